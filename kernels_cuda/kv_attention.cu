// Decode attention over the packed K/V cache, on tensor cores (sm_80 up): flash-decoding that dequantizes in registers.
//
// The query rows of a KV head's group (heads / kv_heads × q_len of them) are padded to ROW_TILES tiles of 16, which
// share every read of the cache. A sequence's visible keys are cut into as many spans as the grid has splits; a block
// takes one. In a block, TEAMS teams of ROW_TILES warps walk over the span's steps of KEYS keys, each with a ring of
// STAGES buffers that cp.async fills, so that memory is busy while the tensor cores are. The teams' sums are merged in
// shared memory, the blocks' by the block that arrives last, in a fixed order: the result does not depend on it.
//
// Codes become halves without conversions: the bits of 1024 + c (or 64 + c from the upper nibble; 128 + c in bfloat16)
// are 0x6400 | c, and subtracting 1024 + zero leaves c - zero exactly. A 32-bit word of 8 codes gives the pairs
// (c0, c4), (c1, c5), (c2, c6), (c3, c7); that order, and which lane holds which columns, is a permutation of the mma's
// k (scores) or n (values), chosen so that a lane's codes lie together in memory:
//   scores: lane (g, t) reads the t-th quarter of key g's columns; the query's fragments are permuted to match.
//   values: lane (g, t) reads the g-th eighth of the columns of its keys, those = t modulo 4; key 8j + 4e + t is
//           column 2t + e of score tile j, so that the probabilities are in place as A fragments.
//
// A value's weight p · scale is rounded to fp16. The running maximum is of (score + exponent of the value's scale), so
// the weights never exceed 2 and the largest lose nothing, however the scales differ; sums are in float32.
//
// With a mask, a lane reads one key's byte for a step, and the warp votes: each has the 32 keys of a query in a word.
//
// Macros: HEAD_DIM, a multiple of 16 up to 256; TYPE; ROW_TILES; TEAMS; STAGES; BLOCKS, of an SM at a time;
// COPY_ZEROS, 1 if the capacity is a multiple of 4; MASKED. The cache's codes of a head are aligned to 16 bytes.
#include "kv_attention_products.cuh"

// ---- A step of KEYS keys. ----

// What a lane's two rows may see.
struct Limits {
    int query[2];
    int begin[2], end[2];
    int all_begin, all_end;  // what every row of the sequence sees
};

// A sequence's mask: a byte a key, 0 hides it, and a row of them for each of `queries`.
struct Mask {
    const u8* bytes;
    int pitch, queries, end;
};

// Of the KEYS keys from `key` on, which the queries of a lane's two rows are shown, as bits.
DEVICE void shown_keys(const Mask& mask, const Limits& limits, int key, int lane, u32 (&shown)[2]) {
    const u8* byte = mask.bytes + key + lane;
    const bool present = key + lane < mask.end;
#pragma unroll 1
    for (int i = 0; i < mask.queries; ++i, byte += mask.pitch) {
        const u32 bits = ballot(present && load(byte) != 0);
#pragma unroll
        for (int half = 0; half < 2; ++half) shown[half] = limits.query[half] == i ? bits : shown[half];
    }
}

