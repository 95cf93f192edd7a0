// SPDX-License-Identifier: Apache-2.0
// Backward of the triangle multiplicative update's operands, for Hopper (sm_90a). With x = LN(z), for 128 of the rows of
// Wp and Wg, whose gradient of the operand is `grad`:
//   p = x Wp^T + bp,  g = x Wg^T + bg,  dp = mask * grad * sigmoid(g),  dg = dp * p * (1 - sigmoid(g))
//   dWp = dp^T x,  dWg = dg^T x,  grad_x += dp Wp + dg Wg,  after the last rows grad_z = LN'(grad_x)
// Tensors are BF16; statistics, products and sums FP32. triangle_backward.py says the same in Triton.
//
// A launch for each 128 rows, a persistent grid of one CTA per SM, tiles of 64 positions of one row of z. The weights
// stay in shared memory, their gradients in registers until the end. One warpgroup starts bulk copies, normalizes z where
// it lies and finishes grad_x. Two others have 64 channels each and do not wait for each other: while one makes dp and dg,
// the tensor cores are the other's. dp and dg lie in shared memory channel by channel, and are read turned or not.
// Compiled at run time: see nvrtc.py.

#include "triangle.cuh"

#ifndef DIM               // 64 or 128
#define DIM 128
#endif
#ifndef MASK              // 0: none, 1: FP32, 2: BF16, 3: bytes
#define MASK 2
#endif
#ifndef HAS_BIAS          // of p or g
#define HAS_BIAS 0
#endif
#ifndef HAS_GRAD          // grad_x is added to what is there
#define HAS_GRAD 1
#endif
#ifndef IS_LAST           // the result is the gradient of z
#define IS_LAST 1
#endif
#ifndef NUM_STAGES
#define NUM_STAGES 3
#endif

constexpr int kPositions = 64;
constexpr int kMathThreads = 256;
constexpr int kThreads = kMathThreads + 128;
constexpr int kHalves = DIM / 64;  // of 128 bytes
constexpr int kPanelBytes = 64 * 128;  // 64 rows of 128 bytes
constexpr int kStageBytes = kHalves * kPanelBytes;
constexpr int kWeightBytes = 128 * DIM * 2;  // halves of 128 rows
constexpr int kTotals = DIM / 2;             // of a thread: 64 rows x DIM columns
constexpr int kOffsetStages = 2 * kWeightBytes;
constexpr int kOffsetGrads = kOffsetStages + NUM_STAGES * kStageBytes;  // [side]: 64 channels
constexpr int kOffsetDeltas = kOffsetGrads + 2 * kPanelBytes;            // [side]: dp, dg
constexpr int kOffsetShares = kOffsetDeltas + 4 * kPanelBytes;           // [side]: grad_x of 64 channels
constexpr int kOffsetStaged = kOffsetShares + 2 * kStageBytes;           // grad_x as it was, z once more
constexpr int kOffsetNorm = kOffsetStaged + 2 * kStageBytes;
constexpr int kOffsetFactors = kOffsetNorm + 2 * DIM * 4;
constexpr int kOffsetTiles = kOffsetFactors + NUM_STAGES * kPositions * 4;
constexpr int kTileSlots = NUM_STAGES + 1;  // of 16 bytes: a tile is finished while one is copied that is three ahead
constexpr int kOffsetBarriers = kOffsetTiles + kTileSlots * 16;
// Of a row of z: eight lanes normalize it, one for each four channels finishes its gradient.
constexpr int kNormLanes = 8;
constexpr int kLanes = DIM / 4;
constexpr int kRows = 32 / kLanes;   // of a warp at a time
constexpr int kAtOnce = IS_LAST ? 2 : 4;  // as many of these, whose steps hide each other's latency: few warps run here

static_assert(DIM == 64 || DIM == 128, "channels of z");
static_assert(NUM_STAGES >= 3, "one stage each for copies, the norm and products");

