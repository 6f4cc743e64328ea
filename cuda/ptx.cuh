// One function per PTX instruction that C++ has no word for: those of sm_80, then those of sm_90a.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace lowbitcore::cuda::ptx {

// The address of shared memory as shared-memory instructions take it.
__device__ __forceinline__ std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes to shared memory in the background; zeros where `valid` is false (the source is
// not read then, but has to be an address that could be).
__device__ __forceinline__ void copy_async(std::uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `kPending` of this thread's latest groups of copies are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(std::uint32_t (&r)[4], std::uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(std::uint32_t (&r)[4],
                                                         std::uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

__device__ __forceinline__ uint4 load_shared_128(std::uint32_t shared) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared)
               : "memory");
  return v;
}

__device__ __forceinline__ uint2 load_shared_64(std::uint32_t shared) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(shared) : "memory");
  return v;
}

__device__ __forceinline__ std::uint32_t load_shared_32(std::uint32_t shared) {
  std::uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(shared) : "memory");
  return v;
}

__device__ __forceinline__ std::uint32_t load_shared_16(std::uint32_t shared) {
  std::uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(shared) : "memory");
  return v;
}

__device__ __forceinline__ void store_shared_32(std::uint32_t shared, std::uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared), "r"(value) : "memory");
}

// A function of three bits, applied to 32 at a time; kTable is its truth table.
template <int kTable>
__device__ __forceinline__ std::uint32_t lop3(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return r;
}
// Truth tables: the arguments are 0xF0, 0xCC and 0xAA.
constexpr int kAndOr = (0xF0 & 0xCC) | 0xAA;  // (a & b) | c
constexpr int kOrAnd = 0xF0 | (0xCC & 0xAA);  // a | (b & c)

// Any four of the eight bytes of b:a.
__device__ __forceinline__ std::uint32_t prmt(std::uint32_t a, std::uint32_t b,
                                              std::uint32_t selector) {
  return __byte_perm(a, b, selector);
}

// c += a b for a 16x16 (row), b 16x8 (column), c 16x8 in fp32.
__device__ __forceinline__ void mma(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                    std::uint32_t b1, __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                    std::uint32_t b1, __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// a b + c on two numbers at a time, rounded once.
__device__ __forceinline__ std::uint32_t fma2(std::uint32_t a, std::uint32_t b, std::uint32_t c,
                                              __half) {
  std::uint32_t r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

__device__ __forceinline__ std::uint32_t fma2(std::uint32_t a, std::uint32_t b, std::uint32_t c,
                                              __nv_bfloat16) {
  std::uint32_t r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

// Two floats, rounded to a pair of 16-bit numbers; `low` goes to the lower half.
__device__ __forceinline__ std::uint32_t pack2(float low, float high, __half) {
  std::uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

__device__ __forceinline__ std::uint32_t pack2(float low, float high, __nv_bfloat16) {
  std::uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

__device__ __forceinline__ float2 unpack2(std::uint32_t pair, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

__device__ __forceinline__ float2 unpack2(std::uint32_t pair, __nv_bfloat16) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// ---- sm_90a: products by groups of four warps, which run on while the warps do other work.
//
// The compiler sees a wgmma as any other statement, finished where it stands. What keeps the
// registers of one that is under way from being touched is that `hold` makes every later statement
// depend on them, right after the instruction that says when they may be touched.

// Every use of these registers so far comes before, every later one after.
template <int kCount>
__device__ __forceinline__ void hold(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int kCount>
__device__ __forceinline__ void hold(std::uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// What this thread has written to shared memory, its landed copies included, becomes visible to
// wgmma; a barrier must follow for other threads' wgmma.
__device__ __forceinline__ void publish_to_wgmma() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Registers written so far may be operands of the wgmmas that follow.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_wgmmas() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `kPending` of this warp's latest groups of wgmmas are under way.
template <int kPending>
__device__ __forceinline__ void wait_wgmmas() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// An operand in shared memory: rows of 64 16-bit elements, 128 bytes apart, whose chunks of 16
// bytes are permuted by chunk ^ (row % 8); `shared` is a multiple of 1024, plus 32 for each 16
// columns that are skipped.
__device__ __forceinline__ std::uint64_t wgmma_operand(std::uint32_t shared) {
  constexpr std::uint64_t kEightRows = 1024, kPermuted128 = 1;
  return (shared & 0x3ffffu) >> 4 | std::uint64_t{1} << 16 | kEightRows >> 4 << 32 |
         kPermuted128 << 62;
}

#define LOWBITCORE_ACCUMULATORS_8(c, i)                                                         \
  "+f"((c)[i]), "+f"((c)[(i) + 1]), "+f"((c)[(i) + 2]), "+f"((c)[(i) + 3]), "+f"((c)[(i) + 4]), \
      "+f"((c)[(i) + 5]), "+f"((c)[(i) + 6]), "+f"((c)[(i) + 7])
#define LOWBITCORE_ACCUMULATORS_64(c)                                     \
  LOWBITCORE_ACCUMULATORS_8(c, 0), LOWBITCORE_ACCUMULATORS_8(c, 8),       \
      LOWBITCORE_ACCUMULATORS_8(c, 16), LOWBITCORE_ACCUMULATORS_8(c, 24), \
      LOWBITCORE_ACCUMULATORS_8(c, 32), LOWBITCORE_ACCUMULATORS_8(c, 40), \
      LOWBITCORE_ACCUMULATORS_8(c, 48), LOWBITCORE_ACCUMULATORS_8(c, 56)
#define LOWBITCORE_WGMMA(type)                                                                  \
  "{.reg .pred add; setp.eq.b32 add, 0, 0;"                                                     \
  "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                  \
  " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19," \
  " %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37,"  \
  " %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55,"  \
  " %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, add, 1, 1, 0;}"

// c += a b in the background, by four warps: a 64x16 (row), of which a warp holds 16 rows as `mma`
// does, b 16x128 in shared memory, c 64x128 in fp32: as sixteen of `mma`'s side by side.
__device__ __forceinline__ void wgmma(float (&c)[64], const std::uint32_t (&a)[4], std::uint64_t b,
                                      __half) {
  asm volatile(LOWBITCORE_WGMMA("f16")
               : LOWBITCORE_ACCUMULATORS_64(c)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void wgmma(float (&c)[64], const std::uint32_t (&a)[4], std::uint64_t b,
                                      __nv_bfloat16) {
  asm volatile(LOWBITCORE_WGMMA("bf16")
               : LOWBITCORE_ACCUMULATORS_64(c)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef LOWBITCORE_ACCUMULATORS_8
#undef LOWBITCORE_ACCUMULATORS_64
#undef LOWBITCORE_WGMMA

}  // namespace lowbitcore::cuda::ptx
