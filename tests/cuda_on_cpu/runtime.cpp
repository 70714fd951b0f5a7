// libcudart.so.13 on the CPU: memory, streams, events, graphs, launches, and a log of what was asked for.
// CUDA_ON_CPU_SCHEDULE says when work runs (see Schedule); CUDA_ON_CPU_TRACE=1 prints the log as it grows.
#include "runtime.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <stdexcept>
#include <unordered_map>
#include <utility>
#include <vector>

namespace cuda_on_cpu {
namespace {

constexpr int kDevices = 2;
constexpr size_t kDeviceBytes = size_t{8} << 30;
constexpr size_t kAllBytes = kDeviceBytes * kDevices;
constexpr size_t kPage = size_t{2} << 20;  // of cudaMalloc

using Clock = std::map<const void*, size_t>;  // of a capture: how many tasks of each stream come before

// A place in a stream.
struct Marker {
  CUstream_st* stream;
  bool done = false;
  std::chrono::steady_clock::time_point at;
};

struct Task {
  std::function<void()> run;             // empty where the stream only waits
  std::shared_ptr<Marker> after;         // of another stream
  std::shared_ptr<const Record> record;  // of what the program asked for
};

struct Graph {
  std::vector<Task> tasks;  // in the order of issue, which no stream contradicts
  Clock issued;
  CUstream_st* origin = nullptr;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  unsigned long long id = 0;
  bool broken = false;
};

}  // namespace
}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

// What CUDA only declares.
struct CUstream_st {
  explicit CUstream_st(int device, int priority = 0, bool blocking = false)
      : device(device), priority(priority), blocking(blocking) {}

  const int device;
  const int priority;
  const bool blocking;
  std::deque<Task> tasks;
  bool draining = false;
  bool ahead = false;            // in a seeded schedule: runs what it can
  std::shared_ptr<Graph> graph;  // being captured
  Clock clock;
};
struct CUevent_st {
  std::shared_ptr<Marker> marker;  // null: never recorded
  std::shared_ptr<Graph> graph;    // recorded in a capture
  Clock clock;
  int polls = 0;
};
struct CUgraph_st {
  std::shared_ptr<Graph> graph;
};
struct CUgraphExec_st {
  std::shared_ptr<Graph> graph;
};

namespace cuda_on_cpu {
namespace {

// When work runs that nothing waits for. Late is as late as CUDA allows, so that whoever should have waited for it
// finds that it has not been done. The main stream of a device is the one that torch begins with. Never: kernels
// are not even looked at, ATen's own neither, so that the time of the host alone is left to measure.
struct Schedule {
  enum Kind { kNow, kLate, kSideLate, kMainLate, kSeeded, kNever } kind = kNow;
  unsigned seed = 0;

  static Schedule parse(const std::string& text) {
    const std::map<std::string, Kind> named = {
        {"", kNow},       {"now", kNow}, {"late", kLate}, {"side-late", kSideLate}, {"main-late", kMainLate},
        {"never", kNever}};
    if (const auto found = named.find(text); found != named.end()) {
      return {found->second, 0};
    }
    return {kSeeded, static_cast<unsigned>(std::stoul(text))};
  }
};

struct Kernel {
  std::string name;
  size_t argument_bytes = 0;
  KernelBody body;
};

struct Registered {
  std::string part;
  size_t argument_bytes;
  KernelBody body;
};

const char* environment(const char* name) {
  const char* const text = std::getenv(name);
  return text == nullptr ? "" : text;
}

// Everything there is. Never destroyed: others call in until the process is gone.
struct World {
  std::recursive_mutex mutex;
  Schedule schedule = Schedule::parse(environment("CUDA_ON_CPU_SCHEDULE"));
  std::minstd_rand random{schedule.seed};
  bool trace = *environment("CUDA_ON_CPU_TRACE") != 0;
  uintptr_t base = 0;
  std::map<uintptr_t, size_t> blocks;  // live ones
  std::map<uintptr_t, size_t> pinned;
  CUstream_st* main[kDevices];
  std::vector<CUstream_st*> streams;  // in the order in which they were made
  std::set<Graph*> captures;
  unsigned long long captures_begun = 0;
  std::map<const void*, const char*> names;  // as registered, mangled
  std::unordered_map<const void*, Kernel> kernels;
  std::vector<Registered> registered;
  std::string log;         // a line each: kind, name, device, stream, bytes, grid, block
  std::vector<Task> over;  // let go of without the lock: a tensor may want Python's
  std::string missing;     // what was last asked for and is not there
  std::string failure;     // of work on a stream
  bool has_context[kDevices] = {};
  Observer* observer = nullptr;

