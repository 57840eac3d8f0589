// kron_quant's way in: panels of X (and of right) from global to shared memory, and the prologues on them.
#pragma once
#include "kron_quant_layout.cuh"

// Calls f(row, column in the panel, column of X) for each piece of a panel that this thread looks after.
template <class F>
DEVICE void for_pieces(int thread, int panel, F f) {
    constexpr int IN_ROW = (PANELS == 1 ? N2 : PANEL) / PIECE;
#pragma unroll 1
    for (int i = thread; i < N1 * IN_ROW; i += GROUP_THREADS) {
        int column = i % IN_ROW * PIECE;
        f(i / IN_ROW, column, panel * PANEL + column);
    }
}

// A token of odd width may begin at any half: whole words are read from the 128-byte line on in which it begins, so
// that a warp reads a line at a time.
DEVICE void copy_by_words(u16* tile, const u16* token, int thread) {
    int before = static_cast<int>(reinterpret_cast<u64>(token) & 127) / 2;
#pragma unroll 1
    for (int i = thread; 2 * i < before + N; i += GROUP_THREADS) {
        int first = 2 * i - before;
        u32 word = 0;
        if (first >= 0 && first + 1 < N) {
            word = load(reinterpret_cast<const u32*>(token + first));
        } else if (first >= 0) {
            word = load(token + first);
        } else if (first == -1) {
            word = static_cast<u32>(load(token)) << 16;
        }
        if (first >= 0) shared_store(tile + element(first / N2, first % N2), static_cast<u16>(word));
        if (first + 1 >= 0 && first + 1 < N)
            shared_store(tile + element((first + 1) / N2, (first + 1) % N2), static_cast<u16>(word >> 16));
    }
}

DEVICE void copy_panel(u16* tile, const u16* token, int thread, int panel) {
    if constexpr (BY_WORDS) return copy_by_words(tile, token, thread);
    for_pieces(thread, panel, [&](int row, int column, int source_column) {
        bool inside = PANELS == 1 || source_column < N2;
        u16* to = tile + element(row, column);
        const u16* from = inside ? token + row * N2 + source_column : token;
        if constexpr (PIECE == 8) cp_async_16(to, from, inside ? 16 : 0);
        if constexpr (PIECE == 2) cp_async_4(to, from, inside ? 4 : 0);
        if constexpr (PIECE == 1) shared_store(to, inside ? load(from) : u16(0));
    });
}

// Starts the copies of one step of the ring.
DEVICE void issue(u8* shared, const Inputs& in, const Place& at, int slot, int tile, int panel) {
    for (int i = 0; i < WARP_TOKENS; i++) {
        int local = at.group * WARP_TOKENS + i;
        int token = tile * TOKENS + local;
        if (token >= in.tokens) break;
        i64 offset = static_cast<i64>(token) * N;
        copy_panel(tile_of(shared, slot, local, 0), in.x + offset, at.group_thread(), panel);
        if (PROLOGUE == GATE) copy_panel(tile_of(shared, slot, local, 1), in.gate + offset, at.group_thread(), panel);
    }
    if constexpr (STREAM_RIGHT && HAS_RIGHT) {
        constexpr int STEP = N_PAIRS * WARP;
        uint4* to = reinterpret_cast<uint4*>(shared + slot * SLOT_BYTES + X_BYTES);
        const uint4* from = in.right + panel * (PANEL / 16) * STEP;
#pragma unroll 1
        for (int i = at.thread; i < panel_steps(panel) * STEP; i += THREADS) cp_async_16(to + i, from + i);
    }
}

// ---- Prologues, on the pieces that this thread has copied. ----

