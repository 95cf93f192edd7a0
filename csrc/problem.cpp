// SPDX-License-Identifier: Apache-2.0

#include "problem.h"

#include <limits>
#include <stdexcept>
#include <tuple>

namespace teb {

namespace {

// Every field of the key in one place: equality and hash cannot disagree.
auto fields(const Matrix& x) {
  return std::make_tuple(static_cast<int64_t>(x.dtype), x.ld, x.batch_stride,
                         static_cast<int64_t>(x.transposed), static_cast<int64_t>(x.scale_mode));
}

auto fields(const Problem& p) {
  return std::tuple_cat(
      fields(p.a), fields(p.b), fields(p.d),
      std::make_tuple(p.batch, p.m, p.n, p.k, static_cast<int64_t>(p.epilogue),
                      static_cast<int64_t>(p.bias_dtype), p.bias_batch_stride,
                      static_cast<int64_t>(p.accumulate), static_cast<int64_t>(p.fast_accumulation),
                      static_cast<int64_t>(p.allow_tf32), static_cast<int64_t>(p.amax_d),
                      static_cast<int64_t>(p.device), static_cast<int64_t>(p.sm_count),
                      p.workspace_limit));
}

size_t combine(size_t seed, int64_t value) {
  // splitmix64: neighbouring sizes must not collide.
  uint64_t x = static_cast<uint64_t>(value) + 0x9e3779b97f4a7c15ULL + seed;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return static_cast<size_t>(x ^ (x >> 31));
}

void require(bool condition, const Problem& problem, const std::string& what) {
  if (!condition) {
    throw std::invalid_argument(what + " in " + problem.to_string());
  }
}

void check_matrix(const Problem& problem, const Matrix& x, const char* which, int64_t rows,
                  int64_t cols) {
  const std::string operand = std::string("operand ") + which;
  const int64_t contiguous = x.transposed ? rows : cols;
  require(x.ld >= contiguous, problem, operand + ": leading dimension smaller than a row");
  require(x.batch_stride >= 0, problem, operand + ": negative batch stride");
  require(is_fp8(x.dtype) == (x.scale_mode != ScaleMode::kNone), problem,
          operand + ": FP8 needs a scale, and other types take none");
}

std::string describe(const Matrix& x) {
  std::string text = name(x.dtype);
  text += "(ld=" + std::to_string(x.ld) + ", batch_stride=" + std::to_string(x.batch_stride);
  text += x.transposed ? ", transposed" : "";
  if (x.scale_mode != ScaleMode::kNone) {
    text += std::string(", scale=") + name(x.scale_mode);
  }
  return text + ")";
}

}  // namespace

bool is_fp8(DataType dtype) {
  return dtype == DataType::kFloat8E4M3 || dtype == DataType::kFloat8E5M2;
}

bool has_bias(Epilogue epilogue) {
  return epilogue == Epilogue::kBias || epilogue == Epilogue::kGeluBias;
}

int64_t element_size(DataType dtype) {
  switch (dtype) {
    case DataType::kFloat32:
      return 4;
    case DataType::kFloat16:
    case DataType::kBFloat16:
      return 2;
    case DataType::kFloat8E4M3:
    case DataType::kFloat8E5M2:
      return 1;
  }
  throw std::invalid_argument("unknown data type");
}

const char* name(DataType dtype) {
  switch (dtype) {
    case DataType::kFloat32:
      return "fp32";
    case DataType::kFloat16:
      return "fp16";
    case DataType::kBFloat16:
      return "bf16";
    case DataType::kFloat8E4M3:
      return "e4m3";
    case DataType::kFloat8E5M2:
      return "e5m2";
  }
  return "?";
}

const char* name(ScaleMode mode) {
  switch (mode) {
    case ScaleMode::kNone:
      return "none";
    case ScaleMode::kTensor:
      return "tensor";
    case ScaleMode::kBlock32:
      return "block32";
  }
  return "?";
}

const char* name(Epilogue epilogue) {
  switch (epilogue) {
    case Epilogue::kNone:
      return "none";
    case Epilogue::kBias:
      return "bias";
    case Epilogue::kGelu:
      return "gelu";
    case Epilogue::kGeluBias:
      return "gelu_bias";
  }
  return "?";
}

bool Matrix::operator==(const Matrix& other) const { return fields(*this) == fields(other); }

bool Problem::operator==(const Problem& other) const { return fields(*this) == fields(other); }

size_t Problem::hash() const {
  return std::apply(
      [](auto... value) {
        size_t seed = 0;
        ((seed = combine(seed, value)), ...);
        return seed;
      },
      fields(*this));
}

void Problem::check() const {
  require(batch > 0 && m > 0 && n > 0 && k > 0, *this, "empty product");
  // BATCH_COUNT is an int32 attribute.
  require(batch <= std::numeric_limits<int32_t>::max(), *this, "batch count beyond int32");
  check_matrix(*this, a, "a", m, k);
  check_matrix(*this, b, "b", k, n);
  check_matrix(*this, d, "d", m, n);
  require(!d.transposed, *this, "operand d: transposed output");
  require(d.scale_mode != ScaleMode::kBlock32, *this, "operand d: block-scaled output");
  require(batch == 1 || d.batch_stride != 0, *this, "operand d: broadcast output");
  require(a.scale_mode == b.scale_mode, *this, "operands a and b: different scale modes");
  require(!(a.dtype == DataType::kFloat8E5M2 && b.dtype == DataType::kFloat8E5M2), *this,
          "operands a and b: e5m2 x e5m2 has no tensor-core instruction");
  require(!(amax_d && !is_fp8(d.dtype)), *this, "amax of an output that is not FP8");
  require(!(accumulate && is_fp8(d.dtype)), *this, "accumulation into FP8");
  require(!(fast_accumulation && !is_fp8(a.dtype)), *this, "fast accumulation of other than FP8");
  // There is no attribute for the batch stride of block scales: the library walks them item by item,
  // also where the codes are broadcast.
  const bool broadcast = batch > 1 && (a.batch_stride == 0 || b.batch_stride == 0);
  require(!(a.scale_mode == ScaleMode::kBlock32 && broadcast), *this,
          "broadcast batch of a block-scaled operand");
  require(sm_count >= 0 && workspace_limit >= 0, *this, "negative limit");
}

std::string Problem::to_string() const {
  // No streams: their locales break where the compiler links its own libstdc++ into the extension.
  std::string text = "Problem(batch=" + std::to_string(batch) + ", m=" + std::to_string(m) +
                     ", n=" + std::to_string(n) + ", k=" + std::to_string(k) +
                     ", a=" + describe(a) + ", b=" + describe(b) + ", d=" + describe(d);
  if (epilogue != Epilogue::kNone) {
    text += std::string(", epilogue=") + name(epilogue);
  }
  if (has_bias(epilogue)) {
    text += std::string(", bias=") + name(bias_dtype) +
            "(batch_stride=" + std::to_string(bias_batch_stride) + ")";
  }
  text += accumulate ? ", accumulate" : "";
  text += fast_accumulation ? ", fast_accumulation" : "";
  text += allow_tf32 ? ", allow_tf32" : "";
  text += amax_d ? ", amax_d" : "";
  if (sm_count != 0) {
    text += ", sm_count=" + std::to_string(sm_count);
  }
  return text + ", device=" + std::to_string(device) +
         ", workspace_limit=" + std::to_string(workspace_limit) + ")";
}

}  // namespace teb
