// SPDX-License-Identifier: Apache-2.0
// Batched products of FP8 matrices with scales per block of 128 along K, for Hopper (sm_90a):
//   out[b, m, n] (+)= sum over k-blocks of scale_a[b, m, kb] * scale_b[b, n, kb] * (A[b, m] . B[b, n] over the block)
// Each block's dot product is a product of tensor cores, which keep about 14 bits of a sum of FP8 products; the
// sum over blocks is FP32 ("promotion", as DeepSeek-V3 trains, arXiv 2412.19437, section 3.3.2).
//
// A persistent grid of one CTA per SM walks the tiles. One warpgroup produces: a warp starts the bulk tensor
// copies of A and B, three copy scales, into a ring of stages. Two or three warpgroups multiply; while one promotes,
// the others have the tensor cores. Compiled at run time: see nvrtc.py.

#include "hopper.cuh"

#ifndef BLOCK_M           // rows of a tile
#define BLOCK_M 256
#endif
#ifndef BLOCK_N           // columns of a tile
#define BLOCK_N 128
#endif
#ifndef MATH_GROUPS       // warpgroups that multiply
#define MATH_GROUPS 2
#endif
#ifndef GROUPS_N          // 2: the two warpgroups share the rows of a tile and split its columns; 1: all split its rows
#define GROUPS_N 1
#endif
#ifndef NUM_STAGES
#define NUM_STAGES 4
#endif
#define BATCHED 0         // item b: A[b] with B[b]
#define MASKED 1          // item b: the first row_info[b] rows
#define CONTIGUOUS 2      // row m: B[row_info[m]]; no output where that is negative
#define K_GROUPED 3       // item g: row_info[g] columns of A and B
#ifndef MODE
#define MODE BATCHED
#endif
#ifndef B_PER_COLUMN      // 1: any scales of B; 0: one scale per 128 columns from the tile's first column on
#define B_PER_COLUMN 0
#endif
#define BF16 0
#define FP16 1
#define FP32 2
#ifndef OUT_TYPE
#define OUT_TYPE BF16
#endif
#ifndef ACCUMULATE        // FP32 only
#define ACCUMULATE 0
#endif

constexpr int kBlockK = 128;
constexpr int kMathThreads = 128 * MATH_GROUPS;
constexpr int kMathWarps = kMathThreads / 32;
constexpr int kThreads = kMathThreads + 128;
constexpr int kGroupsM = MATH_GROUPS / GROUPS_N;
// A warpgroup multiplies slabs of 64 rows, one after the other, into the same registers of products. Slabs of the
// warpgroups alternate, so that a tile with few rows leaves all the same work.
constexpr int kSlabStep = 64 * kGroupsM;
constexpr int kSlabs = BLOCK_M / kSlabStep;
constexpr int kGroupCols = BLOCK_N / GROUPS_N;
constexpr int kAccumulators = kGroupCols / 2;
constexpr int kBoxM = BLOCK_M % 128 == 0 ? 128 : BLOCK_M;
constexpr int kBoxN = kGroupCols;
constexpr int kBytesA = BLOCK_M * kBlockK;
constexpr int kBytesB = BLOCK_N * kBlockK;
constexpr int kScalesB = B_PER_COLUMN ? BLOCK_N : 4;
constexpr int kStagingBytes = 2048;  // per warp: 16 rows of 64 two-byte outputs
constexpr int kOffsetB = NUM_STAGES * kBytesA;
constexpr int kOffsetScalesA = kOffsetB + NUM_STAGES * kBytesB;
constexpr int kOffsetScalesB = kOffsetScalesA + NUM_STAGES * BLOCK_M * 4;
constexpr int kOffsetStaging = (kOffsetScalesB + NUM_STAGES * kScalesB * 4 + 127) / 128 * 128;
constexpr int kOffsetBarriers = kOffsetStaging + kMathWarps * kStagingBytes;
// Tiles under way at one time cover about this many rows of tiles, so that they share operands in the L2 cache.
constexpr int kRasterRows = BLOCK_M >= 256 ? 8 : 16;
// Of 512 in sum for the lanes of four warpgroups: 3 * 160 + 32. Three warpgroups start with 168 each: 2 * 224 + 56.
constexpr int kMathRegisters = MATH_GROUPS == 3 ? 160 : 224;
constexpr int kLoadRegisters = MATH_GROUPS == 3 ? 32 : 56;