  World() {
    // What programs see, and the bytes behind it.
    void* const window =
        mmap(nullptr, 2 * kAllBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (window == MAP_FAILED) {
      std::perror("simulated CUDA: address space");
      std::abort();
    }
    base = reinterpret_cast<uintptr_t>(window);
    mprotect(static_cast<char*>(window) + kAllBytes, kAllBytes, PROT_READ | PROT_WRITE);
    for (int device = 0; device < kDevices; ++device) {
      main[device] = new CUstream_st(device);
      streams.push_back(main[device]);
    }
  }
};

World& world() {
  static World* const all = new World;
  return *all;
}

using Lock = std::lock_guard<std::recursive_mutex>;

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
thread_local struct {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} configuration;

cudaError_t fail(cudaError_t error) {
  last_error = error;
  return error;
}

bool is_main(const CUstream_st* stream) { return stream == world().main[stream->device]; }

// The record of work on a stream is kept with the work where somebody is told of it as it runs.
std::shared_ptr<const Record> note(
    const std::string& kind, const std::string& name, const CUstream_st* stream, uint64_t bytes = 0,
    dim3 grid = {0, 0, 0}, dim3 block = {0, 0, 0}) {
  auto& all = world();
  const auto handle = stream == nullptr || is_main(stream) ? 0 : reinterpret_cast<uintptr_t>(stream);
  const int device = stream == nullptr ? current_device : stream->device;
  const auto text = [](uint64_t number) { return "\t" + std::to_string(number); };
  const std::string line = kind + "\t" + name + text(static_cast<uint64_t>(device)) + text(handle) + text(bytes) +
                           text(grid.x * grid.y * grid.z) + text(block.x * block.y * block.z) + "\n";
  all.log += line;
  if (all.trace) {
    std::fprintf(stderr, "simulated CUDA: %s", line.c_str());
  }
  if (all.observer == nullptr || stream == nullptr) {
    return nullptr;
  }
  return std::make_shared<Record>(Record{kind, name, device, handle, bytes, grid, block, all.observer->asked()});
}

// What CUDA makes a context for: half a GB of the device, and no fork from here on.
void need_context(const char* function) {
  if (!std::exchange(world().has_context[current_device], true)) {
    note("context", function, nullptr);
  }
}

CUstream_st* real(cudaStream_t stream) {
  need_context("work on a stream");
  const bool named = reinterpret_cast<uintptr_t>(stream) > 2;  // 1 and 2: legacy and per thread
  return named ? stream : world().main[current_device];
}

// --- when work runs ---

bool runs_late(const CUstream_st* stream) {
  switch (world().schedule.kind) {
    case Schedule::kNow:
      return false;
    case Schedule::kSideLate:
      return !is_main(stream);
    case Schedule::kMainLate:
      return is_main(stream);
    default:
      return true;
  }
}

void run_observed(const std::function<void()>& run, const std::shared_ptr<const Record>& record) {
  auto* const observer = record == nullptr ? nullptr : world().observer;
  const uint64_t begin = observer == nullptr ? 0 : observer->now();
  run();
  if (observer != nullptr) {
    observer->ran(*record, begin, observer->now());
  }
}

void run_first(CUstream_st* stream) {
  Task task = std::move(stream->tasks.front());
  stream->tasks.pop_front();
  if (!task.run) {
    return;
  }
  try {
    run_observed(task.run, task.record);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "simulated CUDA: work on a stream failed: %s\n", error.what());
    world().failure = error.what();
  }
  world().over.push_back(std::move(task));
}

// Runs a stream's work in order, until `until` is done; what it waits for on other streams first.
void drain(CUstream_st* stream, const Marker* until = nullptr) {
  if (std::exchange(stream->draining, true)) {
    return;
  }
  while (!stream->tasks.empty() && (until == nullptr || !until->done)) {
    if (const auto after = stream->tasks.front().after; after != nullptr && !after->done) {
      drain(after->stream, after.get());
    }
    run_first(stream);
  }
  stream->draining = false;
}

void drain_device(int device) {
  for (auto* stream : world().streams) {
    if (stream->device == device) {
      drain(stream);
    }
  }
}

void drain_all() {
  for (int device = 0; device < kDevices; ++device) {
    drain_device(device);
  }
}

// Of some streams everything that need not wait, of the others nothing; which, changes from time to time.
void run_some() {
  auto& all = world();
  if (all.random() % 32 == 0) {
    for (auto* stream : all.streams) {
      stream->ahead = all.random() % 2 == 0;
    }
  }
  const auto is_ready = [](const CUstream_st* stream) {
    return stream->ahead && !stream->draining && !stream->tasks.empty() &&
           (stream->tasks.front().after == nullptr || stream->tasks.front().after->done);
  };
  for (bool ran = true; ran;) {  // others may have waited for what ran
    ran = false;
    for (auto* stream : all.streams) {
      while (is_ready(stream)) {
        stream->draining = true;
        run_first(stream);
        stream->draining = false;
        ran = true;
      }
    }
  }
}

void put(CUstream_st* stream, Task task) {
  if (stream->graph != nullptr) {
    stream->graph->tasks.push_back(std::move(task));
    stream->clock[stream] = ++stream->graph->issued[stream];
    return;
  }
  stream->tasks.push_back(std::move(task));
  if (!runs_late(stream)) {
    drain(stream);
  } else if (world().schedule.kind == Schedule::kSeeded) {
    run_some();
  }
}

cudaError_t check_failure() {
  if (std::exchange(world().failure, "").empty()) {
    return cudaSuccess;
  }
  return fail(cudaErrorLaunchFailure);
}

cudaError_t check_capturing(CUstream_st* stream) {
  if (stream->graph == nullptr) {
    return cudaSuccess;
  }
  stream->graph->broken = true;
  return fail(cudaErrorStreamCaptureUnsupported);
}

// What must not happen while a graph is captured, on whatever stream.
cudaError_t check_no_capture() {
  if (capture_mode != cudaStreamCaptureModeRelaxed) {
    for (auto* graph : world().captures) {
      if (graph->mode == cudaStreamCaptureModeGlobal) {
        graph->broken = true;
        return fail(cudaErrorStreamCaptureUnsupported);
      }
    }
  }
  return cudaSuccess;
}

cudaError_t synchronize(CUstream_st* stream, const char* function) {
  note("sync", function, stream);
  if (const auto error = check_capturing(stream); error != cudaSuccess) {
    return error;
  }
  if (const auto error = check_no_capture(); error != cudaSuccess) {
    return error;
  }
  drain(stream);
  return check_failure();
}

// --- memory ---

// The entry of a map from begin to size that `place` lies in, or its end.
std::map<uintptr_t, size_t>::iterator entry_at(std::map<uintptr_t, size_t>& entries, uintptr_t place) {
  auto after = entries.upper_bound(place);
  if (after == entries.begin()) {
    return entries.end();
  }
  --after;
  return place < after->first + after->second ? after : entries.end();
}

bool is_pinned(const void* address) {
  auto& pinned = world().pinned;
  return entry_at(pinned, reinterpret_cast<uintptr_t>(address)) != pinned.end();
}

// Whether all bytes of a device address lie in one allocation.
bool is_allocated(const void* address, size_t bytes) {
  auto& blocks = world().blocks;
  const auto place = reinterpret_cast<uintptr_t>(address);
  const auto found = entry_at(blocks, place);
  return bytes == 0 || (found != blocks.end() && place + bytes <= found->first + found->second);
}

int device_of(uintptr_t address) { return static_cast<int>((address - world().base) / kDeviceBytes); }

char side(const void* address) { return is_device_address(address) ? 'D' : is_pinned(address) ? 'P' : 'H'; }

cudaError_t copy(void* to, const void* from, size_t bytes, cudaStream_t on, const char* function) {
  auto* const stream = real(on);
  const auto record = note("copy", std::string(function) + " " + side(from) + "2" + side(to), stream, bytes);
  for (const void* end : {static_cast<const void*>(to), from}) {
    if (is_device_address(end) && !is_allocated(end, bytes)) {
      return fail(cudaErrorInvalidValue);
    }
  }
  void* const target = bytes_of(to);
  char* const source = static_cast<char*>(bytes_of(from));
  if (side(from) == 'H') {  // pageable memory is read before the call returns
    put(stream,
        {[=, kept = std::vector<char>(source, source + bytes)] { std::memcpy(target, kept.data(), kept.size()); },
         nullptr, record});
  } else {
    put(stream, {[=] { std::memmove(target, source, bytes); }, nullptr, record});
  }
  if (side(to) == 'H' && stream->graph == nullptr) {
    drain(stream);  // and written by the time it does
  }
  return cudaSuccess;
}

// --- launches ---

Kernel& kernel_of(const void* function) {
  auto& all = world();
  auto& kernel = all.kernels[function];
  if (kernel.body) {
    return kernel;
  }
  const auto found = all.names.find(function);
  const char* const mangled = found == all.names.end() ? "a function that is no kernel" : found->second;
  int status = 0;
  char* const readable = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  kernel.name = status == 0 ? readable : mangled;
  std::free(readable);
  for (const auto& entry : all.registered) {
    if (kernel.name.find(entry.part) != std::string::npos) {
      kernel.argument_bytes = entry.argument_bytes;
      kernel.body = entry.body ? entry.body : [](void*, dim3, dim3, int) {};
    }
  }
  return kernel;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, cudaStream_t on) {
  auto& all = world();
  if (all.schedule.kind == Schedule::kNever) {
    return cudaSuccess;
  }
  const Lock lock(all.mutex);
  auto* const stream = real(on);
  const auto& kernel = kernel_of(function);
  const size_t threads = size_t{block.x} * block.y * block.z;
  const auto record = note("launch", kernel.name, stream, kernel.argument_bytes, grid, block);
  if (stream->device != current_device) {
    return fail(cudaErrorInvalidResourceHandle);
  }
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535) {
    return fail(cudaErrorInvalidConfiguration);
  }
  if (!kernel.body) {
    all.missing = "operation not supported: simulated CUDA has no body for the kernel " + kernel.name;
    std::fprintf(stderr, "%s\n", all.missing.c_str());
    return fail(cudaErrorNotSupported);
  }
  const char* const given = kernel.argument_bytes == 0 ? nullptr : static_cast<const char*>(arguments[0]);
  put(stream, {[=, body = kernel.body, device = stream->device,
                argument = std::vector<char>(given, given + kernel.argument_bytes)] {
                 auto own = argument;  // a graph is replayed
                 body(own.data(), grid, block, device);
               },
               nullptr, record});
  return runs_late(stream) ? cudaSuccess : check_failure();
}

// Loads libaten_on_cpu.so, which lies beside this library and replaces ATen's CUDA kernels. Called when a program
// first asks for devices: by then torch's own libraries are there.
bool replace_aten() {
  if (world().schedule.kind == Schedule::kNever) {
    return true;
  }
  Dl_info self{};
  dladdr(reinterpret_cast<const void*>(&replace_aten), &self);
  const std::string path = self.dli_fname;
  const std::string library = path.substr(0, path.rfind('/')) + "/libaten_on_cpu.so";
  if (dlopen(library.c_str(), RTLD_NOW) == nullptr) {
    std::fprintf(stderr, "simulated CUDA: %s\n", dlerror());
    std::abort();
  }
  return true;
}

}  // namespace

