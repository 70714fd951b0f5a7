// libcupti.so.13: what torch's profiler learns of the GPU, from the runtime's own record of work. build.py adds a
// stub for each other function.
#include <cupti.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "runtime.h"

namespace {

using cuda_on_cpu::Record;

// Numbers that programs give to what a thread does, by kind; the last one holds.
thread_local std::map<CUpti_ExternalCorrelationKind, std::vector<uint64_t>> external;

class Activities final : public cuda_on_cpu::Observer {
 public:
  void enable(CUpti_ActivityKind kind, bool on) {
    bool any = false;
    {
      const std::lock_guard<std::recursive_mutex> lock(mutex_);
      on ? void(enabled_.insert(kind)) : void(enabled_.erase(kind));
      any = !enabled_.empty();
    }
    cuda_on_cpu::set_observer(any ? this : nullptr);  // without the lock, which the runtime takes within its own
  }

  uint32_t asked() override {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    ++asked_;
    for (const auto& [kind, numbers] : external) {
      if (!numbers.empty()) {
        CUpti_ActivityExternalCorrelation activity{};
        activity.kind = CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION;
        activity.externalKind = kind;
        activity.externalId = numbers.back();
        activity.correlationId = asked_;
        add(activity);
      }
    }
    return asked_;
  }

  uint64_t now() override {
    if (clock != nullptr) {
      return clock();
    }
    const auto since = std::chrono::system_clock::now().time_since_epoch();
    return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(since).count());
  }

  void ran(const Record& record, uint64_t begin, uint64_t end) override {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    const auto fill = [&](auto activity, CUpti_ActivityKind kind) {
      activity.kind = kind;
      activity.start = begin;
      activity.end = end;
      activity.deviceId = static_cast<uint32_t>(record.device);
      activity.streamId =
          static_cast<uint32_t>(streams_.try_emplace(record.stream, streams_.size() + 1).first->second);
      activity.correlationId = record.correlation;
      return activity;
    };
    if (record.kind == "copy") {
      auto activity = fill(CUpti_ActivityMemcpy5{}, CUPTI_ACTIVITY_KIND_MEMCPY);
      const char from = record.name[record.name.size() - 3];  // as in "cudaMemcpyAsync P2D"
      const char to = record.name.back();
      const auto memory = [](char side) {
        return static_cast<uint8_t>(
            side == 'D'   ? CUPTI_ACTIVITY_MEMORY_KIND_DEVICE
            : side == 'P' ? CUPTI_ACTIVITY_MEMORY_KIND_PINNED
                          : CUPTI_ACTIVITY_MEMORY_KIND_PAGEABLE);
      };
      activity.copyKind = static_cast<uint8_t>(
          from != 'D' ? CUPTI_ACTIVITY_MEMCPY_KIND_HTOD
          : to != 'D' ? CUPTI_ACTIVITY_MEMCPY_KIND_DTOH
                      : CUPTI_ACTIVITY_MEMCPY_KIND_DTOD);
      activity.srcKind = memory(from);
      activity.dstKind = memory(to);
      activity.bytes = record.bytes;
      add(activity);
    } else if (record.kind == "fill") {
      auto activity = fill(CUpti_ActivityMemset4{}, CUPTI_ACTIVITY_KIND_MEMSET);
      activity.memoryKind = CUPTI_ACTIVITY_MEMORY_KIND_DEVICE;
      activity.bytes = record.bytes;
      add(activity);
    } else if (record.kind == "launch" || record.kind == "op") {
      auto activity = fill(CUpti_ActivityKernel9{}, CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
      activity.name = names_.insert(record.name).first->c_str();
      // The profiler makes an occupancy of these, which ATen's stand-ins do not have.
      const auto size = [](unsigned given) { return std::max(1, static_cast<int32_t>(given)); };
      activity.gridX = size(record.grid.x);
      activity.gridY = size(record.grid.y);
      activity.gridZ = size(record.grid.z);
      activity.blockX = size(record.block.x);
      activity.blockY = size(record.block.y);
      activity.blockZ = size(record.block.z);
      activity.registersPerThread = 64;
      add(activity);
    }
  }

  // Hand over what there is.
  void flush() {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    if (buffer_ != nullptr) {
      completed(nullptr, 0, std::exchange(buffer_, nullptr), size_, used_);
    }
  }

  CUpti_BuffersCallbackRequestFunc requested = nullptr;
  CUpti_BuffersCallbackCompleteFunc completed = nullptr;
  CUpti_TimestampCallbackFunc clock = nullptr;

  // The size of a record, as it is in the buffers.
  static size_t size_of(CUpti_ActivityKind kind) {
    switch (kind) {
      case CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION:
        return sizeof(CUpti_ActivityExternalCorrelation);
      case CUPTI_ACTIVITY_KIND_MEMCPY:
        return sizeof(CUpti_ActivityMemcpy5);
      case CUPTI_ACTIVITY_KIND_MEMSET:
        return sizeof(CUpti_ActivityMemset4);
      default:
        return sizeof(CUpti_ActivityKernel9);
    }
  }

 private:
  template <class Activity>
  void add(const Activity& activity) {
    if (requested == nullptr || enabled_.count(activity.kind) == 0) {
      return;
    }
    if (buffer_ != nullptr && used_ + sizeof(activity) > size_) {
      flush();
    }
    if (buffer_ == nullptr) {
      size_t most = 0;
      requested(&buffer_, &size_, &most);
      used_ = 0;
    }
    std::memcpy(buffer_ + used_, &activity, sizeof(activity));
    used_ += sizeof(activity);
  }

  std::recursive_mutex mutex_;
  std::set<CUpti_ActivityKind> enabled_;
  std::set<std::string> names_;         // as long as the process lives, as those of kernels do
  std::map<uint64_t, size_t> streams_;  // their numbers
  uint32_t asked_ = 0;
  uint8_t* buffer_ = nullptr;
  size_t size_ = 0;
  size_t used_ = 0;
};

Activities& activities() {
  static auto& all = *new Activities;
  return all;
}

}  // namespace

