// SPDX-License-Identifier: Apache-2.0
// Backward of the triangle multiplicative update's output, for Hopper (sm_90a). With x = LN_in(z), y = LN_out(c),
// u = Wo y + bo, s = sigmoid(Wgo x + bgo):
//   du = s * grad_out;  dg = du * u * (1 - s);  grad_x = Wgo^T dg;  grad_c = LN_out's backward of Wo^T du
//   dWo = sum of du y^T;  dWgo = sum of dg x^T;  dbo = sum of du;  dbgo = sum of dg
// All tensors are BF16 and c is channel-first; statistics, sums and gates FP32. triangle_backward.py says the same.
//
// The norms' weights and biases are put into Wo, bo, Wgo and bgo, as triangle_project_backward.cu has it for LN_in. With
// c' = (c - mean) / std and r = 1 / std of c,  Wo y + bo = V c' + v:
//   grad_c = r * (V^T du - c' * (mean of c' * V^T du)),  and that mean is (du . V c') / H
// Of LN_in's backward the operands' kernel does the rest: it gets the gradient of hat, which is V_g^T dg, and hat itself.
//
// A persistent grid of one CTA per SM walks tiles of 64 positions of one row, bulk copies of z, c and grad_out ahead of it.
// One warpgroup normalizes tiles where they lie, and copies hat out. The other two share the channels: products for u and s,
// du in the place of grad_out and dg beside it, products for half of grad_hat and grad_c, and the sums over positions, which
// stay in registers until the end. Both weights stay in shared memory. Compiled at run time: see nvrtc.py.

#include "triangle_norms.cuh"

#define E4M3 1
#define E5M2 2
#define BF16 3
#ifndef OUT_TYPE          // of grad_c
#define OUT_TYPE E5M2
#endif
#ifndef HAS_BIAS          // of any norm, u or the gate
#define HAS_BIAS 1
#endif
#ifndef RAISES            // amax is raised
#define RAISES 1
#endif
#ifndef NUM_UNITS         // tiles of z, c and grad_out in shared memory
#define NUM_UNITS 7
#endif

constexpr int kPositions = 64;
constexpr int kChannels = 128;  // of z and of c
constexpr int kMathThreads = 256;
constexpr int kMathWarps = kMathThreads / 32;
constexpr int kThreads = kMathThreads + 128;
constexpr int kUnitBytes = kPositions * kChannels * 2;
constexpr int kWeightBytes = kChannels * kChannels * 2;
constexpr int kVector = OUT_TYPE == BF16 ? 8 : 16;             // positions in 16 bytes of grad_c
constexpr int kLineBytes = OUT_TYPE == BF16 ? 128 : 64;        // of one channel of a tile of grad_c
constexpr int kOffsetGate = kWeightBytes;                      // V_g behind V
constexpr int kOffsetUnits = 2 * kWeightBytes;
constexpr int kOffsetGrads = kOffsetUnits + NUM_UNITS * kUnitBytes;  // dg
constexpr int kOffsetOutX = kOffsetGrads + kUnitBytes;               // grad_hat
constexpr int kOffsetOutC = kOffsetOutX + kUnitBytes;                // grad_c
constexpr int kOffsetBias = kOffsetOutC + kChannels * kLineBytes;    // of two channels v, then v_g times -log2(e)
constexpr int kOffsetRstd = kOffsetBias + 2 * kChannels * 4;         // of c, of two tiles
constexpr int kOffsetRstdZ = kOffsetRstd + 2 * kPositions * 4;
constexpr int kOffsetDots = kOffsetRstdZ + kPositions * 4;           // du . V c' of two tiles, a half of the channels each
constexpr int kOffsetBarriers = kOffsetDots + 4 * kPositions * 4;

static_assert(NUM_UNITS >= 6 && NUM_UNITS < 9, "two tiles");

