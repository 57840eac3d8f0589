// kron_quant's way out: a token's range, its codes, and how they reach global memory in whole sectors.
//
// A lane holds neighbouring codes of rows g and g + 8 of its warp's 16. Where rows are whole sectors (or halves and
// quarters that tile them) it stores them at once; elsewhere the 16 rows, which are one stretch of global memory, pass
// through a stage in shared memory.
#pragma once
#include "kron_quant_layout.cuh"

// Writes the 2 · LENGTH codes (COUNT bytes) of a lane in one row of a run of tiles.
template <int LENGTH, bool TO_SHARED>
DEVICE void put_codes(u8* to, const u32 (&word)[(2 * LENGTH + WORD_CODES - 1) / WORD_CODES]) {
    constexpr int BYTES = 2 * LENGTH * BITS / 8;
    auto put = [](auto* p, auto value) {
        if constexpr (TO_SHARED) {
            shared_store(p, value);
        } else {
            store(p, value);
        }
    };
    if constexpr (BYTES == 1) put(to, static_cast<u8>(word[0]));
    if constexpr (BYTES == 2) put(reinterpret_cast<u16*>(to), static_cast<u16>(word[0]));
    if constexpr (BYTES == 4) put(reinterpret_cast<u32*>(to), word[0]);
    if constexpr (BYTES == 8) put(reinterpret_cast<uint2*>(to), uint2{word[0], word[1]});
    if constexpr (BYTES == 16) put(reinterpret_cast<uint4*>(to), uint4{word[0], word[1], word[2], word[3]});
}

// The codes of one run of LENGTH tiles, from tile FIRST on, rows g and g + 8 of a unit.
template <int LENGTH>
DEVICE void put_run(u8* base, int pitch, int rows, const float (&z)[N_TILES][4], int first, const Rounding& rounding,
                    int lane) {
    constexpr int CODES = 2 * LENGTH;
    constexpr int WORDS = (CODES + WORD_CODES - 1) / WORD_CODES;
    constexpr int IN_WORD = CODES / WORDS;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 word[WORDS];
#pragma unroll
        for (int w = 0; w < WORDS; w++) {
            u32 code[IN_WORD];
#pragma unroll
            for (int i = 0; i < IN_WORD; i++) {
                int c = w * IN_WORD + i;
                code[i] = rounding.code(z[first + c / 2][half * 2 + c % 2]);
            }
            word[w] = pack_word(code);
        }
        int row = lane / 4 + half * 8;
        int byte = (first * 8 + lane % 4 * CODES) * BITS / 8;
        if (row < rows) put_codes<LENGTH, !DIRECT>(base + row * pitch + byte, word);
    }
}

DEVICE void put_unit(u8* base, int pitch, int rows, const float (&z)[N_TILES][4], const Rounding& rounding, int lane) {
    constexpr int RUNS = N_TILES / RUN * RUN;
    constexpr int REST = N_TILES - RUNS;
#pragma unroll
    for (int first = 0; first < RUNS; first += RUN) put_run<RUN>(base, pitch, rows, z, first, rounding, lane);
    if constexpr (REST >= 2) put_run<2>(base, pitch, rows, z, RUNS, rounding, lane);
    if constexpr (REST % 2 == 1) put_run<1>(base, pitch, rows, z, N_TILES - 1, rounding, lane);
}

template <class T>
DEVICE void copy_out(u8* to, const u8* stage, int rows, int lane) {
    constexpr int IN_ROW = N2 * BITS / 8 / static_cast<int>(sizeof(T));
#pragma unroll 1
    for (int i = lane; i < rows * IN_ROW; i += WARP)
        store(reinterpret_cast<T*>(to) + i,
              shared_load(reinterpret_cast<const T*>(stage + i / IN_ROW * STAGE_PITCH) + i % IN_ROW));
}

// Byte `index` of a unit's packed codes, `count` codes in all.
DEVICE u32 staged_byte(const u8* stage, int index, int count) {
    auto byte_of = [&](int code) { return shared_load(stage + code / N2 * STAGE_PITCH + code % N2 * BITS / 8); };
    if constexpr (BITS == 8) {
        return byte_of(index);
    } else if constexpr (N2 % 2 == 0) {
        return byte_of(2 * index);
    } else {  // codes of two rows may share a byte
        auto nibble = [&](int code) { return code < count ? byte_of(code) >> code % N2 % 2 * 4 & 15 : 0u; };
        return nibble(2 * index) | nibble(2 * index + 1) << 4;
    }
}

