// One parallel region over the elements of many tensors. Knows no optimizer.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "tensor_update.h"

namespace torch_freeze {

// Below this many elements in all, waking other threads costs more than it saves.
constexpr int64_t kParallelNumel = 32768;
// What a thread takes at a time shrinks with what is left, so that a thread the system delays does not hold up the
// others at the end; but it is long enough for the memory system to stream: in DRAM 8192 elements cost a quarter
// of the bandwidth, 32768 a tenth, 262144 nothing.
constexpr int64_t kMinChunkNumel = 16384;
constexpr int64_t kMaxChunkNumel = 262144;
// Tensors are split between threads at multiples of this, so that no two threads share a cache line and
// aligned tensors stay aligned.
constexpr int64_t kSplitNumel = 64;

// Calls `apply(update, begin, end)` so that every element of every update is in exactly one call, from several
// threads at once where there is enough to do. Each thread gets an `apply` of its own from `make_apply()`.
template <class MakeApply>
void for_each_span(const TensorUpdate* updates, int64_t count, int64_t numel, const MakeApply& make_apply) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), numel / kMinChunkNumel);
  if (numel < kParallelNumel || threads <= 1 || at::in_parallel_region()) {
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
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto apply = make_apply();
    // A thread's chunks only ever move forward, so it finds its tensors by walking on from the last one.
    int64_t tensor = 0;
    int64_t tensor_start = 0;  // in the flat space of all elements
    int64_t begin = 0;
    int64_t end = 0;
    while (take(begin, end)) {
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
  });
}

}  // namespace torch_freeze
