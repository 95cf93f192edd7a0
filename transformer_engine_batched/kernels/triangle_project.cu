// SPDX-License-Identifier: Apache-2.0
// Both operands of the triangle multiplicative update's contraction, for Hopper (sm_90a):
//   x = LN(z);  [a | b] = mask * sigmoid(x Wg^T + bg) * (x Wp^T + bp), each [items, HIDDEN, padded, padded]
// z and weights are BF16; statistics, products and gates FP32. triangle_forward.py says the same in Triton.
//
// A persistent grid of one CTA per SM walks tiles of 128 positions of a padded matrix. All weights stay in shared memory.
// One warpgroup starts the bulk copies of z and normalizes tiles where they lie; one makes operand a, one b, 32 channels
// at a time, while the products of the next 32 are under way. Weights are the rows of a product and positions its columns:
// 8 rows of Wp, 8 of Wg, and so on, so that a thread holds both p and g of one channel. Columns are positions in an order
// that gives a thread neighbours: its 16 bytes are stored from registers. Compiled at run time: see nvrtc.py.

#include "triangle.cuh"

#ifndef DIM               // 64 or 128
#define DIM 128
#endif
#ifndef HIDDEN            // a multiple of 64
#define HIDDEN 128
#endif
#define NONE 0            // find amaxes only
#define E4M3 1
#define E5M2 2
#define BF16 3
#ifndef OUT_TYPE
#define OUT_TYPE E4M3
#endif
#ifndef HAS_MASK
#define HAS_MASK 1
#endif
#ifndef HAS_BIAS          // of p or g
#define HAS_BIAS 0
#endif
#ifndef IS_EVEN           // no padding
#define IS_EVEN 1
#endif
#ifndef RAISES            // amaxes are raised
#define RAISES 1
#endif
#ifndef NUM_STAGES
#define NUM_STAGES 3
#endif

constexpr int kPositions = 128;
constexpr int kMathThreads = 256;
constexpr int kMathWarps = kMathThreads / 32;
constexpr int kThreads = kMathThreads + 128;
constexpr int kHalves = DIM / 64;  // of 128 bytes
constexpr int kBlockChannels = 32;
constexpr int kBlocks = HIDDEN / kBlockChannels;  // of one operand
constexpr int kBlockBytes = 64 * DIM * 2;         // p and g
constexpr int kStageBytes = kPositions * DIM * 2;
constexpr int kVector = OUT_TYPE == BF16 ? 8 : 16;  // positions in 16 bytes
constexpr int kGroup = 4 * kVector;                 // of the four threads that share a channel
constexpr int kGroups = kPositions / kGroup;
// Positions outside count as masked, so that they raise no amax.
constexpr bool kHasFactors = HAS_MASK || !IS_EVEN;
constexpr int kOffsetStages = 2 * kBlocks * kBlockBytes;
constexpr int kOffsetFactors = kOffsetStages + NUM_STAGES * kStageBytes;
constexpr int kOffsetNorm = kOffsetFactors + NUM_STAGES * kPositions * 4;
constexpr int kOffsetBarriers = kOffsetNorm + 2 * DIM * 4;
// Lanes that share a row of z, 32 channels each; rows of a lane in a pass over 16 rows of a warp.
constexpr int kRowLanes = DIM / 32;
constexpr int kLaneRows = kRowLanes / 2;

static_assert(DIM == 64 || DIM == 128, "channels of z");
static_assert(kBlocks % 2 == 0, "the two sets of products take turns");
static_assert(NUM_STAGES >= 3, "one stage each for copies, the norm and products");

// triangle_project.py packs this struct.
struct Params {
  TensorMap z_map;  // (bytes, contracted, other, items) in boxes of 128 bytes x box_positions
  TensorMap p_map;  // (bytes, rows, 1) in boxes of 128 bytes x 8
  TensorMap g_map;
  const void* mask;  // null: none. So are the next four
  const void* norm_weight;
  const void* norm_bias;
  const void* p_bias;
  const void* g_bias;
  char* outs[2];        // a, b
  const float* scales;  // null: from amaxes
  float* amaxes;
  float* scale_invs;  // 16 bytes apart, as cuBLASLt wants them
  i64 mask_row_stride, mask_col_stride, mask_item_stride;
  float eps, amax_epsilon;
  int mask_type, norm_weight_type, norm_bias_type, p_bias_type, g_bias_type;  // 0: FP32, 1: BF16, 2: bytes
  int is_power_of_2;
  int size, padded, num_tiles;
  int box_positions;     // divides kPositions and padded
  int is_column_major;   // consecutive tiles lie below each other: neighbours in memory when the first index is contracted
};

