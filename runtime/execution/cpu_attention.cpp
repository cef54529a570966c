// Paged attention for CPUs as torch operators: cuts a call into items and runs them. Compiled once
// per instruction set (see native.py).
//
// Items are cut by fixed sizes, never by what else is in the batch, so that a sequence's result
// does not depend on its neighbours or on the number of threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu_kernels.h"
#include "cpu_threads.h"
#include "cpu_tiles.h"

namespace {

constexpr int kTileRows = 128;            // rows of a wide item
constexpr int kSplitKeys = 512;           // keys of a narrow item; longer contexts are split
constexpr int kTakenItems = 4;            // items that a thread takes at a time, if there are many
constexpr int64_t kSerialWork = 1 << 16;  // multiplications below which threads cost more

// The items of a call. Split items of one (sequence, kv head) are consecutive.
template <typename T>
std::vector<Item> plan(const Call<T>& call, const int32_t* query_start, const int32_t* context_lens,
                       int64_t num_sequences) {
  std::vector<Item> items;
  int64_t num_partials = 0;
  for (int64_t i = 0; i < num_sequences; ++i) {
    const int64_t token = query_start[i], n = query_start[i + 1] - token, context = context_lens[i];
    const bool is_narrow = n * call.group <= kNarrowRows && call.head_dim % kLanes == 0;
    const int64_t tile = is_narrow ? n : std::max<int64_t>(1, kTileRows / call.group);
    for (int64_t head = 0; head < call.num_kv_heads; ++head) {
      for (int64_t t = 0; t < n; t += tile) {
        const int64_t num_tokens = std::min(tile, n - t), position = context - n + t;
        const int64_t first = std::max<int64_t>(0, position - call.window + 1);
        const int64_t end = position + num_tokens;
        Item item{i, head, token + t, num_tokens, position, first, end, -1, is_narrow};
        if (!is_narrow || first / kSplitKeys == (end - 1) / kSplitKeys) {
          items.push_back(item);
          continue;
        }
        for (int64_t key = first; key < end; key = item.end_key) {
          item.first_key = key;
          item.end_key = std::min(end, (key / kSplitKeys + 1) * kSplitKeys);
          item.partial = num_partials++;
          items.push_back(item);
        }
      }
    }
  }
  return items;
}

// Adds up the parts of one split (sequence, kv head): items [first, last).
template <typename T>
void merge(const Call<T>& call, const Item* first, const Item* last, Partials& partials) {
  const int64_t dim = call.head_dim;
  for (int64_t row = 0; row < first->num_tokens * call.group; ++row) {
    float top = call.sinks ? call.sinks[head_of(call, *first, row)] : -kInfinity;
    const float sink = top;
    for (const Item* item = first; item < last; ++item)
      top = std::max(top, partials.row(item->partial, row)[0]);
    float sum = sink == -kInfinity ? 0.0f : std::exp(sink - top);
    std::vector<float> out(dim, 0.0f);
    for (const Item* item = first; item < last; ++item) {
      const float* part = partials.row(item->partial, row);
      const float weight = part[0] == -kInfinity ? 0.0f : std::exp(part[0] - top);
      sum += weight * part[1];
      for (int64_t d = 0; d < dim; ++d) out[d] += weight * part[2 + d];
    }
    T* target = call.output + row_offset(call, *first, row);
    for (int64_t d = 0; d < dim; ++d) target[d] = static_cast<T>(out[d] / sum);
  }
}

template <typename T>
void run_item(const Call<T>& call, const Item& item, const Item* next, Partials& partials) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, c10::BFloat16>)
    if (fits_tiles(call.head_dim)) return run_tiles(call, item, next, partials);
#endif
  static_cast<void>(next);
  if (item.is_narrow)
    run_few(call, item, partials);
  else
    run_wide(call, item);
}