// A unit's rows as aligned words, whatever they begin and end with.
DEVICE void copy_out_by_words(u8* to, const u8* stage, int rows, int lane) {
    int count = rows * N2;
    int bytes = (count * BITS + 7) / 8;
    int before = static_cast<int>(reinterpret_cast<u64>(to) & 127);
#pragma unroll 1
    for (int i = lane; 4 * i < before + bytes; i += WARP) {
        int first = 4 * i - before;
        u32 byte[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            byte[j] = first + j >= 0 && first + j < bytes ? staged_byte(stage, first + j, count) : 0;
        if (first >= 0 && first + 3 < bytes) {
            store(reinterpret_cast<u32*>(to + first), byte[0] | byte[1] << 8 | byte[2] << 16 | byte[3] << 24);
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (first + j >= 0 && first + j < bytes) store(to + first + j, static_cast<u8>(byte[j]));
        }
    }
}

// A unit's rows, which are one stretch of memory, from the warp's stage to global memory.
DEVICE void copy_out_unit(u8* to, const u8* stage, int rows, int lane) {
    if constexpr (N2 * BITS % 16 != 0) {
        copy_out_by_words(to, stage, rows, lane);
    } else {
        constexpr int BYTES = N2 * BITS / 8;
        if constexpr (BYTES % 16 == 0) copy_out<uint4>(to, stage, rows, lane);
        else if constexpr (BYTES % 8 == 0) copy_out<uint2>(to, stage, rows, lane);
        else if constexpr (BYTES % 4 == 0) copy_out<u32>(to, stage, rows, lane);
        else copy_out<u16>(to, stage, rows, lane);
    }
}

struct Outputs {
    u8* codes;
    float* scale;
    int* zero;
    int tokens;
};

DEVICE void write_unit(u8* shared, const Outputs& out, int token, int tile, const float (&z)[N_TILES][4],
                       const Rounding& rounding, const Place& at) {
    int rows = N1 - tile * 16 < 16 ? N1 - tile * 16 : 16;
    if (token >= out.tokens || rows <= 0) return;
    u8* to = out.codes + token * ROW_BYTES + tile * 16 * N2 * BITS / 8;
    if constexpr (DIRECT) {
        put_unit(to, N2 * BITS / 8, rows, z, rounding, at.lane);
    } else {
        u8* stage = shared + STAGE_AT + at.warp * STAGE_BYTES;
        put_unit(stage, STAGE_PITCH, 16, z, rounding, at.lane);
        warp_sync();
        copy_out_unit(to, stage, rows, at.lane);
        warp_sync();
    }
}

// The range of each of the group's tokens, from the ranges of its warps.
DEVICE void token_ranges(u8* shared, Range (&range)[WARP_TOKENS], const Place& at) {
    float2* partial = reinterpret_cast<float2*>(shared + REDUCE_AT);
#pragma unroll
    for (int i = 0; i < WARP_TOKENS; i++) {
        range[i].high = warp_max(range[i].high);
        range[i].low = warp_max(range[i].low);
        if (GROUP_WARPS > 1 && at.lane == 0)
            shared_store(partial + at.warp * WARP_TOKENS + i, float2{range[i].high, range[i].low});
    }
    if (GROUP_WARPS == 1) return;
    group_sync(at.group);
#pragma unroll
    for (int i = 0; i < WARP_TOKENS; i++)
        for (int w = 0; w < GROUP_WARPS; w++) {
            float2 other = shared_load(partial + (at.group * GROUP_WARPS + w) * WARP_TOKENS + i);
            range[i].merge(other.x, other.y);
        }
}

// A unit put aside as 16-bit integers relative to the greatest of the warp's values, and taken back.
DEVICE float put_aside(u32* aside, const float (&z)[N_TILES][4], Range range, int lane) {
    float greatest = warp_max(max_nan(range.high, range.low));
    float step = greatest > 0.0f ? greatest / 32767.0f : 1.0f;
    float inverse = 1.0f / step;
#pragma unroll
    for (int i = 0; i < N_TILES * 2; i++) {
        u32 low = float_bits(z[i / 2][i % 2 * 2] * inverse + (MAGIC + 32768.0f));
        u32 high = float_bits(z[i / 2][i % 2 * 2 + 1] * inverse + (MAGIC + 32768.0f));
        shared_store(aside + i * WARP + lane, byte_permute(low, high, 0x5410));
    }
    return step;
}
DEVICE void take_back(float (&z)[N_TILES][4], const u32* aside, float step, int lane) {
#pragma unroll
    for (int i = 0; i < N_TILES * 2; i++) {
        u32 pair = shared_load(aside + i * WARP + lane);
        z[i / 2][i % 2 * 2] = (bits_float(0x4b000000 | (pair & 0xffff)) - (8388608.0f + 32768.0f)) * step;
        z[i / 2][i % 2 * 2 + 1] = (bits_float(0x4b000000 | pair >> 16) - (8388608.0f + 32768.0f)) * step;
    }
}