// triangle_project_backward.py packs this struct.
struct Params {
  TensorMap z_map;  // (bytes, columns, rows, items) in boxes of 128 bytes x 64
  TensorMap z_part_map;  // in boxes of 128 bytes x 16. So is the next one
  TensorMap grad_x_map;
  TensorMap p_map;  // (bytes, rows, 1) in boxes of 128 bytes x 128
  TensorMap g_map;
  TensorMap grad_maps[2];  // of each 64 rows: (bytes of a row, channels, rows, items) in boxes of 128 bytes x 64
  const void* mask;        // null: none. So are the next four
  const void* norm_weight;
  const void* norm_bias;
  const void* p_bias;
  const void* g_bias;
  char* out;         // may be what `grad_x_map` reads
  float* sums;       // of each CTA: dWp, dbp, dWg, dbg
  float* norm_sums;  // of each CTA: of the norm's weight and bias
  float eps;
  int norm_weight_type, norm_bias_type, p_bias_type, g_bias_type;
  int first_row, num_rows;  // of the weights
  int first_channels[2];    // in the maps of gradients
  int size, tiles_per_row, num_tiles;
};

struct Barriers {
  u32 weights;
  u32 full, ready, empty;         // a stage holds z; it holds x; it is free
  u32 grads;                      // of each 64 channels: gradients of the operand are there
  u32 shares_full, shares_empty;  // of each 16 positions: both shares of grad_x are there; both are read
  u32 staged;                     // of each 16 positions: what is behind `kOffsetStaged` is there
};

struct Tile {
  int item, row, col;
};

__device__ __forceinline__ Tile locate(const Params& params, int index) {
  const int line = index / params.tiles_per_row;
  return {line / params.size, line % params.size, (index - line * params.tiles_per_row) * kPositions};
}

__device__ __forceinline__ i64 position_of(const Params& params, const Tile& tile) {
  return (static_cast<i64>(tile.item) * params.size + tile.row) * params.size + tile.col;
}

// --- The last warpgroup: copies, x in the place of z, grad_x

__device__ __forceinline__ void load_weights(const Params& params, u32 shared, u32 barrier) {
  arrive_expecting(barrier, 2 * kWeightBytes);
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    load_box(shared + half * (2 * kPanelBytes), params.p_map, barrier, half * 128, params.first_row, 0);
    load_box(shared + kWeightBytes + half * (2 * kPanelBytes), params.g_map, barrier, half * 128, params.first_row, 0);
  }
}

// LN of the 16 rows of a warp, eight at a time. Returns mean * rstd and rstd: lane 8 * i + j has those of row
// 4 * j + i, j below 4.
__device__ __forceinline__ float2 normalize_rows(u32 stage, u32 norm, int warp, float eps) {
  const int lane = threadIdx.x % 32, part = lane % kNormLanes;
  float2 moments = make_float2(0, 0);
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    u32 addresses[2];
    float x[2][8 * kHalves], mean[2], rstd[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      addresses[i] = chunk_address(stage, warp * 16 + pass * 8 + i * 4 + lane / kNormLanes, part);
      float total = 0;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        u32 pairs[4];
        load_shared(addresses[i] + half * kPanelBytes, pairs);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int n = half * 8 + k * 2;
          x[i][n] = low_half(pairs[k]);
          x[i][n + 1] = high_half(pairs[k]);
          total += x[i][n] + x[i][n + 1];
        }
      }
      mean[i] = total;
    }
    sum_each<kNormLanes>(mean);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      mean[i] *= 1.0f / DIM;
      float square = 0;
#pragma unroll
      for (int n = 0; n < 8 * kHalves; ++n) {
        x[i][n] -= mean[i];
        square += x[i][n] * x[i][n];
      }
      rstd[i] = square;
    }
    sum_each<kNormLanes>(rstd);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      rstd[i] = rsqrt_approx(rstd[i] * (1.0f / DIM) + eps);
      if (IS_LAST && part == pass * 2 + i) moments = make_float2(mean[i] * rstd[i], rstd[i]);
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      u32 words[2][4];
#pragma unroll
      for (int quarter = 0; quarter < 2; ++quarter) {
        float weight[4], bias[4];
        const u32 address = norm + (half * 64 + part * 8 + quarter * 4) * 4;
        load_shared(address, weight);
        load_shared(address + DIM * 4, bias);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float* y = x[i] + half * 8 + quarter * 4;
          words[i][quarter * 2] =
              pack_bf16(y[0] * rstd[i] * weight[0] + bias[0], y[1] * rstd[i] * weight[1] + bias[1]);
          words[i][quarter * 2 + 1] =
              pack_bf16(y[2] * rstd[i] * weight[2] + bias[2], y[3] * rstd[i] * weight[3] + bias[3]);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) store_shared(addresses[i] + half * kPanelBytes, words[i]);
    }
  }
  return moments;
}

