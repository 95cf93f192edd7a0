// SPDX-License-Identifier: Apache-2.0
// LayerNorms of tiles in shared memory, where they lie: BF16, swizzled as the tensor cores read them. A warp has 16 positions.
// The norm's weight and bias are those of what reads it: see triangle_project_backward.cu.
#pragma once

#include "triangle.cuh"

// Mean and sum of squared deviations of `count` values each of two lanes, merged (Chan et al. 1979).
struct Moments {
  float mean, square;
  __device__ __forceinline__ void merge(int mask, float count) {
    const float other = __shfl_xor_sync(~0u, mean, mask), others = __shfl_xor_sync(~0u, square, mask);
    const float distance = other - mean;
    mean += distance * 0.5f;
    square += others + distance * distance * (count * 0.5f);
  }
};

// What is added to (z - mean) / std. Then sums over the channels of `gradient^T hat` are D times this of the gradient's own
// sum. A larger number would cost hat more bits, a smaller one the sums: their error is that of a row of hat, whose mean is
// zero but for the rounding of BF16, 2^-10 of the gradient here.
constexpr float kHatOffset = 0.25f;

// Eight of a weight's 8 * kLanes columns, whose input is hat instead of LN's result; rows have mean zero. `shift`, in each of
// the lanes, is then to be added to the product.
template <int kLanes>
__device__ __forceinline__ void fold_norm(const uint4& raw, const float (&weight)[8], const float (&bias)[8],
                                          u32 (&words)[4], float& shift) {
  const u32 pairs[4] = {raw.x, raw.y, raw.z, raw.w};
  float values[8], sums[2] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float value = i % 2 ? high_half(pairs[i / 2]) : low_half(pairs[i / 2]);
    values[i] = value * weight[i];
    sums[0] += values[i];
    sums[1] += value * bias[i];
  }
  sum_each<kLanes>(sums);
  const float mean = sums[0] * (1.0f / (8 * kLanes));
  float rest = 0;  // what rounding leaves of the mean
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = pack_bf16(values[2 * i] - mean, values[2 * i + 1] - mean);
    rest += low_half(words[i]) + high_half(words[i]);
  }
  shift = sums[1] - kHatOffset * sum_lanes<kLanes>(rest);
}

// hat of the 16 rows of a warp in a tile of positions x `kDim` channels, halves of 64 channels `kHalfBytes` apart, where it
// lies, and 1 / std of each row. In few registers: a lane has a quarter of two rows, and reads them twice. Between, it does
// something else.
template <int kDim, int kHalfBytes, class Between>
__device__ __forceinline__ void normalize_row_pairs(u32 tile, u32 rstds, int warp, float eps, Between between) {
  const int lane = threadIdx.x % 32, part = lane % 4;
  // Eight neighbouring lanes use different banks. The second row is the eighth behind the first.
  const int row = (lane & 4) + lane / 8;
  const u32 even = chunk_address(tile, warp * 16 + row, part), odd = even ^ 64;
  Moments rows[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float x[kDim / 4], sums[4] = {};
#pragma unroll
    for (int j = 0; j < kDim / 32; ++j) {
      u32 pairs[4];
      load_shared((j % 2 ? odd : even) + j / 2 * kHalfBytes + i * 1024, pairs);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        x[8 * j + 2 * k] = low_half(pairs[k]);
        x[8 * j + 2 * k + 1] = high_half(pairs[k]);
        sums[k] += x[8 * j + 2 * k] + x[8 * j + 2 * k + 1];
      }
    }
    rows[i].mean = (sums[0] + sums[1] + (sums[2] + sums[3])) * (4.0f / kDim);
#pragma unroll
    for (int k = 0; k < 4; ++k) sums[k] = 0;
#pragma unroll
    for (int n = 0; n < kDim / 4; ++n) {
      x[n] -= rows[i].mean;
      sums[n % 4] += x[n] * x[n];
    }
    rows[i].square = sums[0] + sums[1] + (sums[2] + sums[3]);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) rows[i].merge(1, kDim / 4);
#pragma unroll
  for (int i = 0; i < 2; ++i) rows[i].merge(2, kDim / 2);
  between();
  float rstd[2], shift[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    rstd[i] = rsqrt_approx(rows[i].square * (1.0f / kDim) + eps);
    shift[i] = kHatOffset - rows[i].mean * rstd[i];
    if (part == i) store_shared(rstds + (i * 8 + row) * 4, rstd[i]);
  }
  auto find_address = [&](int n) { return (n % 2 ? odd : even) + n / 2 % (kDim / 64) * kHalfBytes + n / (kDim / 32) * 1024; };
  u32 words[kDim / 16][4];
  // All of them before anything is stored, so that reading does not wait for that.
#pragma unroll
  for (int n = 0; n < kDim / 16; ++n) load_shared(find_address(n), words[n]);
#pragma unroll
  for (int n = 0; n < kDim / 16; ++n) {
    const int i = n / (kDim / 32);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      words[n][k] = pack_bf16(low_half(words[n][k]) * rstd[i] + shift[i], high_half(words[n][k]) * rstd[i] + shift[i]);
    }
    store_shared(find_address(n), words[n]);
  }
}