bool is_device_address(const void* address) {
  return reinterpret_cast<uintptr_t>(address) - world().base < kAllBytes;
}

void* bytes_of(const void* address) {
  const auto place = reinterpret_cast<uintptr_t>(address);
  return reinterpret_cast<void*>(place + (is_device_address(address) ? kAllBytes : 0));
}

Bounds allocation_at(uintptr_t bytes, int device) {
  auto& all = world();
  const Lock lock(all.mutex);
  const auto found = entry_at(all.blocks, bytes - kAllBytes);
  if (found == all.blocks.end() || device_of(found->first) != device) {
    return {0, 0};
  }
  const uintptr_t begin = found->first + kAllBytes;
  return {begin, begin + found->second};
}

When when_runs(cudaStream_t stream) {
  const Lock lock(world().mutex);
  return real(stream)->graph != nullptr ? When::kRecorded : runs_late(real(stream)) ? When::kLater : When::kNow;
}

void enqueue(cudaStream_t stream, const std::string& kind, const std::string& name, std::function<void()> work) {
  std::vector<Task> over;  // goes after the lock
  const Lock lock(world().mutex);
  over.swap(world().over);
  put(real(stream), {std::move(work), nullptr, note(kind, name, real(stream))});
}

void run_now(
    cudaStream_t stream, const std::string& kind, const std::string& name, const std::function<void()>& work) {
  std::shared_ptr<const Record> record;
  {
    const Lock lock(world().mutex);
    record = note(kind, name, real(stream));
    drain(real(stream));
  }
  run_observed(work, record);  // without the lock: it may want Python's
}