// Bits of the mask at a position, and the number that they are.
__device__ __forceinline__ u32 read_mask(const Params& params, i64 position) {
  if (MASK == 1) return static_cast<const u32*>(params.mask)[position];
  if (MASK == 2) return static_cast<const unsigned short*>(params.mask)[position];
  return static_cast<const unsigned char*>(params.mask)[position];
}

__device__ __forceinline__ float decode_mask(u32 bits) {
  if (MASK == 1) return __int_as_float(static_cast<int>(bits));
  return MASK == 2 ? low_half(bits) : static_cast<float>(bits);
}

// Four values that 8 bytes of shared memory hold.
__device__ __forceinline__ void load_values(u32 address, float (&x)[4]) {
  float pairs[2];
  load_shared(address, pairs);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    x[2 * k] = low_half(static_cast<u32>(__float_as_int(pairs[k])));
    x[2 * k + 1] = high_half(static_cast<u32>(__float_as_int(pairs[k])));
  }
}

__device__ __forceinline__ void add_values(u32 address, float (&x)[4]) {
  float y[4];
  load_values(address, y);
#pragma unroll
  for (int k = 0; k < 4; ++k) x[k] += y[k];
}

// What a lane keeps of its four channels: the norm's weight, sums for the gradients of its parameters.
struct NormState {
  float weight[4], weight_sums[4], bias_sums[4];
};

// The 16 rows of a warp: both shares and what is there already, and LN's backward behind the last rows of the weights.
__device__ __forceinline__ void finish_rows(const Params& params, const Tile& tile, u32 shared, int warp, float2 moments,
                                            NormState& state) {
  const int lane = threadIdx.x % 32, part = lane % kLanes, first = warp * 16 + lane / kLanes;
  const int num_rows = params.size - tile.col;  // of the tile
  char* out = params.out + (position_of(params, tile) + first) * (DIM * 2) + part * 8;
  const u32 panel = shared + part / 16 * kPanelBytes + part % 2 * 8;
#pragma unroll 1
  for (int row = first; row < first + 16; row += kAtOnce * kRows) {
    float x[kAtOnce][4], hat[kAtOnce][4], rstd[kAtOnce], sums[2 * kAtOnce] = {};  // of x; of x * hat
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const u32 address = chunk_address(panel, row + i * kRows, part / 2);
      load_values(address + kOffsetShares, x[i]);
      if (IS_LAST) load_values(address + kOffsetStaged + kStageBytes, hat[i]);
      add_values(address + kOffsetShares + kStageBytes, x[i]);
      if (HAS_GRAD) add_values(address + kOffsetStaged, x[i]);
    }
    if (IS_LAST) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int source = (row + i * kRows & 3) * 8 + (row + i * kRows >> 2 & 3);
        const float shift = __shfl_sync(~0u, moments.x, source);
        rstd[i] = __shfl_sync(~0u, moments.y, source);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          hat[i][k] = hat[i][k] * rstd[i] - shift;
          state.weight_sums[k] += x[i][k] * hat[i][k];
          state.bias_sums[k] += x[i][k];
          x[i][k] *= state.weight[k];
          sums[i] += x[i][k];
          sums[i + kAtOnce] += x[i][k] * hat[i][k];
        }
      }
      sum_each<kLanes>(sums);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float factor = rstd[i] * (-1.0f / DIM), sum = sums[i] * factor, product = sums[i + kAtOnce] * factor;
#pragma unroll
        for (int k = 0; k < 4; ++k) x[i][k] = hat[i][k] * product + (x[i][k] * rstd[i] + sum);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (row + i * kRows >= num_rows) continue;
      *reinterpret_cast<uint2*>(out + (row - first + i * kRows) * (DIM * 2)) =
          make_uint2(pack_bf16(x[i][0], x[i][1]), pack_bf16(x[i][2], x[i][3]));
    }
  }
}

