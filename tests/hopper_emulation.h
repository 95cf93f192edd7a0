// SPDX-License-Identifier: Apache-2.0
// The functions of kernels/hopper.cuh, and what CUDA C++ has built in, for a CPU: a thread of the kernel is a thread of the
// process, and CTAs run one after the other. Tests put this file in the place of hopper.cuh. Products are done as late as
// they may be, when they are waited for, and copies land at once: wrong numbers show, but not all races.
#pragma once

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#ifndef A_FORMAT
#define A_FORMAT "e4m3"
#endif
#ifndef B_FORMAT
#define B_FORMAT "e4m3"
#endif
#ifndef LAGGING_WARP  // one that is late with products while others are under way: what is overwritten too early shows; -1: none
#define LAGGING_WARP -1
#endif
#ifndef LAG_MS
#define LAG_MS 100
#endif

#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __shared__
#define __align__(bytes)
#define __launch_bounds__(...)

using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;
using std::max;
using std::min;

struct Index {
  int x;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  u32 x, y;
};
struct uint4 {
  u32 x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

inline thread_local Index threadIdx;
inline Index blockIdx, gridDim;
alignas(1024) inline char shared_memory[232448];
#define memory shared_memory

// Address, three sizes, strides of two dims, three sizes of the box.
struct alignas(64) TensorMap {
  u64 words[16];
};

// --- Warps

struct Warp {
  std::barrier<> meeting{32};
  int values[32];
};

struct Cta {
  std::unique_ptr<Warp[]> warps;
  std::unique_ptr<std::barrier<>> meeting;
  std::vector<std::unique_ptr<std::barrier<>>> groups, pairs;
};
inline Cta cta;

inline void __syncthreads() { cta.meeting->arrive_and_wait(); }
inline void sync_group(u32 group) { cta.groups[group]->arrive_and_wait(); }
inline void sync_pair(u32 pair) { cta.pairs[pair]->arrive_and_wait(); }
inline Warp& own_warp() { return cta.warps[threadIdx.x / 32]; }
inline void __syncwarp() { own_warp().meeting.arrive_and_wait(); }

// `choose` reads what all lanes have written.
template <class Choose>
int exchange(int value, Choose choose) {
  Warp& warp = own_warp();
  warp.values[threadIdx.x % 32] = value;
  warp.meeting.arrive_and_wait();
  const int result = choose(warp.values);
  warp.meeting.arrive_and_wait();
  return result;
}

inline int __shfl_sync(u32, int value, int lane) {
  return exchange(value, [&](const int* values) { return values[lane % 32]; });
}
inline int __shfl_up_sync(u32, int value, int distance) {
  const int lane = threadIdx.x % 32;
  return exchange(value, [&](const int* values) { return values[lane >= distance ? lane - distance : lane]; });
}
inline u32 __ballot_sync(u32, bool vote) {
  return exchange(vote, [](const int* values) {
    u32 votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= static_cast<u32>(values[lane]) << lane;
    return static_cast<int>(votes);
  });
}
inline float __shfl_xor_sync(u32, float value, int mask) {
  int bits;
  std::memcpy(&bits, &value, 4);
  const int lane = threadIdx.x % 32;
  bits = exchange(bits, [&](const int* values) { return values[lane ^ mask]; });
  std::memcpy(&value, &bits, 4);
  return value;
}
inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float __shfl_sync(u32 mask, float value, int lane) {
  return __int_as_float(__shfl_sync(mask, __float_as_int(value), lane));
}
inline u32 __byte_perm(u32 low, u32 high, u32 selector) {
  const u64 bytes = u64(high) << 32 | low;
  u32 word = 0;
  for (int i = 0; i < 4; ++i) word |= static_cast<u32>(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return word;
}
inline int __popc(u32 bits) { return __builtin_popcount(bits); }

// --- Barriers

struct Barrier {
  int count = 0, missing = 0;
  i64 bytes = 0;
  u32 phase = 0;
};
inline std::mutex lock;
inline std::condition_variable changed;
inline std::map<u32, Barrier> barriers;

inline int atomicMax(int* target, int value) {
  std::lock_guard guard(lock);
  const int before = *target;
  *target = max(before, value);
  return before;
}

inline u32 shared_address(const void* pointer) {
  return static_cast<u32>(static_cast<const char*>(pointer) - shared_memory);
}

inline void init_barrier(u32 address, u32 count) {
  const int arrivals = static_cast<int>(count);
  barriers[address] = {arrivals, arrivals, 0, 0};
}

inline void publish_barriers() {}

// Under the lock.
inline void change(u32 address, int arrivals, i64 bytes) {
  Barrier& barrier = barriers.at(address);
  barrier.missing -= arrivals;
  barrier.bytes += bytes;
  if (barrier.missing == 0 && barrier.bytes == 0) {
    barrier.missing = barrier.count;
    ++barrier.phase;
    changed.notify_all();
  }
}

inline bool poll_barrier(u32 address, u32 parity) {
  std::lock_guard guard(lock);
  return barriers.at(address).phase % 2 != parity;
}

inline void wait_barrier(u32 address, u32 parity) {
  std::unique_lock guard(lock);
  const bool is_over = changed.wait_for(guard, std::chrono::seconds(120),
                                        [&] { return barriers.at(address).phase % 2 != parity; });
  if (!is_over) {
    std::fprintf(stderr, "thread %d of CTA %d waits for ever at barrier %u\n", threadIdx.x, blockIdx.x, address);
    std::_Exit(1);
  }
}

inline void arrive(u32 address) {
  std::lock_guard guard(lock);
  change(address, 1, 0);
}

inline void arrive_expecting(u32 address, u32 bytes) {
  std::lock_guard guard(lock);
  change(address, 1, bytes);
}

inline void arrive_after_copies(u32 address) { arrive(address); }

inline void wait_for_kernel_before() {}

// --- Copies

inline bool elect_lane() { return threadIdx.x % 32 == 0; }

// 128-byte swizzle: bits 4 to 6 of an address are changed by bits 7 to 9.
inline u32 swizzle(u32 address) { return address ^ ((address >> 7 & 7) << 4); }

inline void load_box(u32 target, const TensorMap& map, u32 barrier, int k, int row, int item) {
  const u64* words = map.words;
  for (int r = 0; r < static_cast<int>(words[7]); ++r) {
    for (int c = 0; c < 128; ++c) {
      const bool is_inside = k + c < static_cast<i64>(words[1]) && row + r < static_cast<i64>(words[2]) &&
                             item < static_cast<i64>(words[3]);
      const char* source = reinterpret_cast<const char*>(words[0]) + k + c + (row + r) * words[4] + item * words[5];
      shared_memory[swizzle(target + r * 128 + c)] = is_inside ? *source : 0;
    }
  }
  std::lock_guard guard(lock);
  change(barrier, 0, -static_cast<i64>(words[6] * words[7] * words[8]));
}

// A map with four dims: address, four sizes, strides of three, four sizes of the box.
inline void load_box(u32 target, const TensorMap& map, u32 barrier, int byte, int col, int row, int item) {
  const u64* words = map.words;
  const int boxes[2] = {static_cast<int>(words[9]), static_cast<int>(words[10])};
  for (int i = 0; i < boxes[0] * boxes[1]; ++i) {
    const i64 at[3] = {col + i % boxes[0], row + i / boxes[0], item};
    const char* source = reinterpret_cast<const char*>(words[0]);
    bool is_inside = byte < static_cast<i64>(words[1]);
    for (int dim = 0; dim < 3; ++dim) {
      is_inside &= at[dim] < static_cast<i64>(words[2 + dim]);
      source += at[dim] * static_cast<i64>(words[5 + dim]);
    }
    for (int c = 0; c < 128; ++c) {
      const bool is_byte_inside = is_inside && byte + c < static_cast<i64>(words[1]);
      shared_memory[swizzle(target + i * 128 + c)] = is_byte_inside ? source[byte + c] : 0;
    }
  }
  std::lock_guard guard(lock);
  change(barrier, 0, -static_cast<i64>(words[8] * words[9] * words[10] * words[11]));
}

// As late as they may be: when they are waited for.
inline thread_local std::vector<std::function<void()>> pending_stores;

inline void store_box(const TensorMap& map, u32 source, int byte, int col, int row, int item) {
  pending_stores.push_back([&map, source, byte, col, row, item] {
    const u64* words = map.words;
    const int boxes[2] = {static_cast<int>(words[9]), static_cast<int>(words[10])};
    for (int i = 0; i < boxes[0] * boxes[1]; ++i) {
      const i64 at[3] = {col + i % boxes[0], row + i / boxes[0], item};
      char* target = reinterpret_cast<char*>(words[0]);
      bool is_inside = true;
      for (int dim = 0; dim < 3; ++dim) {
        is_inside &= at[dim] < static_cast<i64>(words[2 + dim]);
        target += at[dim] * static_cast<i64>(words[5 + dim]);
      }
      for (int c = 0; is_inside && c < 128 && byte + c < static_cast<i64>(words[1]); ++c) {
        target[byte + c] = shared_memory[swizzle(source + i * 128 + c)];
      }
    }
  });
}

inline void commit_stores() {}
inline void wait_for_stores() {
  for (const auto& store : pending_stores) store();
  pending_stores.clear();
}
inline void wait_for_reading_stores() { wait_for_stores(); }

inline void publish_writes() {}

inline void copy_word(u32 target, const void* source, bool is_inside) {
  std::memset(shared_memory + target, 0, 4);
  if (is_inside) std::memcpy(shared_memory + target, source, 4);
}

inline float load_shared(u32 address) {
  float value;
  std::memcpy(&value, shared_memory + address, 4);
  return value;
}

template <class T>
void load_shared(u32 address, T (&x)[4]) {
  if (address % 16) std::abort();
  std::memcpy(x, shared_memory + address, 16);
}

template <class T>
void load_shared(u32 address, T (&x)[2]) {
  if (address % 8) std::abort();
  std::memcpy(x, shared_memory + address, 8);
}

inline void store_shared(u32 address, float value) { std::memcpy(shared_memory + address, &value, 4); }

inline void store_shared(u32 address, const u32 (&x)[4]) {
  if (address % 16) std::abort();
  std::memcpy(shared_memory + address, x, 16);
}

inline void store_shared(u32 address, const u32 (&x)[2]) {
  if (address % 8) std::abort();
  std::memcpy(shared_memory + address, x, 8);
}

inline void store_matrices(u32 address, const u32 (&x)[4]) {
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = exchange(static_cast<int>(address), [&](const int* values) { return values[8 * i + lane / 4]; });
    std::memcpy(shared_memory + row + lane % 4 * 4, &x[i], 4);
  }
}

// Copies between a lane's elements of four matrices and shared memory.
template <class Copy>
void visit_matrices(u32 address, bool is_turned, Copy copy) {
  const int lane = threadIdx.x % 32;
  exchange(static_cast<int>(address), [&](const int* rows) {
    for (int n = 0; n < 8; ++n) {
      const int major = lane / 4, minor = lane % 4 * 2 + n % 2;
      const int row = rows[n / 2 * 8 + (is_turned ? minor : major)];
      copy(shared_memory + row + (is_turned ? major : minor) * 2, n / 2, n % 2);
    }
    return 0;
  });
}

inline void store_turned_matrices(u32 address, const u32 (&x)[4]) {
  visit_matrices(address, true, [&](char* element, int i, int e) {
    std::memcpy(element, reinterpret_cast<const char*>(&x[i]) + 2 * e, 2);
  });
}

inline void load_some_matrices(u32 address, bool is_turned, u32 (&x)[4]) {
  visit_matrices(address, is_turned, [&](const char* element, int i, int e) {
    std::memcpy(reinterpret_cast<char*>(&x[i]) + 2 * e, element, 2);
  });
}
inline void load_matrices(u32 address, u32 (&x)[4]) { load_some_matrices(address, false, x); }
inline void load_turned_matrices(u32 address, u32 (&x)[4]) { load_some_matrices(address, true, x); }

inline u32 pack_bf16(float low, float high) {
  u32 pair = 0;
  for (int i = 0; i < 2; ++i) {
    u32 bits;
    std::memcpy(&bits, i ? &high : &low, 4);
    bits += 0x7FFF + (bits >> 16 & 1);
    pair |= (bits >> 16) << 16 * i;
  }
  return pair;
}

inline u32 pack_fp16(float low, float high) {
  const _Float16 halves[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
  u32 pair;
  std::memcpy(&pair, halves, 4);
  return pair;
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal_approx(float x) { return 1 / x; }
inline float rsqrt_approx(float x) { return 1 / std::sqrt(x); }

// --- Products

inline u64 matrix_descriptor(u32 address) { return address / 16; }
// Distance of panels in the upper half.
inline u64 turned_descriptor(u32 address, u32 panel_bytes) { return u64(panel_bytes) << 32 | address / 16; }

// Byte `k` of row `row` of the matrix at a descriptor.
inline unsigned char read_code(u64 descriptor, int row, int k) {
  return static_cast<unsigned char>(shared_memory[swizzle(static_cast<u32>(descriptor) * 16 + row * 128 + k)]);
}

inline float decode(unsigned char code, bool is_e5m2) {
  const int mantissa_bits = is_e5m2 ? 2 : 3, bias = is_e5m2 ? 15 : 7;
  const int exponent = (code & 0x7F) >> mantissa_bits, mantissa = code & ((1 << mantissa_bits) - 1);
  if (is_e5m2 ? exponent == 31 : (code & 0x7F) == 0x7F) return is_e5m2 && !mantissa ? INFINITY : NAN;
  const float fraction = static_cast<float>(mantissa) / static_cast<float>(1 << mantissa_bits);
  const float value = exponent ? std::ldexp(1 + fraction, exponent - bias) : std::ldexp(fraction, 1 - bias);
  return code & 0x80 ? -value : value;
}

// Round to nearest even, the largest finite code for what is larger, 0x7F for NaN.
inline u32 encode(float value, bool is_e5m2) {
  if (std::isnan(value)) return 0x7F;
  const int mantissa_bits = is_e5m2 ? 2 : 3, smallest = is_e5m2 ? -14 : -6;
  const u32 largest = is_e5m2 ? 0x7B : 0x7E, sign = std::signbit(value) ? 0x80 : 0;
  const float magnitude = std::fabs(value);
  if (std::isinf(magnitude)) return sign | largest;
  const int exponent = magnitude > 0 ? max(std::ilogb(magnitude), smallest) : smallest;
  const u32 units = static_cast<u32>(min(std::nearbyint(std::ldexp(magnitude, mantissa_bits - exponent)), 64.0f));
  return sign | min(units + (static_cast<u32>(exponent - smallest) << mantissa_bits), largest);
}

inline u32 pack_codes(const float (&values)[4], bool is_e5m2) {
  u32 word = 0;
  for (int i = 0; i < 4; ++i) word |= encode(values[i], is_e5m2) << 8 * i;
  return word;
}
inline u32 pack_e4m3(float a, float b, float c, float d) { return pack_codes({a, b, c, d}, false); }
inline u32 pack_e5m2(float a, float b, float c, float d) { return pack_codes({a, b, c, d}, true); }

inline thread_local std::vector<std::function<void()>> pending_products;
inline thread_local size_t last_group = 0, committed = 0;  // where groups begin and end

template <int kSize>
void multiply_now(float (&d)[kSize], u64 a, u64 b, int is_added) {
  const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 % 4 * 16 + lane / 4;
  const bool is_a_e5m2 = A_FORMAT[1] == '5', is_b_e5m2 = B_FORMAT[1] == '5';
  float rows[2][32];
  for (int i = 0; i < 2; ++i) {
    for (int k = 0; k < 32; ++k) rows[i][k] = decode(read_code(a, first_row + i * 8, k), is_a_e5m2);
  }
  for (int j = 0; j < kSize / 2; ++j) {
    float sums[2] = {0, 0};
    const int col = j / 2 * 8 + lane % 4 * 2 + j % 2;
    for (int k = 0; k < 32; ++k) {
      const float code = decode(read_code(b, col, k), is_b_e5m2);
      sums[0] += rows[0][k] * code;
      sums[1] += rows[1][k] * code;
    }
    for (int i = 0; i < 2; ++i) {
      float& element = d[j / 2 * 4 + i * 2 + j % 2];
      element = is_added ? element + sums[i] : sums[i];
    }
  }
}

template <int kSize>
void multiply(float (&d)[kSize], u64 a, u64 b, int is_added) {
  pending_products.push_back([&d, a, b, is_added] { multiply_now(d, a, b, is_added); });
}

// Element `k` of row `row` of a BF16 matrix.
inline float read_bf16(u64 descriptor, int row, int k) {
  u32 bits = 0;
  const u32 address = swizzle(static_cast<u32>(descriptor) * 16 + row * 128 + k * 2);
  std::memcpy(reinterpret_cast<char*>(&bits) + 2, shared_memory + address, 2);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Turned: row k has 64 elements of column k of A.
template <int kSize>
void multiply_bf16_now(float (&d)[kSize], u64 a, u64 b, int is_added, bool is_turned) {
  const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 % 4 * 16 + lane / 4;
  float rows[2][16];
  for (int i = 0; i < 2; ++i) {
    const int row = first_row + i * 8;
    for (int k = 0; k < 16; ++k) rows[i][k] = is_turned ? read_bf16(a, k, row) : read_bf16(a, row, k);
  }
  for (int j = 0; j < kSize / 2; ++j) {
    const int col = j / 2 * 8 + lane % 4 * 2 + j % 2;
    float sums[2] = {0, 0};
    for (int k = 0; k < 16; ++k) {
      const float x = read_bf16(b, col, k);
      sums[0] += rows[0][k] * x;
      sums[1] += rows[1][k] * x;
    }
    for (int i = 0; i < 2; ++i) {
      float& element = d[j / 2 * 4 + i * 2 + j % 2];
      element = is_added ? element + sums[i] : sums[i];
    }
  }
}

inline void multiply_bf16(float (&d)[64], u64 a, u64 b, int is_added) {
  pending_products.push_back([&d, a, b, is_added] { multiply_bf16_now(d, a, b, is_added, false); });
}

template <int kIsTurned>
void multiply_bf16(float (&d)[32], u64 a, u64 b, int is_added) {
  pending_products.push_back([&d, a, b, is_added] { multiply_bf16_now(d, a, b, is_added, kIsTurned); });
}

// Element `k` of row `row` of a BF16 matrix that lies turned.
inline float read_turned_bf16(u64 descriptor, int row, int k) {
  return read_bf16(static_cast<u32>(descriptor) + row / 64 * ((descriptor >> 32) / 16), k, row % 64);
}

template <int kIsTurnedA, int kIsTurnedB, int kSize>
void multiply_bf16(float (&d)[kSize], u64 a, u64 b, int is_added) {
  pending_products.push_back([&d, a, b, is_added] {
    const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    for (int n = 0; n < kSize; ++n) {
      const int row = first_row + n / 2 % 2 * 8, col = n / 4 * 8 + lane % 4 * 2 + n % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) {
        const float x = kIsTurnedA ? read_turned_bf16(a, row, k) : read_bf16(a, row, k);
        sum += x * (kIsTurnedB ? read_turned_bf16(b, col, k) : read_bf16(b, col, k));
      }
      d[n] = is_added ? d[n] + sum : sum;
    }
  });
}

inline void lag() {
  if (static_cast<int>(threadIdx.x) / 32 == LAGGING_WARP) std::this_thread::sleep_for(std::chrono::milliseconds(LAG_MS));
}

inline void commit_products() {
  last_group = committed;
  committed = pending_products.size();
}

inline void wait_for_products() {
  for (const auto& product : pending_products) product();
  pending_products.clear();
  last_group = committed = 0;
}

inline void wait_for_older_products() {
  lag();
  for (size_t i = 0; i < last_group; ++i) pending_products[i]();
  pending_products.erase(pending_products.begin(), pending_products.begin() + last_group);
  committed -= last_group;
  last_group = 0;
}

template <int kSize>
void pin_registers(float (&)[kSize]) {}
inline int thread_index() { return threadIdx.x; }
inline void pin_value(u64&) {}
inline void pin_value(u32&) {}
inline void begin_products() {}
template <int kCount>
void give_registers() {}
template <int kCount>
void take_registers() {}

// Runs a kernel of one struct on `num_ctas` CTAs; shared memory holds NaN at the start of each.
template <class Params>
void run_emulated(void (*kernel)(Params), const Params& params, int num_ctas, int num_threads) {
  gridDim.x = num_ctas;
  for (blockIdx.x = 0; blockIdx.x < num_ctas; ++blockIdx.x) {
    std::memset(shared_memory, 0xFF, sizeof(shared_memory));
    barriers.clear();
    cta.warps = std::make_unique<Warp[]>(num_threads / 32);
    cta.meeting = std::make_unique<std::barrier<>>(num_threads);
    cta.groups.clear();
    for (int i = 0; i < num_threads / 128; ++i) cta.groups.push_back(std::make_unique<std::barrier<>>(128));
    cta.pairs.clear();
    for (int i = 0; i < num_threads / 256; ++i) cta.pairs.push_back(std::make_unique<std::barrier<>>(256));
    std::vector<std::thread> threads;
    for (int i = 0; i < num_threads; ++i) {
      threads.emplace_back([&, i] {
        threadIdx.x = i;
        kernel(params);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
}