void set_observer(Observer* observer) {
  const Lock lock(world().mutex);
  world().observer = observer;
}

void register_kernel(const std::string& part, size_t argument_bytes, KernelBody body) {
  const Lock lock(world().mutex);
  world().registered.push_back({part, argument_bytes, std::move(body)});
}

}  // namespace cuda_on_cpu

extern "C" {

// --- for cuda_on_cpu/__init__.py ---

// The log, and it begins again. Valid until the next call.
const char* cuda_on_cpu_take_log() {
  static std::string taken;
  const Lock lock(world().mutex);
  taken = std::exchange(world().log, "");
  return taken.c_str();
}

// Runs all that is left. Why some of it failed; empty if none did. Valid until the next call.
const char* cuda_on_cpu_finish() {
  static std::string taken;
  std::vector<Task> over;
  const Lock lock(world().mutex);
  drain_all();
  over.swap(world().over);
  taken = std::exchange(world().failure, "");
  return taken.c_str();
}

void cuda_on_cpu_set_schedule(const char* text) {
  const Lock lock(world().mutex);
  drain_all();
  world().schedule = Schedule::parse(text);
  world().random.seed(world().schedule.seed);
}

bool cuda_on_cpu_has_context(int device) { return world().has_context[device]; }

// For the functions that build.py finds to be missing.
int cuda_on_cpu_missing(const char* function) {
  std::fprintf(stderr, "simulated CUDA: there is no %s\n", function);
  return fail(cudaErrorNotSupported);
}

// --- kernels ---

void** __cudaRegisterFatBinary(void*) {
  static void* handle[4];
  return handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(
    void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  const Lock lock(world().mutex);
  world().names.emplace(host, name);
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t stream) {
  return launch(kernel, grid, block, arguments, stream);
}
cudaError_t cudaLaunchKernel(
    const void* function, dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t stream) {
  return launch(function, grid, block, arguments, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  return launch(function, config->gridDim, config->blockDim, arguments, config->stream);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 64;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks, const void*, int threads, size_t, unsigned) {
  *blocks = std::max(1, 640 / threads);  // as many as a kernel of 96 registers has
  return cudaSuccess;
}

// --- devices ---

cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  static const bool replaced = replace_aten();
  *count = replaced ? kDevices : 0;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) {
    return fail(cudaErrorInvalidDevice);
  }
  const Lock lock(world().mutex);
  current_device = device;
  need_context("cudaSetDevice");  // since CUDA 12
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device < 0 || device >= kDevices) {
    return fail(cudaErrorInvalidDevice);
  }
  // Of an H100.
  *properties = {};
  std::strcpy(properties->name, "simulated GPU");
  properties->uuid.bytes[0] = static_cast<char>(device + 1);
  properties->totalGlobalMem = kDeviceBytes;
  properties->sharedMemPerBlock = 49152;
  properties->sharedMemPerBlockOptin = 232448;
  properties->sharedMemPerMultiprocessor = 233472;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->warpSize = 32;
  properties->memPitch = 0x7fffffff;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = 0x7fffffff;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->totalConstMem = 65536;
  properties->major = 9;
  properties->textureAlignment = 512;
  properties->multiProcessorCount = 132;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->maxBlocksPerMultiProcessor = 32;
  properties->l2CacheSize = 50 << 20;
  properties->memoryBusWidth = 5120;
  properties->concurrentKernels = properties->unifiedAddressing = properties->canMapHostMemory = 1;
  properties->streamPrioritiesSupported = properties->asyncEngineCount = 1;
  properties->pciBusID = device + 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp properties;
  if (const auto error = cudaGetDeviceProperties(&properties, device); error != cudaSuccess) {
    return error;
  }
  const std::map<cudaDeviceAttr, int> known = {
      {cudaDevAttrMultiProcessorCount, properties.multiProcessorCount},
      {cudaDevAttrComputeCapabilityMajor, properties.major},
      {cudaDevAttrComputeCapabilityMinor, properties.minor},
      {cudaDevAttrMaxThreadsPerBlock, properties.maxThreadsPerBlock},
      {cudaDevAttrMaxThreadsPerMultiProcessor, properties.maxThreadsPerMultiProcessor},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, static_cast<int>(properties.sharedMemPerBlockOptin)},
      {cudaDevAttrWarpSize, properties.warpSize}};
  const auto found = known.find(attribute);
  *value = found == known.end() ? 0 : found->second;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device) {
  std::snprintf(id, static_cast<size_t>(length), "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  const Lock lock(world().mutex);
  need_context("cudaDeviceGetStreamPriorityRange");
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  const Lock lock(world().mutex);
  need_context("cudaDeviceSynchronize");
  note("sync", "cudaDeviceSynchronize", nullptr);
  if (const auto error = check_no_capture(); error != cudaSuccess) {
    return error;
  }
  drain_device(current_device);
  return check_failure();
}
cudaError_t cudaGetDriverEntryPointByVersion(
    const char*, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result) {
  // Whatever it is, it says CUDA_ERROR_NOT_SUPPORTED.
  *function = reinterpret_cast<void*>(+[]() -> int { return 801; });
  if (result != nullptr) {
    *result = cudaDriverEntryPointSuccess;
  }
  return cudaSuccess;
}
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

// --- errors ---

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorName(cudaError_t error) { return error == cudaSuccess ? "cudaSuccess" : "cudaError"; }
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorNotReady:
      return "device not ready";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureUnjoined:
      return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureIsolation:
      return "dependency created on uncaptured work in another stream";
    case cudaErrorNotSupported:
      return world().missing.empty() ? "operation not supported" : world().missing.c_str();
    default:
      return "an error of the simulated runtime";
  }
}

