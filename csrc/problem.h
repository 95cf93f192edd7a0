// SPDX-License-Identifier: Apache-2.0
// A batched matrix product as a plain value, in row-major terms: D[b] = alpha * A[b] @ B[b] + beta * D[b].
//
// The value is cache key, log line and error text in one. It knows nothing of cuBLASLt; plan.cpp turns it
// into descriptors.

#ifndef TEB_PROBLEM_H_
#define TEB_PROBLEM_H_

#include <cstddef>
#include <cstdint>
#include <string>

namespace teb {

enum class DataType : int32_t { kFloat32 = 0, kFloat16, kBFloat16, kFloat8E4M3, kFloat8E5M2 };

// How the codes of an operand become numbers: as they are, times one FP32 factor for the whole batch, or
// times one E8M0 factor for each 32 elements along the contracted dimension (MXFP8).
enum class ScaleMode : int32_t { kNone = 0, kTensor, kBlock32 };

enum class Epilogue : int32_t { kNone = 0, kBias, kGelu, kGeluBias };

bool is_fp8(DataType dtype);
bool has_bias(Epilogue epilogue);
int64_t element_size(DataType dtype);
const char* name(DataType dtype);
const char* name(ScaleMode mode);
const char* name(Epilogue epilogue);

// One batched matrix in memory. Element (b, r, c) lies at b * batch_stride + r * ld + c, or, if
// `transposed`, at b * batch_stride + c * ld + r. Strides count elements; batch_stride 0 broadcasts.
struct Matrix {
  DataType dtype = DataType::kFloat32;
  int64_t ld = 0;
  int64_t batch_stride = 0;
  bool transposed = false;
  ScaleMode scale_mode = ScaleMode::kNone;

  bool operator==(const Matrix& other) const;
};

struct Problem {
  int64_t batch = 0;
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  Matrix a;  // [batch, m, k]
  Matrix b;  // [batch, k, n]
  Matrix d;  // [batch, m, n], never transposed
  Epilogue epilogue = Epilogue::kNone;
  DataType bias_dtype = DataType::kBFloat16;
  int64_t bias_batch_stride = 0;
  bool accumulate = false;  // beta != 0: D is read, too
  bool fast_accumulation = false;
  bool allow_tf32 = false;
  bool amax_d = false;  // write max |D| before the D scale (FP8 output only)
  int32_t device = 0;
  int32_t sm_count = 0;  // 0: all
  int64_t workspace_limit = 0;

  bool operator==(const Problem& other) const;
  size_t hash() const;

  // Throws std::invalid_argument, naming the field, for what no library can run.
  void check() const;
  std::string to_string() const;
};

struct ProblemHash {
  size_t operator()(const Problem& problem) const { return problem.hash(); }
};

}  // namespace teb

#endif  // TEB_PROBLEM_H_
