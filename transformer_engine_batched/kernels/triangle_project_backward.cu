// SPDX-License-Identifier: Apache-2.0
// Backward of the triangle multiplicative update's operands, for Hopper (sm_90a). With x = LN(z), for 128 of the rows of
// Wp and Wg, whose gradient of the operand is `grad`:
//   p = x Wp^T + bp,  g = x Wg^T + bg,  dp = mask * grad * sigmoid(g),  dg = dp * p * (1 - sigmoid(g))
//   dWp = dp^T x,  dWg = dg^T x,  grad_x = dp Wp + dg Wg,  after the last rows grad_z = LN'(grad_x)
// Tensors are BF16; statistics, products and sums FP32. triangle_backward.py says the same in Triton.
//
// LN's weight and bias are put into those of p and g: with hat = (z - mean) / std,  x W^T + b = hat V^T + v. Rows of hat
// have mean zero, so V's may, too. What is left of LN's backward:
//   grad_hat = dp Vp + dg Vg, summed over all rows,  grad_z = (grad_hat - hat * (grad_hat . hat) / D) / std
//   dW = (dy^T hat) * weight + db bias^T;  dweight = column sums of W * (dy^T hat);  dbias = W^T db
// And hat is kept with a number added: sums over the channels of dy^T hat are then multiples of db, which nothing else has
// to find.
//
// A launch for each 128 rows, a persistent grid of one CTA per SM, tiles of 64 positions of one row of z. The weights
// stay in shared memory, their gradients in registers until the end. One warpgroup starts bulk copies, normalizes z where
// it lies, two tiles ahead of the products, and finishes grad_hat; its warps do not wait for each other. Two others have 64
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
#ifndef HAS_BIAS          // of p or g, or LN's
#define HAS_BIAS 0
#endif
#ifndef HAS_GRAD          // grad_hat is added to what is there
#define HAS_GRAD 1
#endif
#ifndef HAS_HAT           // hat and 1 / std are read instead of z
#define HAS_HAT 0
#endif
#ifndef IS_LAST           // the result is the gradient of z
#define IS_LAST 1
#endif

constexpr int kPositions = 64;
constexpr int kMathThreads = 256;
constexpr int kThreads = kMathThreads + 128;
constexpr int kStages = 4;  // of x: products read one, the next is ready, one is normalized, one on its way
constexpr int kHalves = DIM / 64;  // of 128 bytes
constexpr int kPanelBytes = 64 * 128;  // 64 rows of 128 bytes
constexpr int kStageBytes = kHalves * kPanelBytes;
constexpr int kWeightBytes = 128 * DIM * 2;  // halves of 128 rows
constexpr int kTotals = DIM / 2;             // of a thread: 64 rows x DIM columns
constexpr int kOffsetStages = 2 * kWeightBytes;
constexpr int kOffsetGrads = kOffsetStages + kStages * kStageBytes;  // [side]: 64 channels
constexpr int kOffsetDeltas = kOffsetGrads + 2 * kPanelBytes;        // [side]: dp, dg
constexpr int kOffsetShares = kOffsetDeltas + 4 * kPanelBytes;       // [side]: grad_hat of 64 channels; the result
constexpr int kOffsetStaged = kOffsetShares + 2 * kStageBytes;       // grad_hat as it was
constexpr int kOffsetFactors = kOffsetStaged + kStageBytes;          // the mask, in each stage
constexpr int kOffsetRstds = kOffsetFactors + kStages * kPositions * 4;  // 1 / std, in each stage
constexpr int kOffsetTiles = kOffsetRstds + kStages * kPositions * 4;    // of each stage, of each warp that finishes tiles
constexpr int kOffsetBarriers = kOffsetTiles + 4 * kStages * 16;
// Before the first tile, in the place of shares: v of p, then times -log2(e) of g.
constexpr int kOffsetBias = kOffsetShares;
// Behind the last: sums in the place of weights, of rows where gradients of the operand were.
constexpr int kOffsetRowSums = kOffsetGrads;

static_assert(DIM == 64 || DIM == 128, "channels of z");

