// SPDX-License-Identifier: Apache-2.0

#include "plan.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <optional>
#include <unordered_map>

namespace teb {

namespace {

cudaDataType_t cuda_type(DataType dtype) {
  switch (dtype) {
    case DataType::kFloat32:
      return CUDA_R_32F;
    case DataType::kFloat16:
      return CUDA_R_16F;
    case DataType::kBFloat16:
      return CUDA_R_16BF;
    case DataType::kFloat8E4M3:
      return CUDA_R_8F_E4M3;
    case DataType::kFloat8E5M2:
      return CUDA_R_8F_E5M2;
  }
  throw std::invalid_argument("unknown data type");
}

int32_t lt_scale_mode(ScaleMode mode) {
  return mode == ScaleMode::kBlock32 ? CUBLASLT_MATMUL_MATRIX_SCALE_VEC32_UE8M0
                                     : CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F;
}

uint32_t lt_epilogue(Epilogue epilogue) {
  switch (epilogue) {
    case Epilogue::kNone:
      return CUBLASLT_EPILOGUE_DEFAULT;
    case Epilogue::kBias:
      return CUBLASLT_EPILOGUE_BIAS;
    case Epilogue::kGelu:
      return CUBLASLT_EPILOGUE_GELU;
    case Epilogue::kGeluBias:
      return CUBLASLT_EPILOGUE_GELU_BIAS;
  }
  throw std::invalid_argument("unknown epilogue");
}

// Row-major [rows, cols] with rows of `ld` elements is column-major [cols, rows] in the same memory; a
// transposed one is column-major [rows, cols].
MatrixLayout make_lt_layout(const Matrix& x, DataType dtype, int64_t rows, int64_t cols,
                            int64_t batch) {
  const int64_t lt_rows = x.transposed ? rows : cols;
  const int64_t lt_cols = x.transposed ? cols : rows;
  MatrixLayout layout = make_matrix_layout(cuda_type(dtype), lt_rows, lt_cols, x.ld);
  set<CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT>(layout, static_cast<int32_t>(batch));
  set<CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET>(layout, x.batch_stride);
  return layout;
}

uint32_t address_alignment(uintptr_t address) {
  constexpr uintptr_t kLargest = 256;  // what cudaMalloc gives; the heuristic looks no further
  const uintptr_t lowest_bit = address & (~address + 1);
  return static_cast<uint32_t>(address == 0 ? kLargest : std::min(lowest_bit, kLargest));
}

// cuBLAS release notes, entry 6580689: split-K of algorithm 66 is wrong where the number of splits does
// not divide K, on compute capability 9, 10 and 11; from CUDA 12.6 Update 2 (cuBLAS 12.6.3) up to and
// including CUDA 13.4 (cuBLAS 13.7). The filter can go when those are no longer supported.
bool has_split_k_fault(const Algorithm& algorithm, int64_t k) {
  constexpr size_t kFirstVersion = 120603;
  constexpr size_t kFixedVersion = 130800;
  const size_t version = cublasLtGetVersion();
  if (version < kFirstVersion || version >= kFixedVersion) {
    return false;
  }
  const int32_t splits = get<CUBLASLT_ALGO_CONFIG_SPLITK_NUM>(algorithm.algo);
  return get<CUBLASLT_ALGO_CONFIG_ID>(algorithm.algo) == 66 && splits > 1 && k % splits != 0;
}

// The heuristic ranks the algorithms of FP8 products with fast accumulation by large tiles, which are
// slower on an H200 than these (benchmarks/algorithms.py); its first choice with split accumulation is
// right. The best first; most are offered for most sizes.
struct TileAndCluster {
  int32_t tile, cluster;
};
constexpr TileAndCluster kFastestOfHopper[] = {
    {CUBLASLT_MATMUL_TILE_176x128, CUBLASLT_CLUSTER_SHAPE_1x2x1},
    {CUBLASLT_MATMUL_TILE_128x160, CUBLASLT_CLUSTER_SHAPE_2x1x1},
    {CUBLASLT_MATMUL_TILE_128x128, CUBLASLT_CLUSTER_SHAPE_2x1x1},
};
// Two tiles of 128 x 160 for each of 132 multiprocessors: with less to do, the number of tiles decides.
constexpr int64_t kMinOutputElements = int64_t{2} * 132 * 128 * 160;

// Moves the first of them that is offered to the front.
void prefer_fastest(const Problem& problem, std::vector<Algorithm>& algorithms) {
  const bool is_16_bit = problem.d.dtype == DataType::kBFloat16 || problem.d.dtype == DataType::kFloat16;
  if (!is_fp8(problem.a.dtype) || !problem.fast_accumulation || !is_16_bit || problem.accumulate ||
      problem.batch * problem.m * problem.n < kMinOutputElements) {
    return;
  }
  for (const TileAndCluster& wanted : kFastestOfHopper) {
    const auto found = std::find_if(algorithms.begin(), algorithms.end(), [&](const Algorithm& x) {
      // Algorithm 66 is Hopper's.
      return get<CUBLASLT_ALGO_CONFIG_ID>(x.algo) == 66 &&
             get<CUBLASLT_ALGO_CONFIG_SPLITK_NUM>(x.algo) == 1 &&
             get<CUBLASLT_ALGO_CONFIG_TILE_ID>(x.algo) == static_cast<uint32_t>(wanted.tile) &&
             get<CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID>(x.algo) == wanted.cluster;
    });
    if (found != algorithms.end()) {
      std::rotate(algorithms.begin(), found, found + 1);
      return;
    }
  }
}

struct ChoiceKey {
  Problem problem;
  Alignment alignment;
  bool operator==(const ChoiceKey& other) const {
    return alignment == other.alignment && problem == other.problem;
  }
};

struct ChoiceKeyHash {
  size_t operator()(const ChoiceKey& key) const { return key.problem.hash(); }
};

class Choices {
 public:
  void store(const ChoiceKey& key, const cublasLtMatmulAlgo_t& algo) {
    std::lock_guard<std::mutex> lock(mutex_);
    choices_[key] = algo;
    ++generation_;
  }

