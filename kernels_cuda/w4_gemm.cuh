// What the 4-bit GEMMs share: how packed codes become tensor-core fragments, how the parts of a split sum meet, and how
// an integer sum becomes an output.
//
//     y[token, o] = a_scale[token] · w_scale[o] · (Σ a·w - a_zero[token]·w_sum[o]) + bias[o]
//
// Work goes in steps of 128 codes along `in`. In a step each lane of a quad (t = lane % 4) takes 16 consecutive bytes
// of a row of weights: codes 32t to 32t + 31. A dot product does not ask which k a fragment's element is, as long as
// both operands agree: so a lane's 16 bytes are its fragment words just as they lie in memory, no ldmatrix, no shuffle.
// The words of activations are those of the same 32 codes.
// (Tiles of FORM_S4 take ldmatrix and its order of k: that spares moves between registers.)
//
// FORM_S4: words are operands of mma.m16n8k64.s4, two a step (sm_80, 86, 89 have int4 in silicon).
// FORM_S8: w = 8 codes becomes two words of int8, of the even and of the odd codes, without sign extension:
//     (w << 4) & 0xf0f0f0f0 = 16 · even codes,   w & 0xf0f0f0f0 = 16 · odd codes   (as signed bytes),
//   four mma.m16n8k32 a step. Both sides so: the sum is 256 times the true one; an arithmetic shift restores it.
// FORM_A8: activations of 8 bits; byte_permute gathers their even and odd bytes; the sum is 16 times the true one.
//
// int32 cannot overflow for in ≤ 65536 (longer rows take the plain kernel), whatever the codes:
//     S8 signed   |16a| ≤ 128, |16w| ≤ 128:  2^14 · 2^16 = 2^30
//     S8 unsigned    a  ≤  15, |16w| ≤ 128:  < 2^27
//     A8 signed    |a|  ≤ 128, |16w| ≤ 128:  2^30
//     A8 unsigned   a   ≤ 255, |16w| ≤ 128:  32640 · 65536 = 2139095040 < 2^31 - 1 = 2147483647
// and every partial sum, over any subset of `in`, keeps the same bound. After the shift |sum| ≤ 255 · 8 · 65536 < 2^27,
// as is |a_zero · w_sum|: their difference is exact in int32 too.
#pragma once

#include "ptx.cuh"

#define FORM_S4 0
#define FORM_S8 1
#define FORM_A8 2

constexpr int STEP = 128;                                // codes of `in`
constexpr int WEIGHT_BYTES = STEP / 2;                   // of a row of weights, a step
constexpr int CODE_BYTES = FORM == FORM_A8 ? STEP : STEP / 2;  // of a token, a step
constexpr int CODE_WORDS = CODE_BYTES / 16;            // a lane's share of a token's step
constexpr int PARTS = FORM == FORM_S4 ? 2 : 4;           // mma instructions along a step
constexpr u32 HIGH_NIBBLES = 0xf0f0f0f0u;
constexpr u32 LOW_NIBBLES = 0x0f0f0f0fu;

using i64 = long long;

DEVICE int smaller(int a, int b) { return a < b ? a : b; }

// Where chunk `chunk` (16 bytes) of a row lies in a row of shared memory. A quarter of a warp reads two neighbouring
// rows at once: rows of 64 bytes fill the 32 banks by themselves; of rows of 128 bytes every other chunk is read, so
// odd rows have neighbours exchanged.
DEVICE int place(int chunk, int row) { return CODE_BYTES == 128 ? chunk ^ (row & 1) : chunk; }

DEVICE void take_words(u32* words, uint4 v) {
    words[0] = v.x;
    words[1] = v.y;
    words[2] = v.z;
    words[3] = v.w;
}
// A lane's words of one token's step; `row` is the token's place in the tile, `shared` where its step begins.
DEVICE void code_words(u32 (&words)[CODE_WORDS], const u8* shared, int row, int t) {
#pragma unroll
    for (int i = 0; i < CODE_WORDS / 4; i++) {
        const u8* chunk = shared + 16 * place(t * CODE_WORDS / 4 + i, row);
        take_words(words + 4 * i, shared_load(reinterpret_cast<const uint4*>(chunk)));
    }
}

// The two fragment words of part `part`: those of the mma's low and of its high half of k.
DEVICE void weight_pair(u32& low, u32& high, const u32* words, int part) {
    if constexpr (FORM == FORM_S4) {
        low = words[2 * part];
        high = words[2 * part + 1];
    } else {
        low = (words[part] << 4) & HIGH_NIBBLES;
        high = words[part] & HIGH_NIBBLES;
    }
}
template <bool SIGNED>
DEVICE void code_pair(u32& low, u32& high, const u32 (&words)[CODE_WORDS], int part) {
    if constexpr (FORM == FORM_A8) {
        low = byte_permute(words[2 * part], words[2 * part + 1], 0x6420);
        high = byte_permute(words[2 * part], words[2 * part + 1], 0x7531);
    } else if constexpr (FORM == FORM_S8 && !SIGNED) {
        low = words[part] & LOW_NIBBLES;
        high = (words[part] >> 4) & LOW_NIBBLES;
    } else {
        weight_pair(low, high, words, part);
    }
}
// What the sum of products with signed or with unsigned codes must be shifted by.
constexpr int SIGNED_SHIFT = FORM == FORM_S4 ? 0 : FORM == FORM_S8 ? 8 : 4;
constexpr int UNSIGNED_SHIFT = FORM == FORM_S4 ? 0 : 4;

// The parts of one tile's sum, from the `splits` blocks that share its `in`, meet in the block that comes last: every
// block writes its own part to its own place, so only the counters must be zero beforehand, and with integers the order
// is of no matter. `slot`: this thread's number among the `width` threads that hold sums, or < 0 if it holds none.
// True in the one block that then holds the whole sum.
template <int COUNT>
DEVICE bool merge_splits(int (&sums)[COUNT][4], int* parts, int* counters, int* last, int tile, int tiles, int split,
                         int splits, int slot, int width) {
    if (splits == 1) return true;
    auto part = [&](int s, int i) {
        return reinterpret_cast<uint4*>(parts) + ((static_cast<i64>(s) * tiles + tile) * COUNT + i) * width + slot;
    };
    if (slot >= 0) {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            store(part(split, i), uint4{static_cast<u32>(sums[i][0]), static_cast<u32>(sums[i][1]),
                                        static_cast<u32>(sums[i][2]), static_cast<u32>(sums[i][3])});
    }
    device_fence();
    block_sync();
    if (threadIdx.x == 0) shared_store(last, atomic_add(counters + tile, 1));
    block_sync();
    if (shared_load(last) != splits - 1) return false;
    device_fence();
    if (slot >= 0) {
        for (int s = 0; s < splits; s++) {
            if (s == split) continue;
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                uint4 v = load_coherent(part(s, i));
                sums[i][0] += static_cast<int>(v.x);
                sums[i][1] += static_cast<int>(v.y);
                sums[i][2] += static_cast<int>(v.z);
                sums[i][3] += static_cast<int>(v.w);
            }
        }
    }
    return true;
}

// An output before its one rounding to 16 bits. `sum` is shifted already.
DEVICE float output(int sum, float scale, int zero, float weight_scale, int weight_sum, float bias) {
    return scale * weight_scale * static_cast<float>(sum - zero * weight_sum) + bias;
}