// triangle_output_backward.py packs this struct.
struct Params {
  TensorMap z_map;  // (bytes, columns, rows, items) in boxes of 128 bytes x 64
  TensorMap grad_map;
  TensorMap c_map;    // (bytes of a row, channels, rows, items) in boxes of 128 bytes x 128
  TensorMap hat_map;  // as z's, in boxes of 128 bytes x 16
  const void* parameters[6];  // norm_in weight and bias, norm_out weight and bias, bo, bgo; null: none
  const uint4* p_weight;
  const uint4* g_weight;
  char* grad_c;
  char* grad_hat;
  float* rstds;          // of z, [B, N, N]
  float* in_shares;      // [CTAs, 2 D], of LN_in
  float* out_shares;     // [CTAs, 2 H], of LN_out
  float* weight_shares;  // [CTAs, D (D + H + 2)]: Wo, bo, Wgo, bgo
  const float* scale;
  float* amax;
  float* scale_inv;
  float in_eps, out_eps;
  int parameter_types[6];
  int size, padded, tiles_per_row, num_tiles;
  int col_step, row_step, item_step;  // gridDim.x tiles
};

struct Barriers {
  // Units hold what was copied; tiles (two in turn) are normalized; their hat has been copied out; products of a tile are done.
  u32 full, ready, copied, done;
};

// The first position of a tile, and how to the CTA's next one: without a division.
struct Tile {
  int item, row, col;
  __device__ __forceinline__ Tile(const Params& params, int index) {
    const int line = index / params.tiles_per_row;
    item = line / params.padded;
    row = line - item * params.padded;
    col = (index - line * params.tiles_per_row) * kPositions;
  }
  __device__ __forceinline__ void advance(const Params& params) {
    col += params.col_step;
    row += params.row_step;
    item += params.item_step;
    if (col >= params.tiles_per_row * kPositions) {
      col -= params.tiles_per_row * kPositions;
      ++row;
    }
    if (row >= params.padded) {
      row -= params.padded;
      ++item;
    }
  }
};

__device__ __forceinline__ float read_parameter(const Params& params, int which, int index, float otherwise) {
  return read_or(params.parameters[which], index, params.parameter_types[which], otherwise);
}

// Units of consecutive tiles: z, c and grad_out of each.
struct Ring {
  int unit = 0;
  u32 phase = 0;
  __device__ __forceinline__ void advance() {
    if (++unit == NUM_UNITS) {
      unit = 0;
      phase ^= 1;
    }
  }
};

// --- Before the first tile

// V and v, V_g and v_g: 16 lanes have a row. All is read before anything is written: the latency of one load.
__device__ __forceinline__ void prepare_weights(const Params& params, u32 shared) {
  constexpr int kRows = kThreads / 16, kPasses = (kChannels + kRows - 1) / kRows;
  const int chunk = threadIdx.x % 16, first = threadIdx.x / 16;
  float weights[2][8], biases[2][8];  // of LN_out, of LN_in
  uint4 raw[2][kPasses];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int index = min(first + pass * kRows, kChannels - 1) * 16 + chunk;
    raw[0][pass] = params.p_weight[index];
    raw[1][pass] = params.g_weight[index];
  }
#pragma unroll
  for (int kind = 0; kind < 2; ++kind) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      weights[kind][i] = read_parameter(params, 2 - 2 * kind, chunk * 8 + i, 1);
      biases[kind][i] = read_parameter(params, 3 - 2 * kind, chunk * 8 + i, 0);
    }
  }
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int row = first + pass * kRows;
#pragma unroll
    for (int kind = 0; kind < 2; ++kind) {
      u32 words[4];
      float shift;
      fold_norm<16>(raw[kind][pass], weights[kind], biases[kind], words, shift);
      if (row >= kChannels) continue;  // after the shuffles, in which all lanes take part
      store_shared(chunk_address(shared + kind * kOffsetGate + chunk / 8 * (kWeightBytes / 2), row, chunk), words);
      if (chunk == 0) {
        shift += read_parameter(params, 4 + kind, row, 0);
        store_shared(shared + kOffsetBias + (row / 2 * 4 + kind * 2 + row % 2) * 4, kind ? shift * -1.44269504f : shift);
      }
    }
  }
}

// --- Copies

// Of z (kind 0), c (1) or grad_out (2).
template <int kKind>
__device__ __forceinline__ void fill_unit(const Params& params, const Tile& tile, u32 shared, u32 full, int unit) {
  const u32 target = shared + kOffsetUnits + unit * kUnitBytes, barrier = full + unit * 8;
  arrive_expecting(barrier, kUnitBytes);
  if (kKind == 1) {
    load_box(target, params.c_map, barrier, tile.col * 2, 0, tile.row, tile.item);
  } else {
    const TensorMap& map = kKind == 0 ? params.z_map : params.grad_map;
    load_box(target, map, barrier, 0, tile.col, tile.row, tile.item);
    load_box(target + kUnitBytes / 2, map, barrier, 128, tile.col, tile.row, tile.item);
  }
}

