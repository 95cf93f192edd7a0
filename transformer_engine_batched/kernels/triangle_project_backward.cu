// SPDX-License-Identifier: Apache-2.0
// Backward of the triangle multiplicative update's operands, for Hopper (sm_90a). With x = LN(z), for 128 of the rows of
// Wp and Wg, whose gradient of the operand is `grad`:
//   p = x Wp^T + bp,  g = x Wg^T + bg,  dp = mask * grad * sigmoid(g),  dg = dp * p * (1 - sigmoid(g))
//   dWp = dp^T x,  dWg = dg^T x,  grad_x += dp Wp + dg Wg,  after the last rows grad_z = LN'(grad_x)
// Tensors are BF16; statistics, products and sums FP32. triangle_backward.py says the same in Triton.
//
// A launch for each 128 rows, a persistent grid of one CTA per SM, tiles of 64 positions of one row of z. The weights
// stay in shared memory, their gradients in registers until the end. One warpgroup starts bulk copies, normalizes z where
// it lies and finishes grad_x, which takes the place of x there; its warps do not wait for each other. Two others have 64
// channels each and do not wait for each other: while one makes dp and dg, the tensor cores are the other's. dp and dg lie
// in shared memory channel by channel, and are read turned or not.
// Compiled at run time: see nvrtc.py.

#include "triangle_norms.cuh"

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
#ifndef NUM_STAGES        // as many as there is room for
#define NUM_STAGES (IS_LAST ? 3 : 4)
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
constexpr int kOffsetStaged = kOffsetShares + 2 * kStageBytes;           // grad_x as it was; if IS_LAST, z once more
constexpr int kOffsetNorm = kOffsetStaged + (1 + IS_LAST) * kStageBytes;
constexpr int kOffsetFactors = kOffsetNorm + 2 * DIM * 4;
constexpr int kOffsetTiles = kOffsetFactors + NUM_STAGES * kPositions * 4;
constexpr int kTileSlots = 4;  // of 16 bytes, of each warp of the last warpgroup
constexpr int kOffsetMoments = kOffsetTiles + 4 * kTileSlots * 16;  // of the tile that is being finished
constexpr int kOffsetBarriers = kOffsetMoments + IS_LAST * kPositions * 8;
// Lanes that finish the gradient of a row of z, eight channels each.
constexpr int kLanes = DIM / 8;
constexpr int kRows = 32 / kLanes;  // of a warp at a time
constexpr int kAtOnce = 2;  // as many of these, whose steps hide each other's latency: few warps run here

static_assert(DIM == 64 || DIM == 128, "channels of z");
static_assert(NUM_STAGES == 3 || NUM_STAGES == 4, "stages for copies, the norm and products; slots for tiles");

// triangle_project_backward.py packs this struct.
struct Params {
  TensorMap z_map;       // (bytes, columns, rows, items) in boxes of 128 bytes x 16
  TensorMap grad_x_map;  // the same. So is the result, which takes its place
  TensorMap p_map;  // (bytes, rows, 1) in boxes of 128 bytes x 128
  TensorMap g_map;
  TensorMap grad_maps[2];  // of each 64 rows: (bytes of a row, channels, rows, items) in boxes of 128 bytes x 64
  const void* mask;        // null: none. So are the next four
  const void* norm_weight;
  const void* norm_bias;
  const void* p_bias;
  const void* g_bias;
  float* sums;       // of each CTA: dWp, dbp, dWg, dbg
  float* norm_sums;  // of each CTA: of the norm's weight and bias
  float eps;
  int norm_weight_type, norm_bias_type, p_bias_type, g_bias_type;
  int first_row, num_rows;  // of the weights
  int first_channels[2];    // in the maps of gradients
  int size, tiles_per_row, num_tiles;
  int step_rows, step_tiles;  // as many tiles as there are CTAs, in rows and tiles of a row
};