// triangle_project_backward.py packs this struct.
struct Params {
  TensorMap z_map;         // or of hat: (bytes, columns, rows, items) in boxes of 128 bytes x 16
  TensorMap grad_hat_map;  // the same. So is the result, which takes its place
  TensorMap grad_maps[2];  // of each 64 rows: (bytes of a row, channels, rows, items) in boxes of 128 bytes x 64
  const void* mask;        // null: none. So are the next four
  const void* norm_weight;
  const void* norm_bias;
  const void* p_bias;
  const void* g_bias;
  const float* rstds;      // with hat
  const uint4* p_weight;
  const uint4* g_weight;
  float* sums;       // of each CTA: dWp, dbp, dWg, dbg
  float* norm_sums;  // of each CTA, of this launch: of the norm's weight and bias
  float eps;
  int norm_weight_type, norm_bias_type, p_bias_type, g_bias_type;
  int first_row, num_rows;  // of the weights
  int first_channels[2];    // in the maps of gradients
  int size, tiles_per_row, num_tiles;
  int step_rows, step_tiles;  // as many tiles as there are CTAs, in rows and tiles of a row
};

struct Barriers {
  u32 full;                       // of each stage and 16 positions: z is there
  u32 ready, empty;               // a stage holds x; products have read it
  u32 grads;                      // of each 64 channels: gradients of the operand are there
  u32 shares_full, shares_empty;  // of each 16 positions: both shares of grad_hat are there; may be written
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

// --- The last warpgroup: copies, x in the place of z, grad_hat

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

// The 16 rows of a warp: both shares and what is there already, and LN's backward behind the last rows of the weights. The
// result takes the place of the first share. A lane has a quarter of a row, as when it was normalized.
__device__ __forceinline__ void finish_rows(u32 shared, u32 x, u32 rstds, int warp) {
  constexpr int kChunks = DIM / 32;  // of 16 bytes
  const int lane = threadIdx.x % 32, part = lane % 4, first = warp * 16 + (lane & 4) + lane / 8;
  auto find_place = [&](int pass, int j) {
    return (chunk_address(0, first, part) ^ j % 2 * 64) + j / 2 * kPanelBytes + pass * 1024;
  };
  // Read before anything else is stored, so that it does not wait for that; behind the last rows registers are too few.
  u32 words[kChunks][4];
  auto load_share = [&](int pass, int j) { load_shared(shared + kOffsetShares + find_place(pass, j), words[j]); };
#pragma unroll
  for (int j = 0; j < kChunks; ++j) {
    if (!IS_LAST) load_share(0, j);
  }
#pragma unroll (IS_LAST ? 1 : 2)
  for (int pass = 0; pass < 2; ++pass) {
    float values[kChunks][8], dots[2] = {};
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      const u32 place = find_place(pass, j);
      if (IS_LAST) load_share(pass, j);
#pragma unroll
      for (int k = 0; k < 4; ++k) values[j][2 * k] = low_half(words[j][k]), values[j][2 * k + 1] = high_half(words[j][k]);
      add_values(shared + kOffsetShares + kStageBytes + place, values[j]);
      if (HAS_GRAD) add_values(shared + kOffsetStaged + place, values[j]);
      if (IS_LAST) {
        float hat[8];
        load_values(x + place, hat);
#pragma unroll
        for (int k = 0; k < 8; ++k) dots[k % 2] += values[j][k] * hat[k];
      }
    }
    float rstd = 1, slope = 0;
    if (IS_LAST) {
      rstd = load_shared(rstds + (first + pass * 8) * 4);
      slope = sum_lanes<4>(dots[0] + dots[1]) * rstd * (-1.0f / DIM);
    }
    u32 results[kChunks][4];
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      if (IS_LAST) {
        float hat[8];
        load_values(x + find_place(pass, j), hat);
#pragma unroll
        for (int k = 0; k < 8; ++k) values[j][k] = values[j][k] * rstd + (hat[k] * slope - slope * kHatOffset);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) results[j][k] = pack_bf16(values[j][2 * k], values[j][2 * k + 1]);
    }
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      if (!IS_LAST && pass == 0) load_share(1, j);
    }
#pragma unroll
    for (int j = 0; j < kChunks; ++j) store_shared(shared + kOffsetShares + find_place(pass, j), results[j]);
  }
}

