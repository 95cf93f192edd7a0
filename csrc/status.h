// SPDX-License-Identifier: Apache-2.0
// Status codes of the CUDA libraries as exceptions.

#ifndef TEB_STATUS_H_
#define TEB_STATUS_H_

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace teb {

// The library has no algorithm for this problem on this device.
class NotSupported : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

inline void check_status(cublasStatus_t status, const char* call) {
  if (status != CUBLAS_STATUS_SUCCESS) {
    throw std::runtime_error(std::string(call) + " failed: " + cublasLtGetStatusName(status));
  }
}

inline void check_status(cudaError_t status, const char* call) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(call) + " failed: " + cudaGetErrorString(status));
  }
}

}  // namespace teb

#endif  // TEB_STATUS_H_
