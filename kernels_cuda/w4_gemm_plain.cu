// 4-bit GEMM without tensor cores: any GPU from sm_70, any size, weight scales by row or by group along `in`.
//
// A warp computes one output of up to 8 tokens: its lanes take every 32nd code of the row, a weight's code serves all
// tokens. Each (code - zero point) · weight is summed in int32: exact up to in = 2^20, |255 · 8| · 2^20 < 2^31. With
// groups a lane multiplies its integer of a group by the group's scale and sums those in float.
//
// BITS (of activations: 4 or 8), UNSIGNED, TYPE (F16 or BF16), GROUPED.
#include "ptx.cuh"

using i64 = long long;

constexpr int TOKENS = 8;  // of a warp

DEVICE int signed_nibble(u8 byte, int k) {
    int nibble = byte >> 4 * (k % 2) & 0xf;
    return (nibble ^ 8) - 8;
}
DEVICE int activation(const u8* row, int k) {
    if constexpr (BITS == 8) {
        int code = load(row + k);
        return UNSIGNED ? code : (code ^ 128) - 128;
    } else {
        u8 byte = load(row + k / 2);
        return UNSIGNED ? byte >> 4 * (k % 2) & 0xf : signed_nibble(byte, k);
    }
}

extern "C" __global__ void w4_gemm_plain(const u8* codes, const float* scale, const int* zero, const u8* weight,
                                         const float* weight_scale, const float* bias, u16* y, int tokens, int out,
                                         int in, int groups) {
    const int lane = static_cast<int>(threadIdx.x) % WARP;
    const i64 warp = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) / WARP;
    const int row = static_cast<int>(warp % out), first = static_cast<int>(warp / out) * TOKENS;
    if (first >= tokens) return;
    const int width = (in + 1) / 2, pitch = BITS == 8 ? in : width;
    const u8* weights = weight + static_cast<i64>(row) * width;
    const int count = tokens - first < TOKENS ? tokens - first : TOKENS;

    int sums[TOKENS] = {}, zeros[TOKENS] = {};
    float scaled[TOKENS] = {};
    if constexpr (UNSIGNED)
        for (int i = 0; i < TOKENS; i++) zeros[i] = i < count ? load(zero + first + i) : 0;
    for (int group = 0; group < groups; group++) {
        const int end = (group + 1) * (in / groups);
        for (int k = group * (in / groups) + lane; k < end; k += WARP) {
            const int w = signed_nibble(load(weights + k / 2), k);
            for (int i = 0; i < TOKENS; i++)
                if (i < count) sums[i] += (activation(codes + static_cast<i64>(first + i) * pitch, k) - zeros[i]) * w;
        }
        if constexpr (GROUPED) {
            const float group_scale = load(weight_scale + static_cast<i64>(row) * groups + group);
            for (int i = 0; i < TOKENS; i++) {
                scaled[i] += group_scale * static_cast<float>(sums[i]);
                sums[i] = 0;
            }
        }
    }
    for (int i = 0; i < TOKENS; i++) {
        float value = GROUPED ? warp_sum(scaled[i]) : load(weight_scale + row) * static_cast<float>(warp_sum(sums[i]));
        if (lane == 0 && i < count) {
            value = load(scale + first + i) * value + (bias != nullptr ? load(bias + row) : 0.0f);
            store(y + static_cast<i64>(first + i) * out + row, round_half(TYPE{}, value));
        }
    }
}