__device__ __forceinline__ void finish_tiles(const Params& params, u32 shared, const Barriers& barriers) {
  const int warp = find_warp() % 4, lane = threadIdx.x % 32;
  const int num_ctas = gridDim.x;
  const u32 factors = shared + kOffsetFactors, rstds = shared + kOffsetRstds;
  const int num_tiles = (params.num_tiles - static_cast<int>(blockIdx.x) + num_ctas - 1) / num_ctas;
  const u32 tiles = shared + kOffsetTiles + warp * (kStages * 16);
  // As `fill_z` has left it: divisions are slow.
  auto find_tile = [&](int i) {
    u32 words[4];
    load_shared(tiles + i % kStages * 16, words);
    return Tile{static_cast<int>(words[0]), static_cast<int>(words[1]), static_cast<int>(words[2])};
  };
  // A warp's 16 rows of z.
  auto fill_z = [&](int i) {
    if (i < num_tiles) {
      const Tile tile = i == 0 ? locate(params, blockIdx.x) : advance(params, find_tile(i - 1));
      if (elect_lane()) {
        const u32 words[4] = {static_cast<u32>(tile.item), static_cast<u32>(tile.row), static_cast<u32>(tile.col), 0};
        const u32 barrier = barriers.full + (i % kStages * 4 + warp) * 8;
        const u32 target = shared + kOffsetStages + i % kStages * kStageBytes + warp * 2048;
        store_shared(tiles + i % kStages * 16, words);
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
  // A warp's 16 rows of what grad_hat is added to.
  auto stage_rows = [&](int i) {
    if (HAS_GRAD && i < num_tiles) {
      const Tile tile = find_tile(i);
      if (elect_lane()) {
        const u32 barrier = barriers.staged + warp * 8, target = shared + kOffsetStaged + warp * 2048;
        arrive_expecting(barrier, kHalves * 2048);
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          load_box(target + half * kPanelBytes, params.grad_hat_map, barrier, half * 128, tile.col + warp * 16, tile.row,
                   tile.item);
        }
      }
    }
    __syncwarp();
  };
  // Of a tile that is finished: products may write shares again, once the result has been read, and z of a later one comes
  // where x was, once products have read that.
  auto release = [&](int i) {
    if (elect_lane()) {
      wait_for_reading_stores();
      arrive(barriers.shares_empty + warp * 8);
    }
    __syncwarp();
    if (i + kStages < num_tiles) wait_barrier(barriers.empty + i % kStages * 8, i / kStages % 2);
    fill_z(i + kStages);
  };
  // In the middle, where there is time until it may be, releases a tile before.
  auto prepare = [&](int i, int finished) {
    const int stage = i % kStages, first = stage * kPositions + warp * 16;
    u32 mask = 0;
    float rstd = 0;
    if (MASK || (HAS_HAT && IS_LAST)) {
      const Tile tile = find_tile(i);
      const int row = warp * 16 + lane;
      if (lane < 16 && tile.col + row < params.size) {
        const i64 position = position_of(params, tile) + row;
        if (MASK) mask = read_mask(params, position);
        if (HAS_HAT && IS_LAST) rstd = params.rstds[position];
      }
    }
    wait_barrier(barriers.full + (stage * 4 + warp) * 8, i / kStages % 2);
    auto release_finished = [&] {
      if (finished >= 0) release(finished);
    };
    if (HAS_HAT) {
      release_finished();
    } else {
      normalize_row_pairs<DIM, kPanelBytes>(shared + kOffsetStages + stage * kStageBytes, rstds + first * 4, warp,
                                            params.eps, release_finished);
      publish_writes();
    }
    if (MASK) pin_value(mask);  // until here it is on its way
    if (lane < 16) {
      if (MASK) store_shared(factors + (first + lane) * 4, decode_mask(mask));
      if (HAS_HAT && IS_LAST) store_shared(rstds + (first + lane) * 4, rstd);
    }
    __syncwarp();
    if (lane == 0) arrive(barriers.ready + stage * 8);
  };
  auto finish = [&](int i) {
    const int stage = i % kStages;
    if (HAS_GRAD) wait_barrier(barriers.staged + warp * 8, i % 2);
    wait_barrier(barriers.shares_full + warp * 8, i % 2);
    finish_rows(shared, shared + kOffsetStages + stage * kStageBytes, rstds + stage * kPositions * 4, warp);
    publish_writes();
    __syncwarp();
    const Tile tile = find_tile(i);
    if (elect_lane()) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        store_box(params.grad_hat_map, shared + kOffsetShares + half * kPanelBytes + warp * 2048, half * 128,
                  tile.col + warp * 16, tile.row, tile.item);
      }
      commit_stores();
    }
    __syncwarp();
    stage_rows(i + 1);
  };
  for (int i = 0; i < kStages; ++i) fill_z(i);
  stage_rows(0);
  prepare(0, -1);
  if (num_tiles > 1) prepare(1, -1);
#pragma unroll 1
  for (int i = 0; i < num_tiles; ++i) {
    finish(i);
    if (i + 2 < num_tiles) {
      prepare(i + 2, i);
    } else {
      release(i);
    }
  }
  if (elect_lane()) wait_for_stores();
  __syncwarp();
}

