// The two products of kv_attention.cu over the keys of one step, and what stands between them: where a step's codes lie in
// shared memory, codes to halves, scores, softmax, values. The idea and the macros are described there.
#pragma once
#include "kv_attention.cuh"

constexpr int KEYS = 32;  // of a step: 4 score tiles, 2 k blocks of values
constexpr int SCORE_TILES = KEYS / 8, TILES = HEAD_DIM / 8, K_BLOCKS = HEAD_DIM / 16;
constexpr int CODE_BYTES = HEAD_DIM / 2;
constexpr int ROWS = ROW_TILES * 16;
constexpr int TEAM = ROW_TILES * WARP, THREADS = TEAMS * TEAM;
constexpr int QUERY_PITCH = HEAD_DIM * 2 + 16;
constexpr bool QUERY_REGISTERS = HEAD_DIM <= 128;  // else its fragments are read from shared memory in every step
constexpr int SUM_PITCH = (HEAD_DIM + 31) / 32 * 32;

// What stands between two of these is not reordered: ptxas would begin everything at once, and spill.
#define FEWER_REGISTERS \
    if constexpr (HEAD_DIM > 128) warp_sync()

// A buffer of the ring, in bytes from its start.
constexpr int K_CODES = 0, V_CODES = KEYS * CODE_BYTES;
constexpr int K_SCALES = 2 * V_CODES, V_SCALES = K_SCALES + KEYS * 4;
constexpr int K_ZEROS = V_SCALES + KEYS * 4, V_ZEROS = K_ZEROS + KEYS, STAGE = V_ZEROS + KEYS;

// One head's cache, from its row 0.
struct Cache {
    const u8* codes;
    const float* scale;
    const u8* zero;
};

DEVICE Cache head_cache(const u8* codes, const float* scale, const u8* zero, long long row) {
    return {codes + row * CODE_BYTES, scale + row, zero + row};
}

DEVICE constexpr int segment(int column) {  // columns that are read in one piece, from `column` on
    const int left = HEAD_DIM - column;
    return left >= 128 ? 128 : left >= 64 ? 64 : left >= 32 ? 32 : 16;
}

// ---- Shared memory. ----

// Where byte `byte` of a step's codes lies: its 16 bytes are moved so that neither reading order has bank conflicts.
DEVICE int code_place(int byte) {
    const int chunk = byte >> 4;
    int place = chunk;
    if (CODE_BYTES == 32) place = chunk ^ (chunk >> 3 & 1) << 2;
    if (CODE_BYTES == 64) place = chunk ^ (chunk >> 4 & 1) << 2 ^ (chunk >> 3 & 1) << 1;
    if (CODE_BYTES == 128) place = chunk ^ (chunk >> 3 & 3) << 1 ^ (chunk >> 5 & 1) << 2;
    return place << 4 | (byte & 15);
}

DEVICE int query_place(int row, int chunk) {  // in bytes; the permutation spares the in-loop reads bank conflicts
    return row * QUERY_PITCH + (QUERY_REGISTERS ? chunk : chunk ^ (chunk >> 3 & 1) << 1) * 16;
}

// Part of the copy of `count` rows (the others become 0) from row `key` on; `at` is this thread's place in its team.
DEVICE void copy_rows(u8* stage, int codes_at, int scales_at, int zeros_at, const Cache& cache, int key, int count,
                      int at) {
    const u8* const codes = cache.codes + static_cast<long long>(key) * CODE_BYTES;
#pragma unroll
    for (int first = 0; first < KEYS * CODE_BYTES; first += TEAM * 16) {
        const int byte = first + at * 16, left = count * CODE_BYTES - byte;
        if (KEYS * CODE_BYTES % (TEAM * 16) != 0 && byte >= KEYS * CODE_BYTES) continue;
        const int bytes = left >= 16 ? 16 : left > 0 ? left : 0;
        cp_async_16(stage + codes_at + code_place(byte), codes + (left > 0 ? byte : 0), bytes);
    }
    if (at >= KEYS) return;
    const bool present = at < count;
    cp_async_4(stage + scales_at + at * 4, cache.scale + key + (present ? at : 0), present ? 4 : 0);
    if constexpr (COPY_ZEROS) {
        const bool four = at * 4 < count;
        if (at < KEYS / 4) cp_async_4(stage + zeros_at + at * 4, cache.zero + key + (four ? at * 4 : 0), four ? 4 : 0);
    } else {
        shared_store(stage + zeros_at + at, present ? load(cache.zero + key + at) : static_cast<u8>(0));
    }
}

// ---- Codes to halves. ----

// Twice the same zero point, in the form that `unpack` subtracts.
DEVICE u32 zero_pair(F16, u32 low, u32 high) { return 0x64006400u | low | high << 16; }
DEVICE u32 zero_pair(BF16, u32 low, u32 high) { return 0xc300c300u | low | high << 16; }  // negative: it is added