static_assert(BLOCK_M % kSlabStep == 0 && kSlabs <= 2 && kGroupCols <= 128, "tile");
static_assert(MATH_GROUPS == 2 || (MATH_GROUPS == 3 && GROUPS_N == 1 && kSlabs == 1), "warpgroups");
static_assert(B_PER_COLUMN || BLOCK_N % 128 == 0 || 128 % BLOCK_N == 0, "a tile must not split a block of scales");
static_assert(!ACCUMULATE || OUT_TYPE == FP32, "only FP32 accumulates");

// blockwise_gemm.py packs this struct.
struct Params {
  TensorMap a_map;  // (K, rows, items), boxes of kBlockK x kBoxM
  TensorMap b_map;  // (K, columns, items), boxes of kBlockK x kBoxN
  const float* a_scales;
  const float* b_scales;
  char* out;
  const int* row_info;  // see MODE
  i64 a_scale_row_stride, a_scale_k_stride, a_scale_item_rows;
  i64 b_scale_row_stride, b_scale_k_stride, b_scale_item_rows;
  i64 out_item_stride, out_row_stride;
  int a_scale_shift, b_scale_shift;  // log2 of rows per scale
  int a_item_step, b_item_step;      // 0: one matrix for all items
  int num_items, num_rows, num_cols, num_k_blocks;
  int tiles_n;
  int num_tiles;       // BATCHED, CONTIGUOUS
  int split_from;      // BATCHED: tiles from here on come in two halves of rows
  int is_out_aligned;  // rows of out start at multiples of 16 bytes
};

struct Tile {
  int a_item, b_item, out_item;
  int row, col;        // first of the tile
  int end_row;         // rows from here on are not computed
  int k_block, num_k_blocks;
};

// Walks the tiles of this CTA. All lanes of a warp call it; lanes hold the counts of 32 items.
class Scheduler {
 public:
  __device__ Scheduler(const Params& params)
      : params_(params), index_(blockIdx.x), lane_(threadIdx.x % 32) {
#if MODE == MASKED || MODE == K_GROUPED
    load_items();
#elif MODE == CONTIGUOUS
    prefetch();
#endif
  }