// --- The other two: 64 channels each

// Rows of p and g: 64 channels x 64 positions each.
__device__ __forceinline__ void start_projections(float (&p)[32], float (&g)[32], u32 shared, int side, int stage) {
  const u64 weights = matrix_descriptor(shared + side * kPanelBytes);
  const u64 x = matrix_descriptor(shared + kOffsetStages + stage * kStageBytes);
  pin_registers(p);
  pin_registers(g);
  begin_products();
#pragma unroll
  for (int k = 0; k < DIM / 16; ++k) {
    const u32 at_weights = k / 4 * (2 * kPanelBytes / 16) + k % 4 * 2, at_x = k / 4 * (kPanelBytes / 16) + k % 4 * 2;
    multiply_bf16<0>(p, step(weights, at_weights), step(x, at_x), k > 0);
    multiply_bf16<0>(g, step(weights, kWeightBytes / 16 + at_weights), step(x, at_x), k > 0);
  }
  commit_products();
}

// grad_hat of 64 channels: 64 positions x DIM.
__device__ __forceinline__ void start_share(float (&grad_hat)[kTotals], u32 shared, int side) {
  const u64 deltas = turned_descriptor(shared + kOffsetDeltas + side * (2 * kPanelBytes), kPanelBytes);
  const u64 weights = turned_descriptor(shared + side * kPanelBytes, 2 * kPanelBytes);
  pin_registers(grad_hat);
  begin_products();
#pragma unroll
  for (int k = 0; k < 8; ++k) {  // 16 channels of dp, then of dg
    multiply_bf16<1, 1>(grad_hat, step(deltas, k / 4 * (kPanelBytes / 16) + k % 4 * 128),
                        step(weights, k / 4 * (kWeightBytes / 16) + k % 4 * 128), k > 0);
  }
  commit_products();
}

__device__ __forceinline__ void start_totals(float (&p_totals)[kTotals], float (&g_totals)[kTotals], u32 shared, int side,
                                             int stage) {
  const u64 deltas = matrix_descriptor(shared + kOffsetDeltas + side * (2 * kPanelBytes));
  const u64 x = turned_descriptor(shared + kOffsetStages + stage * kStageBytes, kPanelBytes);
  pin_registers(p_totals);
  pin_registers(g_totals);
  begin_products();
#pragma unroll
  for (int k = 0; k < 4; ++k) {  // 16 positions
    multiply_bf16<0, 1>(p_totals, step(deltas, k * 2), step(x, k * 128), 1);
    multiply_bf16<0, 1>(g_totals, step(deltas, kPanelBytes / 16 + k * 2), step(x, k * 128), 1);
  }
  commit_products();
}

// V and v of p and g, from all threads of the two warpgroups: DIM / 8 lanes have a row. All is read before anything is
// written: the latency of one load.
__device__ __forceinline__ void prepare_weights(const Params& params, u32 shared) {
  constexpr int kLanes = DIM / 8, kRows = kMathThreads / kLanes, kPasses = 128 / kRows;
  const int thread = thread_index(), chunk = thread % kLanes, first = thread / kLanes;
  float weight[8], bias[8];
  uint4 raw[2][kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int index = (params.first_row + first + pass * kRows) * kLanes + chunk;
    raw[0][pass] = params.p_weight[index];
    raw[1][pass] = params.g_weight[index];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    weight[i] = read_or(params.norm_weight, chunk * 8 + i, params.norm_weight_type, 1);
    bias[i] = read_or(params.norm_bias, chunk * 8 + i, params.norm_bias_type, 0);
  }
#pragma unroll
  for (int kind = 0; kind < 2; ++kind) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = first + pass * kRows;
      float shift;
      u32 words[4];
      fold_norm<kLanes>(raw[kind][pass], weight, bias, words, shift);
      store_shared(chunk_address(shared + kind * kWeightBytes + chunk / 8 * (2 * kPanelBytes), row, chunk), words);
      if (HAS_BIAS && chunk == 0) {
        const int type = kind ? params.g_bias_type : params.p_bias_type;
        shift += read_or(kind ? params.g_bias : params.p_bias, params.first_row + row, type, 0);
        store_shared(shared + kOffsetBias + (kind * 128 + row) * 4, kind ? shift * -1.44269504f : shift);
      }
    }
  }
  publish_writes();
}