// hat of the 16 positions of a warp in a tile of 128 channels x 64 positions, where it lies, and 1 / std of each position. A lane has two of eight positions at a time, of every eighth channel.
__device__ __forceinline__ void normalize_columns(u32 tile, u32 rstds, int warp, float eps) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    const u32 address = chunk_address(tile, lane / 4, warp * 2 + pass) + lane % 4 * 4;
    float x[16][2], sums[2][2] = {}, squares[2][2] = {};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const u32 pair = static_cast<u32>(__float_as_int(load_shared(address + i * 1024)));
      x[i][0] = low_half(pair);
      x[i][1] = high_half(pair);
      sums[i % 2][0] += x[i][0];
      sums[i % 2][1] += x[i][1];
    }
    Moments moments[2];
    float rstd[2], shift[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      shift[k] = moments[k].mean = (sums[0][k] + sums[1][k]) * (1.0f / 16);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        x[i][k] -= shift[k];
        squares[i % 2][k] += x[i][k] * x[i][k];
      }
      moments[k].square = squares[0][k] + squares[1][k];
    }
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) {
      moments[0].merge(mask, mask * 4);
      moments[1].merge(mask, mask * 4);
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      rstd[k] = rsqrt_approx(moments[k].square * (1.0f / 128) + eps);
      shift[k] = (shift[k] - moments[k].mean) * rstd[k] + kHatOffset;
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const u32 pair = pack_bf16(x[i][0] * rstd[0] + shift[0], x[i][1] * rstd[1] + shift[1]);
      store_shared(address + i * 1024, __int_as_float(static_cast<int>(pair)));
    }
    if (lane < 4) {
      const u32 bits[2] = {static_cast<u32>(__float_as_int(rstd[0])), static_cast<u32>(__float_as_int(rstd[1]))};
      store_shared(rstds + (warp * 16 + pass * 8 + lane * 2) * 4, bits);
    }
  }
}

// --- The sums over positions of dy^T hat, from two warpgroups, as gradients of parameters

// Sums of this thread's two rows, `row` and the eighth behind it, without what was added to hat, and in `row_sums` db.
template <int kDim>
__device__ __forceinline__ void split_totals(float (&totals)[kDim / 2], u32 row_sums, int row) {
  float sums[2] = {};
#pragma unroll
  for (int n = 0; n < kDim / 2; ++n) sums[n / 2 % 2] += totals[n];
  sum_each<4>(sums);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (thread_index() % 4 == 0) store_shared(row_sums + (row + 8 * i) * 4, sums[i] * (1.0f / (kDim * kHatOffset)));
    sums[i] *= 1.0f / kDim;
  }
#pragma unroll
  for (int n = 0; n < kDim / 2; ++n) totals[n] -= sums[n / 2 % 2];
}

// Where the sum of a row and column is for a while: 32 bytes of a row change places with those of the rows beside it, so
// that stores use all banks.
template <int kDim>
__device__ __forceinline__ u32 sum_address(u32 shared, int row, int col) {
  return shared + row * (kDim * 4) + (col * 4 ^ row % 8 * 32);
}

// Of 128 rows of a weight [rows, kDim] behind LN: dW and db, as this CTA has them, and what a thread has of the gradients of
// LN's weight and bias in one column. `shared` has room for a sum each, `row_sums` for one of each row; after a barrier of
// both warpgroups nothing else uses them.
template <int kDim>
__device__ __forceinline__ void store_weight_sums(float (&totals)[kDim / 2], u32 shared, u32 row_sums, const uint4* matrix,
                                                  float norm_weight, float norm_bias, float* weight_sums, float* bias_sums,
                                                  float (&norm_sums)[2]) {
  constexpr int kGroups = 256 / kDim, kRows = 128 / kGroups;
  const int thread = thread_index(), col = thread % kDim, first = thread / kDim * kRows;
  const int own_row = thread / 32 * 16 + thread % 32 / 4;
  split_totals<kDim>(totals, row_sums, own_row);
#pragma unroll
  for (int n = 0; n < kDim / 2; n += 2) {
    const u32 pair[2] = {static_cast<u32>(__float_as_int(totals[n])), static_cast<u32>(__float_as_int(totals[n + 1]))};
    store_shared(sum_address<kDim>(shared, own_row + n / 2 % 2 * 8, n / 4 * 8 + thread % 4 * 2), pair);
  }
  sync_pair(0);
#pragma unroll 1
  for (int begin = first; begin < first + kRows; begin += 16) {
    float w[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) w[i] = read(matrix, (begin + i) * kDim + col, 1);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int row = begin + i;
      const float sum = load_shared(sum_address<kDim>(shared, row, col)), row_sum = load_shared(row_sums + row * 4);
      norm_sums[0] += w[i] * sum;
      norm_sums[1] += w[i] * row_sum;
      weight_sums[row * kDim + col] = sum * norm_weight + row_sum * norm_bias;
    }
  }
  if (thread < 128) bias_sums[thread] = load_shared(row_sums + thread * 4);
  sync_pair(0);
}

// This CTA's gradients of LN's weight and bias, from those of each thread: rows in a fixed order.
template <int kDim>
__device__ __forceinline__ void store_norm_sums(const float (&norm_sums)[2], u32 shared, float* target) {
  const int thread = thread_index();
#pragma unroll
  for (int i = 0; i < 2; ++i) store_shared(shared + (i * 256 + thread) * 4, norm_sums[i]);
  sync_pair(0);
  if (thread < 2 * kDim) {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < 256 / kDim; ++k) {
      sum += load_shared(shared + (thread / kDim * 256 + k * kDim + thread % kDim) * 4);
    }
    target[thread] = sum;
  }
  sync_pair(0);
}
