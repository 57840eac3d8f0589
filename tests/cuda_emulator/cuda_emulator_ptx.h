// The host half of kernels_cuda/ptx.cuh: the same functions with the meaning the PTX ISA gives each instruction, plus
// what the CUDA compiler has built in (indices, vector types, a few intrinsics). Included by ptx.cuh alone.
#pragma once

#include <math.h>
#include <string.h>

#include "cuda_emulator.h"

#define DEVICE inline
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__
#define __shared__ __attribute__((section("flatq_shared"))) static

#define threadIdx (::emulator::current->index)
#define blockIdx (static_cast<const ::emulator::Index3&>(::emulator::block_index))
#define blockDim (static_cast<const ::emulator::Index3&>(::emulator::block_size))
#define gridDim (static_cast<const ::emulator::Index3&>(::emulator::grid_size))

#define FLATQ_SHARED(name) [[maybe_unused]] static u8* const& name = ::emulator::shared_memory

#define FLATQ_VECTORS(T, name)                                                                            \
    struct alignas(2 * sizeof(T)) name##2 {                                                               \
        T x, y;                                                                                           \
    };                                                                                                    \
    struct name##3 {                                                                                      \
        T x, y, z;                                                                                        \
    };                                                                                                    \
    struct alignas(4 * sizeof(T)) name##4 {                                                               \
        T x, y, z, w;                                                                                     \
    };                                                                                                    \
    DEVICE name##2 make_##name##2(T x, T y) { return {x, y}; }                                            \
    DEVICE name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                    \
    DEVICE name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
FLATQ_VECTORS(i8, char)
FLATQ_VECTORS(u8, uchar)
FLATQ_VECTORS(short, short)
FLATQ_VECTORS(u16, ushort)
FLATQ_VECTORS(int, int)
FLATQ_VECTORS(u32, uint)
FLATQ_VECTORS(float, float)
#undef FLATQ_VECTORS

// ---- Memory. ----

DEVICE u32 shared_address(const void* pointer) {
    return static_cast<u32>(static_cast<const u8*>(pointer) - emulator::shared_memory);
}
template <class T>
DEVICE T load(const T* p, FLATQ_SITE) {
    emulator::access(emulator::Access::global_load, p, sizeof(T), site);
    return *p;
}
template <class T>
DEVICE T load_coherent(const T* p, FLATQ_SITE) {
    emulator::access(emulator::Access::global_load_coherent, p, sizeof(T), site);
    return *p;
}
template <class T>
DEVICE void store(T* p, T value, FLATQ_SITE) {
    emulator::access(emulator::Access::global_store, p, sizeof(T), site);
    *p = value;
}
template <class T>
DEVICE T shared_load(const T* p, FLATQ_SITE) {
    emulator::access(emulator::Access::shared_load, p, sizeof(T), site);
    return *p;
}
template <class T>
DEVICE void shared_store(T* p, T value, FLATQ_SITE) {
    emulator::access(emulator::Access::shared_store, p, sizeof(T), site, &value);
    *p = value;
}
DEVICE int atomic_add(int* p, int value, FLATQ_SITE) {
    emulator::access(emulator::Access::global_atomic, p, sizeof(int), site);
    int old = *p;
    *p = static_cast<int>(static_cast<u32>(old) + static_cast<u32>(value));
    return old;
}
DEVICE float atomic_add(float* p, float value, FLATQ_SITE) {
    emulator::access(emulator::Access::global_atomic, p, sizeof(float), site);
    float old = *p;
    *p = old + value;
    return old;
}
DEVICE void device_fence() {}

DEVICE void cp_async_16(void* shared, const void* global, int bytes = 16, FLATQ_SITE) {
    emulator::copy_async(shared, global, 16, bytes, site);
}
DEVICE void cp_async_4(void* shared, const void* global, int bytes = 4, FLATQ_SITE) {
    emulator::copy_async(shared, global, 4, bytes, site);
}
DEVICE void cp_async_commit() { emulator::copy_commit(); }
template <int PENDING>
DEVICE void cp_async_wait() {
    emulator::copy_wait(PENDING);
}

// ---- Warp collectives: the last lane to arrive does the work of all. ----