// Of a thread's two channels; g's is times -log2(e).
struct Biases {
  float p[2], g[2];
};

// dp and dg of this warp's 16 channels, from p and g, into shared memory. Column 8 * j + i of a product: a lane has i of
// 2 * (lane % 4) and the next.
__device__ __forceinline__ void store_deltas(const float (&p)[32], const float (&g)[32], u32 grads, u32 factors,
                                             u32 deltas, const Biases& biases) {
  const int thread = thread_index(), warp = thread / 32 % 4, lane = thread % 32;
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
          const float gate = sigmoid(g[n], HAS_BIAS ? biases.g[half] : 0);
          dp[k] = (MASK ? grad[k] * factor[k] : grad[k]) * gate;
          const float product = dp[k] * (HAS_BIAS ? p[n] + biases.p[half] : p[n]);
          dg[k] = product - product * gate;
        }
        p_words[i * 2 + half] = pack_bf16(dp[0], dp[1]);
        g_words[i * 2 + half] = pack_bf16(dg[0], dg[1]);
      }
    }
    store_matrices(target ^ pair * 32, p_words);
    store_matrices((target ^ pair * 32) + kPanelBytes, g_words);
  }
}

// grad_hat of this warp's 16 positions, as BF16.
__device__ __forceinline__ void store_share(const float (&grad_hat)[kTotals], u32 share) {
  const int thread = thread_index(), warp = thread / 32 % 4, lane = thread % 32;
  const u32 target = chunk_address(share, warp * 16 + lane % 16, lane / 16);
#pragma unroll
  for (int pair = 0; pair < DIM / 16; ++pair) {
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = pack_bf16(grad_hat[pair * 8 + i * 2], grad_hat[pair * 8 + i * 2 + 1]);
    store_matrices((target ^ pair % 4 * 32) + pair / 4 * kPanelBytes, words);
  }
}

// This CTA's part of the gradients of parameters, by way of shared memory, which nothing else uses any more.
__device__ __forceinline__ void store_totals(const Params& params, u32 shared, float (&p_totals)[kTotals],
                                             float (&g_totals)[kTotals]) {
  const int col = thread_index() % DIM;
  const float weight = read_or(params.norm_weight, col, params.norm_weight_type, 1);
  const float bias = read_or(params.norm_bias, col, params.norm_bias_type, 0);
  const int rows = params.num_rows, first = params.first_row;
  float* sums = params.sums + static_cast<i64>(blockIdx.x) * (2 * rows * (DIM + 1));
  float* g_sums = sums + rows * (DIM + 1);
  float norm_sums[2] = {};
  sync_pair(0);
  store_weight_sums<DIM>(p_totals, shared, shared + kOffsetRowSums, params.p_weight + first * (DIM / 8), weight, bias,
                         sums + first * DIM, sums + rows * DIM + first, norm_sums);
  store_weight_sums<DIM>(g_totals, shared, shared + kOffsetRowSums, params.g_weight + first * (DIM / 8), weight, bias,
                         g_sums + first * DIM, g_sums + rows * DIM + first, norm_sums);
  store_norm_sums<DIM>(norm_sums, shared, params.norm_sums + blockIdx.x * (2 * DIM));
}

