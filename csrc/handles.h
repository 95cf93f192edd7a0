// SPDX-License-Identifier: Apache-2.0
// Owners of cuBLASLt's opaque objects, with typed attribute access. Only `Handle` needs a driver.

#ifndef TEB_HANDLES_H_
#define TEB_HANDLES_H_

#include <cublasLt.h>

#include <memory>

#include "status.h"

namespace teb {

struct Destroy {
  void operator()(cublasLtHandle_t x) const noexcept { cublasLtDestroy(x); }
  void operator()(cublasLtMatmulDesc_t x) const noexcept { cublasLtMatmulDescDestroy(x); }
  void operator()(cublasLtMatrixLayout_t x) const noexcept { cublasLtMatrixLayoutDestroy(x); }
  void operator()(cublasLtMatmulPreference_t x) const noexcept {
    cublasLtMatmulPreferenceDestroy(x);
  }
};

template <typename Opaque>
using Owner = std::unique_ptr<std::remove_pointer_t<Opaque>, Destroy>;

using Handle = Owner<cublasLtHandle_t>;
using MatmulDesc = Owner<cublasLtMatmulDesc_t>;
using MatrixLayout = Owner<cublasLtMatrixLayout_t>;
using Preference = Owner<cublasLtMatmulPreference_t>;

inline Handle make_handle() {
  cublasLtHandle_t handle = nullptr;
  check_status(cublasLtCreate(&handle), "cublasLtCreate");
  return Handle(handle);
}

inline MatmulDesc make_matmul_desc(cublasComputeType_t compute, cudaDataType_t scale) {
  cublasLtMatmulDesc_t desc = nullptr;
  check_status(cublasLtMatmulDescCreate(&desc, compute, scale), "cublasLtMatmulDescCreate");
  return MatmulDesc(desc);
}

inline MatrixLayout make_matrix_layout(cudaDataType_t type, uint64_t rows, uint64_t cols,
                                       int64_t ld) {
  cublasLtMatrixLayout_t layout = nullptr;
  check_status(cublasLtMatrixLayoutCreate(&layout, type, rows, cols, ld),
               "cublasLtMatrixLayoutCreate");
  return MatrixLayout(layout);
}

inline Preference make_preference() {
  cublasLtMatmulPreference_t preference = nullptr;
  check_status(cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
  return Preference(preference);
}

// The type of each attribute that we use, from the comments of cublasLt.h. A setter takes exactly this
// type, so a width is never wrong (an int passed for the int64 batch stride reads garbage).
template <auto attribute>
struct AttributeType;

#define TEB_ATTRIBUTE(attribute, type) \
  template <>                          \
  struct AttributeType<attribute> {    \
    using Type = type;                 \
  }

TEB_ATTRIBUTE(CUBLASLT_MATMUL_DESC_COMPUTE_TYPE, int32_t);
TEB_ATTRIBUTE(CUBLASLT_MATMUL_DESC_TRANSA, int32_t);
TEB_ATTRIBUTE(CUBLASLT_MATMUL_DESC_TRANSB, int32_t);
TEB_ATTRIBUTE(CUBLASLT_MATMUL_DESC_EPILOGUE, uint32_t);
TEB_ATTRIBUTE(CUBLASLT_MATMUL_DESC_BIAS_POINTER, const void*);
TEB_ATTRIBUTE(CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE, int64_t);
TEB_ATTRIBUTE(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, int32_t);
TEB_ATTRIBUTE(CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET, int32_t);
TEB_ATTRIBUTE(CUBLASLT_MATMUL_DESC_FAST_ACCUM, int8_t);
TEB_ATTRIBUTE(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, const void*);
TEB_ATTRIBUTE(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, const void*);
TEB_ATTRIBUTE(CUBLASLT_MATMUL_DESC_D_SCALE_POINTER, const void*);
TEB_ATTRIBUTE(CUBLASLT_MATMUL_DESC_AMAX_D_POINTER, void*);
TEB_ATTRIBUTE(CUBLASLT_MATMUL_DESC_A_SCALE_MODE, int32_t);
TEB_ATTRIBUTE(CUBLASLT_MATMUL_DESC_B_SCALE_MODE, int32_t);
TEB_ATTRIBUTE(CUBLASLT_MATMUL_DESC_D_SCALE_MODE, int32_t);
TEB_ATTRIBUTE(CUBLASLT_MATRIX_LAYOUT_TYPE, uint32_t);
TEB_ATTRIBUTE(CUBLASLT_MATRIX_LAYOUT_ORDER, int32_t);
TEB_ATTRIBUTE(CUBLASLT_MATRIX_LAYOUT_ROWS, uint64_t);
TEB_ATTRIBUTE(CUBLASLT_MATRIX_LAYOUT_COLS, uint64_t);
TEB_ATTRIBUTE(CUBLASLT_MATRIX_LAYOUT_LD, int64_t);
TEB_ATTRIBUTE(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, int32_t);
TEB_ATTRIBUTE(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, int64_t);
TEB_ATTRIBUTE(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t);
TEB_ATTRIBUTE(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, uint32_t);
TEB_ATTRIBUTE(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, uint32_t);
TEB_ATTRIBUTE(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, uint32_t);
TEB_ATTRIBUTE(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, uint32_t);
TEB_ATTRIBUTE(CUBLASLT_ALGO_CONFIG_ID, int32_t);
TEB_ATTRIBUTE(CUBLASLT_ALGO_CONFIG_TILE_ID, uint32_t);
TEB_ATTRIBUTE(CUBLASLT_ALGO_CONFIG_STAGES_ID, uint32_t);
TEB_ATTRIBUTE(CUBLASLT_ALGO_CONFIG_SPLITK_NUM, int32_t);
TEB_ATTRIBUTE(CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, uint16_t);

#undef TEB_ATTRIBUTE

template <auto attribute>
using ValueOf = typename AttributeType<attribute>::Type;

template <cublasLtMatmulDescAttributes_t attribute>
void set(const MatmulDesc& desc, ValueOf<attribute> value) {
  check_status(cublasLtMatmulDescSetAttribute(desc.get(), attribute, &value, sizeof(value)),
               "cublasLtMatmulDescSetAttribute");
}

template <cublasLtMatrixLayoutAttribute_t attribute>
void set(const MatrixLayout& layout, ValueOf<attribute> value) {
  check_status(cublasLtMatrixLayoutSetAttribute(layout.get(), attribute, &value, sizeof(value)),
               "cublasLtMatrixLayoutSetAttribute");
}

template <cublasLtMatmulPreferenceAttributes_t attribute>
void set(const Preference& preference, ValueOf<attribute> value) {
  check_status(
      cublasLtMatmulPreferenceSetAttribute(preference.get(), attribute, &value, sizeof(value)),
      "cublasLtMatmulPreferenceSetAttribute");
}

template <cublasLtMatmulDescAttributes_t attribute>
ValueOf<attribute> get(const MatmulDesc& desc) {
  ValueOf<attribute> value{};
  size_t written = 0;
  check_status(
      cublasLtMatmulDescGetAttribute(desc.get(), attribute, &value, sizeof(value), &written),
      "cublasLtMatmulDescGetAttribute");
  return value;
}

template <cublasLtMatrixLayoutAttribute_t attribute>
ValueOf<attribute> get(const MatrixLayout& layout) {
  ValueOf<attribute> value{};
  size_t written = 0;
  check_status(
      cublasLtMatrixLayoutGetAttribute(layout.get(), attribute, &value, sizeof(value), &written),
      "cublasLtMatrixLayoutGetAttribute");
  return value;
}

template <cublasLtMatmulAlgoConfigAttributes_t attribute>
ValueOf<attribute> get(const cublasLtMatmulAlgo_t& algo) {
  ValueOf<attribute> value{};
  size_t written = 0;
  check_status(
      cublasLtMatmulAlgoConfigGetAttribute(&algo, attribute, &value, sizeof(value), &written),
      "cublasLtMatmulAlgoConfigGetAttribute");
  return value;
}

}  // namespace teb

#endif  // TEB_HANDLES_H_