struct Ring {
  int stage = 0;
  u32 phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == NUM_STAGES) {
      stage = 0;
      phase ^= 1;
    }
  }
};

struct Barriers {
  u32 full, ready, empty, weights;  // a stage holds z; it holds x; it is free; the weights are there
};

struct Tile {
  int item, position;  // the first of a padded matrix
};

__device__ __forceinline__ Tile locate(const Params& params, int index) {
  const int per_item = params.padded * params.padded / kPositions;
  Tile tile;
  tile.item = index / per_item;
  index -= tile.item * per_item;
  tile.position = index * kPositions;
  if (params.is_column_major) {
    tile.position = index % params.padded * params.padded + index / params.padded * kPositions;
  }
  return tile;
}

// Exchanges the bits of a position that a lane of the product has with those that count its columns: its own inverse.
__device__ __forceinline__ int exchange_bits(int position) {
  constexpr int kUp = kVector == 16 ? 3 : 2;
  constexpr int kLow = 6;
  return (position & ~(kLow | kLow << kUp)) | (position & kLow) << kUp | (position >> kUp & kLow);
}

// --- The first warpgroup: z, and x in its place

__device__ __forceinline__ void load_weights(const Params& params, u32 shared, u32 barrier) {
  arrive_expecting(barrier, 2 * kBlocks * kBlockBytes);
  // Box i: 8 rows of p or g, of one half, of one block.
#pragma unroll 1
  for (int i = 0; i < 2 * kBlocks * kHalves * 8; ++i) {
    const int slice = i % 8, half = i / 8 % kHalves, block = i / 8 / kHalves;
    const TensorMap& map = slice % 2 ? params.g_map : params.p_map;
    load_box(shared + i * 1024, map, barrier, half * 128, block * kBlockChannels + slice / 2 * 8, 0);
  }
}

__device__ __forceinline__ void load_tile(const Params& params, int index, u32 target, u32 barrier) {
  const Tile tile = locate(params, index);
  arrive_expecting(barrier, kStageBytes);
  for (int first = 0; first < kPositions; first += params.box_positions) {
    const int position = tile.position + first;
    const int row = position / params.padded, col = position - row * params.padded;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      load_box(target + half * (kPositions * 128) + first * 128, params.z_map, barrier, half * 128, col, row, tile.item);
    }
  }
}