  void clear() {
    std::lock_guard<std::mutex> lock(mutex_);
    choices_.clear();
    ++generation_;
  }

  std::optional<cublasLtMatmulAlgo_t> find(const ChoiceKey& key) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = choices_.find(key);
    return found == choices_.end() ? std::nullopt : std::make_optional(found->second);
  }

  uint64_t generation() const { return generation_.load(std::memory_order_acquire); }

 private:
  std::mutex mutex_;
  std::unordered_map<ChoiceKey, cublasLtMatmulAlgo_t, ChoiceKeyHash> choices_;
  std::atomic<uint64_t> generation_{0};
};

Choices& choices() {
  static Choices instance;
  return instance;
}

}  // namespace

Alignment alignment_of(const Pointers& pointers) {
  return {address_alignment(pointers.a), address_alignment(pointers.b),
          address_alignment(pointers.d), address_alignment(pointers.bias)};
}

std::string describe(const Algorithm& algorithm) {
  const cublasLtMatmulAlgo_t& algo = algorithm.algo;
  return "id=" + std::to_string(get<CUBLASLT_ALGO_CONFIG_ID>(algo)) +
         " tile=" + std::to_string(get<CUBLASLT_ALGO_CONFIG_TILE_ID>(algo)) +
         " stages=" + std::to_string(get<CUBLASLT_ALGO_CONFIG_STAGES_ID>(algo)) +
         " cluster=" + std::to_string(get<CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID>(algo)) +
         " splits=" + std::to_string(get<CUBLASLT_ALGO_CONFIG_SPLITK_NUM>(algo)) +
         " workspace=" + std::to_string(algorithm.workspace_bytes);
}