// Units kFirst to kLast of the CTA's tiles, three of each, which is the unit `unit` and those that follow; `tile` is that of
// unit kFirst, of index `index`.
template <int kFirst, int kLast>
__device__ __forceinline__ void fill_units(const Params& params, Tile tile, int index, u32 shared, u32 full, int unit) {
  if (index >= params.num_tiles) return;
  fill_unit<kFirst % 3>(params, tile, shared, full, unit);
  if constexpr (kFirst < kLast) {
    if (kFirst % 3 == 2) {
      tile.advance(params);
      index += gridDim.x;
    }
    fill_units<kFirst + 1, kLast>(params, tile, index, shared, full, unit + 1 == NUM_UNITS ? 0 : unit + 1);
  }
}

// --- The last warpgroup: norms

// 1 / std and hat of a warp's 16 positions, for the operands' backward.
__device__ __forceinline__ void store_hat(const Params& params, const Tile& tile, int warp, u32 z, u32 rstds) {
  const int lane = threadIdx.x % 32, col = tile.col + warp * 16;
  if (elect_lane()) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      store_box(params.hat_map, z + half * (kUnitBytes / 2) + warp * 2048, half * 128, col, tile.row, tile.item);
    }
    commit_stores();
  }
  __syncwarp();
  if (lane < 16 && tile.row < params.size && col + lane < params.size) {
    const i64 position = (static_cast<i64>(tile.item) * params.size + tile.row) * params.size + col + lane;
    params.rstds[position] = load_shared(rstds + lane * 4);
  }
}

__device__ __forceinline__ void normalize_tiles(const Params& params, int warp, u32 shared, const Barriers& barriers) {
  Ring ring;
  Tile tile(params, blockIdx.x);
  u32 parity = 0;
  for (int index = blockIdx.x; index < params.num_tiles; index += gridDim.x, parity ^= 1) {
    wait_barrier(barriers.full + ring.unit * 8, ring.phase);
    const u32 z = shared + kOffsetUnits + ring.unit * kUnitBytes, rstds = shared + kOffsetRstdZ + warp * 64;
    normalize_row_pairs<kChannels, kUnitBytes / 2>(z, rstds, warp, params.in_eps, [] {});
    publish_writes();
    __syncwarp();
    store_hat(params, tile, warp, z, rstds);
    ring.advance();
    wait_barrier(barriers.full + ring.unit * 8, ring.phase);
    const u32 c = shared + kOffsetUnits + ring.unit * kUnitBytes;
    normalize_columns(c, shared + kOffsetRstd + parity * (kPositions * 4), warp, params.out_eps);
    ring.advance();
    ring.advance();
    publish_writes();
    __syncwarp();
    if (elect_lane()) {
      arrive(barriers.ready + parity * 8);
      wait_for_reading_stores();
      arrive(barriers.copied + parity * 8);
    }
    __syncwarp();
    tile.advance(params);
  }
  if (elect_lane()) wait_for_stores();
  __syncwarp();
}

// --- The other two: half of the channels each

struct Units {
  u32 z, c, grad, grad_barrier;
  u32 grad_phase;
};

__device__ __forceinline__ Units take_units(Ring& ring, u32 shared, u32 full) {
  Units units;
  const u32 first = shared + kOffsetUnits;
  units.z = first + ring.unit * kUnitBytes;
  ring.advance();
  units.c = first + ring.unit * kUnitBytes;
  ring.advance();
  units.grad = first + ring.unit * kUnitBytes;
  units.grad_barrier = full + ring.unit * 8;
  units.grad_phase = ring.phase;
  ring.advance();
  return units;
}

// Where a thread is in its warpgroup. Found anew where it is needed: registers are few.
struct Place {
  int warp, lane;
  __device__ __forceinline__ Place() {
    const int thread = thread_index();
    warp = thread / 32 % 4;
    lane = thread % 32;
  }
  // Of the lane's row of four matrices, in a half of a tile [position, channel]: 16 positions x 16 channels; the next 16
  // are at XOR 32.
  __device__ __forceinline__ u32 find_matrices() const {
    return (warp * 16 + lane % 16) * 128 + (lane / 16 ^ lane % 8) * 16;
  }
};