  __device__ bool next(Tile& tile) {
    tile.k_block = 0;
    tile.num_k_blocks = params_.num_k_blocks;
    tile.end_row = params_.num_rows;
    const int step = gridDim.x;
#if MODE == BATCHED
    const int per_item = (params_.num_rows + BLOCK_M - 1) / BLOCK_M * params_.tiles_n;
    for (;; index_ += step) {
      if (index_ >= params_.num_tiles) return false;
      int index = index_, half = -1;
      if (kSlabs == 2 && index >= params_.split_from) {
        half = (index - params_.split_from) % 2;
        index = params_.split_from + (index - params_.split_from) / 2;
      }
      const int item = index / per_item;
      place(tile, index - item * per_item, (params_.num_rows + BLOCK_M - 1) / BLOCK_M);
      tile.a_item = tile.b_item = tile.out_item = item;
      if (half >= 0) {
        tile.row += half * (BLOCK_M / 2);
        if (tile.row >= params_.num_rows) continue;
        tile.end_row = min(tile.end_row, tile.row + BLOCK_M / 2);
      }
      index_ += step;
      return true;
    }
#elif MODE == CONTIGUOUS
    for (;;) {
      if (index_ >= params_.num_tiles) return false;
      const int group = next_group_;
      place(tile, index_, (params_.num_rows + BLOCK_M - 1) / BLOCK_M);
      index_ += step;
      prefetch();
      if (group < 0) continue;
      tile.a_item = tile.out_item = 0;
      tile.b_item = group;
      return true;
    }
#elif MODE == MASKED
    while (index_ >= tiles_before_ + __shfl_sync(~0u, tiles_through_, 31)) {
      tiles_before_ += __shfl_sync(~0u, tiles_through_, 31);
      first_item_ += 32;
      if (first_item_ >= params_.num_items) return false;
      load_items();
    }
    const int inside = index_ - tiles_before_;
    const int slot = __popc(__ballot_sync(~0u, tiles_through_ <= inside));
    const int rows = __shfl_sync(~0u, rows_, slot);
    const int tiles_m = (rows + BLOCK_M - 1) / BLOCK_M;
    const int through = __shfl_sync(~0u, tiles_through_, slot);
    place(tile, inside - (through - tiles_m * params_.tiles_n), tiles_m);
    tile.a_item = tile.b_item = tile.out_item = first_item_ + slot;
    tile.end_row = rows;
    index_ += step;
    return true;
#else
    const int tiles_m = (params_.num_rows + BLOCK_M - 1) / BLOCK_M;
    const int per_item = tiles_m * params_.tiles_n;
    const int item = index_ / per_item;
    if (item >= params_.num_items) return false;
    while (item >= first_item_ + 32) {
      k_before_ += __shfl_sync(~0u, k_through_, 31);
      first_item_ += 32;
      load_items();
    }
    place(tile, index_ - item * per_item, tiles_m);
    const int through = __shfl_sync(~0u, k_through_, item - first_item_);
    tile.num_k_blocks = __shfl_sync(~0u, k_blocks_, item - first_item_);
    tile.k_block = k_before_ + through - tile.num_k_blocks;
    tile.a_item = tile.b_item = 0;
    tile.out_item = item;
    index_ += step;
    return true;
#endif
  }

 private:
  __device__ void place(Tile& tile, int index, int tiles_m) {
    const int per_group = kRasterRows * params_.tiles_n;
    const int group = index / per_group;
    const int rows = min(kRasterRows, tiles_m - group * kRasterRows);
    index -= group * per_group;
    tile.row = (group * kRasterRows + index % rows) * BLOCK_M;
    tile.col = index / rows * BLOCK_N;
  }

  __device__ int sum_lanes_through(int value) const {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int below = __shfl_up_sync(~0u, value, distance);
      if (lane_ >= distance) value += below;
    }
    return value;
  }

  const Params& params_;
  int index_;
  const int lane_;
#if MODE == MASKED
  __device__ void load_items() {
    const int item = first_item_ + lane_;
    rows_ = item < params_.num_items ? max(0, min(params_.row_info[item], params_.num_rows)) : 0;
    tiles_through_ = sum_lanes_through((rows_ + BLOCK_M - 1) / BLOCK_M * params_.tiles_n);
  }
  int first_item_ = 0, rows_, tiles_through_, tiles_before_ = 0;
#elif MODE == K_GROUPED
  __device__ void load_items() {
    const int item = first_item_ + lane_;
    k_blocks_ = item < params_.num_items ? max(0, params_.row_info[item]) / kBlockK : 0;
    k_through_ = sum_lanes_through(k_blocks_);
  }
  int first_item_ = 0, k_blocks_, k_through_, k_before_ = 0;
#elif MODE == CONTIGUOUS
  // The group of the tile to come, read while the tile before it is multiplied.
  __device__ void prefetch() {
    Tile tile;
    if (index_ >= params_.num_tiles) return;
    place(tile, index_, (params_.num_rows + BLOCK_M - 1) / BLOCK_M);
    next_group_ = params_.row_info[tile.row];
  }
  int next_group_ = -1;
#endif
};

// Stage and phase of the ring.
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