// LN of the rows of one stage that this warp has, 16 at a time, which are a set that `exchange_bits` maps to itself. Eight
// neighbouring lanes read, and write, different banks.
__device__ __forceinline__ void normalize_rows(u32 stage, u32 norm, int warp, float eps) {
  constexpr int kHigh = kVector == 16 ? 4 : 3;
  const int lane = threadIdx.x % 32, part = lane % kRowLanes, index = lane / kRowLanes;
  int first = warp / 2 * 64 + warp % 2 * (kVector == 16 ? 8 : 32);
  int rows[kLaneRows];
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const int b0 = index & 1, b1 = index >> 1 & 1, b2 = index >> 2 & 1, b3 = index >> 3;
    if (kRowLanes == 4) {
      rows[i] = first + b1 * 2 + (b0 ^ i) * 4 + (b2 << kHigh) + (b0 << (kHigh + 1));
    } else {
      rows[i] = first + b1 * 2 + b0 * 4 + ((b1 ^ b3) << kHigh) + ((b0 ^ b2) << (kHigh + 1));
    }
  }
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    u32 pairs[kLaneRows][4][4];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const int row = rows[i] + pass;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int chunk = j * kRowLanes + part;
        load_shared(stage + chunk / 8 * (kPositions * 128) + row * 128 + ((chunk ^ row) & 7) * 16, pairs[i][j]);
      }
    }
    __syncwarp();  // before any of these rows is overwritten
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const int row = exchange_bits(rows[i] + pass);
      float x[32];
      float total = 0, square = 0;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const u32 pair = pairs[i][j / 4][j % 4];
        x[2 * j] = low_half(pair);
        x[2 * j + 1] = high_half(pair);
        total += x[2 * j] + x[2 * j + 1];
      }
      const float mean = sum_lanes<kRowLanes>(total) * (1.0f / DIM);
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        x[j] -= mean;
        square += x[j] * x[j];
      }
      const float rstd = rsqrt_approx(sum_lanes<kRowLanes>(square) * (1.0f / DIM) + eps);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int chunk = j * kRowLanes + part;
        float weight[2][4], bias[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          load_shared(norm + chunk * 32 + half * 16, weight[half]);
          load_shared(norm + DIM * 4 + chunk * 32 + half * 16, bias[half]);
        }
        u32 words[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int n = k % 2 * 2;
          words[k] = pack_bf16(x[8 * j + 2 * k] * rstd * weight[k / 2][n] + bias[k / 2][n],
                               x[8 * j + 2 * k + 1] * rstd * weight[k / 2][n + 1] + bias[k / 2][n + 1]);
        }
        store_shared(stage + chunk / 8 * (kPositions * 128) + row * 128 + ((chunk ^ row) & 7) * 16, words);
      }
    }
  }
}

// The mask at the tile's position of this thread, 0 outside.
__device__ __forceinline__ float read_factor(const Params& params, const Tile& tile, int thread) {
  const int position = tile.position + thread;
  const int row = position / params.padded, col = position - row * params.padded;
  if (!IS_EVEN && (row >= params.size || col >= params.size)) return 0;
  return read_or(params.mask, tile.item * params.mask_item_stride + row * params.mask_row_stride +
                                  col * params.mask_col_stride, params.mask_type, 1);
}

__device__ __forceinline__ void normalize_tiles(const Params& params, int warp, u32 shared, const Barriers& barriers) {
  const int thread = threadIdx.x - kMathThreads;
  const u32 norm = shared + kOffsetNorm;
  const bool is_leader = elect_lane();
  if (warp == 1 && is_leader) load_weights(params, shared, barriers.weights);
  // Four threads share a channel of the product; vector i of thread t: factors 4 * i to 4 * i + 3 of its positions.
  const int member = thread / kVector % 4, place = thread / kGroup * kVector + thread % kVector;
  const u32 factors = shared + kOffsetFactors + place / 4 * 64 + member * 16 + place % 4 * 4;
  Ring filling, ring;
  const int step = gridDim.x;
  int index_to_fill = blockIdx.x;
  auto fill = [&] {
    if (warp == 0 && is_leader && index_to_fill < params.num_tiles) {
      wait_barrier(barriers.empty + filling.stage * 8, filling.phase ^ 1);
      load_tile(params, index_to_fill, shared + kOffsetStages + filling.stage * kStageBytes,
                barriers.full + filling.stage * 8);
    }
    index_to_fill += step;
    filling.advance();
  };
  // A stage is filled again two tiles later, when the products are done with it: waiting for it delays no norm.
  for (int i = 0; i < NUM_STAGES - 2; ++i) fill();
  for (int index = blockIdx.x; index < params.num_tiles; index += step, ring.advance()) {
    fill();
    __syncwarp();
    float factor = 0;
    if (kHasFactors) factor = read_factor(params, locate(params, index), thread);
    wait_barrier(barriers.full + ring.stage * 8, ring.phase);
    normalize_rows(shared + kOffsetStages + ring.stage * kStageBytes, norm, warp, params.eps);
    if (kHasFactors) store_shared(factors + ring.stage * (kPositions * 4), factor);
    publish_writes();
    __syncwarp();
    if (thread % 32 == 0) arrive(barriers.ready + ring.stage * 8);
  }
}

// --- The other two: one operand each

__device__ __forceinline__ void start_products(float (&products)[64], u64 weights, u64 positions) {
  pin_registers(products);
  begin_products();
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
#pragma unroll
    for (int k = 0; k < 8; k += 2) {  // 16 channels: 32 bytes
      multiply_bf16(products, weights + half * (8192 / 16) + k, positions + half * (kPositions * 128 / 16) + k,
                    half + k > 0);
    }
  }
  commit_products();
}