extern "C" {

CUptiResult cuptiActivityRegisterCallbacks(
    CUpti_BuffersCallbackRequestFunc requested, CUpti_BuffersCallbackCompleteFunc completed) {
  activities().requested = requested;
  activities().completed = completed;
  return CUPTI_SUCCESS;
}
CUptiResult cuptiActivityRegisterTimestampCallback(CUpti_TimestampCallbackFunc clock) {
  activities().clock = clock;
  return CUPTI_SUCCESS;
}
CUptiResult cuptiActivityEnable(CUpti_ActivityKind kind) { return activities().enable(kind, true), CUPTI_SUCCESS; }
CUptiResult cuptiActivityDisable(CUpti_ActivityKind kind) {
  return activities().enable(kind, false), CUPTI_SUCCESS;
}
CUptiResult cuptiActivityFlushAll(uint32_t) { return activities().flush(), CUPTI_SUCCESS; }
CUptiResult cuptiActivityGetNextRecord(uint8_t* buffer, size_t bytes, CUpti_Activity** record) {
  auto* next = buffer;
  if (*record != nullptr) {
    next = reinterpret_cast<uint8_t*>(*record) + Activities::size_of((*record)->kind);
  }
  if (next >= buffer + bytes) {
    return CUPTI_ERROR_MAX_LIMIT_REACHED;
  }
  *record = reinterpret_cast<CUpti_Activity*>(next);
  return CUPTI_SUCCESS;
}
CUptiResult cuptiActivityGetNumDroppedRecords(CUcontext, uint32_t, size_t* dropped) {
  return *dropped = 0, CUPTI_SUCCESS;
}
CUptiResult cuptiActivityPushExternalCorrelationId(CUpti_ExternalCorrelationKind kind, uint64_t number) {
  external[kind].push_back(number);
  return CUPTI_SUCCESS;
}
CUptiResult cuptiActivityPopExternalCorrelationId(CUpti_ExternalCorrelationKind kind, uint64_t* last) {
  auto& numbers = external[kind];
  if (numbers.empty()) {
    return CUPTI_ERROR_QUEUE_EMPTY;
  }
  if (last != nullptr) {
    *last = numbers.back();
  }
  numbers.pop_back();
  return CUPTI_SUCCESS;
}

// Of no consequence here: calls of the runtime make no records, and nobody is called back.
CUptiResult cuptiActivitySetAttribute(CUpti_ActivityAttribute, size_t*, void*) { return CUPTI_SUCCESS; }
CUptiResult cuptiActivityEnableRuntimeApi(CUpti_CallbackId, uint8_t) { return CUPTI_SUCCESS; }
CUptiResult cuptiActivityEnableDriverApi(CUpti_CallbackId, uint8_t) { return CUPTI_SUCCESS; }
CUptiResult cuptiActivityEnableCudaEventDeviceTimestamps(uint8_t) { return CUPTI_SUCCESS; }
CUptiResult cuptiSubscribe(CUpti_SubscriberHandle*, CUpti_CallbackFunc, void*) { return CUPTI_SUCCESS; }
CUptiResult cuptiUnsubscribe(CUpti_SubscriberHandle) { return CUPTI_SUCCESS; }
CUptiResult cuptiEnableCallback(uint32_t, CUpti_SubscriberHandle, CUpti_CallbackDomain, CUpti_CallbackId) {
  return CUPTI_SUCCESS;
}
CUptiResult cuptiEnableDomain(uint32_t, CUpti_SubscriberHandle, CUpti_CallbackDomain) { return CUPTI_SUCCESS; }
CUptiResult cuptiGetVersion(uint32_t* version) { return *version = CUPTI_API_VERSION, CUPTI_SUCCESS; }

}  // extern "C"
