// What the simulated CUDA runtime offers beside CUDA's own functions.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace cuda_on_cpu {

// Device memory has two addresses: the one that CUDA programs see, where host code crashes, and the one at which
// kernels find its bytes, which has the same alignment.
bool is_device_address(const void* address);
void* bytes_of(const void* address);

// What one cudaMalloc gave; empty where it gave nothing, or not on `device`. Where the bytes are.
struct Bounds {
  uintptr_t begin, end;
};
Bounds allocation_at(uintptr_t bytes, int device);

// When work on a stream runs: at once, at some later time, or at each replay of the graph being captured.
enum class When { kNow, kLater, kRecorded };
When when_runs(cudaStream_t stream);

// Puts work on a stream. What it throws fails the synchronisation that follows.
void enqueue(cudaStream_t stream, const std::string& kind, const std::string& name, std::function<void()> work);
// Runs it after what is on the stream, before it returns.
void run_now(
    cudaStream_t stream, const std::string& kind, const std::string& name, const std::function<void()>& work);

// Something that the runtime was asked for.
struct Record {
  std::string kind;  // launch, op, copy, fill, sync, malloc, free, graph, host or context
  std::string name;
  int device;
  uint64_t stream;  // 0: the main one
  uint64_t bytes;   // copied, allocated, or of a kernel's argument
  dim3 grid{0, 0, 0}, block{0, 0, 0};
  uint32_t correlation = 0;
};

// Told of the work on streams: as it is asked for, by the thread that asks, which returns a number for it; and as
// it runs, with the times that `now` gave before and after.
class Observer {
 public:
  virtual uint32_t asked() = 0;
  virtual uint64_t now() = 0;
  virtual void ran(const Record& record, uint64_t begin, uint64_t end) = 0;

 protected:
  ~Observer() = default;
};
void set_observer(Observer* observer);

// Gives a body to the kernels that have `part` in their readable names. Null: they do nothing. They take one
// argument by value, of so many bytes; the body gets a copy of it.
using KernelBody = std::function<void(void* argument, dim3 grid, dim3 block, int device)>;
void register_kernel(const std::string& part, size_t argument_bytes, KernelBody body);

}  // namespace cuda_on_cpu