DEVICE void attend(const u8* stage, const u8* rows, const Query& query, int key, const Limits& limits,
                   const Mask& mask, float score_scale, int lane, State& state) {
    const int g = lane / 4, t = lane % 4;
    u32 zeros[SCORE_TILES];
#pragma unroll
    for (int j = 0; j < SCORE_TILES; ++j) {
        const u32 zero = shared_load(stage + K_ZEROS + 8 * j + (g >> 1) + 4 * (g & 1)) & 15;
        zeros[j] = zero_pair(TYPE{}, zero, zero);
    }
    Scores scores = {};
    add_scores<0>(stage, rows, query, zeros, lane, scores);
    u32 shown[2] = {};
    if constexpr (MASKED) shown_keys(mask, limits, key, lane, shown);

    float scales[2 * SCORE_TILES];
    auto load_scales = [&](int at) {
#pragma unroll
        for (int i = 0; i < 2 * SCORE_TILES; ++i) {
            scales[i] = shared_load(reinterpret_cast<const float*>(stage + at) + 4 * i + t);
        }
    };
    load_scales(K_SCALES);
    const bool masked = key < limits.all_begin || key + KEYS > limits.all_end;
#pragma unroll
    for (int j = 0; j < SCORE_TILES; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int e = i % 2, half = i / 2, here = key + 8 * j + 4 * e + t;
            scores[j][i] *= scales[2 * j + e] * score_scale;
            const bool hidden = MASKED && !(shown[half] >> (8 * j + 4 * e + t) & 1);
            const bool outside = masked && (here < limits.begin[half] || here >= limits.end[half]);
            if (hidden || outside) scores[j][i] = minus_infinity();
        }
    }
    load_scales(V_SCALES);
    softmax_step(scores, scales, state);

    u32 weights[KEYS / 16][4], value_zeros[KEYS / 8];
#pragma unroll
    for (int block = 0; block < KEYS / 16; ++block) {
#pragma unroll
        for (int pair = 2 * block; pair < 2 * block + 2; ++pair) {
            const u8* const zero = stage + V_ZEROS + 8 * pair + t;
            value_zeros[pair] = zero_pair(F16{}, shared_load(zero) & 15, shared_load(zero + 4) & 15);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float(&tile)[4] = scores[2 * block + i / 2];
            weights[block][i] = pack_halves(F16{}, tile[2 * (i % 2)], tile[2 * (i % 2) + 1]);
        }
    }
    add_values<0>(stage, weights, value_zeros, lane, state);
}

// ---- Merging. ----

// Where in a team's sums (floats) the 4 columns from 4 · chunk on of a row lie: moved to spare bank conflicts.
DEVICE int sum_place(int row, int chunk) {
    return row * SUM_PITCH + 4 * (SUM_PITCH % 64 == 0 ? chunk ^ ((chunk >> 3 & 3) | (row & 1) << 2) : chunk);
}

template <int COLUMN>
DEVICE void put_sums(float* sums, int row, int lane, const State& state) {
    if constexpr (COLUMN < HEAD_DIM) {
        constexpr int SEGMENT = segment(COLUMN), WIDTH = SEGMENT / 8, TILE = COLUMN / 8;
        const int t = lane % 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int from = COLUMN + (2 * t + e) * WIDTH, here = row + 8 * half, i = 2 * half + e;
                if constexpr (WIDTH >= 4) {
#pragma unroll
                    for (int tile = 0; tile < WIDTH; tile += 4) {
                        const float4 v = {state.sum[TILE + tile][i], state.sum[TILE + tile + 1][i],
                                          state.sum[TILE + tile + 2][i], state.sum[TILE + tile + 3][i]};
                        shared_store(reinterpret_cast<float4*>(sums + sum_place(here, (from + tile) / 4)), v);
                    }
                } else {
#pragma unroll
                    for (int tile = 0; tile < WIDTH; ++tile) {
                        const int column = from + tile;
                        shared_store(sums + sum_place(here, column / 4) + column % 4, state.sum[TILE + tile][i]);
                    }
                }
            }
        }
        put_sums<COLUMN + SEGMENT>(sums, row, lane, state);
    }
}

// A row's result so far, 4 columns of it.
struct Part {
    float top, total;
    float4 sum;

    DEVICE void add(float other_top, float other_total, const float4& other) {
        const float highest = fmaxf(top, other_top), mine = rescale(top, highest), its = rescale(other_top, highest);
        total = total * mine + other_total * its;
        sum.x = sum.x * mine + other.x * its;
        sum.y = sum.y * mine + other.y * its;
        sum.z = sum.z * mine + other.z * its;
        sum.w = sum.w * mine + other.w * its;
        top = highest;
    }
};

