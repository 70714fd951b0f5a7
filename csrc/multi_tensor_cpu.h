// The elements of many tensors, shared between threads. Knows no optimizer.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "helper_threads.h"
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

// The elements of all tensors, in their order, cut into numbered chunks. `threads` share them.
class ChunkSchedule {
 public:
  ChunkSchedule(int64_t numel, int64_t threads) : numel_(numel), threads_(threads) {}

  int64_t count() const {
    int64_t count = 0;
    for (int64_t begin = 0; begin < numel_; begin = end_from(begin)) {
      ++count;
    }
    return count;
  }
  int64_t end_from(int64_t begin) const {
    const int64_t chunk = std::clamp((numel_ - begin) / (2 * threads_), kMinChunkNumel, kMaxChunkNumel);
    return std::min(begin + chunk, numel_);
  }

 private:
  int64_t numel_;
  int64_t threads_;
};

// Calls `apply(update, begin, end)` so that every element of every update is in exactly one call, from several
// threads at once where there is enough to do. Each thread gets an `apply` of its own from `make_apply()`, which
// does not throw.
template <class MakeApply>
void for_each_span(const TensorUpdate* updates, int64_t count, int64_t numel, const MakeApply& make_apply) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), numel / kMinChunkNumel);
  if (numel >= kParallelNumel && threads > 1 && !at::in_parallel_region()) {
    const ChunkSchedule schedule(numel, threads);
    const auto loop = [&](Chunks& chunks) {
      auto apply = make_apply();
      // A thread's chunks only ever move forward, so it finds them and their tensors by walking on from the last.
      int64_t number = 0;
      int64_t begin = 0;
      int64_t end = schedule.end_from(0);
      int64_t tensor = 0;
      int64_t tensor_start = 0;  // in the flat space of all elements
      for (int64_t chunk = chunks.next(); chunk >= 0; chunk = chunks.next()) {
        for (; number < chunk; ++number) {
          begin = end;
          end = schedule.end_from(begin);
        }
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
    };
    using Loop = decltype(loop);
    const auto call = [](const void* context, Chunks& chunks) { (*static_cast<const Loop*>(context))(chunks); };
    if (share_chunks(schedule.count(), threads - 1, call, &loop)) {
      return;
    }
  }
  auto apply = make_apply();
  for (int64_t i = 0; i < count; ++i) {
    apply(updates[i], int64_t{0}, updates[i].numel);
  }
}

}  // namespace torch_freeze
