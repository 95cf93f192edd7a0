// SPDX-License-Identifier: Apache-2.0
// The output of the triangle multiplicative update, for Hopper (sm_90a):
//   out = sigmoid(LN_in(z) Wgo^T + bgo) * (LN_out(c) Wo^T + bo)
// All tensors are BF16 and c is channel-first; statistics, products and gates FP32. triangle_forward.py says the same.
//
// A persistent grid of one CTA per SM. Four warpgroups walk tiles of 64 positions of one row, each on its own: bulk copies
// of z and c, both norms where the tiles lie, products, gate and stores. While one waits for its copies, or for its
// products, the others work. Both weights stay in shared memory, in an order of rows that gives a thread neighbouring
// channels: its 16 bytes are stored from registers. c is the left operand as it lies, turned. Compiled at run time: see
// nvrtc.py.

#include "triangle.cuh"

#ifndef DIM               // 64 or 128: channels of z and of the output
#define DIM 128
#endif
#ifndef HIDDEN            // 64 or 128: channels of c
#define HIDDEN 128
#endif
#ifndef HAS_BIAS          // of p or g
#define HAS_BIAS 0
#endif

constexpr int kPositions = 64;
constexpr int kGroups = 4;
constexpr int kThreads = kGroups * 128;
constexpr int kHalves = DIM / 64;
constexpr int kBytesZ = kPositions * DIM * 2;
constexpr int kBytesC = kPositions * HIDDEN * 2;
constexpr int kOffsetGate = DIM * HIDDEN * 2;  // behind Wo
constexpr int kOffsetStages = kOffsetGate + DIM * DIM * 2;
constexpr int kOffsetNorms = kOffsetStages + kGroups * (kBytesZ + kBytesC);
constexpr int kOffsetBarriers = kOffsetNorms + 2 * (DIM + HIDDEN) * 4;
constexpr int kRowLanes = DIM / 32;  // lanes that share a row of z, 32 channels each

static_assert(DIM == 64 || DIM == 128, "channels of z");
static_assert(HIDDEN == 64 || HIDDEN == 128, "channels of c");

// triangle_output.py packs this struct.
struct Params {
  TensorMap z_map;  // (bytes, columns, rows, items) in boxes of 128 bytes x 64
  TensorMap c_map;  // (bytes of a row, channels, rows, items) in boxes of 128 bytes x HIDDEN
  const void* parameters[6];  // norm_in weight and bias, norm_out weight and bias, bo, bgo; null: none
  const uint4* p_weight;
  const uint4* g_weight;
  char* out;
  float in_eps, out_eps;
  int parameter_types[6];  // 0: FP32, 1: BF16
  int size, tiles_per_row, num_tiles, unused;
};

struct Tile {
  int item, row, col;
};

__device__ __forceinline__ Tile locate(const Params& params, int index) {
  const int line = index / params.tiles_per_row;
  return {line / params.size, line % params.size, (index - line * params.tiles_per_row) * kPositions};
}

__device__ __forceinline__ float read_parameter(const Params& params, int which, int index, float otherwise) {
  const void* values = params.parameters[which];
  if (!values) return otherwise;
  if (params.parameter_types[which] == 0) return static_cast<const float*>(values)[index];
  return __int_as_float(static_cast<int>(static_cast<const unsigned short*>(values)[index]) << 16);
}

// Rows 64 * i to 64 * i + 63 of a weight, halves of 128 bytes, as the tensor cores read them. Row 8 * j + 2 * t + e of 32
// is channel 8 * t + 2 * j + e.
__device__ __forceinline__ void load_weight(const uint4* weight, int cols, u32 target) {
  const int chunks = cols / 8;
  for (int i = threadIdx.x; i < DIM * chunks; i += kThreads) {
    const int channel = i / chunks, chunk = i % chunks;
    const int row = (channel & ~30) | (channel & 6) << 2 | (channel >> 2 & 6);
    const uint4 value = weight[i];
    const u32 words[4] = {value.x, value.y, value.z, value.w};
    const u32 block = row / 64 * (cols / 64) + chunk / 8;
    store_shared(target + block * 8192 + row % 64 * 128 + ((chunk ^ row) & 7) * 16, words);
  }
}

__device__ __forceinline__ void load_tile(const Params& params, int index, u32 stage, u32 barrier) {
  const Tile tile = locate(params, index);
  arrive_expecting(barrier, kBytesZ + kBytesC);
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    load_box(stage + half * 8192, params.z_map, barrier, half * 128, tile.col, tile.row, tile.item);
  }
  load_box(stage + kBytesZ, params.c_map, barrier, tile.col * 2, 0, tile.row, tile.item);
}

