// What the scan by warpgroups needs that C++ does not spell: barriers in shared memory, fences,
// registers handed over, and products of matrices that lie in shared memory (sm_90a alone). As with
// intrinsics.cuh, the tests have an implementation of their own for a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// Whether what is being compiled has these instructions; kernels are empty elsewhere.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define GRACE_HAS_WARPGROUPS
#endif

namespace grace::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// From a multiple of 1024 bytes on, which swizzled matrices need.
__device__ __forceinline__ char* swizzled_shared() {
  extern __shared__ __align__(1024) char swizzled[];
  return swizzled;
}

// A barrier in shared memory: a phase ends when so many have arrived. Phases are counted from 0.
__device__ __forceinline__ void start_barrier(uint64_t* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}\n" ::"r"(
                   shared_address(barrier))
               : "memory");
}
// Wait for the end of a phase, which is the current one or the one before.
__device__ __forceinline__ void wait_for(uint64_t* barrier, unsigned phase) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n.reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n}\n"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(phase & 1)
        : "memory");
  } while (ended == 0);
}

// What this thread wrote to shared memory, or has waited for of its copies, may be read by
// multiply() of others once they know that this was called.
__device__ __forceinline__ void publish_to_products() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Registers of every thread of this warpgroup from here on. A block has as many as it began with:
// taking more waits until others have given them up, for ever where they do not.
template <int Registers>
__device__ __forceinline__ void give_registers_up() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// Names a matrix in shared memory to multiply(): rows of 128 bytes, eight of them 1024 bytes that
// begin at a multiple of that, the next eight `stride` bytes on. Part i of a row of 16 bytes stands
// at place i ^ (row % 8). Sixteen elements further along all rows is 2 more.
__device__ __forceinline__ uint64_t matrix(const void* shared, int stride) {
  constexpr uint64_t kSwizzled = uint64_t{1} << 62;  // by 128 bytes
  return kSwizzled | static_cast<uint64_t>(stride / 16) << 32 | uint64_t{1} << 16 |
         (shared_address(shared) & 0x3ffff) / 16;
}
constexpr uint64_t kNextProduct = 2;

// Before the first multiply() that uses registers which were read or written otherwise.
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// The operands of an instruction that has all of d.
#define GRACE_SUMS_16                                                                             \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),    \
      "+f"(d[15])
#define GRACE_SUMS_64                                                                            \
  GRACE_SUMS_16, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),   \
      "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), \
      "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), \
      "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), \
      "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), \
      "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), \
      "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define GRACE_MULTIPLY_64(type)                                    \
  asm volatile(                                                    \
      "{\n.reg .pred more;\nsetp.ne.b32 more, %66, 0;\n"           \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type \
      " "                                                          \
      "{%0, %1, %2, %3, %4, %5, %6, %7, "                          \
      "%8, %9, %10, %11, %12, %13, %14, %15, "                     \
      "%16, %17, %18, %19, %20, %21, %22, %23, "                   \
      "%24, %25, %26, %27, %28, %29, %30, %31, "                   \
      "%32, %33, %34, %35, %36, %37, %38, %39, "                   \
      "%40, %41, %42, %43, %44, %45, %46, %47, "                   \
      "%48, %49, %50, %51, %52, %53, %54, %55, "                   \
      "%56, %57, %58, %59, %60, %61, %62, %63}, "                  \
      "%64, %65, more, 1, 1, 0, 0;\n}\n"                           \
      : GRACE_SUMS_64                                              \
      : "l"(a), "l"(b), "r"(more)                                  \
      : "memory")
#define GRACE_MULTIPLY_16(type)                                   \
  asm volatile(                                                   \
      "{\n.reg .pred more;\nsetp.ne.b32 more, %18, 0;\n"          \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type \
      " "                                                         \
      "{%0, %1, %2, %3, %4, %5, %6, %7, "                         \
      "%8, %9, %10, %11, %12, %13, %14, %15}, "                   \
      "%16, %17, more, 1, 1, 0, 0;\n}\n"                          \
      : GRACE_SUMS_16                                             \
      : "l"(a), "l"(b), "r"(more)                                 \
      : "memory")

// Start d = a b^T, plus d if there is `more`, for 64 rows and 16 elements of a and as many rows of
// b as d has twice. A warp has 16 rows of a; lane 4 g + j has d[4 m + 2 i + h], of row 8 i + g and
// row 8 m + 2 j + h of b. All four warps of a warpgroup together. Nobody may touch d, a or b until
// wait_for_products().
__device__ __forceinline__ void multiply(BFloat, float (&d)[64], uint64_t a, uint64_t b, int more) {
  GRACE_MULTIPLY_64("bf16");
}
__device__ __forceinline__ void multiply(Half, float (&d)[64], uint64_t a, uint64_t b, int more) {
  GRACE_MULTIPLY_64("f16");
}
__device__ __forceinline__ void multiply(BFloat, float (&d)[16], uint64_t a, uint64_t b, int more) {
  GRACE_MULTIPLY_16("bf16");
}
__device__ __forceinline__ void multiply(Half, float (&d)[16], uint64_t a, uint64_t b, int more) {
  GRACE_MULTIPLY_16("f16");
}

// Wait for all that this warpgroup has committed.
__device__ __forceinline__ void wait_for_products(float (&d)[64]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" : GRACE_SUMS_64 : : "memory");
}
__device__ __forceinline__ void wait_for_products(float (&d)[16]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" : GRACE_SUMS_16 : : "memory");
}

#undef GRACE_SUMS_16
#undef GRACE_SUMS_64
#undef GRACE_MULTIPLY_64
#undef GRACE_MULTIPLY_16

}  // namespace grace::cuda