// What the epilogue of one operand needs.
struct Epilogue {
  char* out;  // of the first tile's channel of this thread
  float scale;
  int member;  // of the four threads that share a channel
  float p_bias, g_bias;
};

// Gates, codes and stores: this thread's 32 positions of one channel.
__device__ __forceinline__ void store_channel(const Epilogue& epilogue, const float (&products)[64], u32 factors,
                                              const int (&num_inside)[kGroups], float& amax) {
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    u32 words[4];
#pragma unroll
    for (int i = 0; i < kVector / 4; ++i) {
      float factor[4], values[4];
      if (kHasFactors) load_shared(factors + (group * (kVector / 4) + i) * 64, factor);
#pragma unroll
      for (int f = 0; f < 4; ++f) {
        const int column = exchange_bits(group * kGroup + i * 4 + f);  // of thread 0 of four
        const int n = column / 8 * 4 + column % 2;
        float p = products[n], g = products[n + 2];
        if (HAS_BIAS) p += epilogue.p_bias, g += epilogue.g_bias;
        values[f] = p * sigmoid(g);
        if (kHasFactors) values[f] *= factor[f];
        if (RAISES) amax = fmaxf(amax, fabsf(values[f]));
      }
      if (OUT_TYPE == E4M3 || OUT_TYPE == E5M2) {
        const float s = epilogue.scale;
        constexpr auto pack = OUT_TYPE == E4M3 ? pack_e4m3 : pack_e5m2;
        words[i % 4] = pack(values[0] * s, values[1] * s, values[2] * s, values[3] * s);
      } else if (OUT_TYPE == BF16) {
        words[i % 2 * 2] = pack_bf16(values[0], values[1]);
        words[i % 2 * 2 + 1] = pack_bf16(values[2], values[3]);
      }
    }
    if (OUT_TYPE == NONE) continue;
    if (!IS_EVEN && num_inside[group] < kVector) {
      // By bits: a product with 0 could be -0 or NaN.
      constexpr int kPerWord = kVector / 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int count = min(max(num_inside[group] - i * kPerWord, 0), kPerWord);
        words[i] &= static_cast<u32>((u64(1) << (count * (32 / kPerWord))) - 1);
      }
    }
    *reinterpret_cast<uint4*>(epilogue.out + group * 64) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// `reference.quantizers.scale_from_amax`, operation by operation.
__device__ __forceinline__ float compute_scale(const Params& params, float amax) {
  if (amax < params.amax_epsilon) amax = params.amax_epsilon;
  float scale = (OUT_TYPE == E5M2 ? 57344.0f : 448.0f) / amax;
  if (scale > 3.4028234663852886e38f) scale = 3.4028234663852886e38f;
  if (params.is_power_of_2) scale = __int_as_float(__float_as_int(scale) & -8388608);
  return amax > 0 && amax <= 3.4028234663852886e38f ? scale : 1.0f;
}

