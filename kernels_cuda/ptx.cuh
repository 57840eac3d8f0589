// The instructions that the kernels are made of: one PTX instruction (or one memory access) in one inline function.
//
// Kernels touch memory and tensor cores through these functions only. That keeps inline assembly in one room, and it
// lets the very same kernel text run on a CPU: there, cuda_emulator.h takes the place of this file's device half
// and gives each function the meaning the PTX ISA gives its instruction (tests/cuda_emulator).
//
// A kernel's dialect: extern "C" entry points with pointer, int and float parameters; one-dimensional blocks of a
// multiple of 32 threads; dynamic shared memory through FLATQ_SHARED; warp collectives with all 32 lanes present.
// Halves are carried as bit patterns (u16, or two in a u32: the low half is the even element), so no CUDA header is needed.
#pragma once

using u8 = unsigned char;
using i8 = signed char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// Tags for the two 16-bit floating-point types.
struct F16 {};
struct BF16 {};

constexpr u32 FULL_WARP = 0xffffffffu;
constexpr int WARP = 32;

#if defined(FLATQ_EMULATOR)
#include <cuda_emulator_ptx.h>
#else

#define DEVICE __device__ __forceinline__

// The block's dynamic shared memory, aligned to 128 bytes.
#define FLATQ_SHARED(name) extern __shared__ __align__(128) u8 name[]

DEVICE u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

// ---- Memory. T is of 1, 2, 4, 8 or 16 bytes (u8 ... u32, float, uint2, uint4) and the address a multiple of that. ----

// Global memory that nobody writes while the kernel runs (ld.global.nc).
template <class T>
DEVICE T load(const T* p) {
    return __ldg(p);
}
// Global memory that other blocks of this launch may have written (ld.global.cg, past L1).
template <class T>
DEVICE T load_coherent(const T* p) {
    return __ldcg(p);
}
template <class T>
DEVICE void store(T* p, T value) {
    *p = value;
}
template <class T>
DEVICE T shared_load(const T* p) {
    return *p;
}
template <class T>
DEVICE void shared_store(T* p, T value) {
    *p = value;
}
DEVICE int atomic_add(int* p, int value) { return atomicAdd(p, value); }
DEVICE float atomic_add(float* p, float value) { return atomicAdd(p, value); }

// Writes of this thread before the fence are seen by the whole device before its writes after it.
DEVICE void device_fence() { __threadfence(); }

// ---- Asynchronous copies, global to shared (sm_80). ----

// 16 bytes, both addresses multiples of 16; of the source only `bytes` (0 to 16) are read, the rest becomes 0.
DEVICE void cp_async_16(void* shared, const void* global, int bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
}
// 4 bytes, both addresses multiples of 4; `bytes` is 0 or 4.
DEVICE void cp_async_4(void* shared, const void* global, int bytes = 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `PENDING` of this thread's groups are under way.
template <int PENDING>
DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- Shared memory to matrix fragments: lane l gives the address of row l (x2: lanes 0-15) of 16 bytes. ----

DEVICE void ldmatrix_x4(u32 (&d)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(row))
                 : "memory");
}
DEVICE void ldmatrix_x4_trans(u32 (&d)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(row))
                 : "memory");
}
DEVICE void ldmatrix_x2(u32 (&d)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(d[0]), "=r"(d[1])
                 : "r"(shared_address(row))
                 : "memory");
}
DEVICE void ldmatrix_x2_trans(u32 (&d)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(d[0]), "=r"(d[1])
                 : "r"(shared_address(row))
                 : "memory");
}

// ---- Tensor cores: d += a · b. A is row-major, B column-major; fragments as the PTX ISA lays them out. ----
// Volatile, though they are pure: the compiler may copy others into both sides of a branch (it did), and all lanes of a
// warp must meet at the same one.

