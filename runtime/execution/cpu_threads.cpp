// See cpu_threads.h. One section runs at a time; a second caller meanwhile works alone.

#include "cpu_threads.h"

#include <c10/util/Exception.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

namespace tapeout {
namespace {

// How long a helper stays awake for the next section, and the caller for the last chunk. Most
// gaps inside a step are shorter; a sleeping thread takes tens of microseconds to come.
constexpr auto kAwake = std::chrono::microseconds(50);
constexpr int kPausesPerLook = 32;  // between two looks at the clock
constexpr auto kBetweenStarts = std::chrono::seconds(1);  // after a thread that could not start

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Until `ready` holds, or for kAwake. Returns whether it holds.
template <typename F>
bool spin(const F& ready) {
  const auto until = std::chrono::steady_clock::now() + kAwake;
  do {
    for (int i = 0; i < kPausesPerLook; ++i) {
      if (ready()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < until);
  return ready();
}

struct Pool {
  std::mutex mutex;  // held by the caller whose section runs
  // The section's number (upper half) and its chunks not yet taken (lower half), so that a helper
  // that comes late can never take a chunk of another section than the one it read.
  std::atomic<uint64_t> ticket{0};
  std::atomic<uint32_t> section{0};    // what helpers wait for
  std::atomic<uint32_t> unfinished{0};  // chunks
  std::atomic<int64_t> num_helpers{0};  // that may help in this section
  std::atomic<void (*)(const void*, int64_t)> run{nullptr};
  std::atomic<const void*> context{nullptr};
  std::atomic<bool> has_failed{false};  // whether a chunk of the section threw
  std::exception_ptr failure;           // what the first such chunk threw
  int64_t num_started = 0;
  std::chrono::steady_clock::time_point next_start{};
  pid_t process = 0;

  // Takes chunks of the section until none is left. While one is taken its section cannot end,
  // so `run` and `context`, read after, are those of the section.
  void work() {
    uint64_t seen = ticket.load(std::memory_order_acquire);
    const uint64_t number = seen >> 32;
    while (seen >> 32 == number && static_cast<uint32_t>(seen) > 0) {
      if (!ticket.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel)) continue;
      try {
        run.load(std::memory_order_relaxed)(context.load(std::memory_order_relaxed),
                                            static_cast<uint32_t>(seen) - 1);
      } catch (...) {  // out of memory, say: the caller throws it when nobody works any more
        if (!has_failed.exchange(true)) failure = std::current_exception();
      }
      if (unfinished.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished.notify_one();
      seen = ticket.load(std::memory_order_acquire);
    }
  }

  [[noreturn]] void help(int64_t index) {
    for (uint32_t known = 0;;) {
      if (!spin([&] { return section.load(std::memory_order_acquire) != known; }))
        section.wait(known, std::memory_order_acquire);
      known = section.load(std::memory_order_acquire);
      if (index < num_helpers.load(std::memory_order_relaxed)) work();
    }
  }

  // Threads do not survive a fork: a child starts its own. Where the system refuses more (a limit
  // on processes or memory), those that there are do the work, and more are tried for later.
  void start(int64_t count) {
    if (process != getpid()) {
      num_started = 0;
      next_start = {};
    }
    process = getpid();
    if (num_started >= count || std::chrono::steady_clock::now() < next_start) return;
    try {
      for (; num_started < count; ++num_started)
        std::thread(&Pool::help, this, num_started).detach();
    } catch (const std::exception& error) {
      next_start = std::chrono::steady_clock::now() + kBetweenStarts;
      TORCH_WARN_ONCE("the operators run on ", num_started + 1, " threads: another did not start (",
                      error.what(), ")");
    }
  }
};

// Never destroyed: its threads outlive every static object.
Pool& pool() {
  static Pool* const found = new Pool;
  return *found;
}

}  // namespace

void run_chunks(int64_t num_chunks, int64_t num_threads, void (*run)(const void*, int64_t),
                const void* context) {
  Pool& shared = pool();
  const int64_t helpers = std::min(num_threads, num_chunks) - 1;
  std::unique_lock lock(shared.mutex, std::defer_lock);
  if (helpers <= 0 || !lock.try_lock()) {
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) run(context, chunk);
    return;
  }
  shared.start(helpers);
  shared.run.store(run, std::memory_order_relaxed);
  shared.context.store(context, std::memory_order_relaxed);
  shared.num_helpers.store(helpers, std::memory_order_relaxed);
  shared.unfinished.store(static_cast<uint32_t>(num_chunks), std::memory_order_relaxed);
  const uint64_t number = (shared.ticket.load(std::memory_order_relaxed) >> 32) + 1;
  shared.ticket.store(number << 32 | static_cast<uint32_t>(num_chunks), std::memory_order_release);
  shared.section.store(static_cast<uint32_t>(number), std::memory_order_release);
  shared.section.notify_all();
  shared.work();
  const auto is_done = [&] { return shared.unfinished.load(std::memory_order_acquire) == 0; };
  while (!spin(is_done)) {
    const uint32_t left = shared.unfinished.load(std::memory_order_acquire);
    if (left > 0) shared.unfinished.wait(left, std::memory_order_acquire);
  }
  if (shared.has_failed.exchange(false)) std::rethrow_exception(std::exchange(shared.failure, {}));
}

}  // namespace tapeout