struct Barriers {
  u32 weights;
  u32 full;                       // of each stage and 16 positions: z is there
  u32 ready, empty;               // a stage holds x; products have read it
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

// That of the same CTA's next one.
__device__ __forceinline__ Tile advance(const Params& params, Tile tile) {
  tile.row += params.step_rows;
  tile.col += params.step_tiles * kPositions;
  if (tile.col >= params.size) {
    tile.col -= params.tiles_per_row * kPositions;
    ++tile.row;
  }
  while (tile.row >= params.size) {
    tile.row -= params.size;
    ++tile.item;
  }
  return tile;
}

__device__ __forceinline__ i64 position_of(const Params& params, const Tile& tile) {
  return (static_cast<i64>(tile.item) * params.size + tile.row) * params.size + tile.col;
}

// --- The last warpgroup: copies, x in the place of z, grad_x

__device__ __forceinline__ void load_weights(const Params& params, u32 shared, u32 barrier) {
  if (elect_lane()) {
    arrive_expecting(barrier, 2 * kWeightBytes);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      load_box(shared + half * (2 * kPanelBytes), params.p_map, barrier, half * 128, params.first_row, 0);
      load_box(shared + kWeightBytes + half * (2 * kPanelBytes), params.g_map, barrier, half * 128, params.first_row, 0);
    }
  }
  __syncwarp();
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

// What a lane keeps of its eight channels between tiles: sums for the gradients of the norm's weight, then bias. They are
// volatile, else they would take registers where others are needed more.
struct alignas(16) NormSums {
  float values[16];
};

__device__ __forceinline__ void load_sums(const NormSums& sums, float (&x)[16]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const volatile float4& four = reinterpret_cast<const volatile float4*>(sums.values)[k];
    x[4 * k] = four.x, x[4 * k + 1] = four.y, x[4 * k + 2] = four.z, x[4 * k + 3] = four.w;
  }
}

__device__ __forceinline__ void store_sums(NormSums& sums, const float (&x)[16]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    volatile float4& four = reinterpret_cast<volatile float4*>(sums.values)[k];
    four.x = x[4 * k], four.y = x[4 * k + 1], four.z = x[4 * k + 2], four.w = x[4 * k + 3];
  }
}

// The 16 rows of a warp: both shares and what is there already, and LN's backward behind the last rows of the weights. The
// result takes the place of x once products have read it.
__device__ __forceinline__ void finish_rows(u32 shared, u32 stage, int warp, u32 empty, u32 parity, NormSums& norm_sums) {
  const int lane = threadIdx.x % 32, part = lane % kLanes;
  const u32 panel = part / 8 * kPanelBytes, norm = shared + kOffsetNorm + part * 32;
  float col_sums[16];  // of x * hat, then of x
  if (IS_LAST) load_sums(norm_sums, col_sums);
#pragma unroll 1
  for (int first = 0; first < 16; first += kAtOnce * kRows) {
    float x[kAtOnce][8], sums[2 * kAtOnce] = {};  // of x * weight; of x * weight * hat
    float row_moments[kAtOnce][2];  // mean / std, 1 / std
    u32 places[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = first + i * kRows + lane / kLanes;
      places[i] = chunk_address(panel, warp * 16 + row, part);
      load_values(shared + kOffsetShares + places[i], x[i]);
      add_values(shared + kOffsetShares + kStageBytes + places[i], x[i]);
      if (HAS_GRAD) add_values(shared + kOffsetStaged + places[i], x[i]);
      if (IS_LAST) {
        load_shared(shared + kOffsetMoments + (warp * 16 + row) * 8, row_moments[i]);
        u32 pairs[4];
        load_shared(shared + kOffsetStaged + kStageBytes + places[i], pairs);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float weight[4];
          load_shared(norm + half * 16, weight);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const float z = k % 2 ? high_half(pairs[half * 2 + k / 2]) : low_half(pairs[half * 2 + k / 2]);
            const float hat = z * row_moments[i][1] - row_moments[i][0];
            const int n = half * 4 + k;
            col_sums[n] += x[i][n] * hat;
            col_sums[8 + n] += x[i][n];
            x[i][n] *= weight[k];
            sums[i] += x[i][n];
            sums[i + kAtOnce] += x[i][n] * hat;
          }
        }
      }
    }
    if (IS_LAST) {
      sum_each<kLanes>(sums);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float rstd = row_moments[i][1], factor = rstd * (-1.0f / DIM);
        const float product = sums[i + kAtOnce] * factor;
        const float slope = product * rstd, offset = sums[i] * factor - product * row_moments[i][0];
        float z[8];
        load_values(shared + kOffsetStaged + kStageBytes + places[i], z);
#pragma unroll
        for (int k = 0; k < 8; ++k) x[i][k] = x[i][k] * rstd + (z[k] * slope + offset);
      }
    }
    if (first == 0) wait_barrier(empty, parity);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      u32 words[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) words[k] = pack_bf16(x[i][2 * k], x[i][2 * k + 1]);
      store_shared(stage + places[i], words);
    }
  }
  if (IS_LAST) store_sums(norm_sums, col_sums);
}