// u without v, and the gate's argument without bgo, of 64 channels.
__device__ __forceinline__ void start_forward(float (&u)[32], float (&g)[32], const Units& units, u32 shared, int group) {
  pin_registers(u);
  pin_registers(g);
  begin_products();
  const u64 c = matrix_descriptor(units.c), x = matrix_descriptor(units.z);
  const u64 p_weights = matrix_descriptor(shared + group * (kWeightBytes / 4));
#pragma unroll
  for (int k = 0; k < kChannels / 16; ++k) {
    const u32 offset = k % 4 * 2, weight = k / 4 * (kWeightBytes / 32) + offset;
    multiply_bf16<1, 0>(u, step(c, k * 128), step(p_weights, weight), k > 0);
    multiply_bf16<0, 0>(g, step(x, k / 4 * (kUnitBytes / 32) + offset), step(p_weights, kOffsetGate / 16 + weight), k > 0);
  }
  commit_products();
}

// Steps `first` to `last` of half of the gradient of what a weight multiplies: grads . weight.
__device__ __forceinline__ void start_backward(float (&d)[32], u32 grads, u32 weight, int group, int first, int last) {
  if (first == 0) pin_registers(d);
  begin_products();
  const u64 a = matrix_descriptor(grads), b = matrix_descriptor(weight + group * (kWeightBytes / 2));
#pragma unroll
  for (int k = first; k <= last; ++k) {
    multiply_bf16<0, 1>(d, step(a, k / 4 * (kUnitBytes / 32) + k % 4 * 2), step(b, k * 128), k > 0);
  }
  commit_products();
}

struct Totals {
  float p[64], g[64];  // du c'^T and dg hat^T: 64 rows
  __device__ __forceinline__ void pin() {
    pin_registers(p);
    pin_registers(g);
  }
};

// Step k of four.
__device__ __forceinline__ void start_totals(Totals& totals, const Units& units, u32 shared, int group, int k) {
  const int half = group * (kUnitBytes / 2);
  const u64 du = matrix_descriptor(units.grad + half), dg = matrix_descriptor(shared + kOffsetGrads + half);
  const u64 c = matrix_descriptor(units.c), x = turned_descriptor(units.z, kUnitBytes / 2);
  if (k == 0) totals.pin();
  begin_products();
  multiply_bf16<1, 0>(totals.p, step(du, k * 128), step(c, k * 2), 1);
  multiply_bf16<1, 1>(totals.g, step(dg, k * 128), step(x, k * 128), 1);
  commit_products();
}

// du in the place of grad_out, dg, and this half's du . V c' of each position.
__device__ __forceinline__ void gate_gradients(const float (&u)[32], const float (&g)[32], u32 unit, u32 shared, int group,
                                               u32 dots) {
  const Place place;
  const u32 offset = group * (kUnitBytes / 2) + place.find_matrices();
  const u32 grads = unit + offset, gates = shared + kOffsetGrads + offset;
  const u32 biases = shared + kOffsetBias + (group * 64 + place.lane % 4 * 2) * 8;
  float dot[2] = {};
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    u32 pairs[4], du_words[4], dg_words[4];
    load_matrices(grads ^ part * 32, pairs);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float bias[4] = {};
      if (HAS_BIAS) load_shared(biases + (part * 16 + j * 8) * 8, bias);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float du[2], dg[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int n = part * 8 + j * 4 + i * 2 + e;
          const u32 pair = pairs[2 * j + i];
          const float gate = sigmoid(g[n], bias[2 + e]);
          du[e] = (e ? high_half(pair) : low_half(pair)) * gate;
          dot[i] += du[e] * u[n];
          const float product = du[e] * (HAS_BIAS ? u[n] + bias[e] : u[n]);
          dg[e] = product - product * gate;
        }
        du_words[2 * j + i] = pack_bf16(du[0], du[1]);
        dg_words[2 * j + i] = pack_bf16(dg[0], dg[1]);
      }
    }
    store_matrices(grads ^ part * 32, du_words);
    store_matrices(gates ^ part * 32, dg_words);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) dot[i] = sum_lanes<4>(dot[i]);
  if (place.lane % 4 == 0) {
    const u32 target = dots + (group * kPositions + place.warp * 16 + place.lane / 4) * 4;
    store_shared(target, dot[0]);
    store_shared(target + 32, dot[1]);
  }
}

