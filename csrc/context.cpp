// SPDX-License-Identifier: Apache-2.0

#include "context.h"

#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace teb {

// Contexts outlive their threads: a finished thread gives them back, the next one takes them over, so that
// short-lived threads do not pay for a handle and for planning again.
class ContextPool {
 public:
  static ContextPool& instance() {
    // Never destroyed: at process exit the driver may be gone before us, and then no handle can be freed.
    static ContextPool* const pool = new ContextPool;
    return *pool;
  }

  std::unique_ptr<Context> take(int device) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      auto& idle = idle_[device];
      if (!idle.empty()) {
        std::unique_ptr<Context> context = std::move(idle.back());
        idle.pop_back();
        return context;
      }
    }
    return std::unique_ptr<Context>(new Context);
  }

  void give_back(int device, std::unique_ptr<Context> context) {
    std::lock_guard<std::mutex> lock(mutex_);
    idle_[device].push_back(std::move(context));
  }

 private:
  std::mutex mutex_;
  std::map<int, std::vector<std::unique_ptr<Context>>> idle_;
};

namespace {

// The contexts that the calling thread has borrowed.
struct Borrowed {
  std::map<int, std::unique_ptr<Context>> contexts;
  ~Borrowed() {
    for (auto& [device, context] : contexts) {
      ContextPool::instance().give_back(device, std::move(context));
    }
  }
};

// A plan takes about 2 KiB. Ragged workloads see many sizes, but few of them again.
constexpr size_t kMaxPlans = 4096;

}  // namespace

Context& Context::current(int device) {
  thread_local Borrowed borrowed;
  std::unique_ptr<Context>& context = borrowed.contexts[device];
  if (context == nullptr) {
    // A new thread may have no CUDA context yet: neither cudaGetDevice nor torch's cached memory bind one,
    // and a launch without it fails. Setting the device does (CUDA 12 and later).
    check_status(cudaSetDevice(device), "cudaSetDevice");
    context = ContextPool::instance().take(device);
  }
  return *context;
}

Plan& Context::plan(const Problem& problem) {
  const auto found = plans_.find(problem);
  if (found != plans_.end()) {
    return *found->second;
  }
  if (plans_.size() >= kMaxPlans) {
    plans_.clear();
  }
  return *plans_.emplace(problem, std::make_unique<Plan>(problem)).first->second;
}

}  // namespace teb
