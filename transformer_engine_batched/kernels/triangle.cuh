// SPDX-License-Identifier: Apache-2.0
// What the kernels of the triangle multiplicative update share: parameters of several types, pairs of BF16,
// gates, sums of lanes, addresses in tiles that are swizzled as the tensor cores read them.
#pragma once

#include "hopper.cuh"

// Types: 0: FP32, 1: BF16, 2: bytes.
__device__ __forceinline__ float read(const void* values, i64 index, int type) {
  if (type == 0) return static_cast<const float*>(values)[index];
  if (type == 1) return __int_as_float(static_cast<int>(static_cast<const unsigned short*>(values)[index]) << 16);
  return static_cast<const unsigned char*>(values)[index];
}

__device__ __forceinline__ float read_or(const void* values, i64 index, int type, float otherwise) {
  return values ? read(values, index, type) : otherwise;
}

__device__ __forceinline__ float low_half(u32 pair) { return __int_as_float(static_cast<int>(pair << 16)); }
__device__ __forceinline__ float high_half(u32 pair) { return __int_as_float(static_cast<int>(pair & 0xFFFF0000)); }

// `shift`: what is added to x, times -log2(e).
__device__ __forceinline__ float sigmoid(float x, float shift = 0) {
  return reciprocal_approx(1.0f + exp2_approx(x * -1.44269504f + shift));
}

// Of `kLanes` neighbours, in each of them.
template <int kLanes>
__device__ __forceinline__ float sum_lanes(float value) {
#pragma unroll
  for (int mask = 1; mask < kLanes; mask *= 2) value += __shfl_xor_sync(~0u, value, mask);
  return value;
}

// The same of several values, step by step: the steps of one hide the others' latency.
template <int kLanes, int kCount>
__device__ __forceinline__ void sum_each(float (&values)[kCount]) {
#pragma unroll
  for (int mask = 1; mask < kLanes; mask *= 2) {
    float others[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) others[i] = __shfl_xor_sync(~0u, values[i], mask);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] += others[i];
  }
}

// Eight BF16 values that 16 bytes of shared memory hold.
__device__ __forceinline__ void load_values(u32 address, float (&x)[8]) {
  u32 pairs[4];
  load_shared(address, pairs);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    x[2 * k] = low_half(pairs[k]);
    x[2 * k + 1] = high_half(pairs[k]);
  }
}

__device__ __forceinline__ void add_values(u32 address, float (&x)[8]) {
  u32 pairs[4];
  load_shared(address, pairs);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    x[2 * k] += low_half(pairs[k]);
    x[2 * k + 1] += high_half(pairs[k]);
  }
}

// Of 16 bytes: row and chunk of a tile of 128-byte rows.
__device__ __forceinline__ u32 chunk_address(u32 tile, int row, int chunk) {
  return tile + row * 128 + ((chunk ^ row) & 7) * 16;
}

// From lane 0, so that the compiler knows that a warp agrees on it.
__device__ __forceinline__ int find_warp() { return __shfl_sync(~0u, thread_index() / 32, 0); }

// A descriptor 16 * `units` bytes further on, by an addition of 32 bits: nothing is carried.
__device__ __forceinline__ u64 step(u64 descriptor, u32 units) {
  return (descriptor & ~u64(0xFFFFFFFF)) | (static_cast<u32>(descriptor) + units);
}