// Part of four of 16 positions x 64 channels of a warp, into shared memory.
__device__ __forceinline__ void stage_grad_hat(const float (&values)[32], u32 stage, int part) {
  const Place place;
  u32 words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = pack_bf16(values[part * 8 + 2 * i], values[part * 8 + 2 * i + 1]);
  store_matrices(stage + (place.find_matrices() ^ part * 32), words);
}

// From there, 128 neighbouring bytes of 8 lanes.
__device__ __forceinline__ void store_grad_hat(const Params& params, const Tile& tile, u32 stage, int group) {
  const Place place;
  __syncwarp();
  const int first = place.warp * 16 + place.lane / 8, chunk = place.lane % 8;
  const i64 position = (static_cast<i64>(tile.item) * params.size + tile.row) * params.size + tile.col + first;
  char* out = params.grad_hat + (position * kChannels + group * 64 + chunk * 8) * 2;
  const int num_rows = tile.row < params.size ? params.size - tile.col - first : 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    u32 words[4];
    load_shared(chunk_address(stage, first + 4 * i, chunk), words);
    if (4 * i >= num_rows) continue;
    *reinterpret_cast<uint4*>(out + i * (4 * kChannels * 2)) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// LN_out's backward, for the two rows of a thread.
struct NormBackward {
  float rstd[2], factor[2];
  __device__ __forceinline__ NormBackward(u32 rstds, u32 dots) {
    const Place place;
    const u32 row = (place.warp * 16 + place.lane / 4) * 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float dot = load_shared(dots + row + i * 32) + load_shared(dots + kPositions * 4 + row + i * 32);
      rstd[i] = load_shared(rstds + row + i * 32);
      factor[i] = rstd[i] * dot * (1.0f / kChannels);
    }
  }
};

// Part of four of 64 channels, into shared memory, where they are turned.
__device__ __forceinline__ void stage_grad_c(const float (&values)[32], const NormBackward& norm, u32 normalized, u32 stage,
                                             float scale, float& amax, u32 (&words)[4], int part) {
  const Place place;
  const int matrix = place.lane / 8, line = place.lane % 8;
  u32 pairs[4];
  load_turned_matrices(
      chunk_address(normalized + matrix / 2 * 1024 + part * 2048, line, place.warp * 2 + matrix % 2), pairs);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float v[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const u32 pair = pairs[2 * j + i];
        const float c = e ? high_half(pair) : low_half(pair);
        v[i][e] = values[part * 8 + j * 4 + i * 2 + e] * norm.rstd[i] + (kHatOffset - c) * norm.factor[i];
        if (RAISES) amax = fmaxf(amax, fabsf(v[i][e]));
        if (OUT_TYPE != BF16) v[i][e] *= scale;
      }
    }
    if (OUT_TYPE == BF16) {
      words[2 * j] = pack_bf16(v[0][0], v[0][1]);
      words[2 * j + 1] = pack_bf16(v[1][0], v[1][1]);
    } else {
      // Codes of positions i and i + 8 are neighbours for a while: what is turned has two bytes.
      constexpr auto pack = OUT_TYPE == E4M3 ? pack_e4m3 : pack_e5m2;
      words[part % 2 * 2 + j] = pack(v[0][0], v[1][0], v[0][1], v[1][1]);
    }
  }
  if (OUT_TYPE == BF16) {
    const int channel = part * 16 + matrix / 2 * 8 + line;
    store_turned_matrices(chunk_address(stage, channel, place.warp * 2 + matrix % 2), words);
  } else if (part % 2) {
    store_turned_matrices(stage + (part / 2 * 32 + place.lane) * 64 + (place.warp ^ (line / 2)) * 16, words);
  }
}

