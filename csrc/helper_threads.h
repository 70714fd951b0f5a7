// Threads that help a caller with work it could do alone. Knows no tensors.
//
// The caller never waits for a thread that has not begun: it takes chunks like its helpers, and at the end waits
// only for those chunks that a helper has taken and not finished. A helper that the system runs late, or never,
// costs its help and nothing else; one that comes after the end finds no work and touches none of it.
#pragma once

#include <atomic>
#include <cstdint>

namespace torch_freeze {

struct SharedWork;

// The chunks of one piece of work, as one of its threads takes them.
class Chunks {
 public:
  Chunks(SharedWork& work, int64_t taken);
  Chunks(const Chunks&) = delete;
  Chunks& operator=(const Chunks&) = delete;

  // The number of the next chunk, each time a larger one, or -1 after the last. The one before is finished then.
  int64_t next();

 private:
  SharedWork& work_;
  int64_t count_;
  int64_t taken_;  // and not given to the caller of next() yet, or -1
  bool busy_;      // with a chunk
};

using ChunkLoop = void (*)(const void* context, Chunks& chunks);

// Has `loop` called here and by up to `helpers` other threads at once; returns false, having done nothing, where
// no thread is to be had. `loop` takes all the chunks it can get and does not throw. Helpers have the caller's
// rounding mode and treatment of denormal numbers.
bool share_chunks(int64_t count, int64_t helpers, ChunkLoop loop, const void* context);

}  // namespace torch_freeze