DEVICE void put_output(u16* out, const Part& part) {
    const float inverse = part.total == 0.f ? 0.f : 1.f / part.total;  // a query that sees nothing gives 0
    store(reinterpret_cast<uint2*>(out), uint2{pack_halves(TYPE{}, part.sum.x * inverse, part.sum.y * inverse),
                                               pack_halves(TYPE{}, part.sum.z * inverse, part.sum.w * inverse)});
}

// ---- The kernel. Grid: (splits, kv_heads · groups of ROWS rows, batch). ----

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
kv_attention(const u16* query, const u8* k_codes, const float* k_scale, const u8* k_zero, const u8* v_codes,
             const float* v_scale, const u8* v_zero, const int* lengths, const int* first, u16* out, float* partial,
             int* arrivals, int kv_heads, int group_rows, int q_len, int capacity, int window, float score_scale,
             const u8* mask_bytes, int mask_batch, int mask_query, int mask_keys) {
    FLATQ_SHARED(shared);
    const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    const int team = warp / ROW_TILES, row_tile = warp % ROW_TILES;
    const int splits = gridDim.x, split = blockIdx.x, batch = blockIdx.z;
    const int head = blockIdx.y % kv_heads, first_row = blockIdx.y / kv_heads * ROWS;
    const int rows = group_rows - first_row < ROWS ? group_rows - first_row : ROWS;
    const long long batch_head = static_cast<long long>(batch) * kv_heads + head;
    const u16* const query_rows = query + (batch_head * group_rows + first_row) * HEAD_DIM;
    u16* const out_rows = out + (batch_head * group_rows + first_row) * HEAD_DIM;
    constexpr int CHUNKS = HEAD_DIM / 4;  // of a row of sums

    // This block's span of the visible keys; spans are whole rounds of all teams, so short sequences take fewer blocks.
    const int most = MASKED && mask_keys < capacity ? mask_keys : capacity;
    const Visible visible = visible_keys(lengths, first, batch, q_len, window, most, !MASKED);
    const int begin = visible.begin(0) & ~15, end = visible.end(q_len - 1);
    const int total = visible.begin(0) < end ? end - begin : 0;
    constexpr int ROUND = TEAMS * KEYS;
    const int span = (total + splits * ROUND - 1) / (splits * ROUND) * ROUND;
    const int busy = span > 0 ? (total + span - 1) / span : 0;
    if (split >= busy) {
        if (split == 0) {
            for (int i = thread; i < rows * CHUNKS; i += THREADS) {
                store(reinterpret_cast<uint2*>(out_rows) + i, uint2{0, 0});
            }
        }
        return;
    }
    const int span_begin = begin + split * span, span_end = span_begin + span < end ? span_begin + span : end;

    for (int i = thread; i < ROWS * (HEAD_DIM / 8); i += THREADS) {
        const int row = i / (HEAD_DIM / 8), chunk = i % (HEAD_DIM / 8);
        const bool present = row < rows;
        const u16* const from = query_rows + (present ? row * HEAD_DIM + chunk * 8 : 0);
        cp_async_16(shared + query_place(row, chunk), from, present ? 16 : 0);
    }
    cp_async_commit();

    const Cache keys = head_cache(k_codes, k_scale, k_zero, batch_head * capacity);
    const Cache values = head_cache(v_codes, v_scale, v_zero, batch_head * capacity);
    u8* const ring = shared + ROWS * QUERY_PITCH + team * STAGES * STAGE;
    const int at = thread % TEAM;
    auto fetch = [&](int step) {
        const int key = span_begin + (step * TEAMS + team) * KEYS, count = span_end - key;
        if (count > 0) {
            u8* const stage = ring + step % STAGES * STAGE;
            copy_rows(stage, K_CODES, K_SCALES, K_ZEROS, keys, key, count, at);
            copy_rows(stage, V_CODES, V_SCALES, V_ZEROS, values, key, count, at);
        }
        cp_async_commit();
    };
#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) fetch(step);
    cp_async_wait<STAGES - 1>();
    block_sync();  // the query is here

    const u8* const tile_rows = shared + row_tile * 16 * QUERY_PITCH;
    Query fragments;
    if constexpr (QUERY_REGISTERS) load_query<0>(tile_rows, lane, fragments);
    Limits limits;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int i = (first_row + row_tile * 16 + lane / 4 + 8 * half) % q_len;
        limits.query[half] = i;
        limits.begin[half] = visible.begin(i);
        limits.end[half] = visible.end(i);
    }
    limits.all_begin = visible.begin(q_len - 1);
    limits.all_end = visible.end(0);

    const Mask mask = {mask_bytes + static_cast<long long>(batch) * mask_batch, mask_query, q_len, span_end};
    State state = {};
    state.top[0] = state.top[1] = minus_infinity();
    for (int step = 0, key = span_begin + team * KEYS; key < span_end; ++step, key += ROUND) {
        cp_async_wait<STAGES - 2>();
        if constexpr (ROW_TILES == 1) {
            warp_sync();
        } else {
            named_sync(1 + team, TEAM);
        }  // the step's codes are here, and nobody reads the buffer that is filled next
        fetch(step + STAGES - 1);
        attend(ring + step % STAGES * STAGE, tile_rows, fragments, key, limits, mask, score_scale, lane, state);
    }
    cp_async_wait<0>();
    block_sync();  // from here on the shared memory holds sums: [TEAMS][ROWS] rows, then their (top, total)

    float* const sums = reinterpret_cast<float*>(shared);
    float2* const tops = reinterpret_cast<float2*>(sums + TEAMS * ROWS * SUM_PITCH);
    int* const last_flag = reinterpret_cast<int*>(tops + TEAMS * ROWS);
    const int row_here = row_tile * 16 + lane / 4;
    put_sums<0>(sums + team * ROWS * SUM_PITCH, row_here, lane, state);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float all = state.total[half];
        all += shuffle_xor(all, 1);
        all += shuffle_xor(all, 2);
        if (lane % 4 == 0) shared_store(tops + team * ROWS + row_here + 8 * half, float2{state.top[half], all});
    }
    block_sync();

    // [batch · kv_heads · groups][splits] of (top, total) of ROWS rows, then their sums.
    constexpr int PARTIAL = ROWS * (HEAD_DIM + 2);
    const long long group = static_cast<long long>(batch) * gridDim.y + blockIdx.y;
    float* const first_partial = partial + group * splits * PARTIAL;
    float* const my_partial = first_partial + static_cast<long long>(split) * PARTIAL;
    for (int i = thread; i < rows * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        Part part = {minus_infinity(), 0.f, {0.f, 0.f, 0.f, 0.f}};
#pragma unroll
        for (int k = 0; k < TEAMS; ++k) {
            const float2 top = shared_load(tops + k * ROWS + row);
            const float* const sum = sums + k * ROWS * SUM_PITCH + sum_place(row, chunk);
            part.add(top.x, top.y, shared_load(reinterpret_cast<const float4*>(sum)));
        }
        if (busy == 1) {
            put_output(out_rows + row * HEAD_DIM + chunk * 4, part);
        } else {
            store(reinterpret_cast<float4*>(my_partial + 2 * ROWS) + i, part.sum);
            if (chunk == 0) store(reinterpret_cast<float2*>(my_partial) + row, float2{part.top, part.total});
        }
    }
    if (busy == 1) return;

    device_fence();
    block_sync();
    if (thread == 0) shared_store(last_flag, atomic_add(arrivals + group, 1) == busy - 1 ? 1 : 0);
    block_sync();
    if (!shared_load(last_flag)) return;
    device_fence();
    for (int i = thread; i < rows * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS;
        Part part = {minus_infinity(), 0.f, {0.f, 0.f, 0.f, 0.f}};
        for (int k = 0; k < busy; ++k) {
            const float* const from = first_partial + static_cast<long long>(k) * PARTIAL;
            const float2 top = load_coherent(reinterpret_cast<const float2*>(from) + row);
            part.add(top.x, top.y, load_coherent(reinterpret_cast<const float4*>(from + 2 * ROWS) + i));
        }
        put_output(out_rows + row * HEAD_DIM + i % CHUNKS * 4, part);
    }
}