// LN of 16 rows of z, channels of a row in neighbouring lanes. Eight neighbouring lanes use different banks.
__device__ __forceinline__ void normalize_z(u32 stage, u32 norm, int warp, float eps) {
  constexpr int kRows = 32 / kRowLanes;  // at a time
  const int lane = threadIdx.x % 32, part = lane % kRowLanes, index = lane / kRowLanes;
  const int place = kRowLanes == 4 ? (index & 1) << 2 | index >> 1 : (index & 3) << 1 | (index >> 2 & 1) | (index & 8);
#pragma unroll
  for (int pass = 0; pass < 16 / kRows; ++pass) {
    const int row = warp * 16 + pass * kRows + place;
    u32 addresses[4];
    float x[32], total = 0, square = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int chunk = j * kRowLanes + part;
      addresses[j] = stage + chunk / 8 * 8192 + row * 128 + ((chunk ^ row) & 7) * 16;
      u32 pairs[4];
      load_shared(addresses[j], pairs);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        x[8 * j + 2 * k] = low_half(pairs[k]);
        x[8 * j + 2 * k + 1] = high_half(pairs[k]);
        total += x[8 * j + 2 * k] + x[8 * j + 2 * k + 1];
      }
    }
#pragma unroll
    for (int mask = 1; mask < kRowLanes; mask *= 2) total += __shfl_xor_sync(~0u, total, mask);
    const float mean = total * (1.0f / DIM);
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      x[j] -= mean;
      square += x[j] * x[j];
    }
#pragma unroll
    for (int mask = 1; mask < kRowLanes; mask *= 2) square += __shfl_xor_sync(~0u, square, mask);
    const float rstd = rsqrt_approx(square * (1.0f / DIM) + eps);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const u32 channel = norm + (j * kRowLanes + part) * 32;
      u32 words[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float weight[4], bias[4];
        load_shared(channel + half * 16, weight);
        load_shared(channel + DIM * 4 + half * 16, bias);
        const float* y = x + 8 * j + 4 * half;
        words[2 * half] = pack_bf16(y[0] * rstd * weight[0] + bias[0], y[1] * rstd * weight[1] + bias[1]);
        words[2 * half + 1] = pack_bf16(y[2] * rstd * weight[2] + bias[2], y[3] * rstd * weight[3] + bias[3]);
      }
      store_shared(addresses[j], words);
    }
  }
}

// LN of 16 positions of c: a lane has 8 of them, of every 16th channel.
__device__ __forceinline__ void normalize_c(u32 stage, u32 norm, int warp, float eps) {
  constexpr int kRows = HIDDEN / 16;
  const int lane = threadIdx.x % 32, chunk = warp * 2 + lane % 2;
  // Rows of eight neighbouring lanes: 0, 2, 4, 6, so that they use different banks.
  const int first = (lane >> 1 & 3) * 2 + (lane >> 3 & 1) + (lane >> 4) * 8;
  const u32 address = stage + first * 128 + ((chunk ^ first) & 7) * 16;
  u32 pairs[kRows][4];
  float mean[8] = {}, rstd[8] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    load_shared(address + i * 2048, pairs[i]);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      mean[2 * k] += low_half(pairs[i][k]);
      mean[2 * k + 1] += high_half(pairs[i][k]);
    }
  }
#pragma unroll
  for (int k = 0; k < 8; ++k) {
#pragma unroll
    for (int mask = 2; mask < 32; mask *= 2) mean[k] += __shfl_xor_sync(~0u, mean[k], mask);
    mean[k] *= 1.0f / HIDDEN;
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float low = low_half(pairs[i][k]) - mean[2 * k], high = high_half(pairs[i][k]) - mean[2 * k + 1];
      rstd[2 * k] += low * low;
      rstd[2 * k + 1] += high * high;
    }
  }
#pragma unroll
  for (int k = 0; k < 8; ++k) {
#pragma unroll
    for (int mask = 2; mask < 32; mask *= 2) rstd[k] += __shfl_xor_sync(~0u, rstd[k], mask);
    rstd[k] = rsqrt_approx(rstd[k] * (1.0f / HIDDEN) + eps);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const u32 channel = norm + (first + 16 * i) * 4;
    const float weight = load_shared(channel), bias = load_shared(channel + HIDDEN * 4);
    u32 words[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      words[k] = pack_bf16((low_half(pairs[i][k]) - mean[2 * k]) * rstd[2 * k] * weight + bias,
                           (high_half(pairs[i][k]) - mean[2 * k + 1]) * rstd[2 * k + 1] * weight + bias);
    }
    store_shared(address + i * 2048, words);
  }
}

