// SPDX-License-Identifier: Apache-2.0
// The instructions of Hopper (sm_90a) that the kernels beside this file use, as functions: barriers in shared memory, bulk
// copies, products of tensor cores, registers. Nothing here knows of a problem. The PTX manual says what each one does
// (https://docs.nvidia.com/cuda/parallel-thread-execution/). tests/hopper_emulation.h has the same functions for a CPU.
#pragma once

#ifndef A_FORMAT
#define A_FORMAT "e4m3"
#endif
#ifndef B_FORMAT
#define B_FORMAT "e4m3"
#endif
#ifndef SPIN_LIMIT  // polls of a barrier before the kernel traps; 0: never (production)
#define SPIN_LIMIT 0
#endif

using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

struct alignas(64) TensorMap {
  u64 words[16];
};

// --- Barriers: addresses are those of shared memory.

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void init_barrier(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

// Other threads and the copy engine see the barriers initialized before.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

// Whether a barrier's phase is over; does not wait.
__device__ __forceinline__ bool poll_barrier(u32 barrier, u32 parity) {
  u32 done;
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
  return done;
}

__device__ __forceinline__ void wait_barrier(u32 barrier, u32 parity) {
  for (int polls = 0;; ++polls) {
    if (SPIN_LIMIT > 0 && polls == SPIN_LIMIT) asm volatile("trap;");
    u32 done;
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    if (done) return;
  }
}

__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and the phase lasts until so many bytes have been copied, too.
__device__ __forceinline__ void arrive_expecting(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives when this thread's `copy_word`s have landed.
__device__ __forceinline__ void arrive_after_copies(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// All threads of a warpgroup; groups count from 0.
__device__ __forceinline__ void sync_group(u32 group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }

// All threads of two neighbouring warpgroups.
__device__ __forceinline__ void sync_pair(u32 pair) { asm volatile("bar.sync %0, 256;" ::"r"(pair + 9) : "memory"); }

// Until the kernel before is done, where this one was launched early, and its writes can be seen.
__device__ __forceinline__ void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// --- Copies

// True for one lane of a warp, always the same; all of them ask. Bulk copies are for it alone, in code that whole warps reach
// (their number from `__shfl_sync`): ptxas (13.0) then issues them as they stand. For a lane that it only finds to be alone,
// it loops over lanes, and has skipped the coordinates of copies after the first where copies depended on conditions.
__device__ __forceinline__ bool elect_lane() {
  u32 is_elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(is_elected));
  return is_elected;
}

// A box of a tensor map whose first element is (k, row, item); zeros where it lies outside.
__device__ __forceinline__ void load_box(u32 target, const TensorMap& map, u32 barrier, int k, int row, int item) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          target),
      "l"(&map), "r"(barrier), "r"(k), "r"(row), "r"(item)
      : "memory");
}

// The same of a map with four dims.
__device__ __forceinline__ void load_box(u32 target, const TensorMap& map, u32 barrier, int byte, int col, int row,
                                         int item) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(target),
      "l"(&map), "r"(barrier), "r"(byte), "r"(col), "r"(row), "r"(item)
      : "memory");
}

// Writes a box of a map with four dims; what lies outside is not written. Stores are waited for in groups.
__device__ __forceinline__ void store_box(const TensorMap& map, u32 source, int byte, int col, int row, int item) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(source), "r"(byte), "r"(col), "r"(row), "r"(item)
               : "memory");
}

__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until this thread's stores have read shared memory, or are done.
__device__ __forceinline__ void wait_for_reading_stores() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void wait_for_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Tensor cores and bulk copies see what this thread has written into shared memory.
__device__ __forceinline__ void publish_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Four bytes, or zeros.
__device__ __forceinline__ void copy_word(u32 target, const void* source, bool is_inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(target), "l"(source), "r"(is_inside ? 4 : 0)
               : "memory");
}

__device__ __forceinline__ float load_shared(u32 address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address));
  return value;
}

__device__ __forceinline__ void load_shared(u32 address, float (&x)[2]) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x[0]), "=f"(x[1]) : "r"(address));
}

__device__ __forceinline__ void load_shared(u32 address, float (&x)[4]) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
               : "r"(address));
}

__device__ __forceinline__ void load_shared(u32 address, u32 (&x)[4]) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_shared(u32 address, u32 (&x)[2]) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "r"(address) : "memory");
}

__device__ __forceinline__ void store_shared(u32 address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ void store_shared(u32 address, const u32 (&x)[2]) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(x[0]), "r"(x[1]) : "memory");
}