// Nibbles 0 to COUNT - 1 of the word's two halves, less their zero points: pair i = (low half's, high half's nibble i).
template <int COUNT>
DEVICE void unpack(F16, u32 word, u32 zero, u32 (&pairs)[4]) {
    const u32 high_zero = 0x54005400u | (zero & 0x000f000f) << 4;  // of 64 + c, whose unit is 1/16
#pragma unroll
    for (int i = 0; i < COUNT; i += 2) {
        const u32 from = word >> (4 * i);
        pairs[i] = sub_halves(F16{}, lop3<0xea>(from, 0x000f000f, 0x64006400), zero);
        pairs[i + 1] = sub_halves(F16{}, lop3<0xea>(from, 0x00f000f0, 0x54005400), high_zero);
    }
}
template <int COUNT>
DEVICE void unpack(BF16, u32 word, u32 zero, u32 (&pairs)[4]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        pairs[i] = fma_halves(BF16{}, lop3<0xea>(word >> (4 * i), 0x000f000f, 0x43004300), 0x3f803f80, zero);
    }
}

// ---- Scores. ----

using Query = u32[K_BLOCKS][4];
using Scores = float[SCORE_TILES][4];

// The A fragments of the `index`-th word's columns (8 of them: 2 k blocks; 4 in a segment of 16: one).
template <int COLUMN>
DEVICE void query_fragments(const u8* rows, int lane, int index, u32 (&a)[2][4]) {
    constexpr int SEGMENT = segment(COLUMN);
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if constexpr (SEGMENT >= 32) {
            const int chunk = (COLUMN + t * (SEGMENT / 4)) / 8 + index;
            const uint4 v = shared_load(reinterpret_cast<const uint4*>(rows + query_place(g + 8 * half, chunk)));
            a[0][half] = byte_permute(v.x, v.z, 0x5410);
            a[0][half + 2] = byte_permute(v.x, v.z, 0x7632);
            a[1][half] = byte_permute(v.y, v.w, 0x5410);
            a[1][half + 2] = byte_permute(v.y, v.w, 0x7632);
        } else {
            const int place = query_place(g + 8 * half, COLUMN / 8) + t * 8;
            const uint2 v = shared_load(reinterpret_cast<const uint2*>(rows + place));
            a[0][half] = byte_permute(v.x, v.y, 0x5410);
            a[0][half + 2] = byte_permute(v.x, v.y, 0x7632);
        }
    }
}

template <int COLUMN>
DEVICE void load_query(const u8* rows, int lane, Query& query) {
    if constexpr (COLUMN < HEAD_DIM) {
        constexpr int SEGMENT = segment(COLUMN), BLOCKS_HERE = SEGMENT >= 32 ? 2 : 1;
#pragma unroll
        for (int index = 0; index < SEGMENT / (16 * BLOCKS_HERE); ++index) {
            u32 a[2][4];
            query_fragments<COLUMN>(rows, lane, index, a);
#pragma unroll
            for (int block = 0; block < BLOCKS_HERE; ++block) {
#pragma unroll
                for (int i = 0; i < 4; ++i) query[COLUMN / 16 + index * BLOCKS_HERE + block][i] = a[block][i];
            }
        }
        load_query<COLUMN + SEGMENT>(rows, lane, query);
    }
}

// A lane's codes of one key and segment.
template <int BYTES>
DEVICE void load_words(const u8* codes, int byte, u32 (&words)[4]) {
    const u8* const p = codes + code_place(byte);
    if constexpr (BYTES == 16) {
        const uint4 v = shared_load(reinterpret_cast<const uint4*>(p));
        words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    }
    if constexpr (BYTES == 8) {
        const uint2 v = shared_load(reinterpret_cast<const uint2*>(p));
        words[0] = v.x, words[1] = v.y;
    }
    if constexpr (BYTES == 4) words[0] = shared_load(reinterpret_cast<const u32*>(p));
    if constexpr (BYTES == 2) words[0] = shared_load(reinterpret_cast<const u16*>(p));
    if constexpr (BYTES == 1) words[0] = shared_load(p);
}

