// One access of one warp, of a pattern whose cost is counted by hand in the tests.
#include "ptx.cuh"

extern "C" __global__ void accesses(int pattern, int pitch, float* x, int* counter) {
    FLATQ_SHARED(memory);
    float* words = reinterpret_cast<float*>(memory);
    const int lane = threadIdx.x;
    u32 d[4];
    switch (pattern) {
        case 0: load(x + lane * pitch); break;
        case 1: load(reinterpret_cast<const float4*>(x) + lane * pitch); break;
        case 2: if (lane < 16) store(x + lane, 0.0f); break;
        case 3: for (int i = 0; i < 3; ++i) load_coherent(x + 32 * i + lane); break;
        case 4: for (int i = 0; i < lane; ++i) load(x + 8 * i); break;  // lane 31 alone takes part in the last of them
        case 5: atomic_add(counter, 1); break;
        case 6: shared_load(words + lane * pitch); break;
        case 7: shared_load(reinterpret_cast<const float2*>(words) + lane * pitch); break;
        case 8: shared_load(reinterpret_cast<const float4*>(words) + lane * pitch); break;
        case 9: shared_load(memory + lane * pitch); break;
        case 10: ldmatrix_x4(d, memory + lane * pitch); break;
        case 11: cp_async_16(memory + 16 * lane, x + 4 * lane, lane < pitch ? 16 : 0); break;
        case 12: if (lane < 16) load(x + lane); warp_sync(); if (lane >= 16) load(x + lane); break;
        case 13: shared_store(words + lane, 0.0f); block_sync(); named_sync(1, 32); break;
        default: break;
    }
}