__device__ __forceinline__ void finish_tiles(const Params& params, u32 shared, const Barriers& barriers) {
  // From lane 0, so that the compiler knows that a warp agrees on it.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32 % 4, 0), lane = threadIdx.x % 32;
  const int step = gridDim.x;
  const u32 norm = shared + kOffsetNorm, factors = shared + kOffsetFactors;
  const int num_tiles = (params.num_tiles - static_cast<int>(blockIdx.x) + step - 1) / step;
  const u32 tiles = shared + kOffsetTiles + warp * (kTileSlots * 16);
  // As `fill_z` has left it: divisions are slow.
  auto find_tile = [&](int i) {
    u32 words[4];
    load_shared(tiles + i % kTileSlots * 16, words);
    return Tile{static_cast<int>(words[0]), static_cast<int>(words[1]), static_cast<int>(words[2])};
  };
  // A warp's 16 rows of z, where the same warp's result of a tile before may still be read from.
  auto fill_z = [&](int i) {
    if (i < num_tiles) {
      const Tile tile = i == 0 ? locate(params, blockIdx.x) : advance(params, find_tile(i - 1));
      if (elect_lane()) {
        const u32 words[4] = {static_cast<u32>(tile.item), static_cast<u32>(tile.row), static_cast<u32>(tile.col), 0};
        const u32 barrier = barriers.full + (i % NUM_STAGES * 4 + warp) * 8;
        const u32 target = shared + kOffsetStages + i % NUM_STAGES * kStageBytes + warp * 2048;
        wait_for_reading_stores();
        store_shared(tiles + i % kTileSlots * 16, words);
        arrive_expecting(barrier, kHalves * 2048);
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          load_box(target + half * kPanelBytes, params.z_map, barrier, half * 128, tile.col + warp * 16, tile.row,
                   tile.item);
        }
      }
    }
    __syncwarp();
  };
  // A warp's 16 rows of what grad_x is finished with.
  auto stage_rows = [&](int i) {
    constexpr int kTensors = HAS_GRAD + IS_LAST;
    if (kTensors > 0 && i < num_tiles) {
      const Tile tile = find_tile(i);
      if (elect_lane()) {
        const u32 barrier = barriers.staged + warp * 8, target = shared + kOffsetStaged + warp * 2048;
        const int col = tile.col + warp * 16;
        arrive_expecting(barrier, kTensors * kHalves * 2048);
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          const u32 part = target + half * kPanelBytes;
          if (HAS_GRAD) load_box(part, params.grad_x_map, barrier, half * 128, col, tile.row, tile.item);
          if (IS_LAST) load_box(part + kStageBytes, params.z_map, barrier, half * 128, col, tile.row, tile.item);
        }
      }
    }
    __syncwarp();
  };
  auto normalize = [&](int i) {
    const int stage = i % NUM_STAGES;
    u32 mask = 0;
    if (MASK) {
      const Tile tile = find_tile(i);
      const int row = warp * 16 + lane;
      if (lane < 16 && tile.col + row < params.size) mask = read_mask(params, position_of(params, tile) + row);
    }
    wait_barrier(barriers.full + (stage * 4 + warp) * 8, i / NUM_STAGES % 2);
    const u32 tile_at = shared + kOffsetStages + stage * kStageBytes;
    const float2 moments = normalize_row_pairs<DIM, kPanelBytes>(tile_at, norm, warp, params.eps, [&] {
      // The stage whose result was stored last: by now it has been read.
      if (i > 1) fill_z(i + NUM_STAGES - 2);
    });
    if (MASK) {
      pin_value(mask);  // until here it is on its way
      if (lane < 16) store_shared(factors + (stage * kPositions + warp * 16 + lane) * 4, decode_mask(mask));
    }
    publish_writes();
    __syncwarp();
    if (lane == 0) arrive(barriers.ready + stage * 8);
    return moments;
  };
  auto finish = [&](int i, NormSums& state) {
    const int stage = i % NUM_STAGES;
    const u32 target = shared + kOffsetStages + stage * kStageBytes;
    if (HAS_GRAD || IS_LAST) wait_barrier(barriers.staged + warp * 8, i % 2);
    wait_barrier(barriers.shares_full + warp * 8, i % 2);
    finish_rows(shared, target, warp, barriers.empty + stage * 8, i / NUM_STAGES % 2, state);
    publish_writes();
    __syncwarp();
    const Tile tile = find_tile(i);
    if (elect_lane()) {
      arrive(barriers.shares_empty + warp * 8);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        store_box(params.grad_x_map, target + half * kPanelBytes + warp * 2048, half * 128, tile.col + warp * 16,
                  tile.row, tile.item);
      }
      commit_stores();
    }
    __syncwarp();
    stage_rows(i + 1);
  };
  NormSums state;
  if (IS_LAST) store_sums(state, {});
  if (warp == 0) load_weights(params, shared, barriers.weights);
  for (int i = 0; i < NUM_STAGES; ++i) fill_z(i);
  stage_rows(0);
  const float2 moments = normalize(0);
  if (IS_LAST) store_moments(shared + kOffsetMoments, warp, moments);