__device__ __forceinline__ void finish_tiles(const Params& params, u32 shared, const Barriers& barriers) {
  const int thread = threadIdx.x - kMathThreads, warp = thread / 32, lane = thread % 32;
  const int step = gridDim.x;
  const u32 norm = shared + kOffsetNorm, factors = shared + kOffsetFactors;
  const int num_tiles = (params.num_tiles - static_cast<int>(blockIdx.x) + step - 1) / step;
  // As the thread that copies the tile has left it: divisions are slow.
  auto find_tile = [&](int i) {
    u32 words[4];
    load_shared(shared + kOffsetTiles + i % kTileSlots * 16, words);
    return Tile{static_cast<int>(words[0]), static_cast<int>(words[1]), static_cast<int>(words[2])};
  };
  auto fill_z = [&](int i) {
    if (thread == 0 && i < num_tiles) {
      const Tile tile = locate(params, blockIdx.x + i * step);
      const u32 words[4] = {static_cast<u32>(tile.item), static_cast<u32>(tile.row), static_cast<u32>(tile.col), 0};
      const int stage = i % NUM_STAGES;
      const u32 barrier = barriers.full + stage * 8, target = shared + kOffsetStages + stage * kStageBytes;
      wait_barrier(barriers.empty + stage * 8, i / NUM_STAGES % 2 ^ 1);
      store_shared(shared + kOffsetTiles + i % kTileSlots * 16, words);
      arrive_expecting(barrier, kStageBytes);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        load_box(target + half * kPanelBytes, params.z_map, barrier, half * 128, tile.col, tile.row, tile.item);
      }
    }
    __syncwarp();
  };
  // A warp's 16 rows of what grad_x is finished with.
  auto stage_rows = [&](int i, const Tile& tile) {
    constexpr int kTensors = HAS_GRAD + IS_LAST;
    if (kTensors > 0 && lane == 0 && i < num_tiles) {
      const u32 barrier = barriers.staged + warp * 8, target = shared + kOffsetStaged + warp * 2048;
      arrive_expecting(barrier, kTensors * kHalves * 2048);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const int col = tile.col + warp * 16;
        if (HAS_GRAD) {
          load_box(target + half * kPanelBytes, params.grad_x_map, barrier, half * 128, col, tile.row, tile.item);
        }
        if (IS_LAST) {
          load_box(target + kStageBytes + half * kPanelBytes, params.z_part_map, barrier, half * 128, col, tile.row,
                   tile.item);
        }
      }
    }
    __syncwarp();
  };
  auto normalize = [&](int i) {
    const int stage = i % NUM_STAGES;
    wait_barrier(barriers.full + stage * 8, i / NUM_STAGES % 2);
    const Tile tile = find_tile(i);
    const bool is_masked = MASK && thread < kPositions;
    u32 mask = 0;
    if (is_masked && tile.col + thread < params.size) mask = read_mask(params, position_of(params, tile) + thread);
    const float2 moments = normalize_rows(shared + kOffsetStages + stage * kStageBytes, norm, warp, params.eps);
    pin_value(mask);  // until here it is on its way
    if (is_masked) store_shared(factors + (stage * kPositions + thread) * 4, decode_mask(mask));
    publish_writes();
    __syncwarp();
    if (lane == 0) arrive(barriers.ready + stage * 8);
    return moments;
  };
  NormState state;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    state.weight[k] = load_shared(norm + (lane % kLanes * 4 + k) * 4);
    state.weight_sums[k] = state.bias_sums[k] = 0;
  }
  if (thread == 0) load_weights(params, shared, barriers.weights);
  for (int i = 0; i < NUM_STAGES; ++i) fill_z(i);
  stage_rows(0, locate(params, blockIdx.x));
  // Tiles that are normalized and not finished: no more, so that the copy of the next has a tile's time.
  constexpr int kAhead = 1;
  float2 moments[kAhead + 1] = {};
