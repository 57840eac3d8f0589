// The cache's codes back to numbers: (q - zero) · scale.
//
// A thread takes BYTES bytes of one row's codes. The fast form stores 16 bytes: 8 halves or 4 floats.
// Macros: HEAD_DIM; BITS; OUT, F16, BF16 or F32; BYTES, 1, 2, 4 or 8, a divisor of a row's bytes.
#include "ptx.cuh"

struct F32 {};

constexpr int CODE_BYTES = HEAD_DIM * BITS / 8;
constexpr int CODES = BYTES * 8 / BITS;  // of a thread
constexpr int THREADS = 256;

DEVICE void load_codes(const u8* p, u32 (&words)[2]) {
    if constexpr (BYTES == 8) {
        const uint2 v = load(reinterpret_cast<const uint2*>(p));
        words[0] = v.x;
        words[1] = v.y;
    }
    if constexpr (BYTES == 4) words[0] = load(reinterpret_cast<const u32*>(p));
    if constexpr (BYTES == 2) words[0] = load(reinterpret_cast<const u16*>(p));
    if constexpr (BYTES == 1) words[0] = load(p);
}

DEVICE void store_numbers(F32, void* out, long long at, const float (&y)[CODES]) {
    float* const to = static_cast<float*>(out) + at;
    if constexpr (CODES == 4) {
        store(reinterpret_cast<float4*>(to), float4{y[0], y[1], y[2], y[3]});
    } else {
#pragma unroll
        for (int i = 0; i < CODES; ++i) store(to + i, y[i]);
    }
}
template <class H>
DEVICE void store_numbers(H, void* out, long long at, const float (&y)[CODES]) {
    u16* const to = static_cast<u16*>(out) + at;
    if constexpr (CODES == 8) {
        store(reinterpret_cast<uint4*>(to), uint4{pack_halves(H{}, y[0], y[1]), pack_halves(H{}, y[2], y[3]),
                                                  pack_halves(H{}, y[4], y[5]), pack_halves(H{}, y[6], y[7])});
    } else {
#pragma unroll
        for (int i = 0; i < CODES; ++i) store(to + i, round_half(H{}, y[i]));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
kv_dequant(const u8* codes, const float* scale, const u8* zero, void* out, int rows) {
    const long long index = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    const long long row = index / (CODE_BYTES / BYTES);
    if (row >= rows) return;
    u32 words[2] = {0, 0};
    load_codes(codes + index * BYTES, words);
    const float step = load(scale + row);
    const int offset = load(zero + row);
    float y[CODES];
#pragma unroll
    for (int i = 0; i < CODES; ++i) {
        const int code = words[i * BITS / 32] >> (i * BITS % 32) & ((1 << BITS) - 1);
        y[i] = static_cast<float>(code - offset) * step;
    }
    store_numbers(OUT{}, out, index * CODES, y);
}