#pragma unroll 1
  for (int i = 0; i < num_tiles; ++i) {
    // One tile ahead, so that the products always have work.
    float2 next = make_float2(0, 0);
    if (i + 1 < num_tiles) next = normalize(i + 1);
    finish(i, state);
    if (IS_LAST) store_moments(shared + kOffsetMoments, warp, next);
  }
  if (elect_lane()) wait_for_stores();
  __syncwarp();
  if (IS_LAST) {
    // Rows of a warp, then warps, in a fixed order.
    float* sums = params.norm_sums + static_cast<i64>(blockIdx.x) * (2 * DIM);
    const u32 parts = shared + kOffsetShares;  // which all warps have read behind the barrier
    sync_group(2);
    float col_sums[16];
    load_sums(state, col_sums);
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      float sum = col_sums[k];
#pragma unroll
      for (int mask = kLanes; mask < 32; mask *= 2) sum += __shfl_xor_sync(~0u, sum, mask);
      if (lane < kLanes) store_shared(parts + (warp * 2 * DIM + k / 8 * DIM + lane * 8 + k % 8) * 4, sum);
    }
    sync_group(2);
    for (int i = threadIdx.x % 128; i < 2 * DIM; i += 128) {
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
  if (elect_lane()) {
    arrive_expecting(barrier, kPanelBytes);
    load_box(target, params.grad_maps[side], barrier, tile.col * 2, params.first_channels[side], tile.row, tile.item);
  }
  __syncwarp();
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
  if (warp == 0) load_grads(params, blockIdx.x, side, grads, grads_full);
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
    if (warp == 0 && i + 1 < num_tiles) {
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
  barriers.full = make(NUM_STAGES * 4, 1);
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