DEVICE void mma_m16n8k16(F16, float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma_m16n8k16(BF16, float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma_m16n8k32_s8(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// A of unsigned, B of signed bytes: codes with a zero point against symmetric weights.
DEVICE void mma_m16n8k32_u8s8(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// int4 tensor cores: in silicon on sm_80, sm_86 and sm_89 only (emulated, slowly, by the compiler elsewhere).
DEVICE void mma_m16n8k64_s4(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma_m16n8k64_u4s4(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k64.row.col.s32.u4.s4.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- Meeting points. ----

DEVICE void block_sync() { __syncthreads(); }
DEVICE void warp_sync() { __syncwarp(); }
// `threads` threads of the block (whole warps) that use barrier `id` (1 to 15) wait for each other.
DEVICE void named_sync(int id, int threads) { asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

template <class T>
DEVICE T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(FULL_WARP, value, mask);
}
template <class T>
DEVICE T shuffle(T value, int lane) {
    return __shfl_sync(FULL_WARP, value, lane);
}
// Bit i is lane i's vote.
DEVICE u32 ballot(bool vote) { return __ballot_sync(FULL_WARP, vote); }

// ---- Arithmetic. ----

// The greater; NaN if either is (fmaxf would drop it).
DEVICE float max_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
    float d;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
    return d;
#else
    return (a > b || a != a) ? a : b;
#endif
}
// 2^x and 1/x to about 2 units in the last place.
DEVICE float fast_exp2(float x) {
    float d;
    asm("ex2.approx.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}
DEVICE float fast_reciprocal(float x) {
    float d;
    asm("rcp.approx.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}
DEVICE float fast_rsqrt(float x) {
    float d;
    asm("rsqrt.approx.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}
DEVICE u32 float_bits(float x) { return __float_as_uint(x); }
DEVICE float bits_float(u32 x) { return __uint_as_float(x); }
// Bytes of {high, low} picked by the four nibbles of `selector` (prmt).
DEVICE u32 byte_permute(u32 low, u32 high, u32 selector) { return __byte_perm(low, high, selector); }
// The bitwise function of three words whose truth table is TABLE (lop3): TABLE = f(0xf0, 0xcc, 0xaa).
template <u32 TABLE>
DEVICE u32 lop3(u32 a, u32 b, u32 c) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(TABLE));
    return d;
}

// Two floats to a pair of halves (round to nearest even) and back.
DEVICE u32 pack_halves(F16, float low, float high) {
    u32 d;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#else
    asm("{.reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h};}" : "=r"(d) : "f"(low), "f"(high));
#endif
    return d;
}
DEVICE u16 round_half(F16, float x) {
    u16 d;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(d) : "f"(x));
    return d;
}
DEVICE float half_float(F16, u16 x) {
    float d;
    asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(x));
    return d;
}
DEVICE float half_float(BF16, u16 x) { return __uint_as_float(static_cast<u32>(x) << 16); }
#if __CUDA_ARCH__ >= 800
DEVICE u32 pack_halves(BF16, float low, float high) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
DEVICE u16 round_half(BF16, float x) {
    u16 d;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(d) : "f"(x));
    return d;
}
#else
DEVICE u16 round_half(BF16, float x) {
    u32 bits = __float_as_uint(x);
    return x != x ? 0x7fff : static_cast<u16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
DEVICE u32 pack_halves(BF16, float low, float high) {
    return round_half(BF16{}, low) | static_cast<u32>(round_half(BF16{}, high)) << 16;
}
#endif
// a · b + c and a - b on pairs of halves.
DEVICE u32 fma_halves(F16, u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
DEVICE u32 sub_halves(F16, u32 a, u32 b) {
    u32 d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
#if __CUDA_ARCH__ >= 800
DEVICE u32 fma_halves(BF16, u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
#endif

#endif  // FLATQ_EMULATOR

// The low and the high half of a pair, as floats.
template <class H>
DEVICE float low_half(H type, u32 pair) {
    return half_float(type, static_cast<u16>(pair & 0xffff));
}
template <class H>
DEVICE float high_half(H type, u32 pair) {
    return half_float(type, static_cast<u16>(pair >> 16));
}
template <class T>
DEVICE T warp_max(T value) {
    for (int mask = WARP / 2; mask > 0; mask >>= 1) value = max_nan(value, shuffle_xor(value, mask));
    return value;
}
template <class T>
DEVICE T warp_sum(T value) {
    for (int mask = WARP / 2; mask > 0; mask >>= 1) value += shuffle_xor(value, mask);
    return value;
}
