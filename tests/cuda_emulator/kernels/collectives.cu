// Each collective on data from memory, one warp: what the tests compare with numpy.
#include "ptx.cuh"

template <class Mma>
DEVICE void run_mma(const u32* a, const u32* b, u32* d, Mma mma) {
    const int lane = threadIdx.x;
    u32 x[4], y[2];
    for (int r = 0; r < 4; ++r) x[r] = load(a + 4 * lane + r);
    for (int r = 0; r < 2; ++r) y[r] = load(b + 2 * lane + r);
    mma(d + 4 * lane, x, y);
}
template <class Function>
DEVICE void in_floats(u32* d, Function mma) {
    float z[4];
    for (int r = 0; r < 4; ++r) z[r] = bits_float(load_coherent(d + r));
    mma(z);
    for (int r = 0; r < 4; ++r) store(d + r, float_bits(z[r]));
}
template <class Function>
DEVICE void in_ints(u32* d, Function mma) {
    int z[4];
    for (int r = 0; r < 4; ++r) z[r] = static_cast<int>(load_coherent(d + r));
    mma(z);
    for (int r = 0; r < 4; ++r) store(d + r, static_cast<u32>(z[r]));
}

// a [32, 4] and b [32, 2] registers of the lanes; d [32, 4] is read and written.
extern "C" __global__ void mma(int kind, const u32* a, const u32* b, u32* d) {
    run_mma(a, b, d, [kind](u32* d, const u32(&x)[4], const u32(&y)[2]) {
        if (kind == 0) in_floats(d, [&](float(&z)[4]) { mma_m16n8k16(F16{}, z, x, y); });
        if (kind == 1) in_floats(d, [&](float(&z)[4]) { mma_m16n8k16(BF16{}, z, x, y); });
        if (kind == 2) in_ints(d, [&](int(&z)[4]) { mma_m16n8k32_s8(z, x, y); });
        if (kind == 3) in_ints(d, [&](int(&z)[4]) { mma_m16n8k32_u8s8(z, x, y); });
        if (kind == 4) in_ints(d, [&](int(&z)[4]) { mma_m16n8k64_s4(z, x, y); });
        if (kind == 5) in_ints(d, [&](int(&z)[4]) { mma_m16n8k64_u4s4(z, x, y); });
    });
}

// matrices [4, 8, 8] of 16 bits -> d [4 kinds, 32 lanes, 4 registers]: x4, x4 transposed, x2, x2 transposed.
extern "C" __global__ void matrices(const uint4* matrices, u32* d) {
    FLATQ_SHARED(memory);
    uint4* rows = reinterpret_cast<uint4*>(memory);
    const int lane = threadIdx.x;
    shared_store(rows + lane, load(matrices + lane));
    warp_sync();
    u32 x[4][4] = {};
    u32 two[2];
    const uint4* nowhere = rows + 1000000;  // the last 16 lanes' addresses are not used by x2
    ldmatrix_x4(x[0], rows + lane);
    ldmatrix_x4_trans(x[1], rows + lane);
    ldmatrix_x2(two, lane < 16 ? rows + lane : nowhere);
    x[2][0] = two[0], x[2][1] = two[1];
    ldmatrix_x2_trans(two, lane < 16 ? rows + lane : nowhere);
    x[3][0] = two[0], x[3][1] = two[1];
    for (int i = 0; i < 4; ++i)
        for (int r = 0; r < 4; ++r) store(d + (i * WARP + lane) * 4 + r, x[i][r]);
}

// x [32] -> y [32]: which lanes' x are positive, as each lane knows it.
extern "C" __global__ void ballots(const float* x, u32* y) {
    const int lane = threadIdx.x;
    store(y + lane, ballot(load(x + lane) > 0.f));
}

// x [32] -> y [5, 32]: xor 5, lane 3 + 7, from the next lane, sum, maximum.
extern "C" __global__ void shuffles(const float* x, float* y) {
    const int lane = threadIdx.x;
    const float value = load(x + lane);
    store(y + lane, shuffle_xor(value, 5));
    store(y + 32 + lane, shuffle(value, 3 + 7));
    store(y + 64 + lane, shuffle(value, lane + 1));
    store(y + 96 + lane, warp_sum(value));
    store(y + 128 + lane, warp_max(value));
}
