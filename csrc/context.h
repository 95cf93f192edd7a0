// SPDX-License-Identifier: Apache-2.0
// What one thread keeps for one device: a cuBLASLt handle and the plans of the problems it has seen.
// Descriptors hold the addresses of the current launch, so no two threads may share a plan.

#ifndef TEB_CONTEXT_H_
#define TEB_CONTEXT_H_

#include <memory>
#include <unordered_map>

#include "handles.h"
#include "plan.h"
#include "problem.h"

namespace teb {

class Context {
 public:
  // The context of the calling thread for a device, which must be the current one.
  static Context& current(int device);

  cublasLtHandle_t handle() const { return handle_.get(); }
  Plan& plan(const Problem& problem);
  size_t num_plans() const { return plans_.size(); }

 private:
  friend class ContextPool;
  Context() : handle_(make_handle()) {}

  Handle handle_;
  std::unordered_map<Problem, std::unique_ptr<Plan>, ProblemHash> plans_;
};

// Makes a device current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_status(cudaGetDevice(&previous_), "cudaGetDevice");
    is_switched_ = previous_ != device;
    if (is_switched_) {
      check_status(cudaSetDevice(device), "cudaSetDevice");
    }
  }
  ~DeviceGuard() {
    if (is_switched_) {
      cudaSetDevice(previous_);
    }
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool is_switched_ = false;
};

}  // namespace teb

#endif  // TEB_CONTEXT_H_
