// SPDX-License-Identifier: Apache-2.0
// A problem as cuBLASLt descriptors. The only place that swaps row-major for column-major:
// a row-major D = A @ B is the column-major D^T = B^T @ A^T, so cuBLASLt's first operand (lt_a) is our b.

#ifndef TEB_PLAN_H_
#define TEB_PLAN_H_

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "handles.h"
#include "problem.h"

namespace teb {

// Device addresses of one launch; scales and amax are FP32 (block scales: packed E8M0 tiles).
struct Pointers {
  uintptr_t a = 0;
  uintptr_t b = 0;
  uintptr_t d = 0;
  uintptr_t scale_inv_a = 0;
  uintptr_t scale_inv_b = 0;
  uintptr_t scale_d = 0;
  uintptr_t amax_d = 0;
  uintptr_t bias = 0;
};

// Largest power of two, at most 256, that divides each of the addresses a, b, d and bias: the part of an
// address that the heuristic may look at.
using Alignment = std::array<uint32_t, 4>;
Alignment alignment_of(const Pointers& pointers);

struct Algorithm {
  cublasLtMatmulAlgo_t algo;
  size_t workspace_bytes;
  int rank = 0;  // in the heuristic's order
};

// How many algorithms the heuristic is asked for; on an H200 it has 8 for a large FP8 batch.
constexpr int kOfferedAlgorithms = 8;

// What an algorithm is, for logs and for the file of autotuned choices.
std::string describe(const Algorithm& algorithm);

class Plan {
 public:
  // Needs no driver. Throws std::invalid_argument for a problem that fails its check.
  explicit Plan(const Problem& problem);

  // All attributes, read back from the descriptors.
  std::map<std::string, int64_t> read_back() const;

  // The algorithms that the heuristic offers, best guess first, without those that a known fault of the
  // loaded library makes unsafe. Throws NotSupported if there is none.
  std::vector<Algorithm> query_algorithms(cublasLtHandle_t handle, const Pointers& pointers,
                                          int max_count);

  // The algorithm for this alignment: an autotuned choice, else the heuristic's first. Cached.
  const Algorithm& choose_algorithm(cublasLtHandle_t handle, const Pointers& pointers);

  void launch(cublasLtHandle_t handle, const Pointers& pointers, float alpha, float beta,
              const Algorithm& algorithm, uintptr_t workspace, size_t workspace_bytes,
              cudaStream_t stream);

 private:
  void set_pointers(const Pointers& pointers);
  Algorithm check_algorithm(cublasLtHandle_t handle, const cublasLtMatmulAlgo_t& algo) const;

  Problem problem_;
  MatmulDesc desc_;
  MatrixLayout lt_a_;
  MatrixLayout lt_b_;
  MatrixLayout lt_c_;  // null where C and D share a descriptor
  MatrixLayout lt_d_;
  std::map<Alignment, Algorithm> algorithms_;
  uint64_t generation_ = 0;  // of the autotuned choices that algorithms_ has seen
};

// Autotuned choices of the process, seen by the plans of all threads. A choice is checked by the library
// (cublasLtMatmulAlgoCheck) when a plan first takes it: one from a file may be of another machine.
void store_choice(const Problem& problem, const Alignment& alignment,
                  const cublasLtMatmulAlgo_t& algo);
void clear_choices();

}  // namespace teb

#endif  // TEB_PLAN_H_