__device__ __forceinline__ void project_tiles(const Params& params, int warp, u32 shared, const Barriers& barriers) {
  const int side = warp / 4, lane = threadIdx.x % 32;
  const int channel = warp % 4 * 8 + lane / 4;  // in each block
  constexpr int kOutBytes = OUT_TYPE == BF16 ? 2 : 1;
  const float known_amax = params.amaxes ? params.amaxes[side] : 0;
  float amax = 0;
  Epilogue epilogue;
  epilogue.member = lane % 4;
  epilogue.scale = 1;
  if (OUT_TYPE == E4M3 || OUT_TYPE == E5M2) {
    epilogue.scale = params.scales ? params.scales[side] : compute_scale(params, known_amax);
    if (blockIdx.x == 0 && threadIdx.x % 128 == 0) params.scale_invs[4 * side] = 1.0f / epilogue.scale;
  }
  float first[64], second[64];
  const u64 weights = matrix_descriptor(shared + side * (kBlocks * kBlockBytes));
  const u64 stages = matrix_descriptor(shared + kOffsetStages);
  Ring ring;
  wait_barrier(barriers.weights, 0);
  for (int index = blockIdx.x; index < params.num_tiles; index += gridDim.x) {
    const Tile tile = locate(params, index);
    const u64 positions = stages + ring.stage * (kStageBytes / 16);
    const u32 factors = shared + kOffsetFactors + ring.stage * (kPositions * 4) + epilogue.member * 16;
    const i64 area = static_cast<i64>(params.padded) * params.padded;
    const i64 matrix = static_cast<i64>(tile.item) * HIDDEN + channel;
    epilogue.out = params.outs[side] + (matrix * area + tile.position + epilogue.member * kVector) * kOutBytes;
    int num_inside[kGroups] = {};
    if (!IS_EVEN) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const int position = tile.position + group * kGroup + epilogue.member * kVector;
        const int row = position / params.padded, col = position - row * params.padded;
        num_inside[group] = row < params.size ? params.size - col : 0;
      }
    }
    auto finish_block = [&](const float(&products)[64], int block) {
      if (HAS_BIAS) {
        const int row = side * HIDDEN + block * kBlockChannels + channel;
        epilogue.p_bias = read_or(params.p_bias, row, params.p_bias_type, 0);
        epilogue.g_bias = read_or(params.g_bias, row, params.g_bias_type, 0);
      }
      store_channel(epilogue, products, factors, num_inside, amax);
      epilogue.out += kBlockChannels * area * kOutBytes;
    };
    wait_barrier(barriers.ready + ring.stage * 8, ring.phase);
    start_products(first, weights, positions);
#pragma unroll
    for (int block = 0; block < kBlocks; block += 2) {
      start_products(second, weights + (block + 1) * (kBlockBytes / 16), positions);
      wait_for_older_products();
      pin_registers(first);
      finish_block(first, block);
      if (block + 2 < kBlocks) {
        start_products(first, weights + (block + 2) * (kBlockBytes / 16), positions);
        wait_for_older_products();
      } else {
        // None of the next tile is started here: ptxas 13.0 serializes all products of a loop (C7514) whose end some
        // pass under way. The other warpgroup has the tensor cores.
        wait_for_products();
      }
      pin_registers(second);
      finish_block(second, block + 1);
    }
    __syncwarp();
    if (lane == 0) arrive(barriers.empty + ring.stage * 8);
    ring.advance();
  }
  if (RAISES) {
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, mask));
    // On the bits, which order floats that are not negative; a NaN that is there is larger than all.
    const int bits = __float_as_int(amax);
    if (lane == 0 && bits > __float_as_int(known_amax)) atomicMax(reinterpret_cast<int*>(params.amaxes + side), bits);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) project_operands(const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) char memory[];
  const u32 shared = shared_address(memory);  // dynamic memory alone: it starts at a multiple of 1024
  const u32 full = shared + kOffsetBarriers;
  const Barriers barriers = {full, full + NUM_STAGES * 8, full + NUM_STAGES * 16, full + NUM_STAGES * 24};
  if (threadIdx.x == 0) {
    for (int i = 0; i < NUM_STAGES; ++i) {
      init_barrier(barriers.full + i * 8, 1);
      init_barrier(barriers.ready + i * 8, 4);
      init_barrier(barriers.empty + i * 8, kMathWarps);
    }
    init_barrier(barriers.weights, 1);
    publish_barriers();
  }
  wait_for_kernel_before();
  for (int i = threadIdx.x; i < DIM; i += kThreads) {
    store_shared(shared + kOffsetNorm + i * 4, read_or(params.norm_weight, i, params.norm_weight_type, 1));
    store_shared(shared + kOffsetNorm + (DIM + i) * 4, read_or(params.norm_bias, i, params.norm_bias_type, 0));
  }
  __syncthreads();
  // From lane 0, so that the compiler knows that a warp agrees on it.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  // The three warpgroups start with 168 registers a thread each, in sum 504 = 120 + 2 * 192.
  if (warp >= kMathWarps) {
    give_registers<120>();
    normalize_tiles(params, warp - kMathWarps, shared, barriers);
  } else {
    take_registers<192>();
    project_tiles(params, warp, shared, barriers);
  }
}