#pragma unroll 1
  for (int i = -kAhead; i < num_tiles; ++i) {
    if (i + kAhead < num_tiles) moments[kAhead] = normalize(i + kAhead);
    if (i >= 0) {
      if (HAS_GRAD || IS_LAST) wait_barrier(barriers.staged + warp * 8, i % 2);
      wait_barrier(barriers.shares_full + warp * 8, i % 2);
      finish_rows(params, find_tile(i), shared, warp, moments[0], state);
      __syncwarp();
      if (lane == 0) arrive(barriers.shares_empty + warp * 8);
      stage_rows(i + 1, find_tile(i + 1));
      fill_z(i + NUM_STAGES);  // products of this tile are done, or nearly so
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) moments[k] = moments[k + 1];
  }
  if (IS_LAST) {
    // Rows of a warp, then warps, in a fixed order.
    float* sums = params.norm_sums + static_cast<i64>(blockIdx.x) * (2 * DIM);
    const u32 parts = shared + kOffsetShares;  // which all warps have read behind the barrier
    sync_group(2);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int mask = kLanes; mask < 32; mask *= 2) {
        state.weight_sums[k] += __shfl_xor_sync(~0u, state.weight_sums[k], mask);
        state.bias_sums[k] += __shfl_xor_sync(~0u, state.bias_sums[k], mask);
      }
      if (lane < kLanes) {
        store_shared(parts + (warp * 2 * DIM + lane * 4 + k) * 4, state.weight_sums[k]);
        store_shared(parts + (warp * 2 * DIM + DIM + lane * 4 + k) * 4, state.bias_sums[k]);
      }
    }
    sync_group(2);
    for (int i = thread; i < 2 * DIM; i += 128) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < 4; ++w) sum += load_shared(parts + (w * 2 * DIM + i) * 4);
      sums[i] = sum;
    }
  }
}

// --- The other two: 64 channels each

// Rows of p and g: 64 channels x 64 positions each.
__device__ __forceinline__ void start_projections(float (&p)[32], float (&g)[32], u64 weights, u64 x) {
  pin_registers(p);
  pin_registers(g);
  begin_products();
#pragma unroll
  for (int k = 0; k < DIM / 16; ++k) {
    const int at_weights = k / 4 * (2 * kPanelBytes / 16) + k % 4 * 2, at_x = k / 4 * (kPanelBytes / 16) + k % 4 * 2;
    multiply_bf16<0>(p, weights + at_weights, x + at_x, k > 0);
    multiply_bf16<0>(g, weights + kWeightBytes / 16 + at_weights, x + at_x, k > 0);
  }
  commit_products();
}

// Of a thread's two channels.
struct ChannelState {
  float p_bias[2], g_bias[2], p_sums[2], g_sums[2];
};

// dp and dg of this warp's 16 channels, from p and g, into shared memory. Column 8 * j + i of a product: a lane has i of
// 2 * (lane % 4) and the next.
__device__ __forceinline__ void store_deltas(const float (&p)[32], const float (&g)[32], u32 grads, u32 factors,
                                             u32 deltas, int warp, ChannelState& state) {
  const int lane = threadIdx.x % 32;
  const u32 source = chunk_address(grads, warp * 16 + lane / 4, 0) + lane % 4 * 4;
  const u32 target = chunk_address(deltas, warp * 16 + lane % 16, lane / 16);
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    u32 p_words[4], g_words[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int j = pair * 2 + i;
      float factor[2];
      if (MASK) load_shared(factors + j * 32 + lane % 4 * 8, factor);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const u32 word = static_cast<u32>(__float_as_int(load_shared((source ^ j * 16) + half * 1024)));
        const float grad[2] = {low_half(word), high_half(word)};
        float dp[2], dg[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int n = j * 4 + half * 2 + k;
          float p_value = p[n], g_value = g[n];
          if (HAS_BIAS) p_value += state.p_bias[half], g_value += state.g_bias[half];
          const float gate = sigmoid(g_value);
          dp[k] = (MASK ? grad[k] * factor[k] : grad[k]) * gate;
          dg[k] = dp[k] * p_value * (1.0f - gate);
          if (HAS_BIAS) state.p_sums[half] += dp[k], state.g_sums[half] += dg[k];
        }
        p_words[i * 2 + half] = pack_bf16(dp[0], dp[1]);
        g_words[i * 2 + half] = pack_bf16(dg[0], dg[1]);
      }
    }
    store_matrices(target ^ pair * 32, p_words);
    store_matrices((target ^ pair * 32) + kPanelBytes, g_words);
  }
}