// scores += query · (codes - zero) over the columns from COLUMN on; `zeros` as zero_pair makes them, of a lane's keys.
template <int COLUMN>
DEVICE void add_scores(const u8* stage, const u8* rows, const Query& query, const u32 (&zeros)[SCORE_TILES], int lane,
                       Scores& scores) {
    if constexpr (COLUMN < HEAD_DIM) {
        constexpr int SEGMENT = segment(COLUMN), BYTES = SEGMENT / 8;
        const int g = lane / 4, t = lane % 4, key = (g >> 1) + 4 * (g & 1);
        u32 words[SCORE_TILES][4];
#pragma unroll
        for (int j = 0; j < SCORE_TILES; ++j) {
            load_words<BYTES>(stage + K_CODES, (8 * j + key) * CODE_BYTES + COLUMN / 2 + t * BYTES, words[j]);
        }
#pragma unroll
        for (int index = 0; index < (BYTES + 3) / 4; ++index) {
            u32 a[2][4];
            if constexpr (QUERY_REGISTERS) {
#pragma unroll
                for (int i = 0; i < 4 * (SEGMENT >= 32 ? 2 : 1); ++i) {
                    a[i / 4][i % 4] = query[COLUMN / 16 + 2 * index + i / 4][i % 4];
                }
            } else {
                FEWER_REGISTERS;
                query_fragments<COLUMN>(rows, lane, index, a);
            }
#pragma unroll
            for (int j = 0; j < SCORE_TILES; ++j) {
                u32 pairs[4];
                if constexpr (SEGMENT >= 32) {
                    unpack<4>(TYPE{}, words[j][index], zeros[j], pairs);
                    mma_m16n8k16(TYPE{}, scores[j], a[0], {pairs[0], pairs[1]});
                    mma_m16n8k16(TYPE{}, scores[j], a[1], {pairs[2], pairs[3]});
                } else {  // 4 codes: two in each half
                    unpack<2>(TYPE{}, byte_permute(words[j][index], 0, 0x4140), zeros[j], pairs);
                    mma_m16n8k16(TYPE{}, scores[j], a[0], {pairs[0], pairs[1]});
                }
            }
        }
        add_scores<COLUMN + SEGMENT>(stage, rows, query, zeros, lane, scores);
    }
}

// ---- Softmax. ----

// A warp's running result: `top` = the largest (score + exponent of the value's scale) so far, sums relative to 2^top.
// Index 0 is row g, 1 is row g + 8; `total` is this lane's part.
struct State {
    float top[2], total[2];
    float sum[TILES][4];
};

// Scores (times log2 e) to weights p · value scale, at most 2. Masked ones are -infinity.
DEVICE void softmax_step(Scores& scores, const float (&scales)[2 * SCORE_TILES], State& state) {
    float top[2] = {state.top[0], state.top[1]};
#pragma unroll
    for (int j = 0; j < SCORE_TILES; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            u32 exponent = float_bits(scales[2 * j + e]) >> 23 & 0xff;
            exponent = exponent < 31 ? 31 : exponent;  // below 2^-96 the sum of p might overflow
            const float shift = bits_float(0x4b000000u | exponent) - (8388608.f + 127.f);
            top[0] = fmaxf(top[0], scores[j][e] + shift);
            top[1] = fmaxf(top[1], scores[j][2 + e] + shift);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        top[half] = fmaxf(top[half], shuffle_xor(top[half], 1));
        top[half] = fmaxf(top[half], shuffle_xor(top[half], 2));
        const float factor = rescale(state.top[half], top[half]);
        const float base = top[half] == minus_infinity() ? 0.f : top[half];
        state.top[half] = top[half];
        if (factor != 1.f) {
            state.total[half] *= factor;
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                state.sum[tile][2 * half] *= factor;
                state.sum[tile][2 * half + 1] *= factor;
            }
        }
#pragma unroll
        for (int j = 0; j < SCORE_TILES; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float p = fast_exp2(scores[j][2 * half + e] - base);
                state.total[half] += p;
                scores[j][2 * half + e] = p == 0.f ? 0.f : p * scales[2 * j + e];  // a masked key's scale may be NaN
            }
        }
    }
}

// ---- Values. ----

// sums += weights · (codes - zero) over the columns from COLUMN on. `zeros`: pairs of a lane's keys.
template <int COLUMN>
DEVICE void add_values(const u8* stage, const u32 (&weights)[KEYS / 16][4], const u32 (&zeros)[KEYS / 8], int lane,
                       State& state) {
    if constexpr (COLUMN < HEAD_DIM) {
        constexpr int SEGMENT = segment(COLUMN), BYTES = SEGMENT / 16, TILE = COLUMN / 8;
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int block = 0; block < KEYS / 16; ++block) {
            FEWER_REGISTERS;
            u32 words[4][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int key = 16 * block + 4 * i + t;
                load_words<BYTES>(stage + V_CODES, key * CODE_BYTES + COLUMN / 2 + g * BYTES, words[i]);
            }
#pragma unroll
            for (int part = 0; part < (BYTES + 1) / 2; ++part) {  // 4 columns each
                constexpr int COLUMNS = BYTES == 1 ? 2 : 4;
                const u32 selector = part % 2 ? 0x7632 : 0x5410;
                const u32 low = byte_permute(words[0][part / 2], words[1][part / 2], selector);
                const u32 high = byte_permute(words[2][part / 2], words[3][part / 2], selector);
                u32 first[4], second[4];
                unpack<COLUMNS>(F16{}, low, zeros[2 * block], first);
                unpack<COLUMNS>(F16{}, high, zeros[2 * block + 1], second);
#pragma unroll
                for (int column = 0; column < COLUMNS; ++column) {
                    float(&sum)[4] = state.sum[TILE + 4 * part + column];
                    mma_m16n8k16(F16{}, sum, weights[block], {first[column], second[column]});
                }
            }
        }
        add_values<COLUMN + SEGMENT>(stage, weights, zeros, lane, state);
    }
}
