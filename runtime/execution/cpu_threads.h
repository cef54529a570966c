// Threads for the operators' short parallel sections. A decoding step has some two hundred of them,
// of 20 to 200 microseconds: waking sleeping threads and waiting for all of them, as OpenMP does,
// costs about as much. Here a section is a number of chunks that the caller starts at once, helped
// by those threads that happen to be awake or to wake in time; nobody waits for one that did not.

#pragma once

#include <cstdint>

namespace tapeout {

// Calls run(context, chunk) once for every chunk, on the calling thread and up to
// `num_threads - 1` others; returns when all are done, and then throws what the first that threw did.
void run_chunks(int64_t num_chunks, int64_t num_threads, void (*run)(const void*, int64_t),
                const void* context);

template <typename F>
void for_chunks(int64_t num_chunks, int64_t num_threads, const F& body) {
  run_chunks(
      num_chunks, num_threads,
      [](const void* context, int64_t chunk) { (*static_cast<const F*>(context))(chunk); }, &body);
}

}  // namespace tapeout