struct Piece {
    float value[PIECE];
    template <class L>
    DEVICE Piece(const u16* p, L read) {
        if constexpr (PIECE == 8) {
            uint4 q = read(reinterpret_cast<const uint4*>(p));
            u32 word[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
            for (int i = 0; i < 8; i++)
                value[i] = i % 2 ? high_half(TYPE{}, word[i / 2]) : low_half(TYPE{}, word[i / 2]);
        } else if constexpr (PIECE == 2) {
            u32 word = read(reinterpret_cast<const u32*>(p));
            value[0] = low_half(TYPE{}, word), value[1] = high_half(TYPE{}, word);
        } else {
            value[0] = half_float(TYPE{}, read(p));
        }
    }
    DEVICE void write(u16* p) const {  // rounded
        u32 word[(PIECE + 1) / 2];
#pragma unroll
        for (int i = 0; i + 1 < PIECE; i += 2) word[i / 2] = pack_halves(TYPE{}, value[i], value[i + 1]);
        if constexpr (PIECE == 8) shared_store(reinterpret_cast<uint4*>(p), uint4{word[0], word[1], word[2], word[3]});
        if constexpr (PIECE == 2) shared_store(reinterpret_cast<u32*>(p), word[0]);
        if constexpr (PIECE == 1) shared_store(p, round_half(TYPE{}, value[0]));
    }
    DEVICE float squares() const {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < PIECE; i++) sum += value[i] * value[i];
        return sum;
    }
};

struct FromShared {
    template <class T>
    DEVICE T operator()(const T* p) const {
        return shared_load(p);
    }
};
struct FromGlobal {
    template <class T>
    DEVICE T operator()(const T* p) const {
        return load(p);
    }
};

// The norm's factor of each of the group's tokens. With panels the token is read once more for it (from L2, mostly).
DEVICE void norm_factors(u8* shared, const Inputs& in, const Place& at, int slot, int tile,
                         float (&factor)[WARP_TOKENS]) {
    float* partial = reinterpret_cast<float*>(shared + REDUCE_AT) + WARPS * WARP_TOKENS * 2;
    for (int i = 0; i < WARP_TOKENS; i++) {
        int local = at.group * WARP_TOKENS + i;
        int token = tile * TOKENS + local;
        float sum = 0.0f;
        if (PANELS == 1) {
            const u16* x = tile_of(shared, slot, local, 0);
            for_pieces(at.group_thread(), 0, [&](int row, int column, int) {
                sum += Piece(x + element(row, column), FromShared{}).squares();
            });
        } else if (token < in.tokens) {
            const u16* x = in.x + static_cast<i64>(token) * N;
#pragma unroll 1
            for (int j = at.group_thread(); j < N / PIECE; j += GROUP_THREADS)
                sum += Piece(x + j * PIECE, FromGlobal{}).squares();
        }
        factor[i] = warp_sum(sum);
    }
    if (GROUP_WARPS == 1) {
        for (int i = 0; i < WARP_TOKENS; i++) factor[i] = reciprocal_root(factor[i] / N + in.eps);
        return;
    }
    for (int i = 0; i < WARP_TOKENS; i++)
        if (at.lane == 0) shared_store(partial + at.warp * WARP_TOKENS + i, factor[i]);
    group_sync(at.group);
    for (int i = 0; i < WARP_TOKENS; i++) {
        float sum = 0.0f;
        for (int w = 0; w < GROUP_WARPS; w++)
            sum += shared_load(partial + (at.group * GROUP_WARPS + w) * WARP_TOKENS + i);
        factor[i] = reciprocal_root(sum / N + in.eps);
    }
}

DEVICE Piece weight_piece(const u8* shared, const Inputs& in, int index) {
    if constexpr (NORM_SHARED) return Piece(reinterpret_cast<const u16*>(shared + WEIGHT_AT) + index, FromShared{});
    return Piece(in.weight + index, FromGlobal{});
}

DEVICE void prologue(u8* shared, const Inputs& in, const Place& at, int slot, int panel,
                     const float (&factor)[WARP_TOKENS]) {
    for (int i = 0; i < WARP_TOKENS; i++) {
        u16* x = tile_of(shared, slot, at.group * WARP_TOKENS + i, 0);
        for_pieces(at.group_thread(), panel, [&](int row, int column, int source_column) {
            if (PANELS > 1 && source_column >= N2) return;  // those are zeros and stay zeros
            u16* p = x + element(row, column);
            Piece value(p, FromShared{});
            if constexpr (PROLOGUE == GATE) {
                Piece gate(p + TILE_HALVES, FromShared{});
#pragma unroll
                for (int j = 0; j < PIECE; j++) value.value[j] = silu_times(gate.value[j], value.value[j]);
            } else {
                int index = row * N2 + source_column;
                Piece weight = weight_piece(shared, in, index);
#pragma unroll
                for (int j = 0; j < PIECE; j++) value.value[j] = value.value[j] * factor[i] * weight.value[j];
            }
            value.write(p);
        });
    }
}