// grad_x of this warp's 16 positions, as BF16.
__device__ __forceinline__ void store_share(const float (&grad_x)[kTotals], u32 share, int warp) {
  const int lane = threadIdx.x % 32;
  const u32 target = chunk_address(share, warp * 16 + lane % 16, lane / 16);
#pragma unroll
  for (int pair = 0; pair < DIM / 16; ++pair) {
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = pack_bf16(grad_x[pair * 8 + i * 2], grad_x[pair * 8 + i * 2 + 1]);
    store_matrices((target ^ pair % 4 * 32) + pair / 4 * kPanelBytes, words);
  }
}

__device__ __forceinline__ void store_totals(float* target, const float (&totals)[kTotals]) {
#pragma unroll
  for (int n = 0; n < kTotals; n += 2) {
    *reinterpret_cast<float2*>(target + n / 2 % 2 * 8 * DIM + n / 4 * 8) = make_float2(totals[n], totals[n + 1]);
  }
}

// Gradients of the operand, of 64 channels.
__device__ __forceinline__ void load_grads(const Params& params, int index, int side, u32 target, u32 barrier) {
  const Tile tile = locate(params, index);
  arrive_expecting(barrier, kPanelBytes);
  load_box(target, params.grad_maps[side], barrier, tile.col * 2, params.first_channels[side], tile.row, tile.item);
}

// `side` is a constant, and so are the addresses of all operands: registers are scarce here.
template <int side>
__device__ __forceinline__ void multiply_tiles(const Params& params, u32 shared, const Barriers& barriers) {
  // From lane 0, so that the compiler knows that a warp agrees on it.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32 % 4, 0), lane = threadIdx.x % 32;
  const u32 grads = shared + kOffsetGrads + side * kPanelBytes, grads_full = barriers.grads + side * 8;
  const u32 deltas_at = shared + kOffsetDeltas + side * (2 * kPanelBytes);
  const u32 share = shared + kOffsetShares + side * kStageBytes;
  const u64 weights = matrix_descriptor(shared + side * kPanelBytes);
  const u64 turned_weights = turned_descriptor(shared + side * kPanelBytes, 2 * kPanelBytes);
  const u64 x = matrix_descriptor(shared + kOffsetStages);
  const u64 turned_x = turned_descriptor(shared + kOffsetStages, kPanelBytes);
  const u64 deltas = matrix_descriptor(deltas_at);
  const u64 turned_deltas = turned_descriptor(deltas_at, kPanelBytes);
  ChannelState state;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (HAS_BIAS) {
      const int row = params.first_row + side * 64 + warp * 16 + lane / 4;
      state.p_bias[half] = read_or(params.p_bias, row + half * 8, params.p_bias_type, 0);
      state.g_bias[half] = read_or(params.g_bias, row + half * 8, params.g_bias_type, 0);
    }
    state.p_sums[half] = state.g_sums[half] = 0;
  }
  float p_totals[kTotals], g_totals[kTotals];
#pragma unroll
  for (int n = 0; n < kTotals; ++n) p_totals[n] = g_totals[n] = 0;
  float p[32], g[32];
  if (threadIdx.x % 128 == 0) load_grads(params, blockIdx.x, side, grads, grads_full);
  __syncwarp();
  wait_barrier(barriers.weights, 0);
  wait_barrier(barriers.ready, 0);
  start_projections(p, g, weights, x);
  wait_for_products();
  pin_registers(p);
  pin_registers(g);
  const int num_tiles = (params.num_tiles - static_cast<int>(blockIdx.x) + gridDim.x - 1) / gridDim.x;
  int i = 0;