// From there, in order.
__device__ __forceinline__ void store_grad_c(const Params& params, const Tile& tile, u32 stage, int group) {
  sync_group(group);
  constexpr int kChunks = kLineBytes / 16, kBytes = OUT_TYPE == BF16 ? 2 : 1;
  const int thread = thread_index() % 128, chunk = thread % kChunks, first = thread / kChunks;
  const int col = tile.col + chunk * kVector;
  const i64 matrices = static_cast<i64>(tile.item) * kChannels + group * 64 + first;
  const i64 area = static_cast<i64>(params.padded) * params.padded;
  char* out = params.grad_c + (matrices * area + static_cast<i64>(tile.row) * params.padded + col) * kBytes;
  const int num_inside = tile.row < params.size ? params.size - col : 0;
#pragma unroll
  for (int i = 0; i < 64 * kChunks / 128; ++i) {
    const int channel = first + i * (128 / kChunks);
    u32 x[4];
    if (OUT_TYPE == BF16) {
      load_shared(chunk_address(stage, channel, chunk), x);
    } else {
      u32 pairs[4];
      load_shared(stage + channel * 64 + ((chunk ^ (channel / 2)) & 3) * 16, pairs);
      x[0] = __byte_perm(pairs[0], pairs[1], 0x6420);
      x[1] = __byte_perm(pairs[2], pairs[3], 0x6420);
      x[2] = __byte_perm(pairs[0], pairs[1], 0x7531);
      x[3] = __byte_perm(pairs[2], pairs[3], 0x7531);
    }
    if (num_inside < kVector) {
      constexpr int kPerWord = kVector / 4;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int count = min(max(num_inside - k * kPerWord, 0), kPerWord);
        x[k] &= static_cast<u32>((u64(1) << (count * (32 / kPerWord))) - 1);
      }
    }
    if (col < params.padded) {
      *reinterpret_cast<uint4*>(out + i * (128 / kChunks) * area * kBytes) = make_uint4(x[0], x[1], x[2], x[3]);
    }
  }
}

// This CTA's part of the gradients of parameters, by way of shared memory: weights and dg are needed no more.
__device__ __forceinline__ void store_totals(Totals& totals, const Params& params, u32 shared) {
  const int col = thread_index() % kChannels;
  float* sums = params.weight_shares + static_cast<i64>(blockIdx.x) * (kChannels * (2 * kChannels + 2));
  const u32 row_sums = shared + kOffsetGrads;
  sync_pair(0);
  auto store = [&](float(&x)[64], const uint4* weight, int norm, float* target, float* norm_target) {
    float norm_sums[2] = {};
    store_weight_sums<kChannels>(x, shared, row_sums, weight, read_parameter(params, norm, col, 1),
                                 read_parameter(params, norm + 1, col, 0), target, target + kChannels * kChannels,
                                 norm_sums);
    store_norm_sums<kChannels>(norm_sums, shared, norm_target + blockIdx.x * (2 * kChannels));
  };
  store(totals.p, params.p_weight, 2, sums, params.out_shares);
  store(totals.g, params.g_weight, 0, sums + kChannels * (kChannels + 1), params.in_shares);
}