__device__ __forceinline__ void load_operands(const Params& params, u32 shared, u32 full, u32 empty) {
  const bool is_leader = elect_lane();
  Scheduler scheduler(params);
  Ring ring;
  for (Tile tile; scheduler.next(tile);) {
    if (is_leader) {
      // Boxes that lie outside are not loaded: what is computed from them is not stored.
      const int boxes_a = min(BLOCK_M / kBoxM, (tile.end_row - tile.row + kBoxM - 1) / kBoxM);
      const int boxes_b = min(GROUPS_N, (params.num_cols - tile.col + kBoxN - 1) / kBoxN);
      const u32 bytes = boxes_a * (kBoxM * kBlockK) + boxes_b * (kBoxN * kBlockK);
      for (int i = 0; i < tile.num_k_blocks; ++i, ring.advance()) {
        const u32 barrier = full + ring.stage * 8;
        wait_barrier(empty + ring.stage * 8, ring.phase ^ 1);
        arrive_expecting(barrier, bytes);
        const int k = (tile.k_block + i) * kBlockK;
#pragma unroll
        for (int box = 0; box < BLOCK_M / kBoxM; ++box) {
          if (box >= boxes_a) continue;
          load_box(shared + ring.stage * kBytesA + box * (kBoxM * kBlockK), params.a_map, barrier, k,
                   tile.row + box * kBoxM, tile.a_item * params.a_item_step);
        }
#pragma unroll
        for (int box = 0; box < GROUPS_N; ++box) {
          if (box >= boxes_b) continue;
          load_box(shared + kOffsetB + ring.stage * kBytesB + box * (kBoxN * kBlockK), params.b_map, barrier, k,
                   tile.col + box * kBoxN, tile.b_item * params.b_item_step);
        }
      }
    }
    __syncwarp();
  }
}

// Scales come in any strides, so in copies of four bytes. A warp copies those of 32 * kCopies rows of A (kIsA) or
// columns of B, from `first` on, a row for each lane and copy; or those of the tile's blocks of 128 columns of B. It must
// keep pace with the tensor cores: all but the step along K is done once for a tile.
template <bool kIsA, int kCopies>
__device__ __forceinline__ void load_scales(const Params& params, int first, u32 shared, u32 full, u32 empty) {
  constexpr bool kIsPerRow = kIsA || B_PER_COLUMN;
  constexpr int kScales = kIsA ? BLOCK_M : kScalesB;
  const int lane = threadIdx.x % 32;
  // Scales of 16 columns are ordered by the lanes that take them, four each: see multiply_blocks.
  const int slot = kIsA || !B_PER_COLUMN ? lane : (lane & 17) | (lane & 6) << 1 | (lane & 8) >> 2;
  const u32 targets = shared + (kIsA ? kOffsetScalesA : kOffsetScalesB) + (first + slot) * 4;
  const int shift = kIsA ? params.a_scale_shift : params.b_scale_shift;
  const i64 row_stride = kIsA ? params.a_scale_row_stride : params.b_scale_row_stride;
  const i64 k_stride = kIsA ? params.a_scale_k_stride : params.b_scale_k_stride;
  const i64 item_rows = kIsA ? params.a_scale_item_rows : params.b_scale_item_rows;
  Scheduler scheduler(params);
  Ring ring;
  for (Tile tile; scheduler.next(tile);) {
    const int begin = kIsA ? tile.row : tile.col;
    const int end = kIsA ? tile.end_row : params.num_cols;
    const i64 begin_scale = (kIsA ? tile.a_item : tile.b_item) * item_rows + begin;
    const float* scales = kIsA ? params.a_scales : params.b_scales;
    scales += (begin_scale >> shift) * row_stride + tile.k_block * k_stride;
    int offsets[kCopies];  // negative: outside
#pragma unroll
    for (int j = 0; j < kCopies; ++j) {
      const int row = kIsPerRow ? first + j * 32 + lane : lane * 128;
      offsets[j] = static_cast<int>(((begin_scale + row) >> shift) - (begin_scale >> shift)) * static_cast<int>(row_stride);
      if (begin + row >= end) offsets[j] = -1;
    }
    for (int i = 0; i < tile.num_k_blocks; ++i, ring.advance()) {
      wait_barrier(empty + ring.stage * 8, ring.phase ^ 1);
#pragma unroll
      for (int j = 0; j < kCopies; ++j) {
        if (!kIsPerRow && lane >= (BLOCK_N + 127) / 128) continue;
        copy_word(targets + ring.stage * (kScales * 4) + j * 128, scales + max(offsets[j], 0), offsets[j] >= 0);
      }
      scales += k_stride;
      arrive_after_copies(full + ring.stage * 8);
    }
  }
}