// --- memory ---

cudaError_t cudaMalloc(void** address, size_t bytes) {
  auto& all = world();
  const Lock lock(all.mutex);
  need_context("cudaMalloc");
  note("malloc", "cudaMalloc", nullptr, bytes);
  if (const auto error = check_no_capture(); error != cudaSuccess) {
    return error;
  }
  const auto rounded = [](uintptr_t place) { return (place + kPage - 1) / kPage * kPage; };
  const size_t wanted = rounded(std::max<size_t>(bytes, 1));
  const uintptr_t begin = all.base + static_cast<size_t>(current_device) * kDeviceBytes;
  uintptr_t place = begin + kPage;  // the first page is never given out, so that no address is the window's
  for (auto block = all.blocks.lower_bound(begin); block != all.blocks.end() && block->first < place + wanted;
       ++block) {
    place = std::max(place, rounded(block->first + block->second));
  }
  if (place + wanted > begin + kDeviceBytes) {
    return fail(cudaErrorMemoryAllocation);
  }
  all.blocks[place] = bytes;
  *address = reinterpret_cast<void*>(place);
  return cudaSuccess;
}
cudaError_t cudaFree(void* address) {
  auto& all = world();
  const Lock lock(all.mutex);
  if (address == nullptr) {
    return cudaSuccess;
  }
  note("free", "cudaFree", nullptr);
  if (const auto error = check_no_capture(); error != cudaSuccess) {
    return error;
  }
  const auto found = all.blocks.find(reinterpret_cast<uintptr_t>(address));
  if (found == all.blocks.end()) {
    return fail(cudaErrorInvalidValue);
  }
  drain_all();
  madvise(bytes_of(address), (found->second + 4095) / 4096 * 4096, MADV_DONTNEED);
  all.blocks.erase(found);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const Lock lock(world().mutex);
  *total = *free = kDeviceBytes;
  for (const auto& [place, bytes] : world().blocks) {
    *free -= device_of(place) == current_device ? bytes : 0;
  }
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void* address, size_t bytes, unsigned) {
  const Lock lock(world().mutex);
  world().pinned[reinterpret_cast<uintptr_t>(address)] = bytes;
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* address) {
  const Lock lock(world().mutex);
  world().pinned.erase(reinterpret_cast<uintptr_t>(address));
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned flags) {
  const Lock lock(world().mutex);
  note("malloc", "cudaHostAlloc", nullptr, bytes);
  if (const auto error = check_no_capture(); error != cudaSuccess) {
    return error;
  }
  *address = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  return cudaHostRegister(*address, bytes, flags);
}
cudaError_t cudaFreeHost(void* address) {
  cudaHostUnregister(address);
  std::free(address);
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  const Lock lock(world().mutex);
  *attributes = {};
  attributes->type = cudaMemoryTypeUnregistered;
  attributes->device = cudaInvalidDeviceId;
  if (is_device_address(address)) {
    attributes->type = cudaMemoryTypeDevice;
    attributes->device = device_of(reinterpret_cast<uintptr_t>(address));
  } else if (is_pinned(address)) {
    attributes->type = cudaMemoryTypeHost;
    attributes->device = current_device;
  }
  if (attributes->type != cudaMemoryTypeUnregistered) {
    attributes->devicePointer = const_cast<void*>(address);
  }
  if (attributes->type != cudaMemoryTypeDevice) {
    attributes->hostPointer = const_cast<void*>(address);
  }
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  const Lock lock(world().mutex);
  return copy(to, from, bytes, stream, "cudaMemcpyAsync");
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  const Lock lock(world().mutex);
  return copy(to, from, bytes, stream, "cudaMemcpyPeerAsync");
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  const Lock lock(world().mutex);
  if (const auto error = check_no_capture(); error != cudaSuccess) {
    return error;
  }
  if (const auto error = copy(to, from, bytes, nullptr, "cudaMemcpy"); error != cudaSuccess) {
    return error;
  }
  return synchronize(real(nullptr), "cudaMemcpy");
}
cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t stream) {
  const Lock lock(world().mutex);
  const auto record = note("fill", "cudaMemsetAsync", real(stream), bytes);
  if (!is_allocated(address, bytes)) {
    return fail(cudaErrorInvalidValue);
  }
  put(real(stream), {[=, target = bytes_of(address)] { std::memset(target, value, bytes); }, nullptr, record});
  return cudaSuccess;
}