__device__ __forceinline__ void multiply_tiles(const Params& params, u32 shared, const Barriers& barriers) {
  int group = find_warp() / 4;
  float scale = 1, amax = 0;
  if (OUT_TYPE != BF16) {
    scale = params.scale[0];
    if (blockIdx.x == 0 && threadIdx.x == 0) params.scale_inv[0] = 1.0f / scale;
  }
  Tile tile(params, blockIdx.x);
  Totals totals = {};
  float first[32], second[32];  // of u and the gate, then of grad_hat and grad_c
  Ring ring;
  Units units = take_units(ring, shared, barriers.full);
  wait_barrier(barriers.ready, 0);
  start_forward(first, second, units, shared, group);
  wait_for_products();
  pin_registers(first);
  pin_registers(second);
  int tile_index = 0;  // of this CTA
  for (int index = blockIdx.x; index < params.num_tiles; index += gridDim.x, ++tile_index) {
    const u32 parity = tile_index % 2;
    const u32 dots = shared + kOffsetDots + parity * (2 * kPositions * 4);
    wait_barrier(units.grad_barrier, units.grad_phase);
    // All warps' products with the dg before: each reads what all of them have written.
    if (tile_index > 0) wait_barrier(barriers.done, parity ^ 1);
    gate_gradients(first, second, units.grad, shared, group, dots);
    publish_writes();
    sync_pair(0);
    // Few products wait at a time in the tensor cores' queue: a warp starts some, and does something else meanwhile.
    const u32 x_stage = shared + kOffsetOutX + group * (kUnitBytes / 2);
    start_backward(first, shared + kOffsetGrads, shared + kOffsetGate, group, 0, 7);
    start_backward(second, units.grad, shared, group, 0, 1);
    wait_for_older_products();
    pin_registers(first);
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      if (part > 0) start_backward(second, units.grad, shared, group, 2 * part, 2 * part + 1);
      stage_grad_hat(first, x_stage, part);
    }
    start_totals(totals, units, shared, group, 0);
    store_grad_hat(params, tile, x_stage, group);
    wait_for_older_products();
    pin_registers(second);
    const NormBackward norm(shared + kOffsetRstd + parity * (kPositions * 4), dots);
    const u32 c_stage = shared + kOffsetOutC + group * (64 * kLineBytes);
    u32 words[4];
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      if (part > 0) start_totals(totals, units, shared, group, part);
      stage_grad_c(second, norm, units.c + group * 8192, c_stage, scale, amax, words, part);
    }
    store_grad_c(params, tile, c_stage, group);
    group = find_warp() / 4;  // else addresses made of it would be kept, and spilled
    // The next tile's first products, or those of whatever is there after the last. No products are under way when the
    // loop turns: ptxas 13.0 would serialize all of them (C7514).
    units = take_units(ring, shared, barriers.full);
    if (index + static_cast<int>(gridDim.x) < params.num_tiles) {
      wait_barrier(barriers.ready + (parity ^ 1) * 8, (tile_index + 1) / 2 % 2);
    }
    start_forward(first, second, units, shared, group);
    wait_for_older_products();
    totals.pin();
    // This tile's units become the next ones.
    __syncwarp();
    if (thread_index() % 32 == 0) arrive(barriers.done);
    if (find_warp() == 0 && elect_lane()) {
      const int unit = ring.unit + (NUM_UNITS - 6);  // six back
      Tile later = tile;
      later.advance(params);
      later.advance(params);
      wait_barrier(barriers.copied + parity * 8, tile_index / 2 % 2);
      wait_barrier(barriers.done, parity);
      fill_units<NUM_UNITS, NUM_UNITS + 2>(params, later, index + 2 * static_cast<int>(gridDim.x), shared, barriers.full,
                                           unit >= NUM_UNITS ? unit - NUM_UNITS : unit);
    }
    tile.advance(params);
    __syncwarp();
    wait_for_products();
    pin_registers(first);
    pin_registers(second);
  }
  if (RAISES) {
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, mask));
    // On the bits, which order floats that are not negative; a NaN that is there is larger than all.
    const int bits = __float_as_int(amax);
    if (threadIdx.x % 32 == 0 && bits > __float_as_int(*params.amax)) atomicMax(reinterpret_cast<int*>(params.amax), bits);
  }
  store_totals(totals, params, shared);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) output_backward(const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) char memory[];
  const u32 shared = shared_address(memory);  // dynamic memory alone: it starts at a multiple of 1024
  const u32 full = shared + kOffsetBarriers, ready = full + NUM_UNITS * 8;
  const Barriers barriers = {full, ready, ready + 16, ready + 32};
  const int warp = find_warp();
  if (warp == 0 && elect_lane()) {
    for (int i = 0; i < NUM_UNITS; ++i) init_barrier(barriers.full + i * 8, 1);
    for (int i = 0; i < 2; ++i) {
      init_barrier(barriers.ready + i * 8, 4);
      init_barrier(barriers.copied + i * 8, 4);
    }
    init_barrier(barriers.done, kMathWarps);
    publish_barriers();
    fill_units<0, NUM_UNITS - 1>(params, Tile(params, blockIdx.x), blockIdx.x, shared, barriers.full, 0);
  }
  prepare_weights(params, shared);
  publish_writes();
  __syncthreads();
  // The three warpgroups start with 168 registers a thread each, in sum 504 = 56 + 2 * 224.
  if (warp >= kMathWarps) {
    give_registers<56>();
    normalize_tiles(params, warp - kMathWarps, shared, barriers);
  } else {
    take_registers<224>();
    multiply_tiles(params, shared, barriers);
  }
}