__device__ __forceinline__ void store_shared(u32 address, const u32 (&x)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

// Four 8 x 8 matrices of two-byte elements: lane 8 * i + r has the address of row r of matrix i, x[i] holds
// elements 2 * (lane % 4) and the next of row lane / 4.
__device__ __forceinline__ void store_matrices(u32 address, const u32 (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
}

// The same, each matrix turned: x[i] holds elements 2 * (lane % 4) and the next of column lane / 4.
__device__ __forceinline__ void store_turned_matrices(u32 address, const u32 (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]),
               "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

// What `store_matrices` stores.
__device__ __forceinline__ void load_matrices(u32 address, u32 (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

// What `store_turned_matrices` stores.
__device__ __forceinline__ void load_turned_matrices(u32 address, u32 (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ u32 pack_fp16(float low, float high) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Four FP8 codes, the first in the lowest byte; too large values become the largest finite ones.
__device__ __forceinline__ u32 pack_e4m3(float a, float b, float c, float d) {
  u32 word;
  asm("{\n.reg .b16 x, y;\ncvt.rn.satfinite.e4m3x2.f32 x, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 y, %4, %3;\n"
      "mov.b32 %0, {x, y};\n}"
      : "=r"(word)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return word;
}

__device__ __forceinline__ u32 pack_e5m2(float a, float b, float c, float d) {
  u32 word;
  asm("{\n.reg .b16 x, y;\ncvt.rn.satfinite.e5m2x2.f32 x, %2, %1;\ncvt.rn.satfinite.e5m2x2.f32 y, %4, %3;\n"
      "mov.b32 %0, {x, y};\n}"
      : "=r"(word)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return word;
}

// Of the special function unit, within 2 ulp.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// --- Products of tensor cores, by the four warps of a warpgroup

// Rows of 128 bytes with 128-byte swizzle, groups of 8 rows 1024 bytes apart. Adding bytes / 16 moves the address.
__device__ __forceinline__ u64 matrix_descriptor(u32 address) {
  return (u64(1) << 62) | (u64(1024 >> 4) << 32) | (u64(1) << 16) | ((address & 0x3FFFF) >> 4);
}

// The same, to be read turned: rows of 128 bytes are 64 neighbouring rows (of A or B) at one k; the next 64 are that many
// bytes further on.
__device__ __forceinline__ u64 turned_descriptor(u32 address, u32 panel_bytes) {
  return (u64(1) << 62) | (u64(1024 >> 4) << 32) | (u64(panel_bytes >> 4) << 16) | ((address & 0x3FFFF) >> 4);
}

#define R4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define R16(d, i) R4(d, i), R4(d, i + 4), R4(d, i + 8), R4(d, i + 12)
#define R32(d, i) R16(d, i), R16(d, i + 16)
#define T0_31                                                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define T32_63                                                                                                  \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MULTIPLY(shape, list, first, second, third)                                      \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " third ", 0;\nwgmma.mma_async.sync.aligned." shape \
  "k32.f32." A_FORMAT "." B_FORMAT " {" list "}, " first ", " second ", p, 1, 1;\n}\n"

// d (+)= A . B^T with 64 rows x 32 of A and 2 * kSize rows x 32 of B. Warp w has rows 16 * w to 16 * w + 15; d[4 * j + i] of
// a lane is row lane / 4 + i / 2 * 8, column 8 * j + lane % 4 * 2 + i % 2.
template <int kSize>
__device__ __forceinline__ void multiply(float (&d)[kSize], u64 a, u64 b, int is_added) {
  if constexpr (kSize == 32) {
    asm volatile(MULTIPLY("m64n64", T0_31, "%32", "%33", "%34") : R32(d, 0) : "l"(a), "l"(b), "r"(is_added));
  } else {
    static_assert(kSize == 64, "columns of a warpgroup");
    asm volatile(MULTIPLY("m64n128", T0_31 ", " T32_63, "%64", "%65", "%66")
                 : R32(d, 0), R32(d, 32)
                 : "l"(a), "l"(b), "r"(is_added));
  }
}

// The same for BF16, 64 rows x 16 of A and 128 rows x 16 of B.
__device__ __forceinline__ void multiply_bf16(float (&d)[64], u64 a, u64 b, int is_added) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" T0_31
      ", " T32_63 "}, %64, %65, p, 1, 1, 0, 0;\n}\n"
      : R32(d, 0), R32(d, 32)
      : "l"(a), "l"(b), "r"(is_added));
}

// The same with 64 rows of B. kIsTurned: A lies turned, 16 rows of 64.
template <int kIsTurned>
__device__ __forceinline__ void multiply_bf16(float (&d)[32], u64 a, u64 b, int is_added) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" T0_31
      "}, %32, %33, p, 1, 1, %35, 0;\n}\n"
      : R32(d, 0)
      : "l"(a), "l"(b), "r"(is_added), "n"(kIsTurned));
}

// 2 * kSize rows of B, each operand as it lies or turned: 16 rows of 64, see `turned_descriptor`.
template <int kIsTurnedA, int kIsTurnedB, int kSize>
__device__ __forceinline__ void multiply_bf16(float (&d)[kSize], u64 a, u64 b, int is_added) {
  if constexpr (kSize == 32) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" T0_31
        "}, %32, %33, p, 1, 1, %35, %36;\n}\n"
        : R32(d, 0)
        : "l"(a), "l"(b), "r"(is_added), "n"(kIsTurnedA), "n"(kIsTurnedB));
  } else if constexpr (kSize == 4) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\nwgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, "
        "%5, p, 1, 1, %7, %8;\n}\n"
        : R4(d, 0)
        : "l"(a), "l"(b), "r"(is_added), "n"(kIsTurnedA), "n"(kIsTurnedB));
  } else {
    static_assert(kSize == 64, "columns of a warpgroup");
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" T0_31
        ", " T32_63 "}, %64, %65, p, 1, 1, %67, %68;\n}\n"
        : R32(d, 0), R32(d, 32)
        : "l"(a), "l"(b), "r"(is_added), "n"(kIsTurnedA), "n"(kIsTurnedB));
  }
}

// Tells the compiler that the registers change here, which it does not see.
template <int kSize>
__device__ __forceinline__ void pin_registers(float (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// threadIdx.x, read anew: what is computed from it need not stay in registers.
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// Keeps the compiler from computing a value anew later, where it is used.
__device__ __forceinline__ void pin_value(u64& value) { asm volatile("" : "+l"(value)); }
__device__ __forceinline__ void pin_value(u32& value) { asm volatile("" : "+r"(value)); }

// Before a `multiply` whose registers were read or written by others.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// For all but those committed last.
__device__ __forceinline__ void wait_for_older_products() { asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); }

// --- Registers: a warpgroup gives some away before another takes them.

template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
