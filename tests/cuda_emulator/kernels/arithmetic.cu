// Conversions and small instructions, one thread an element.
#include "ptx.cuh"

DEVICE int index() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

// kind 0: F16, 1: BF16. halves [n] -> floats [n].
extern "C" __global__ void widen(int kind, const u16* halves, float* floats, int n) {
    const int i = index();
    if (i >= n) return;
    const u16 half = load(halves + i);
    store(floats + i, kind ? half_float(BF16{}, half) : half_float(F16{}, half));
}
// floats [n] -> halves [n], by round_half and, for odd i, as the high half of a pair.
extern "C" __global__ void narrow(int kind, const float* floats, u16* halves, int n) {
    const int i = index();
    if (i >= n) return;
    const float x = load(floats + i);
    const u32 pair = kind ? pack_halves(BF16{}, 1.0f, x) : pack_halves(F16{}, 1.0f, x);
    const u16 half = kind ? round_half(BF16{}, x) : round_half(F16{}, x);
    store(halves + i, i & 1 ? static_cast<u16>(pair >> 16) : half);
}
// Pairs of halves: a · b + c (kind 0: F16, 1: BF16) or a - b (2).
extern "C" __global__ void pairs(int kind, const u32* a, const u32* b, const u32* c, u32* d, int n) {
    const int i = index();
    if (i >= n) return;
    const u32 x = load(a + i), y = load(b + i), z = load(c + i);
    if (kind == 0) store(d + i, fma_halves(F16{}, x, y, z));
    if (kind == 1) store(d + i, fma_halves(BF16{}, x, y, z));
    if (kind == 2) store(d + i, sub_halves(F16{}, x, y));
}
// words [n, 3] -> [3, n]: prmt, lop3 of (a & b) | c, lop3 of a ^ b ^ c.
extern "C" __global__ void words(const u32* words, u32* d, int n) {
    const int i = index();
    if (i >= n) return;
    const u32 a = load(words + 3 * i), b = load(words + 3 * i + 1), c = load(words + 3 * i + 2);
    store(d + i, byte_permute(a, b, c));
    store(d + n + i, lop3<(0xf0 & 0xcc) | 0xaa>(a, b, c));
    store(d + 2 * n + i, lop3<0xf0 ^ 0xcc ^ 0xaa>(a, b, c));
}