__device__ __forceinline__ bool is_row_stored(const Params& params, const Tile& tile, int row) {
#if MODE == CONTIGUOUS
  return row < tile.end_row && params.row_info[row] >= 0;
#else
  return row < tile.end_row;
#endif
}

// Stores 16 rows, those of this warp, of one slab. A lane holds row lane / 4 and that plus 8, columns 2 * (lane % 4)
// and the next of each group of 8.
__device__ __forceinline__ void store_slab(const Params& params, const Tile& tile, int first_row, int first_col,
                                           const float (&acc)[kAccumulators], u32 staging) {
  const int lane = threadIdx.x % 32;
  char* item = params.out + tile.out_item * params.out_item_stride * (OUT_TYPE == FP32 ? 4 : 2);
#if OUT_TYPE == FP32
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first_row + lane / 4 + i * 8;
    if (!is_row_stored(params, tile, row)) continue;
    float* out = reinterpret_cast<float*>(item) + row * params.out_row_stride;
#pragma unroll
    for (int j = 0; j < kGroupCols / 8; ++j) {
      const int col = first_col + j * 8 + lane % 4 * 2;
      float x = acc[4 * j + 2 * i], y = acc[4 * j + 2 * i + 1];
      if (params.is_out_aligned && col + 2 <= params.num_cols) {
        float2* target = reinterpret_cast<float2*>(out + col);
#if ACCUMULATE
        const float2 before = *target;
        x += before.x;
        y += before.y;
#endif
        *target = make_float2(x, y);
        continue;
      }
      if (col < params.num_cols) out[col] = ACCUMULATE ? out[col] + x : x;
      if (col + 1 < params.num_cols) out[col + 1] = ACCUMULATE ? out[col + 1] + y : y;
    }
  }
#else
  // Through shared memory, swizzled like the operands, so that a row is stored in pieces of 128 bytes.
#pragma unroll
  for (int part = 0; part < kGroupCols / 64; ++part) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* d = acc + part * 32 + j * 8;
      const int row = lane % 16, chunk = 2 * j + lane / 16;
      constexpr auto pack = OUT_TYPE == FP16 ? pack_fp16 : pack_bf16;
      const u32 pairs[4] = {pack(d[0], d[1]), pack(d[2], d[3]), pack(d[4], d[5]), pack(d[6], d[7])};
      store_matrices(staging + row * 128 + ((chunk ^ (row % 8)) * 16), pairs);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i * 4 + lane / 8, chunk = lane % 8;
      const int col = first_col + part * 64 + chunk * 8;
      u32 words[4];
      load_shared(staging + row * 128 + ((chunk ^ (row % 8)) * 16), words);
      if (!is_row_stored(params, tile, first_row + row)) continue;
      char* out = item + ((first_row + row) * params.out_row_stride + col) * 2;
      if (params.is_out_aligned && col + 8 <= params.num_cols) {
        *reinterpret_cast<uint4*>(out) = make_uint4(words[0], words[1], words[2], words[3]);
        continue;
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (col + j < params.num_cols) {
          reinterpret_cast<unsigned short*>(out)[j] = static_cast<unsigned short>(words[j / 2] >> (j % 2 * 16));
        }
      }
    }
  }
