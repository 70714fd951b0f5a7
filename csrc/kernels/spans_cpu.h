// One parallel region over the elements of many tensors. Knows no optimizer.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <ctime>

namespace torch_freeze {

// Below this many elements, waking other threads costs more than it saves.
constexpr int64_t kParallelNumel = 32768;
// A thread takes a chunk at a time. Chunks shrink with what is left, so that a delayed thread does not hold up the
// others at the end, but they stay long enough for the memory system to stream: in DRAM, chunks of 8192 elements
// cost a quarter of the bandwidth, 32768 a tenth, 262144 nothing.
constexpr int64_t kMinChunkNumel = 16384;
constexpr int64_t kMaxChunkNumel = 262144;
// Tensors are split between threads at multiples of this, so that no two threads share a cache line and
// aligned tensors stay aligned.
constexpr int64_t kSplitNumel = 64;

// How many of the next steps of about this many elements are done by one thread.
//
// A parallel region ends when its last thread does, and on a busy machine the system may not have run that thread
// yet. After a region that took more than twice as long as its caller would have taken alone, the next kAlone
// steps use one thread; then the others get another chance. A delay that is long for a small step is short for a
// large one, so there is a count for each power of two.
//
// Steps in several Python threads may use one count without synchronization; that costs at most a few slower
// steps.
constexpr uint32_t kAlone = 32;

inline std::atomic<uint32_t>& steps_alone(int64_t numel) {
  static std::array<std::atomic<uint32_t>, 64> counts{};
  return counts[static_cast<size_t>(std::ilogb(static_cast<double>(numel)))];
}

inline bool is_alone(std::atomic<uint32_t>& steps) {
  const uint32_t left = steps.load(std::memory_order_relaxed);
  if (left != 0) {
    steps.store(left - 1, std::memory_order_relaxed);
  }
  return left != 0;
}

// The processor time of the calling thread.
inline double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Calls `apply(update, begin, end)` so that every element of every update is in exactly one call, from several
// threads at once where there is enough to do. Each thread gets an `apply` of its own from `make_apply()`.
template <class Update, class MakeApply>
void for_each_span(const Update* updates, int64_t count, int64_t numel, const MakeApply& make_apply) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), numel / kMinChunkNumel);
  if (numel < kParallelNumel || threads <= 1 || at::in_parallel_region() || is_alone(steps_alone(numel))) {
    auto apply = make_apply();
    for (int64_t i = 0; i < count; ++i) {
      apply(updates[i], int64_t{0}, updates[i].numel);
    }
    return;
  }
  std::atomic<int64_t> taken{0};
  const auto take = [&](int64_t& begin, int64_t& end) {
    begin = taken.load();
    do {
      const int64_t chunk = std::clamp((numel - begin) / (2 * threads), kMinChunkNumel, kMaxChunkNumel);
      end = std::min(begin + chunk, numel);
    } while (begin < numel && !taken.compare_exchange_weak(begin, end));
    return begin < numel;
  };
  double busy = 0;    // seconds that the calling thread has run
  int64_t share = 0;  // elements that it has had
  const auto begin_step = std::chrono::steady_clock::now();
  at::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    const double begin_work = thread == 0 ? thread_seconds() : 0;
    int64_t done = 0;
    auto apply = make_apply();
    // A thread's chunks only ever move forward, so it finds its tensors by walking on from the last one.
    int64_t tensor = 0;
    int64_t tensor_start = 0;  // in the flat space of all elements
    int64_t begin = 0;
    int64_t end = 0;
    while (take(begin, end)) {
      done += end - begin;
      while (tensor < count && tensor_start + updates[tensor].numel <= begin) {
        tensor_start += updates[tensor++].numel;
      }
      int64_t start = tensor_start;
      for (int64_t i = tensor; i < count && start < end; start += updates[i++].numel) {
        const auto split = [&](int64_t flat) {
          const int64_t local = std::max<int64_t>(flat - start, 0);
          return std::min((local + kSplitNumel - 1) / kSplitNumel * kSplitNumel, updates[i].numel);
        };
        const int64_t first = split(begin);
        const int64_t last = split(end);
        if (first < last) {
          apply(updates[i], first, last);
        }
      }
    }
    if (thread == 0) {
      busy = thread_seconds() - begin_work;
      share = done;
    }
  });
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin_step;
  // The caller may have done nothing, if it did not get a processor.
  if (share == 0 || took.count() > 2 * busy * static_cast<double>(numel) / static_cast<double>(share)) {
    steps_alone(numel).store(kAlone, std::memory_order_relaxed);
  }
}

}  // namespace torch_freeze
