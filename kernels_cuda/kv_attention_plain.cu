// Decode attention over the packed K/V cache without tensor cores, on any GPU; 4-bit or 8-bit codes.
//
// A block per query row. Its warps take every WARPS-th key each, the lanes share the columns (pairs l, l + 32, … are
// lane l's), and each warp runs an online softmax; the warps' results are merged in shared memory.
//
// Macros: HEAD_DIM, even, up to 256; TYPE; BITS; WARPS; MASKED.
#include "kv_attention.cuh"

constexpr int THREADS = WARPS * WARP;
constexpr int PAIRS = HEAD_DIM / 2, STEPS = (PAIRS + WARP - 1) / WARP;
constexpr int CODE_BYTES = HEAD_DIM * BITS / 8;

// A lane's columns of a row: (code - zero) · scale; 0 beyond the row.
DEVICE void load_numbers(const u8* codes, const float* scale, const u8* zero, long long row, int lane,
                         float (&y)[2 * STEPS]) {
    const float step = load(scale + row);
    const int offset = load(zero + row);
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
        const int pair = lane + i * WARP;
        y[2 * i] = y[2 * i + 1] = 0.f;
        if (pair >= PAIRS) continue;
        const u8* const p = codes + row * CODE_BYTES + pair * (BITS / 4);
        const int low = BITS == 4 ? load(p) & 15 : load(p), high = BITS == 4 ? load(p) >> 4 : load(p + BITS / 4 - 1);
        y[2 * i] = static_cast<float>(low - offset) * step;
        y[2 * i + 1] = static_cast<float>(high - offset) * step;
    }
}

// Grid: (q_len, heads, batch).
extern "C" __global__ void __launch_bounds__(THREADS)
kv_attention_plain(const u16* query, const u8* k_codes, const float* k_scale, const u8* k_zero, const u8* v_codes,
                   const float* v_scale, const u8* v_zero, const int* lengths, const int* first, u16* out, int kv_heads,
                   int capacity, int window, float score_scale, const u8* mask_bytes, int mask_batch, int mask_query,
                   int mask_keys) {
    FLATQ_SHARED(shared);
    float* const sums = reinterpret_cast<float*>(shared);  // [WARPS][HEAD_DIM], then (top, total) of each warp
    float2* const tops = reinterpret_cast<float2*>(sums + WARPS * HEAD_DIM);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int q_len = gridDim.x, heads = gridDim.y, i = blockIdx.x, head = blockIdx.y, batch = blockIdx.z;
    const long long row = (static_cast<long long>(batch) * heads + head) * q_len + i;
    const long long cache = (static_cast<long long>(batch) * kv_heads + head / (heads / kv_heads)) * capacity;
    const int most = MASKED && mask_keys < capacity ? mask_keys : capacity;
    const Visible visible = visible_keys(lengths, first, batch, q_len, window, most, !MASKED);
    const u8* const shown = mask_bytes + static_cast<long long>(batch) * mask_batch + i * mask_query;

    float q[2 * STEPS], sum[2 * STEPS] = {}, top = minus_infinity(), total = 0.f;
#pragma unroll
    for (int k = 0; k < 2 * STEPS; ++k) {
        const int column = 2 * (lane + k / 2 * WARP) + k % 2;
        q[k] = column < HEAD_DIM ? half_float(TYPE{}, load(query + row * HEAD_DIM + column)) : 0.f;
    }
    for (int key = visible.begin(i) + warp; key < visible.end(i); key += WARPS) {
        if (MASKED && load(shown + key) == 0) continue;
        float y[2 * STEPS], score = 0.f;
        load_numbers(k_codes, k_scale, k_zero, cache + key, lane, y);
#pragma unroll
        for (int k = 0; k < 2 * STEPS; ++k) score = fmaf(q[k], y[k], score);
        score = warp_sum(score) * score_scale;
        const float highest = fmaxf(top, score), factor = rescale(top, highest), p = fast_exp2(score - highest);
        load_numbers(v_codes, v_scale, v_zero, cache + key, lane, y);
        total = total * factor + p;
#pragma unroll
        for (int k = 0; k < 2 * STEPS; ++k) sum[k] = fmaf(p, y[k], sum[k] * factor);
        top = highest;
    }
#pragma unroll
    for (int k = 0; k < 2 * STEPS; ++k) {
        const int column = 2 * (lane + k / 2 * WARP) + k % 2;
        if (column < HEAD_DIM) shared_store(sums + warp * HEAD_DIM + column, sum[k]);
    }
    if (lane == 0) shared_store(tops + warp, float2{top, total});
    block_sync();
    for (int column = threadIdx.x; column < HEAD_DIM; column += THREADS) {
        float highest = minus_infinity(), all = 0.f, y = 0.f;
        for (int w = 0; w < WARPS; ++w) highest = fmaxf(highest, shared_load(tops + w).x);
        for (int w = 0; w < WARPS; ++w) {
            const float2 its = shared_load(tops + w);
            const float factor = rescale(its.x, highest);
            all += its.y * factor;
            y += shared_load(sums + w * HEAD_DIM + column) * factor;
        }
        store(out + row * HEAD_DIM + column, round_half(TYPE{}, all == 0.f ? 0.f : y / all));
    }
}