#pragma unroll 1
  do {
    const int stage = i % NUM_STAGES;
    wait_barrier(grads_full, i % 2);
    sync_group(side);  // all warps are done with dp and dg of the tile before
    store_deltas(p, g, grads, shared + kOffsetFactors + stage * (kPositions * 4), deltas_at, warp, state);
    publish_writes();
    sync_group(side);
    float grad_x[kTotals];
    pin_registers(grad_x);
    pin_registers(p_totals);
    pin_registers(g_totals);
    begin_products();
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // 16 channels
      multiply_bf16<1, 1>(grad_x, turned_deltas + k * 128, turned_weights + k * 128, k > 0);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      multiply_bf16<1, 1>(grad_x, turned_deltas + kPanelBytes / 16 + k * 128,
                          turned_weights + kWeightBytes / 16 + k * 128, 1);
    }
    commit_products();
    const u64 tile = turned_x + stage * (kStageBytes / 16);
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // 16 positions
      multiply_bf16<0, 1>(p_totals, deltas + k * 2, tile + k * 128, 1);
      multiply_bf16<0, 1>(g_totals, deltas + kPanelBytes / 16 + k * 2, tile + k * 128, 1);
    }
    commit_products();
    if (threadIdx.x % 128 == 0 && i + 1 < num_tiles) {
      load_grads(params, blockIdx.x + (i + 1) * gridDim.x, side, grads, grads_full);
    }
    __syncwarp();
    wait_for_older_products();
    pin_registers(grad_x);
    wait_barrier(barriers.shares_empty + warp * 8, i % 2 ^ 1);
    store_share(grad_x, share, warp);
    __syncwarp();
    if (lane == 0) arrive(barriers.shares_full + warp * 8);
    // The next tile's, or of the last tile once more: products under a condition would be serialized.
    const int next = min(i + 1, num_tiles - 1);
    wait_barrier(barriers.ready + next % NUM_STAGES * 8, next / NUM_STAGES % 2);
    start_projections(p, g, weights, x + next % NUM_STAGES * (kStageBytes / 16));
    wait_for_older_products();
    __syncwarp();
    if (lane == 0) arrive(barriers.empty + stage * 8);
    wait_for_products();
    pin_registers(p_totals);
    pin_registers(g_totals);
    pin_registers(p);
    pin_registers(g);
  } while (++i < num_tiles);
  const int rows = params.num_rows;
  const int row = params.first_row + side * 64 + warp * 16 + lane / 4;  // and the eighth behind it
  float* sums = params.sums + static_cast<i64>(blockIdx.x) * (2 * rows * (DIM + 1));
  float* g_sums = sums + rows * (DIM + 1);
  store_totals(sums + row * DIM + lane % 4 * 2, p_totals);
  store_totals(g_sums + row * DIM + lane % 4 * 2, g_totals);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float p_sum = sum_lanes<4>(state.p_sums[half]), g_sum = sum_lanes<4>(state.g_sums[half]);
    if (lane % 4 == 0) {
      sums[rows * DIM + row + half * 8] = p_sum;
      g_sums[rows * DIM + row + half * 8] = g_sum;
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) project_backward(const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) char memory[];
  const u32 shared = shared_address(memory);  // dynamic memory alone: it starts at a multiple of 1024
  u32 next = shared + kOffsetBarriers;
  // Of the main thread's making.
  auto make = [&](int number, int count) {
    const u32 first = next;
    if (threadIdx.x == 0) {
      for (int i = 0; i < number; ++i) init_barrier(first + i * 8, count);
    }
    next += number * 8;
    return first;
  };
  Barriers barriers;
  barriers.weights = make(1, 1);
  barriers.full = make(NUM_STAGES, 1);
  barriers.ready = make(NUM_STAGES, 4);
  barriers.empty = make(NUM_STAGES, kMathThreads / 32);
  barriers.grads = make(2, 1);
  barriers.shares_full = make(4, 2);
  barriers.shares_empty = make(4, 1);
  barriers.staged = make(4, 1);
  if (threadIdx.x == 0) publish_barriers();
  for (int i = threadIdx.x; i < DIM; i += kThreads) {
    store_shared(shared + kOffsetNorm + i * 4, read_or(params.norm_weight, i, params.norm_weight_type, 1));
    store_shared(shared + kOffsetNorm + (DIM + i) * 4, read_or(params.norm_bias, i, params.norm_bias_type, 0));
  }
  __syncthreads();
  // The three warpgroups start with 168 registers a thread each, in sum 504 = 56 + 2 * 224. With 216 instead of 224, or
  // with a SPIN_LIMIT, ptxas 13.0 serializes all products (C7512): their sums alone are 192.
  if (threadIdx.x >= kMathThreads) {
    give_registers<56>();
    finish_tiles(params, shared, barriers);
  } else {
    take_registers<224>();
    if (threadIdx.x < 128) {
      multiply_tiles<0>(params, shared, barriers);
    } else {
      multiply_tiles<1>(params, shared, barriers);
    }
  }
}