DEVICE void ldmatrix_x4(u32 (&d)[4], const void* row, FLATQ_SITE) {
    emulator::MatrixArguments lane{d, row, 4, false, site};
    emulator::meet("ldmatrix_x4", site, &lane, emulator::complete_ldmatrix);
}
DEVICE void ldmatrix_x4_trans(u32 (&d)[4], const void* row, FLATQ_SITE) {
    emulator::MatrixArguments lane{d, row, 4, true, site};
    emulator::meet("ldmatrix_x4_trans", site, &lane, emulator::complete_ldmatrix);
}
DEVICE void ldmatrix_x2(u32 (&d)[2], const void* row, FLATQ_SITE) {
    emulator::MatrixArguments lane{d, row, 2, false, site};
    emulator::meet("ldmatrix_x2", site, &lane, emulator::complete_ldmatrix);
}
DEVICE void ldmatrix_x2_trans(u32 (&d)[2], const void* row, FLATQ_SITE) {
    emulator::MatrixArguments lane{d, row, 2, true, site};
    emulator::meet("ldmatrix_x2_trans", site, &lane, emulator::complete_ldmatrix);
}

DEVICE void mma_m16n8k16(F16, float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], FLATQ_SITE) {
    emulator::MmaArguments lane{d, a, b};
    emulator::meet("mma_m16n8k16(F16)", site, &lane, emulator::complete_mma_f16);
}
DEVICE void mma_m16n8k16(BF16, float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], FLATQ_SITE) {
    emulator::MmaArguments lane{d, a, b};
    emulator::meet("mma_m16n8k16(BF16)", site, &lane, emulator::complete_mma_bf16);
}
DEVICE void mma_m16n8k32_s8(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2], FLATQ_SITE) {
    emulator::MmaArguments lane{d, a, b};
    emulator::meet("mma_m16n8k32_s8", site, &lane, emulator::complete_mma_s8);
}
DEVICE void mma_m16n8k32_u8s8(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2], FLATQ_SITE) {
    emulator::MmaArguments lane{d, a, b};
    emulator::meet("mma_m16n8k32_u8s8", site, &lane, emulator::complete_mma_u8s8);
}
DEVICE void mma_m16n8k64_s4(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2], FLATQ_SITE) {
    emulator::MmaArguments lane{d, a, b};
    emulator::meet("mma_m16n8k64_s4", site, &lane, emulator::complete_mma_s4);
}
DEVICE void mma_m16n8k64_u4s4(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2], FLATQ_SITE) {
    emulator::MmaArguments lane{d, a, b};
    emulator::meet("mma_m16n8k64_u4s4", site, &lane, emulator::complete_mma_u4s4);
}

DEVICE void block_sync(FLATQ_SITE) { emulator::meet_at_barrier("block_sync", site, 0, 0); }
DEVICE void named_sync(int id, int threads, FLATQ_SITE) { emulator::meet_at_barrier("named_sync", site, id, threads); }
DEVICE void warp_sync(FLATQ_SITE) { emulator::meet("warp_sync", site, nullptr, emulator::complete_warp_sync); }

template <class T>
DEVICE T shuffle(T value, int lane, FLATQ_SITE) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles carry 4 or 8 bytes");
    emulator::ShuffleArguments arguments{&value, sizeof(T), lane & (WARP - 1)};
    emulator::meet("shuffle", site, &arguments, emulator::complete_shuffle);
    return value;
}
template <class T>
DEVICE T shuffle_xor(T value, int mask, FLATQ_SITE) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles carry 4 or 8 bytes");
    const int lane = static_cast<int>(emulator::current->lane), source = lane ^ mask;
    emulator::ShuffleArguments arguments{&value, sizeof(T), source >= 0 && source < WARP ? source : lane};
    emulator::meet("shuffle_xor", site, &arguments, emulator::complete_shuffle);
    return value;
}
DEVICE u32 ballot(bool vote, FLATQ_SITE) {
    emulator::BallotArguments arguments{vote, 0};
    emulator::meet("ballot", site, &arguments, emulator::complete_ballot);
    return arguments.votes;
}

// ---- Arithmetic. ----

template <class To, class From>
DEVICE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}
DEVICE u32 float_bits(float x) { return bit_cast<u32>(x); }
DEVICE float bits_float(u32 x) { return bit_cast<float>(x); }

