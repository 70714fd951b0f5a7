#include "helper_threads.h"

#include <pthread.h>
#include <semaphore.h>
#include <signal.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cfenv>
#include <chrono>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

namespace torch_freeze {

// Written by the caller while nobody else can take a chunk, and read by whoever has taken one. Never freed: a
// helper may look at `open` at any time.
struct alignas(64) SharedWork {
  // Helpers that may still join (upper half) and chunks that nobody has taken (lower half).
  std::atomic<uint64_t> open{0};
  // Chunks that are not finished; kAwaited is added when the caller sleeps until there are none.
  alignas(64) std::atomic<int64_t> unfinished{0};
  sem_t finished;
  std::atomic<bool> in_use{false};
  ChunkLoop loop = nullptr;
  const void* context = nullptr;
  int64_t count = 0;
  std::fenv_t floating_point;
};

namespace {

constexpr uint64_t kOneHelper = uint64_t{1} << 32;
constexpr int64_t kMaxCount = kOneHelper - 1;
constexpr int64_t kAwaited = int64_t{1} << 62;
// How long the caller looks for the last chunks to be finished before it sleeps: a chunk takes less, unless its
// thread has lost its processor.
constexpr auto kPatience = std::chrono::microseconds(100);

void wait(sem_t& semaphore) {
  while (sem_wait(&semaphore) != 0 && errno == EINTR) {
  }
}

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The number of the chunk taken, or -1 where none is left.
int64_t take(SharedWork& work, bool join) {
  uint64_t open = work.open.load(std::memory_order_acquire);
  do {
    if (open % kOneHelper == 0 || (join && open < kOneHelper)) {
      return -1;
    }
  } while (!work.open.compare_exchange_weak(
      open, open - 1 - (join ? kOneHelper : 0), std::memory_order_acq_rel, std::memory_order_acquire));
  // What was taken keeps the work as it is until it is finished.
  return work.count - static_cast<int64_t>(open % kOneHelper);
}

void finish(SharedWork& work) {
  if (work.unfinished.fetch_sub(1, std::memory_order_acq_rel) == kAwaited + 1) {
    sem_post(&work.finished);
  }
}

void await(SharedWork& work) {
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  do {
    for (int i = 0; i < 16; ++i) {
      if (work.unfinished.load(std::memory_order_acquire) == 0) {
        return;
      }
      pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  if (work.unfinished.fetch_add(kAwaited, std::memory_order_acq_rel) != 0) {
    wait(work.finished);
  }
}

// Shared by all callers. Helpers sleep unless there is work: one that spun would take a core from a data loader.
class HelperThreads {
 public:
  HelperThreads() {
    sem_init(&wanted_, 0, 0);
    for (auto& work : works_) {
      sem_init(&work.finished, 0, 0);
    }
  }

  // Null where there are more callers at once than places for them.
  SharedWork* acquire() {
    for (auto& work : works_) {
      if (!work.in_use.load(std::memory_order_relaxed) && !work.in_use.exchange(true, std::memory_order_acquire)) {
        return &work;
      }
    }
    return nullptr;
  }

  // As many threads as there are to be had, up to `count`.
  int64_t ensure(int64_t count) {
    if (started_.load(std::memory_order_acquire) < count) {
      const std::lock_guard lock(starting_);
      // Signals are for the threads that were there before.
      sigset_t all;
      sigset_t before;
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &before);
      try {
        for (; started_.load(std::memory_order_relaxed) < count; started_.fetch_add(1)) {
          std::thread([this] { help(); }).detach();
        }
      } catch (const std::exception&) {
        // A limit on threads or memory: with fewer threads the work takes longer.
      }
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
    return std::min(count, started_.load(std::memory_order_acquire));
  }

  // Wakes two, who wake two each: to wake many takes a thread longer than the work.
  void wake(int64_t helpers) {
    int value = 0;
    for (sem_getvalue(&wanted_, &value); value < std::min<int64_t>(helpers, 2); ++value) {
      sem_post(&wanted_);
    }
  }

 private:
  void help() {
    while (true) {
      for (auto& work : works_) {
        const int64_t chunk = take(work, true);
        if (chunk >= 0) {
          wake(static_cast<int64_t>(work.open.load(std::memory_order_relaxed) / kOneHelper));
          std::fesetenv(&work.floating_point);
          Chunks chunks(work, chunk);
          work.loop(work.context, chunks);
        }
      }
      wait(wanted_);
    }
  }

  std::array<SharedWork, 8> works_;
  sem_t wanted_;
  std::mutex starting_;
  std::atomic<int64_t> started_{0};
};

// Never freed: its threads live until the process ends. A forked child has none of them and makes its own.
std::atomic<HelperThreads*> shared_threads{nullptr};
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { shared_threads = nullptr; });

// Null where there is no memory for it.
HelperThreads* helper_threads() {
  HelperThreads* threads = shared_threads.load(std::memory_order_acquire);
  if (threads == nullptr) {
    auto* const made = new (std::nothrow) HelperThreads;
    if (shared_threads.compare_exchange_strong(threads, made)) {
      return made;
    }
    delete made;
  }
  return threads;
}

}  // namespace

Chunks::Chunks(SharedWork& work, int64_t taken)
    : work_(work), count_(work.count), taken_(taken), busy_(taken >= 0) {}

int64_t Chunks::next() {
  int64_t chunk = taken_;
  taken_ = -1;
  if (chunk < 0) {
    // The next is taken before the last is finished, so that it belongs to the same work.
    chunk = take(work_, false);
    if (busy_) {
      finish(work_);
    }
    busy_ = chunk >= 0;
  }
  return chunk;
}

bool share_chunks(int64_t count, int64_t helpers, ChunkLoop loop, const void* context) {
  auto* const threads = helper_threads();
  if (threads == nullptr || count > kMaxCount || threads->ensure(helpers) == 0) {
    return false;
  }
  SharedWork* const work = threads->acquire();
  if (work == nullptr) {
    return false;
  }
  work->loop = loop;
  work->context = context;
  work->count = count;
  std::fegetenv(&work->floating_point);
  work->unfinished.store(count, std::memory_order_relaxed);
  work->open.store(static_cast<uint64_t>(helpers) * kOneHelper + count, std::memory_order_release);
  threads->wake(helpers);
  Chunks chunks(*work, -1);
  loop(context, chunks);
  await(*work);
  work->in_use.store(false, std::memory_order_release);
  return true;
}

}  // namespace torch_freeze