#endif
}

// Where a math warp works.
struct Place {
  u32 shared, full, empty;
  int group_row, group_col;  // of its warpgroup in a tile
  int warp_row;              // of its 16 rows in a tile
  int lane;
};

__device__ __forceinline__ void release_stage(const Place& place, int stage) {
  __syncwarp();
  if (place.lane == 0) arrive(place.empty + stage * 8);
}

__device__ __forceinline__ u64 descriptor_a(const Place& place, int stage) {
  return matrix_descriptor(place.shared + stage * kBytesA + place.group_row * kBlockK);
}

__device__ __forceinline__ u64 descriptor_b(const Place& place, int stage) {
  return matrix_descriptor(place.shared + kOffsetB + stage * kBytesB + place.group_col * kBlockK);
}

// All k-blocks of the first kActive slabs of a tile, into `acc`.
template <int kActive>
__device__ __forceinline__ void multiply_blocks(const Place& place, int num_k_blocks, Ring& ring,
                                                float (&acc)[kSlabs][kAccumulators]) {
  float products[kAccumulators];
  int before = 0;
  const u64 first_a = descriptor_a(place, 0), first_b = descriptor_b(place, 0);
  u64 a = descriptor_a(place, ring.stage), b = descriptor_b(place, ring.stage);
  if (num_k_blocks > 0) wait_barrier(place.full + ring.stage * 8, ring.phase);
  for (int i = 0; i < num_k_blocks; ++i) {
    const int stage = ring.stage;
    const u32 scales_a = place.shared + kOffsetScalesA + (stage * BLOCK_M + place.warp_row + place.lane / 4) * 4;
    float scale_a[kActive][2];
#if B_PER_COLUMN
    const u32 scales_b = place.shared + kOffsetScalesB + (stage * kScalesB + place.group_col) * 4;
#endif
#pragma unroll
    for (int slab = 0; slab < kActive; ++slab) {
      pin_registers(products);
      begin_products();
#pragma unroll
      for (int k = 0; k < kBlockK; k += 32) {
        multiply(products, a + (slab * kSlabStep * kBlockK + k) / 16, b + k / 16, k > 0);
      }
      commit_products();
      pin_registers(products);
      // While the tensor cores work: all that does not need their result. What is left for after it must take less
      // time than the products of the other warpgroups, or the tensor cores idle.
      if (slab == 0) {
        if (i > 0) release_stage(place, before);
#pragma unroll
        for (int j = 0; j < kActive; ++j) {
          scale_a[j][0] = load_shared(scales_a + j * (kSlabStep * 4));
          scale_a[j][1] = load_shared(scales_a + j * (kSlabStep * 4) + 32);
        }
#if !B_PER_COLUMN
        const float scale_b = load_shared(place.shared + kOffsetScalesB + (stage * kScalesB + place.group_col / 128) * 4);
#pragma unroll
        for (int j = 0; j < kActive; ++j) {
          scale_a[j][0] *= scale_b;
          scale_a[j][1] *= scale_b;
        }
#endif
      }
      const float low = scale_a[slab][0], high = scale_a[slab][1];
      if (slab == kActive - 1) {
        // The next stage, too, is waited for here: nothing then stands between this sum and the next products.
        before = stage;
        ring.advance();
        a = first_a + static_cast<u32>(ring.stage) * (kBytesA / 16);
        b = first_b + static_cast<u32>(ring.stage) * (kBytesB / 16);
        pin_value(a);
        pin_value(b);
        if (i + 1 < num_k_blocks) wait_barrier(place.full + ring.stage * 8, ring.phase);
      }
      wait_for_products();
      pin_registers(products);
      float(&sum)[kAccumulators] = acc[slab];
#if B_PER_COLUMN
      // In place: there are no registers for the products of both scales.
#pragma unroll
      for (int j = 0; j < kGroupCols / 16; ++j) {
        float columns[4];
        load_shared(scales_b + j * 64 + place.lane % 4 * 16, columns);
#pragma unroll
        for (int n = 0; n < 8; ++n) products[8 * j + n] *= columns[n / 4 * 2 + n % 2];
#pragma unroll
        for (int n = 0; n < 8; ++n) sum[8 * j + n] += (n % 4 < 2 ? low : high) * products[8 * j + n];
      }
#else
#pragma unroll
      for (int n = 0; n < kAccumulators; ++n) sum[n] += (n % 4 < 2 ? low : high) * products[n];
#endif
    }
  }
  if (num_k_blocks > 0) release_stage(place, before);
}

