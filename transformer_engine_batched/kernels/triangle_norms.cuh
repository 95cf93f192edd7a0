// SPDX-License-Identifier: Apache-2.0
// LayerNorms of tiles in shared memory, where they lie: BF16, 128 channels, swizzled as the tensor cores read them. A warp
// has 16 positions.
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

// LN of the 16 positions of a warp in a tile of positions x 128 channels, halves of 64 channels `kHalfBytes` apart, where it
// lies. `norm` has 128 weights and 128 biases. A lane has 32 channels of one of eight positions at a time; eight
// neighbouring lanes use different banks.
template <int kHalfBytes>
__device__ __forceinline__ void normalize_rows(u32 tile, u32 norm, int warp, float eps) {
  const int lane = threadIdx.x % 32, part = lane % 4, place = (lane >> 2 & 1) << 2 | lane >> 3;
  norm += part * 32;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    const int row = warp * 16 + pass * 8 + place;
    const u32 even = chunk_address(tile, row, part), odd = even ^ 64;
    float x[32], sums[4] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      u32 pairs[4];
      load_shared((j % 2 ? odd : even) + j / 2 * kHalfBytes, pairs);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        x[8 * j + 2 * k] = low_half(pairs[k]);
        x[8 * j + 2 * k + 1] = high_half(pairs[k]);
        sums[k] += x[8 * j + 2 * k] + x[8 * j + 2 * k + 1];
      }
    }
    Moments moments;
    moments.mean = (sums[0] + sums[1] + (sums[2] + sums[3])) * (1.0f / 32);
    const float own = moments.mean;
#pragma unroll
    for (int k = 0; k < 4; ++k) sums[k] = 0;
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      x[j] -= own;
      sums[j % 4] += x[j] * x[j];
    }
    moments.square = sums[0] + sums[1] + (sums[2] + sums[3]);
    moments.merge(1, 32);
    moments.merge(2, 64);
    const float rstd = rsqrt_approx(moments.square * (1.0f / 128) + eps), shift = (own - moments.mean) * rstd;
    u32 words[4][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        float weight[4], bias[4];
        load_shared(norm + j * 128 + k * 8, weight);
        load_shared(norm + 512 + j * 128 + k * 8, bias);
        const float* y = x + 8 * j + 2 * k;
        words[j][k] = pack_bf16((y[0] * rstd + shift) * weight[0] + bias[0], (y[1] * rstd + shift) * weight[1] + bias[1]);
        words[j][k + 1] =
            pack_bf16((y[2] * rstd + shift) * weight[2] + bias[2], (y[3] * rstd + shift) * weight[3] + bias[3]);
      }
    }
    // Last, so that reading does not wait for them.
#pragma unroll
    for (int j = 0; j < 4; ++j) store_shared((j % 2 ? odd : even) + j / 2 * kHalfBytes, words[j]);
  }
}

// LN of the 16 rows of a warp in a tile of `kDim` channels as above, in few registers: a lane has a quarter of two rows, so
// that each of the norm's parameters is read for both, and reads them twice. Between, it does something else. Returns
// mean / std and 1 / std of a row, for `store_moments`.
template <int kDim, int kHalfBytes, class Between>
__device__ __forceinline__ float2 normalize_row_pairs(u32 tile, u32 norm, int warp, float eps, Between between) {
  const int lane = threadIdx.x % 32, part = lane % 4;
  norm += part * 32;
  // Eight neighbouring lanes use different banks. The second row is the eighth behind the first.
  const u32 even = chunk_address(tile, warp * 16 + (lane & 4) + lane / 8, part), odd = even ^ 64;
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
    shift[i] = rows[i].mean * rstd[i];
  }
#pragma unroll
  for (int j = 0; j < kDim / 32; ++j) {
    const u32 address = (j % 2 ? odd : even) + j / 2 * kHalfBytes;
    u32 words[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) load_shared(address + i * 1024, words[i]);
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
      float weight[4], bias[4];
      load_shared(norm + j * 128 + k * 8, weight);
      load_shared(norm + kDim * 4 + j * 128 + k * 8, bias);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const u32 pair = words[i][k + h];
          const float low = low_half(pair) * rstd[i] - shift[i], high = high_half(pair) * rstd[i] - shift[i];
          words[i][k + h] = pack_bf16(low * weight[2 * h] + bias[2 * h], high * weight[2 * h + 1] + bias[2 * h + 1]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) store_shared(address + i * 1024, words[i]);
  }
  return part ? make_float2(shift[1], rstd[1]) : make_float2(shift[0], rstd[0]);
}

// Those of a tile's rows, from the lanes that have them; for the same warp to read.
__device__ __forceinline__ void store_moments(u32 target, int warp, float2 moments) {
  const int lane = threadIdx.x % 32, part = lane % 4;
  const u32 bits[2] = {static_cast<u32>(__float_as_int(moments.x)), static_cast<u32>(__float_as_int(moments.y))};
  if (part < 2) store_shared(target + (warp * 16 + part * 8 + (lane & 4) + lane / 8) * 8, bits);
  __syncwarp();
}

// (c - mean) / std of the 16 positions of a warp in a tile of 128 channels x 64 positions, where it lies, and 1 / std of
// each position. A lane has two of eight positions at a time, of every eighth channel.
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
      shift[k] = (shift[k] - moments[k].mean) * rstd[k];
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