// --- streams and events ---

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  const Lock lock(world().mutex);
  *stream = new CUstream_st(current_device, priority, (flags & cudaStreamNonBlocking) == 0);
  world().streams.push_back(*stream);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const Lock lock(world().mutex);
  drain(stream);
  auto& all = world().streams;
  all.erase(std::remove(all.begin(), all.end(), stream), all.end());  // events may still name it: never freed
  return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  const Lock lock(world().mutex);
  *priority = real(stream)->priority;
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t on) {
  const Lock lock(world().mutex);
  auto* const stream = real(on);
  if (const auto error = check_capturing(stream); error != cudaSuccess) {
    return error;
  }
  return stream->tasks.empty() ? cudaSuccess : fail(cudaErrorNotReady);
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const Lock lock(world().mutex);
  return synchronize(real(stream), "cudaStreamSynchronize");
}
cudaError_t cudaStreamWaitEvent(cudaStream_t on, cudaEvent_t event, unsigned) {
  const Lock lock(world().mutex);
  auto* const stream = real(on);
  if (event->graph != nullptr && !event->graph->broken) {
    if (stream->graph == nullptr) {
      stream->graph = event->graph;  // forked off into the capture
      stream->clock.clear();
    } else if (stream->graph != event->graph) {
      return fail(cudaErrorStreamCaptureIsolation);
    }
    for (const auto& [other, count] : event->clock) {
      stream->clock[other] = std::max(stream->clock[other], count);
    }
    stream->graph->issued.try_emplace(stream, 0);
  } else if (event->marker != nullptr) {
    if (stream->graph != nullptr) {
      stream->graph->broken = true;
      return fail(cudaErrorStreamCaptureIsolation);
    }
    if (!event->marker->done) {
      put(stream, {nullptr, event->marker, nullptr});
    }
  }
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = new CUevent_st{}, cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t on) {
  const Lock lock(world().mutex);
  auto* const stream = real(on);
  event->graph = stream->graph;
  event->clock = stream->clock;
  event->polls = 0;
  event->marker = nullptr;
  if (stream->graph == nullptr) {
    event->marker = std::make_shared<Marker>(Marker{stream, false, {}});
    put(stream, {[marker = event->marker] {
                   marker->done = true;
                   marker->at = std::chrono::steady_clock::now();
                 },
                 nullptr, nullptr});
  }
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  const Lock lock(world().mutex);
  if (event->graph != nullptr && world().captures.count(event->graph.get()) != 0) {
    event->graph->broken = true;
    return fail(cudaErrorCapturedEvent);
  }
  if (const auto error = check_no_capture(); error != cudaSuccess) {
    return error;
  }
  if (event->marker == nullptr || event->marker->done) {
    return cudaSuccess;
  }
  if (++event->polls > 1000) {  // somebody waits by asking
    drain(event->marker->stream, event->marker.get());
  }
  return event->marker->done ? cudaSuccess : fail(cudaErrorNotReady);
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const Lock lock(world().mutex);
  note("sync", "cudaEventSynchronize", event->marker == nullptr ? nullptr : event->marker->stream);
  if (event->marker != nullptr && !event->marker->done) {
    drain(event->marker->stream, event->marker.get());
  }
  return check_failure();
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  const Lock lock(world().mutex);
  if (start->marker == nullptr || end->marker == nullptr) {
    return fail(cudaErrorInvalidResourceHandle);
  }
  if (!start->marker->done || !end->marker->done) {
    return fail(cudaErrorNotReady);
  }
  *milliseconds = std::chrono::duration<float, std::milli>(end->marker->at - start->marker->at).count();
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t on, cudaHostFn_t function, void* data) {
  const Lock lock(world().mutex);
  note("host", "cudaLaunchHostFunc", real(on));
  put(real(on), {[=] { function(data); }, nullptr, nullptr});
  return cudaSuccess;
}