// Gradients of the operand, of 64 channels.
__device__ __forceinline__ void load_grads(const Params& params, int index, u32 shared, const Barriers& barriers, int side) {
  const Tile tile = locate(params, index);
  if (elect_lane()) {
    const u32 barrier = barriers.grads + side * 8;
    arrive_expecting(barrier, kPanelBytes);
    load_box(shared + kOffsetGrads + side * kPanelBytes, params.grad_maps[side], barrier, tile.col * 2,
             params.first_channels[side], tile.row, tile.item);
  }
  __syncwarp();
}

__device__ __forceinline__ void multiply_tiles(const Params& params, u32 shared, const Barriers& barriers) {
  int side = find_warp() / 4;
  prepare_weights(params, shared);
  sync_pair(0);
  Biases biases;
  if (HAS_BIAS) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int thread = thread_index();
      const u32 bias = shared + kOffsetBias + (thread / 32 * 16 + thread % 32 / 4 + half * 8) * 4;
      biases.p[half] = load_shared(bias);
      biases.g[half] = load_shared(bias + 512);
    }
    sync_pair(0);  // shares come there
  }
  float p_totals[kTotals], g_totals[kTotals];
#pragma unroll
  for (int n = 0; n < kTotals; ++n) p_totals[n] = g_totals[n] = 0;
  float p[32], g[32];
  if (find_warp() % 4 == 0) load_grads(params, blockIdx.x, shared, barriers, side);
  wait_barrier(barriers.ready, 0);
  start_projections(p, g, shared, side, 0);
  wait_for_products();
  pin_registers(p);
  pin_registers(g);
  const int num_tiles = (params.num_tiles - static_cast<int>(blockIdx.x) + gridDim.x - 1) / gridDim.x;
  int i = 0;
#pragma unroll 1
  do {
    const int stage = i % kStages;
    wait_barrier(barriers.grads + side * 8, i % 2);
    sync_group(side);  // all warps are done with dp and dg of the tile before
    store_deltas(p, g, shared + kOffsetGrads + side * kPanelBytes, shared + kOffsetFactors + stage * (kPositions * 4),
                 shared + kOffsetDeltas + side * (2 * kPanelBytes), biases);
    publish_writes();
    sync_group(side);
    float grad_hat[kTotals];
    start_share(grad_hat, shared, side);
    start_totals(p_totals, g_totals, shared, side, stage);
    const int warp = find_warp();
    side = warp / 4;  // else addresses made of it would be kept, and spilled
    if (warp % 4 == 0 && i + 1 < num_tiles) {
      load_grads(params, blockIdx.x + (i + 1) * gridDim.x, shared, barriers, side);
    }
    __syncwarp();
    wait_for_older_products();
    pin_registers(grad_hat);
    wait_barrier(barriers.shares_empty + warp % 4 * 8, i % 2 ^ 1);
    store_share(grad_hat, shared + kOffsetShares + side * kStageBytes);
    __syncwarp();
    if (elect_lane()) arrive(barriers.shares_full + warp % 4 * 8);
    // The next tile's, or of the last tile once more: products under a condition would be serialized.
    const int next = min(i + 1, num_tiles - 1);
    wait_barrier(barriers.ready + next % kStages * 8, next / kStages % 2);
    start_projections(p, g, shared, side, next % kStages);
    wait_for_older_products();
    __syncwarp();
    if (elect_lane()) arrive(barriers.empty + stage * 8);
    wait_for_products();
    pin_registers(p_totals);
    pin_registers(g_totals);
    pin_registers(p);
    pin_registers(g);
  } while (++i < num_tiles);
  store_totals(params, shared, p_totals, g_totals);
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
  barriers.full = make(kStages * 4, 1);
  barriers.ready = make(kStages, 4);
  barriers.empty = make(kStages, kMathThreads / 32);
  barriers.grads = make(2, 1);
  barriers.shares_full = make(4, 2);
  barriers.shares_empty = make(4, 1);
  barriers.staged = make(4, 1);
  if (threadIdx.x == 0) publish_barriers();
  __syncthreads();
  // The three warpgroups start with 168 registers a thread each, in sum 504 = 56 + 2 * 224. With 216 instead of 224, or
  // with a SPIN_LIMIT, ptxas 13.0 serializes all products (C7512): their sums alone are 192.
  if (threadIdx.x >= kMathThreads) {
    give_registers<56>();
    finish_tiles(params, shared, barriers);
  } else {
    take_registers<224>();
    multiply_tiles(params, shared, barriers);
  }
}