DEVICE float max_nan(float a, float b) { return a != a || b != b ? bits_float(0x7fffffff) : (a > b ? a : b); }
DEVICE float fast_exp2(float x) { return exp2f(x); }
DEVICE float fast_reciprocal(float x) { return 1.0f / x; }
DEVICE float fast_rsqrt(float x) { return static_cast<float>(1.0 / sqrt(static_cast<double>(x))); }

DEVICE u32 byte_permute(u32 low, u32 high, u32 selector) {
    u64 bytes = static_cast<u64>(high) << 32 | low;
    u32 d = 0;
    for (int i = 0; i < 4; ++i) {
        u32 pick = selector >> (4 * i) & 0xf;
        u32 byte = static_cast<u32>(bytes >> (8 * (pick & 7))) & 0xff;
        if (pick & 8) byte = byte & 0x80 ? 0xff : 0;  // prmt: the byte's sign in all its bits
        d |= byte << (8 * i);
    }
    return d;
}
template <u32 TABLE>
DEVICE u32 lop3(u32 a, u32 b, u32 c) {
    u32 d = 0;
    for (u32 i = 0; i < 8; ++i)
        if (TABLE >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return d;
}

namespace emulator {

// x to sign, EXPONENT and MANTISSA bits, round to nearest even; NaN becomes 0x7fff as in PTX.
template <int EXPONENT, int MANTISSA>
DEVICE u16 narrow(double x) {
    constexpr int BIAS = (1 << (EXPONENT - 1)) - 1, DROPPED = 52 - MANTISSA;
    u64 bits = bit_cast<u64>(x), magnitude = bits & ~(1ull << 63);
    u16 sign = static_cast<u16>(bits >> 63 << 15);
    if (magnitude > 0x7ffull << 52) return 0x7fff;
    int exponent = static_cast<int>(magnitude >> 52) - 1023;
    if (exponent > BIAS) return sign | static_cast<u16>(((1 << EXPONENT) - 1) << MANTISSA);
    if (exponent < -BIAS - MANTISSA) return sign;  // under half of the smallest subnormal
    u64 mantissa = (magnitude & ((1ull << 52) - 1)) | 1ull << 52;
    int dropped = DROPPED, field = exponent + BIAS;
    if (field < 1) dropped += 1 - field, field = 1;
    u64 kept = mantissa >> dropped, rest = mantissa & ((1ull << dropped) - 1), half = 1ull << (dropped - 1);
    if (rest > half || (rest == half && (kept & 1))) ++kept;
    // A kept bit at MANTISSA (a normal number) or a carry raises the exponent field by itself, up to infinity.
    return sign | static_cast<u16>((static_cast<u64>(field - 1) << MANTISSA) + kept);
}
DEVICE u16 narrow(F16, double x) { return narrow<5, 10>(x); }
DEVICE u16 narrow(BF16, double x) { return narrow<8, 7>(x); }
// a · b + c to odd: the result rounds on to 16 bits as the exact sum would. a · b must be exact.
DEVICE double fma_to_odd(double a, double b, double c) {
    double p = a * b, s = p + c, t = s - p, error = (p - (s - t)) + (c - t);
    if (!(s - s == 0) || error == 0 || (bit_cast<u64>(s) & 1)) return s;
    return nextafter(s, error > 0 ? HUGE_VAL : -HUGE_VAL);
}

}  // namespace emulator

template <class H>
DEVICE float low_half(H type, u32 pair);  // ptx.cuh, for both halves
template <class H>
DEVICE u16 round_half(H type, float x) {
    return emulator::narrow(type, x);
}
DEVICE float half_float(BF16, u16 x) { return bits_float(static_cast<u32>(x) << 16); }
DEVICE float half_float(F16, u16 x) {
    u32 sign = (x & 0x8000u) << 16, exponent = x >> 10 & 31, mantissa = x & 1023;
    if (exponent == 31) return bits_float(sign | 0x7f800000 | mantissa << 13);
    if (exponent) return bits_float(sign | (exponent + 112) << 23 | mantissa << 13);
    return bits_float(sign | float_bits(static_cast<float>(mantissa) * 0x1p-24f));
}
template <class H>
DEVICE u32 pack_halves(H type, float low, float high) {
    return round_half(type, low) | static_cast<u32>(round_half(type, high)) << 16;
}
template <class H>
DEVICE u32 fma_halves(H type, u32 a, u32 b, u32 c) {
    auto fma = [type](u32 x, u32 y, u32 z) -> u32 {
        return emulator::narrow(type, emulator::fma_to_odd(low_half(type, x), low_half(type, y), low_half(type, z)));
    };
    return fma(a, b, c) | fma(a >> 16, b >> 16, c >> 16) << 16;
}
DEVICE u32 sub_halves(F16 type, u32 a, u32 b) {
    auto sub = [type](u32 x, u32 y) -> u32 {  // a double holds the difference of two halves exactly
        return emulator::narrow(type, static_cast<double>(low_half(type, x)) - low_half(type, y));
    };
    return sub(a, b) | sub(a >> 16, b >> 16) << 16;
}

// ---- Intrinsics that CUDA has without a header. ----

DEVICE int min(int a, int b) { return a < b ? a : b; }
DEVICE int max(int a, int b) { return a > b ? a : b; }
DEVICE u32 min(u32 a, u32 b) { return a < b ? a : b; }
DEVICE u32 max(u32 a, u32 b) { return a > b ? a : b; }
DEVICE long long min(long long a, long long b) { return a < b ? a : b; }
DEVICE long long max(long long a, long long b) { return a > b ? a : b; }
DEVICE float min(float a, float b) { return fminf(a, b); }
DEVICE float max(float a, float b) { return fmaxf(a, b); }
DEVICE u32 __float_as_uint(float x) { return float_bits(x); }
DEVICE int __float_as_int(float x) { return bit_cast<int>(x); }
DEVICE float __uint_as_float(u32 x) { return bits_float(x); }
DEVICE float __int_as_float(int x) { return bit_cast<float>(x); }
DEVICE u32 __byte_perm(u32 low, u32 high, u32 selector) { return byte_permute(low, high, selector); }
// To an integer: NaN to 0, what is too large to the nearest that fits.
DEVICE int __float2int_rz(float x) {
    if (x != x) return 0;
    return x >= 0x1p31f ? 0x7fffffff : x < -0x1p31f ? -0x7fffffff - 1 : static_cast<int>(x);
}
DEVICE int __float2int_rn(float x) { return __float2int_rz(rintf(x)); }
DEVICE int __float2int_rd(float x) { return __float2int_rz(floorf(x)); }
DEVICE int __float2int_ru(float x) { return __float2int_rz(ceilf(x)); }
DEVICE u32 __float2uint_rz(float x) { return !(x > 0) ? 0 : x >= 0x1p32f ? 0xffffffffu : static_cast<u32>(x); }
DEVICE u32 __float2uint_rn(float x) { return __float2uint_rz(rintf(x)); }
DEVICE float __int2float_rn(int x) { return static_cast<float>(x); }
DEVICE float __uint2float_rn(u32 x) { return static_cast<float>(x); }
DEVICE float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE float __fmul_rn(float a, float b) { return a * b; }
DEVICE float __fadd_rn(float a, float b) { return a + b; }
DEVICE float __fsub_rn(float a, float b) { return a - b; }
DEVICE float __fdiv_rn(float a, float b) { return a / b; }
DEVICE float __frcp_rn(float x) { return 1.0f / x; }
DEVICE float __fsqrt_rn(float x) { return sqrtf(x); }
DEVICE float __fdividef(float a, float b) { return a / b; }
DEVICE float __expf(float x) { return expf(x); }
DEVICE float rsqrtf(float x) { return fast_rsqrt(x); }
DEVICE int __popc(u32 x) { return __builtin_popcount(x); }
DEVICE int __clz(int x) { return x ? __builtin_clz(static_cast<u32>(x)) : 32; }
DEVICE int __ffs(int x) { return __builtin_ffs(x); }
DEVICE int __dp4a(int a, int b, int c) {
    u32 sum = static_cast<u32>(c);
    for (int i = 0; i < 32; i += 8) sum += static_cast<u32>(static_cast<i8>(a >> i) * static_cast<i8>(b >> i));
    return static_cast<int>(sum);
}
