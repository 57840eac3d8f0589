// Key or value rows quantized into the cache without tensor cores, on any GPU.
//
// kv_quant_rows: no matrix (it is folded into v_proj); ROW_LANES lanes share a row, 16 bytes each, so that a warp reads
//   512 and writes 128 bytes at a time. It takes WARP_ROWS rows one after the other and then stores their scales and
//   zeros together. head_dim a multiple of 8, rows aligned to 16 bytes.
// kv_quant_plain: a warp a row, any even head_dim up to 256; with MATRIX 1 every element of the row is broadcast in
//   turn and multiplied with a row of the matrix.
//
// Macros besides kv_quant.cuh's: WARPS; ROW_LANES, a power of 2 not below HEAD_DIM / 8; WARP_ROWS, from
// 32 / ROW_LANES to 32, a power of 2; MATRIX, 0 or 1.
#include "kv_quant.cuh"

constexpr int THREADS = WARPS * WARP;

template <int COUNT, int SPREAD>
DEVICE Grid lanes_grid(const float (&y)[COUNT], float clip_high, float clip_low) {
    float greatest = 0.f, negated_least = 0.f;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        greatest = max_nan(greatest, y[i]);
        negated_least = max_nan(negated_least, -y[i]);
    }
#pragma unroll
    for (int mask = SPREAD / 2; mask > 0; mask >>= 1) {
        greatest = max_nan(greatest, shuffle_xor(greatest, mask));
        negated_least = max_nan(negated_least, shuffle_xor(negated_least, mask));
    }
    return grid_of(greatest, negated_least, clip_high, clip_low);
}

// Rounds the row that ROW_LANES lanes hold, 8 elements each, and stores this lane's codes if `valid`.
DEVICE Grid store_row(const uint4& v, u8* to, float clip_high, float clip_low, bool valid) {
    float y[8];
    const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        y[2 * i] = low_half(TYPE{}, pairs[i]);
        y[2 * i + 1] = high_half(TYPE{}, pairs[i]);
    }
    const Grid grid = lanes_grid<8, ROW_LANES>(y, clip_high, clip_low);
    u32 words[BITS / 4] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) words[i * BITS / 32] |= code_of(y[i], grid) << (i * BITS % 32);
    if (valid) {
        if constexpr (BITS == 4) {
            store(reinterpret_cast<u32*>(to), words[0]);
        } else {
            store(reinterpret_cast<uint2*>(to), uint2{words[0], words[BITS / 4 - 1]});
        }
    }
    return grid;
}

extern "C" __global__ void __launch_bounds__(THREADS)
kv_quant_rows(const u16* x, const u16*, const float* clip, u8* codes, float* scale, u8* zero, const int* start,
              int count, int heads, int tokens, int capacity, int stride_batch, int stride_head, int stride_token) {
    constexpr int AT_ONCE = WARP / ROW_LANES, STEPS = WARP_ROWS / AT_ONCE, BATCH = STEPS < 4 ? STEPS : 4;
    const Rows rows{x, start, count, heads, tokens, capacity, stride_batch, stride_head, stride_token};
    const float clip_high = load(clip), clip_low = load(clip + 1);
    const int lane = threadIdx.x % WARP, group = lane / ROW_LANES, part = lane % ROW_LANES;
    const int first = (blockIdx.x * WARPS + threadIdx.x / WARP) * WARP_ROWS;
    const Row mine = locate(rows, lane < WARP_ROWS ? first + lane : count);  // lane r knows of row r of the warp
    const long long my_offset = mine.place >= 0 ? mine.x - x : 0;
    Grid kept = {};
    for (int step = 0; step < STEPS; step += BATCH) {
        uint4 v[BATCH];
        long long place[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int row = (step + i) * AT_ONCE + group;
            const long long offset = shuffle(my_offset, row);
            place[i] = shuffle(mine.place, row);
            if (part * 8 >= HEAD_DIM) place[i] = -1;
            v[i] = place[i] >= 0 ? load(reinterpret_cast<const uint4*>(x + offset + part * 8)) : uint4{0, 0, 0, 0};
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            u8* const to = codes + place[i] * CODE_BYTES + part * BITS;
            const Grid grid = store_row(v[i], to, clip_high, clip_low, place[i] >= 0);
            const int owner = lane % AT_ONCE * ROW_LANES;  // a lane that holds this lane's row, if it is its turn
            const float its_scale = shuffle(grid.scale, owner), its_zero = shuffle(grid.zero, owner);
            if (lane / AT_ONCE == step + i) kept = {its_scale, 0.f, its_zero};
        }
    }
    if (mine.place >= 0) {
        store(scale + mine.place, kept.scale);
        store(zero + mine.place, zero_of(kept));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
kv_quant_plain(const u16* x, const u16* matrix, const float* clip, u8* codes, float* scale, u8* zero, const int* start,
               int count, int heads, int tokens, int capacity, int stride_batch, int stride_head, int stride_token) {
    constexpr int PAIRS = HEAD_DIM / 2, STEPS = (PAIRS + WARP - 1) / WARP;  // lane l holds pairs l, l + 32, …
    const Rows rows{x, start, count, heads, tokens, capacity, stride_batch, stride_head, stride_token};
    const int lane = threadIdx.x % WARP;
    const Row row = locate(rows, blockIdx.x * WARPS + threadIdx.x / WARP);
    if (row.place < 0) return;  // the whole warp
    float v[2 * STEPS] = {}, y[2 * STEPS] = {};
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
        const int pair = lane + i * WARP;
        if (pair < PAIRS) {
            v[2 * i] = half_float(TYPE{}, load(row.x + 2 * pair));
            v[2 * i + 1] = half_float(TYPE{}, load(row.x + 2 * pair + 1));
        }
    }
    if constexpr (MATRIX) {
#pragma unroll
        for (int from = 0; from < 2 * STEPS; ++from) {
            for (int owner = 0; owner < WARP; ++owner) {
                const float element = shuffle(v[from], owner);
                const int k = 2 * (owner + from / 2 * WARP) + from % 2;
                if (k >= HEAD_DIM) break;
#pragma unroll
                for (int i = 0; i < STEPS; ++i) {
                    const int pair = lane + i * WARP;
                    if (pair >= PAIRS) continue;
                    const u16* const p = matrix + k * HEAD_DIM + 2 * pair;
                    y[2 * i] = fmaf(element, half_float(TYPE{}, load(p)), y[2 * i]);
                    y[2 * i + 1] = fmaf(element, half_float(TYPE{}, load(p + 1)), y[2 * i + 1]);
                }
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < 2 * STEPS; ++i) y[i] = v[i];
    }
    const Grid grid = lanes_grid<2 * STEPS, WARP>(y, load(clip), load(clip + 1));
    u8* const to = codes + row.place * CODE_BYTES;
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
        const int pair = lane + i * WARP;
        if (pair >= PAIRS) continue;
        const u32 first = code_of(y[2 * i], grid), second = code_of(y[2 * i + 1], grid);
        if constexpr (BITS == 4) {
            store(to + pair, static_cast<u8>(first | second << 4));
        } else {
            store(to + 2 * pair, static_cast<u8>(first));
            store(to + 2 * pair + 1, static_cast<u8>(second));
        }
    }
    if (lane == 0) {
        store(scale + row.place, grid.scale);
        store(zero + row.place, zero_of(grid));
    }
}