__device__ __forceinline__ void skip_blocks(const Place& place, int num_k_blocks, Ring& ring) {
  for (int i = 0; i < num_k_blocks; ++i, ring.advance()) {
    wait_barrier(place.full + ring.stage * 8, ring.phase);
    release_stage(place, ring.stage);
  }
}

__device__ __forceinline__ void multiply_tiles(const Params& params, int warp, u32 shared, u32 full, u32 empty) {
  const int group = warp / 4;
  const int group_row = GROUPS_N == 1 ? group * 64 : 0;
  const int group_col = GROUPS_N == 1 ? 0 : group * kGroupCols;
  const Place place = {shared, full, empty, group_row, group_col, group_row + warp % 4 * 16,
                       static_cast<int>(threadIdx.x) % 32};
  const u32 staging = shared + kOffsetStaging + warp * kStagingBytes;
  Scheduler scheduler(params);
  Ring ring;
  Tile tile, following;
  for (bool is_tile = scheduler.next(tile); is_tile; tile = following) {
    float acc[kSlabs][kAccumulators];
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
      for (int i = 0; i < kAccumulators; ++i) acc[slab][i] = 0;
    }
    int slabs = min(kSlabs, (tile.end_row - tile.row - group_row + kSlabStep - 1) / kSlabStep);
    if (tile.col + group_col >= params.num_cols) slabs = 0;
    if (slabs == kSlabs) {
      multiply_blocks<kSlabs>(place, tile.num_k_blocks, ring, acc);
    } else if (kSlabs > 1 && slabs > 0) {
      multiply_blocks<1>(place, tile.num_k_blocks, ring, acc);
    } else {
      skip_blocks(place, tile.num_k_blocks, ring);
    }
    is_tile = scheduler.next(following);
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      if (slab >= slabs || (ACCUMULATE && tile.num_k_blocks == 0)) continue;
      store_slab(params, tile, tile.row + place.warp_row + slab * kSlabStep, tile.col + group_col, acc[slab], staging);
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) multiply_blockwise(const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) char memory[];
  const u32 shared = shared_address(memory);  // dynamic memory alone: it starts at a multiple of 1024
  const u32 full = shared + kOffsetBarriers;
  const u32 empty = full + NUM_STAGES * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < NUM_STAGES; ++i) {
      init_barrier(full + i * 8, 1 + 3 * 32);  // the copies of operands, and the lanes that copy scales
      init_barrier(empty + i * 8, kMathWarps);
    }
    publish_barriers();
  }
  __syncthreads();
  // From lane 0, so that the compiler knows that a warp agrees on it.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp < kMathWarps) {
    take_registers<kMathRegisters>();
    multiply_tiles(params, warp, shared, full, empty);
    return;
  }
  give_registers<kLoadRegisters>();
  switch (warp - kMathWarps) {
    case 0: return load_operands(params, shared, full, empty);
    case 1: return load_scales<true, BLOCK_M / 64>(params, 0, shared, full, empty);
    case 2: return load_scales<true, BLOCK_M / 64>(params, BLOCK_M / 2, shared, full, empty);
    default: return load_scales<false, B_PER_COLUMN ? BLOCK_N / 32 : 1>(params, 0, shared, full, empty);
  }
}