// --- graphs ---

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, capture_mode);
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t on, cudaStreamCaptureMode mode) {
  const Lock lock(world().mutex);
  auto* const stream = real(on);
  if (is_main(stream) || stream->graph != nullptr) {
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  auto graph = std::make_shared<Graph>();
  graph->origin = stream;
  graph->mode = mode;
  graph->id = ++world().captures_begun;
  stream->graph = graph;
  stream->clock.clear();
  world().captures.insert(graph.get());
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t on, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph_out,
    const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges, size_t* count) {
  const Lock lock(world().mutex);
  const auto& graph = real(on)->graph;
  *status = graph == nullptr ? cudaStreamCaptureStatusNone
            : graph->broken  ? cudaStreamCaptureStatusInvalidated
                             : cudaStreamCaptureStatusActive;
  const auto set = [](auto* target, auto value) {
    if (target != nullptr) {
      *target = value;
    }
  };
  set(id, graph == nullptr ? 0ull : graph->id);
  set(graph_out, static_cast<cudaGraph_t>(nullptr));
  set(dependencies, static_cast<const cudaGraphNode_t*>(nullptr));
  set(edges, static_cast<const cudaGraphEdgeData*>(nullptr));
  set(count, size_t{0});
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t on, cudaStreamCaptureStatus* status) {
  const Lock lock(world().mutex);
  for (auto* other : world().streams) {
    if (on == nullptr && other->blocking && other->graph != nullptr) {
      return fail(cudaErrorStreamCaptureImplicit);
    }
  }
  return cudaStreamGetCaptureInfo(on, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}
cudaError_t cudaStreamEndCapture(cudaStream_t on, cudaGraph_t* graph_out) {
  const Lock lock(world().mutex);
  auto* const stream = real(on);
  const auto graph = stream->graph;
  *graph_out = nullptr;
  if (graph == nullptr || graph->origin != stream) {
    return fail(cudaErrorIllegalState);
  }
  bool joined = true;
  for (const auto& [other, count] : graph->issued) {
    joined &= other == stream || stream->clock[other] == count;
  }
  for (auto* other : world().streams) {
    if (other->graph == graph) {
      other->graph = nullptr;
      other->clock.clear();
    }
  }
  world().captures.erase(graph.get());
  if (graph->broken) {
    return fail(cudaErrorStreamCaptureInvalidated);
  }
  if (!joined) {
    return fail(cudaErrorStreamCaptureUnjoined);
  }
  *graph_out = new CUgraph_st{graph};
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = graph->graph->tasks.size();
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  *exec = new CUgraphExec_st{graph->graph};
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t on) {
  const Lock lock(world().mutex);
  note("graph", "cudaGraphLaunch", real(on));
  for (const auto& task : exec->graph->tasks) {
    if (task.run) {
      put(real(on), {task.run, nullptr, task.record});
    }
  }
  return runs_late(real(on)) ? cudaSuccess : check_failure();
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return delete exec, cudaSuccess; }
cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void*, cudaHostFn_t, unsigned, unsigned) {
  return *object = nullptr, cudaSuccess;
}
cudaError_t cudaUserObjectRelease(cudaUserObject_t, unsigned) { return cudaSuccess; }
cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned, unsigned) { return cudaSuccess; }

}  // extern "C"