template <typename T>
void run(const Call<T>& call, const std::vector<Item>& items) {
  int64_t num_partials = 0, work = 0;
  for (const Item& item : items) {
    num_partials = std::max(num_partials, item.partial + 1);
    work += item.num_tokens * call.group * (item.end_key - item.first_key) * call.head_dim;
  }
  const int64_t row_size = call.head_dim + 2;
  Partials partials{std::vector<float>(num_partials * kNarrowRows * row_size), row_size};
  const int64_t num_items = static_cast<int64_t>(items.size());
  const int64_t num_threads = at::get_num_threads();
  const int64_t taken = num_items >= 8 * num_threads * kTakenItems ? kTakenItems : 1;
  // Threads take items as they become free: cores here are shared, and items differ in size.
  tapeout::for_chunks(
      (num_items + taken - 1) / taken, work < kSerialWork ? 1 : num_threads, [&](int64_t chunk) {
        const int64_t last = std::min(num_items, (chunk + 1) * taken);
        for (int64_t i = chunk * taken; i < last; ++i)
          run_item(call, items[i], i + 1 < last ? &items[i + 1] : nullptr, partials);
      });
  for (int64_t i = 0, end; i < num_items; i = end) {
    end = i + 1;
    if (items[i].partial < 0) continue;
    while (end < num_items && items[end].partial >= 0 && items[end].sequence == items[i].sequence &&
           items[end].kv_head == items[i].kv_head)
      ++end;
    merge(call, &items[i], &items[i] + (end - i), partials);
  }
}

void check_caches(const at::Tensor& rows, const at::Tensor& keys, const at::Tensor& values) {
  TORCH_CHECK(keys.dim() == 4 && keys.sizes() == values.sizes() &&
                  keys.strides() == values.strides() && keys.stride(3) == 1 &&
                  keys.stride(2) == keys.size(3) && keys.scalar_type() == values.scalar_type(),
              "caches must be alike, [blocks, kv_heads, block_size, head_dim], dense in the end");
  TORCH_CHECK(rows.dim() == 3 && rows.size(2) == keys.size(3) && rows.stride(2) == 1 &&
                  rows.scalar_type() == keys.scalar_type(),
              "rows must be [tokens, heads, head_dim] in the caches' dtype");
}

const int32_t* integers(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.is_contiguous(), "metadata must be contiguous");
  return tensor.const_data_ptr<int32_t>();
}

// Of an optional argument with one number per query head.
const float* per_head(const std::optional<at::Tensor>& numbers, int64_t num_heads) {
  if (!numbers) return nullptr;
  TORCH_CHECK(numbers->numel() == num_heads && numbers->is_contiguous(),
              "slopes and sinks must hold one float per query head");
  return numbers->const_data_ptr<float>();
}

template <typename T>
void attend_as(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
               const at::Tensor& query_start, const at::Tensor& context_lens,
               const at::Tensor& block_tables, double scale, int64_t window, double soft_cap,
               const std::optional<at::Tensor>& slopes, const std::optional<at::Tensor>& sinks,
               at::Tensor& output) {
  const int64_t heads = query.size(1), kv_heads = keys.size(1), bs = keys.size(2);
  TORCH_CHECK(context_lens.dim() == 1 && block_tables.dim() == 2 && query_start.dim() == 1 &&
                  query_start.numel() == context_lens.size(0) + 1 &&
                  block_tables.size(0) >= context_lens.size(0),
              "query_start must be one longer than context_lens, and a block table be there for "
              "each sequence");
  const int64_t num_sequences = context_lens.size(0), max_blocks = block_tables.size(1);
  const int32_t *tables = integers(block_tables), *contexts = integers(context_lens);
  const int32_t* starts = integers(query_start);
  TORCH_CHECK(starts[0] >= 0, "query_start must not be negative");
  for (int64_t i = 0; i < num_sequences; ++i) {
    TORCH_CHECK(starts[i] < starts[i + 1] && starts[i + 1] <= query.size(0) &&
                    contexts[i] >= starts[i + 1] - starts[i] && contexts[i] <= max_blocks * bs,
                "sequence ", i, " has no tokens, or more than its blocks hold");
    for (int64_t b = 0; b < (contexts[i] + bs - 1) / bs; ++b)
      TORCH_CHECK(tables[i * max_blocks + b] >= 0 && tables[i * max_blocks + b] < keys.size(0),
                  "sequence ", i, " has a block outside the pool");
  }
  const Call<T> call{query.const_data_ptr<T>(), query.stride(0), query.stride(1),
                     keys.const_data_ptr<T>(), values.const_data_ptr<T>(), keys.stride(0),
                     keys.stride(1), tables, max_blocks, bs, keys.size(3), heads, kv_heads,
                     heads / kv_heads, static_cast<float>(scale), static_cast<float>(soft_cap),
                     window > 0 ? window : std::numeric_limits<int32_t>::max(),
                     per_head(slopes, heads), per_head(sinks, heads), output.mutable_data_ptr<T>()};
  run(call, plan(call, starts, contexts, num_sequences));
}