__device__ __forceinline__ void project_tiles(const Params& params, u32 shared) {
  // From lane 0, so that the compiler knows that a warp agrees on it.
  const int cta_warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  const int group = cta_warp / 4, warp = cta_warp % 4, lane = threadIdx.x % 32;
  const bool is_leader = elect_lane() && warp == 0;
  const u32 stage = shared + kOffsetStages + group * (kBytesZ + kBytesC);
  const u32 norms = shared + kOffsetNorms, barrier = shared + kOffsetBarriers + group * 8;
  const int step = gridDim.x * kGroups, begin = blockIdx.x + group * gridDim.x;
  if (is_leader && begin < params.num_tiles) load_tile(params, begin, stage, barrier);
  u32 phase = 0;
  for (int index = begin; index < params.num_tiles; index += step, phase ^= 1) {
    wait_barrier(barrier, phase);
    normalize_z(stage, norms, warp, params.in_eps);
    normalize_c(stage + kBytesZ, norms + 2 * DIM * 4, warp, params.out_eps);
    publish_writes();
    sync_group(group);
    const Tile tile = locate(params, index);
    const i64 position = (static_cast<i64>(tile.item) * params.size + tile.row) * params.size + tile.col;
    const int row = warp * 16 + lane / 4, channel = lane % 4 * 8;
    char* out = params.out + ((position + row) * DIM + channel) * 2;
#pragma unroll
    for (int block = 0; block < DIM / 64; ++block) {
      float p[32], g[32];
      const u64 p_weights = matrix_descriptor(shared + block * (HIDDEN / 64) * 8192);
      const u64 g_weights = matrix_descriptor(shared + kOffsetGate + block * kHalves * 8192);
      const u64 x = matrix_descriptor(stage), y = matrix_descriptor(stage + kBytesZ);
      pin_registers(p);
      pin_registers(g);
      begin_products();
#pragma unroll
      for (int k = 0; k < DIM / 16; ++k) {
        const int offset = k / 4 * 512 + k % 4 * 2;
        multiply_bf16<0>(g, x + offset, g_weights + offset, k > 0);
      }
#pragma unroll
      for (int k = 0; k < HIDDEN / 16; ++k) {
        multiply_bf16<1>(p, y + k * 128, p_weights + k / 4 * 512 + k % 4 * 2, k > 0);
      }
      commit_products();
      wait_for_products();
      pin_registers(p);
      pin_registers(g);
      if (block == DIM / 64 - 1) {
        sync_group(group);  // all are done with the stage
        if (is_leader && index + step < params.num_tiles) load_tile(params, index + step, stage, barrier);
      }
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        float p_bias[8] = {}, g_bias[8] = {};
        if (HAS_BIAS) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int column = block * 64 + part * 32 + channel + i;
            p_bias[i] = read_parameter(params, 4, column, 0);
            g_bias[i] = read_parameter(params, 5, column, 0);
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          u32 words[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int n = part * 16 + j * 4 + half * 2;
            words[j] = pack_bf16((p[n] + p_bias[2 * j]) * sigmoid(g[n] + g_bias[2 * j]),
                                 (p[n + 1] + p_bias[2 * j + 1]) * sigmoid(g[n + 1] + g_bias[2 * j + 1]));
          }
          if (tile.col + row + half * 8 >= params.size) continue;
          char* target = out + (half * 8 * DIM + block * 64 + part * 32) * 2;
          *reinterpret_cast<uint4*>(target) = make_uint4(words[0], words[1], words[2], words[3]);
        }
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) project_output(const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) char memory[];
  const u32 shared = shared_address(memory);  // dynamic memory alone: it starts at a multiple of 1024
  if (threadIdx.x == 0) {
    for (int i = 0; i < kGroups; ++i) init_barrier(shared + kOffsetBarriers + i * 8, 1);
    publish_barriers();
  }
  wait_for_kernel_before();
  load_weight(params.p_weight, HIDDEN, shared);
  load_weight(params.g_weight, DIM, shared + kOffsetGate);
  for (int i = threadIdx.x; i < DIM + HIDDEN; i += kThreads) {
    const bool is_in = i < DIM;
    const int channel = is_in ? i : i - DIM, cols = is_in ? DIM : HIDDEN;
    const u32 target = shared + kOffsetNorms + (is_in ? 0 : 2 * DIM * 4) + channel * 4;
    store_shared(target, read_parameter(params, is_in ? 0 : 2, channel, 1));
    store_shared(target + cols * 4, read_parameter(params, is_in ? 1 : 3, channel, 0));
  }
  publish_writes();
  __syncthreads();
  project_tiles(params, shared);
}