Plan::Plan(const Problem& problem) : problem_(problem) {
  problem_.check();
  const Problem& p = problem_;
  const bool is_tf32 = p.allow_tf32 && p.a.dtype == DataType::kFloat32;
  desc_ = make_matmul_desc(is_tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F, CUDA_R_32F);
  lt_a_ = make_lt_layout(p.b, p.b.dtype, p.k, p.n, p.batch);
  lt_b_ = make_lt_layout(p.a, p.a.dtype, p.m, p.k, p.batch);
  lt_d_ = make_lt_layout(p.d, p.d.dtype, p.m, p.n, p.batch);
  if (is_fp8(p.d.dtype)) {
    // FP8 output takes no C, but the type table wants one of 16 bits.
    lt_c_ = make_lt_layout(p.d, DataType::kBFloat16, p.m, p.n, p.batch);
  }
  // A row-major operand is seen transposed, which is what D^T = B^T @ A^T wants: no operation. A
  // transposed one is seen as it is and must be flipped.
  set<CUBLASLT_MATMUL_DESC_TRANSA>(desc_, p.b.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
  set<CUBLASLT_MATMUL_DESC_TRANSB>(desc_, p.a.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
  set<CUBLASLT_MATMUL_DESC_EPILOGUE>(desc_, lt_epilogue(p.epilogue));
  if (has_bias(p.epilogue)) {
    set<CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE>(desc_, cuda_type(p.bias_dtype));
    set<CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE>(desc_, p.bias_batch_stride);
  }
  if (p.a.scale_mode != ScaleMode::kNone) {
    set<CUBLASLT_MATMUL_DESC_A_SCALE_MODE>(desc_, lt_scale_mode(p.b.scale_mode));
    set<CUBLASLT_MATMUL_DESC_B_SCALE_MODE>(desc_, lt_scale_mode(p.a.scale_mode));
    set<CUBLASLT_MATMUL_DESC_FAST_ACCUM>(desc_, p.fast_accumulation ? 1 : 0);
  }
  if (p.sm_count > 0) {
    set<CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET>(desc_, p.sm_count);
  }
}

std::map<std::string, int64_t> Plan::read_back() const {
  std::map<std::string, int64_t> values;
  const auto read_layout = [&values](const std::string& prefix, const MatrixLayout& layout) {
    values[prefix + ".type"] = get<CUBLASLT_MATRIX_LAYOUT_TYPE>(layout);
    values[prefix + ".order"] = get<CUBLASLT_MATRIX_LAYOUT_ORDER>(layout);
    values[prefix + ".rows"] = get<CUBLASLT_MATRIX_LAYOUT_ROWS>(layout);
    values[prefix + ".cols"] = get<CUBLASLT_MATRIX_LAYOUT_COLS>(layout);
    values[prefix + ".ld"] = get<CUBLASLT_MATRIX_LAYOUT_LD>(layout);
    values[prefix + ".batch_count"] = get<CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT>(layout);
    values[prefix + ".batch_stride"] = get<CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET>(layout);
  };
  read_layout("lt_a", lt_a_);
  read_layout("lt_b", lt_b_);
  read_layout("lt_d", lt_d_);
  if (lt_c_) {
    read_layout("lt_c", lt_c_);
  }
  values["compute_type"] = get<CUBLASLT_MATMUL_DESC_COMPUTE_TYPE>(desc_);
  values["trans_a"] = get<CUBLASLT_MATMUL_DESC_TRANSA>(desc_);
  values["trans_b"] = get<CUBLASLT_MATMUL_DESC_TRANSB>(desc_);
  values["epilogue"] = get<CUBLASLT_MATMUL_DESC_EPILOGUE>(desc_);
  values["bias_batch_stride"] = get<CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE>(desc_);
  values["bias_type"] = get<CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE>(desc_);
  values["fast_accum"] = get<CUBLASLT_MATMUL_DESC_FAST_ACCUM>(desc_);
  values["scale_mode_a"] = get<CUBLASLT_MATMUL_DESC_A_SCALE_MODE>(desc_);
  values["scale_mode_b"] = get<CUBLASLT_MATMUL_DESC_B_SCALE_MODE>(desc_);
  values["sm_count_target"] = get<CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET>(desc_);
  return values;
}

void Plan::set_pointers(const Pointers& pointers) {
  // The library ignores pointers that the modes do not call for, but since CUDA 13.0 refuses scales of
  // types that take none: set only what the problem has.
  const Problem& p = problem_;
  if (p.a.scale_mode != ScaleMode::kNone) {
    set<CUBLASLT_MATMUL_DESC_A_SCALE_POINTER>(desc_,
                                              reinterpret_cast<const void*>(pointers.scale_inv_b));
    set<CUBLASLT_MATMUL_DESC_B_SCALE_POINTER>(desc_,
                                              reinterpret_cast<const void*>(pointers.scale_inv_a));
  }
  if (p.d.scale_mode != ScaleMode::kNone) {
    set<CUBLASLT_MATMUL_DESC_D_SCALE_POINTER>(desc_,
                                              reinterpret_cast<const void*>(pointers.scale_d));
  }
  if (p.amax_d) {
    set<CUBLASLT_MATMUL_DESC_AMAX_D_POINTER>(desc_, reinterpret_cast<void*>(pointers.amax_d));
  }
  if (has_bias(p.epilogue)) {
    set<CUBLASLT_MATMUL_DESC_BIAS_POINTER>(desc_, reinterpret_cast<const void*>(pointers.bias));
  }
}

std::vector<Algorithm> Plan::query_algorithms(cublasLtHandle_t handle, const Pointers& pointers,
                                              int max_count) {
  set_pointers(pointers);
  const Alignment alignment = alignment_of(pointers);
  const Preference preference = make_preference();
  set<CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES>(preference,
                                                static_cast<uint64_t>(problem_.workspace_limit));
  set<CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES>(preference, alignment[1]);
  set<CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES>(preference, alignment[0]);
  set<CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES>(preference, alignment[2]);
  set<CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES>(preference, alignment[2]);
  std::vector<cublasLtMatmulHeuristicResult_t> results(max_count);
  int count = 0;
  const cublasLtMatrixLayout_t lt_c = lt_c_ ? lt_c_.get() : lt_d_.get();
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      handle, desc_.get(), lt_a_.get(), lt_b_.get(), lt_c, lt_d_.get(), preference.get(), max_count,
      results.data(), &count);
  if (status != CUBLAS_STATUS_SUCCESS && status != CUBLAS_STATUS_NOT_SUPPORTED) {
    check_status(status, ("cublasLtMatmulAlgoGetHeuristic for " + problem_.to_string()).c_str());
  }
  std::vector<Algorithm> algorithms;
  for (int i = 0; i < count; ++i) {
    const Algorithm algorithm{results[i].algo, results[i].workspaceSize, i};
    if (results[i].state == CUBLAS_STATUS_SUCCESS && !has_split_k_fault(algorithm, problem_.k)) {
      algorithms.push_back(algorithm);
    }
  }
  if (algorithms.empty()) {
    throw NotSupported("cuBLASLt " + std::to_string(cublasLtGetVersion()) + " has no algorithm for " +
                       problem_.to_string());
  }
  prefer_fastest(problem_, algorithms);
  return algorithms;
}

const Algorithm& Plan::choose_algorithm(cublasLtHandle_t handle, const Pointers& pointers) {
  const uint64_t generation = choices().generation();
  if (generation != generation_) {
    algorithms_.clear();
    generation_ = generation;
  }
  const Alignment alignment = alignment_of(pointers);
  const auto found = algorithms_.find(alignment);
  if (found != algorithms_.end()) {
    return found->second;
  }
  const std::optional<cublasLtMatmulAlgo_t> tuned = choices().find({problem_, alignment});
  set_pointers(pointers);
  // More than one is asked for, so that a faulty first one does not end the search.
  const Algorithm chosen = tuned ? check_algorithm(handle, *tuned)
                                 : query_algorithms(handle, pointers, kOfferedAlgorithms).front();
  return algorithms_.emplace(alignment, chosen).first->second;
}

Algorithm Plan::check_algorithm(cublasLtHandle_t handle, const cublasLtMatmulAlgo_t& algo) const {
  cublasLtMatmulHeuristicResult_t result{};
  const cublasStatus_t status = cublasLtMatmulAlgoCheck(
      handle, desc_.get(), lt_a_.get(), lt_b_.get(), lt_c_ ? lt_c_.get() : lt_d_.get(), lt_d_.get(),
      &algo, &result);
  if (status != CUBLAS_STATUS_SUCCESS ||
      result.workspaceSize > static_cast<size_t>(problem_.workspace_limit)) {
    throw NotSupported("cuBLASLt " + std::to_string(cublasLtGetVersion()) +
                       " refuses the stored autotuned algorithm for " + problem_.to_string());
  }
  return {algo, result.workspaceSize, 0};
}

void Plan::launch(cublasLtHandle_t handle, const Pointers& pointers, float alpha, float beta,
                  const Algorithm& algorithm, uintptr_t workspace, size_t workspace_bytes,
                  cudaStream_t stream) {
  set_pointers(pointers);
  // With beta != 0, C is D: the same pointer and the same descriptor (cublasLtMatmul, in-place rule).
  // The C scale stays unset: cuBLAS 13.1.0 hangs on compute capability 9.0 when it is zero (CUB-9627).
  const void* c = lt_c_ ? nullptr : reinterpret_cast<const void*>(pointers.d);
  check_status(
      cublasLtMatmul(handle, desc_.get(), &alpha, reinterpret_cast<const void*>(pointers.b),
                     lt_a_.get(), reinterpret_cast<const void*>(pointers.a), lt_b_.get(), &beta, c,
                     lt_c_ ? lt_c_.get() : lt_d_.get(), reinterpret_cast<void*>(pointers.d),
                     lt_d_.get(), &algorithm.algo, reinterpret_cast<void*>(workspace),
                     workspace_bytes, stream),
      "cublasLtMatmul");
}

void store_choice(const Problem& problem, const Alignment& alignment,
                  const cublasLtMatmulAlgo_t& algo) {
  choices().store({problem, alignment}, algo);
}

void clear_choices() { choices().clear(); }

}  // namespace teb