// `window` and `soft_cap` of 0 mean none.
at::Tensor attend_rows(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
                  const at::Tensor& query_start, const at::Tensor& context_lens,
                  const at::Tensor& block_tables, double scale, int64_t window, double soft_cap,
                  const std::optional<at::Tensor>& slopes,
                  const std::optional<at::Tensor>& sinks) {
  check_caches(query, keys, values);
  TORCH_CHECK(query.size(1) % keys.size(1) == 0, "heads must be a multiple of kv heads");
  at::Tensor output = at::empty(query.sizes(), query.options());
  const auto as = [&](auto zero) {
    attend_as<decltype(zero)>(query, keys, values, query_start, context_lens, block_tables, scale,
                              window, soft_cap, slopes, sinks, output);
  };
  switch (query.scalar_type()) {
    case at::kFloat: as(float{}); break;
    case at::kBFloat16: as(c10::BFloat16{}); break;
    case at::kHalf: as(c10::Half{}); break;
    default: TORCH_CHECK(false, "attention in ", query.scalar_type(), " is not supported");
  }
  return output;
}

void write_rows(const at::Tensor& keys, const at::Tensor& values, const at::Tensor& key_cache,
           const at::Tensor& value_cache, const at::Tensor& slots) {
  check_caches(keys, key_cache, value_cache);
  check_caches(values, key_cache, value_cache);
  TORCH_CHECK(keys.sizes() == values.sizes() && keys.size(1) == key_cache.size(1) &&
                  slots.dim() == 1 && slots.size(0) == keys.size(0) && slots.is_contiguous(),
              "one key, one value and one slot per token");
  const int64_t bs = key_cache.size(2), num_slots = key_cache.size(0) * bs;
  const int64_t size = keys.element_size(), row_bytes = keys.size(2) * size;
  const int64_t* slot_of = slots.const_data_ptr<int64_t>();
  const auto copy = [&](const at::Tensor& rows, const at::Tensor& cache, int64_t t, int64_t head) {
    const int64_t block = slot_of[t] / bs, offset = slot_of[t] % bs;
    const char* source = static_cast<const char*>(rows.const_data_ptr()) +
                         (t * rows.stride(0) + head * rows.stride(1)) * size;
    char* target = static_cast<char*>(cache.mutable_data_ptr()) +
                   (block * cache.stride(0) + head * cache.stride(1)) * size + offset * row_bytes;
    std::memcpy(target, source, row_bytes);
  };
  for (int64_t t = 0; t < keys.size(0); ++t) {
    TORCH_CHECK(slot_of[t] >= 0 && slot_of[t] < num_slots, "slot outside the pool");
    for (int64_t head = 0; head < keys.size(1); ++head) {
      copy(keys, key_cache, t, head);
      copy(values, value_cache, t, head);
    }
  }
}

}  // namespace

#define TAPEOUT_DEFINE(name)                                                                      \
  TORCH_LIBRARY(name, library) {                                                                  \
    library.def(                                                                                  \
        "write(Tensor keys, Tensor values, Tensor(a!) key_cache, Tensor(b!) value_cache, "        \
        "Tensor slots) -> ()");                                                                   \
    library.def(                                                                                  \
        "attend(Tensor query, Tensor key_cache, Tensor value_cache, Tensor query_start, "         \
        "Tensor context_lens, Tensor block_tables, float scale, int window, float soft_cap, "     \
        "Tensor? slopes, Tensor? sinks) -> Tensor");                                              \
  }                                                                                               \
  TORCH_LIBRARY_IMPL(name, CPU, library) {                                                        \
    library.impl("write", write_rows);                                                                 \
    library.impl("attend", attend_rows);                                                               \
  }

TAPEOUT_DEFINE(TAPEOUT_LIBRARY)
