// y = leftᵀ · X · right of every token (FlatQuant, eq. 3), clipped, rounded and packed: x is read once, codes are
// written once.
//
// A token's X [N1, N2] lies in shared memory, brought there by cp.async while the token before it is worked on. A warp
// owns 16 rows (a tile) of U = leftᵀ X and Z = U right, or two tiles, of one token or of two:
//
//     for each 16 columns of X:   U' = leftᵀ · X[:, 16]          leftᵀ in registers (A), X through ldmatrix.trans (B)
//                                 Z += half(U') · right[16, :]   U' moves from accumulator to A operand in registers
//
// as in FlashAttention's two products, so that U is never stored and Z stays in registers until the token's maximum and
// minimum are known (shuffles, then one barrier among the token's warps). `right` lies in shared memory in the order
// of the fragments (prepare_kron), its columns permuted so that a lane ends up with consecutive codes of a row.
//
// The ring. X arrives in panels of PANEL columns (all of them where shared memory allows) through SLOTS slots; with
// STREAM_RIGHT the rows of `right` that belong to a panel come along (from L2), otherwise `right` stays in shared
// memory. A thread copies, and applies the prologue to, the same pieces of a panel: so most prologues need no barrier.
//
// PASSES = 2 (more rows than registers hold): the upper half of a token's tiles is done first and put aside as 16-bit
// integers, relative to the greatest value of each warp, until the lower half is done.
//
// Sizes are padded to multiples of 16 with zeros in shared memory and in the prepared matrices: padded rows and columns
// of Z are 0 and change neither maximum nor minimum.
//
// Defines: N1 N2 TYPE BITS SYMMETRIC PROLOGUE HAS_LEFT HAS_RIGHT ROW_TILES WARP_TOKENS GROUPS PANEL SLOTS STREAM_RIGHT
// PASSES NORM_SHARED MIN_BLOCKS SHARED_BYTES (kron_plan.py chooses them).
#include "kron_quant_input.cuh"
#include "kron_quant_output.cuh"

// ---- The two products. ----

struct Left {
    u32 a[HAS_LEFT ? ROW_TILES : 1][HAS_LEFT ? K1_STEPS : 1][4];

    // The tiles first, first + 1 ... of leftᵀ.
    DEVICE void read(const uint4* left, int first, int lane) {
        if constexpr (HAS_LEFT) {
#pragma unroll
            for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
                for (int k = 0; k < K1_STEPS; k++) {
                    uint4 q = uint4{0, 0, 0, 0};
                    if (first + m < M_TILES) q = load(left + ((first + m) * K1_STEPS + k) * WARP + lane);
                    a[m][k][0] = q.x, a[m][k][1] = q.y, a[m][k][2] = q.z, a[m][k][3] = q.w;
                }
        }
    }
};

// 16 columns of U: two tiles of 8 columns for each unit (unit = token · ROW_TILES + row tile).
using UPanel = float[UNITS][2][4];

// Where lane's row of an ldmatrix of 16 rows and 16 columns begins: columns 16 · step on of the rows from 0 on.
DEVICE const u16* matrix_row(const u16* x, int step, bool half, int lane) {
    int chunk = step * 2 + (half ? 0 : lane >> 4);
    return x + (lane & 15) * PITCH + (chunk ^ swizzle(lane & 15)) * 8;
}

// U's columns 16 · step ... 16 · step + 15 of a panel. `last`: they are the last of the token.
DEVICE void first_product(UPanel& u, const Left& left, const u16* x, int step, bool last, int lane) {
    const bool half = HALF_STEP && last;
#pragma unroll
    for (int i = 0; i < UNITS * 8; i++) u[i / 8][i / 4 % 2][i % 4] = 0.0f;
    const u16* row = matrix_row(x, step, half, lane);
#pragma unroll
    for (int k = 0; k < K1_STEPS; k++) {
#pragma unroll
        for (int token = 0; token < WARP_TOKENS; token++) {
            u32 b[4];
            ldmatrix_x4_trans(b, row + token * INPUTS * TILE_HALVES + k * 16 * PITCH);
            u32 low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
            for (int m = 0; m < ROW_TILES; m++) {
                mma_m16n8k16(TYPE{}, u[token * ROW_TILES + m][0], left.a[m][k], low);
                if (!half) mma_m16n8k16(TYPE{}, u[token * ROW_TILES + m][1], left.a[m][k], high);
            }
        }
    }
}

// 16 columns of U (rounded to halves) as A operands.
DEVICE void as_operand(u32 (&a)[UNITS][4], const UPanel& u) {
#pragma unroll
    for (int i = 0; i < UNITS; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) a[i][j] = pack_halves(Half::Type{}, u[i][j / 2][j % 2 * 2], u[i][j / 2][j % 2 * 2 + 1]);
}

// The same from X itself, where there is no left matrix.
DEVICE void x_as_operand(u32 (&a)[UNITS][4], const u16* x, int step, bool last, int first_tile, int lane) {
    const bool half = HALF_STEP && last;
    const u16* row = matrix_row(x, step, half, lane);
#pragma unroll
    for (int i = 0; i < UNITS; i++) {
        int tile = first_tile + i % ROW_TILES;
        tile = tile < M_TILES ? tile : M_TILES - 1;
        ldmatrix_x4(a[i], row + i / ROW_TILES * INPUTS * TILE_HALVES + tile * 16 * PITCH);
        if (half) a[i][2] = a[i][3] = 0;
    }
}

using ZRows = float[UNITS][N_TILES][4];

DEVICE void second_product(ZRows& z, const u32 (&a)[UNITS][4], const uint4* right, int lane) {
#pragma unroll
    for (int j = 0; j < N_PAIRS; j++) {
        uint4 q = shared_load(right + j * WARP + lane);
        u32 even[2] = {q.x, q.y}, odd[2] = {q.z, q.w};
#pragma unroll
        for (int i = 0; i < UNITS; i++) {
            mma_m16n8k16(Half::Type{}, z[i][2 * j], a[i], even);
            if (2 * j + 1 < N_TILES) mma_m16n8k16(Half::Type{}, z[i][2 * j + 1], a[i], odd);
        }
    }
}

// Adds a panel of X (and of right) to Z.
DEVICE void multiply_panel(ZRows& z, const Left& left, const u16* x, const uint4* right, int panel, int first_tile,
                           int lane) {
    if constexpr (!HAS_RIGHT) {
        static_assert(HAS_RIGHT || PANELS == 1, "without a right matrix U is Z");
#pragma unroll
        for (int k = 0; k < PADDED2 / 16; k++) {
            UPanel u;
            first_product(u, left, x, k, k == PADDED2 / 16 - 1, lane);
#pragma unroll
            for (int i = 0; i < UNITS * 8; i++)
                if (2 * k + i / 4 % 2 < N_TILES) z[i / 8][2 * k + i / 4 % 2][i % 4] = u[i / 8][i / 4 % 2][i % 4];
        }
    } else {
        int steps = panel_steps(panel);
        UPanel u;
        int to_last = (PADDED2 - panel * PANEL) / 16 - 1;  // steps from here to the token's last one
        if (HAS_LEFT) first_product(u, left, x, 0, to_last == 0, lane);
#pragma unroll 1
        for (int k = 0; k < steps; k++) {
            u32 a[UNITS][4];
            if (HAS_LEFT) {
                as_operand(a, u);
                // The next 16 columns of U are begun before Z's products: the two interleave.
                if (k + 1 < steps) first_product(u, left, x, k + 1, k + 1 == to_last, lane);
            } else {
                x_as_operand(a, x, k, k == to_last, first_tile, lane);
            }
            second_product(z, a, right + k * N_PAIRS * WARP, lane);
        }
    }
}

DEVICE void clear(ZRows& z) {
#pragma unroll
    for (int i = 0; i < UNITS * N_TILES * 4; i++) z[i / (N_TILES * 4)][i / 4 % N_TILES][i % 4] = 0.0f;
}

DEVICE void add_to_ranges(Range (&range)[WARP_TOKENS], const ZRows& z) {
#pragma unroll
    for (int i = 0; i < UNITS * N_TILES * 4; i++)
        range[i / (N_TILES * 4) / ROW_TILES].add(z[i / (N_TILES * 4)][i / 4 % N_TILES][i % 4]);
}

// Zeros in the padding, and what stays in shared memory: right, the norm's weight.
DEVICE void prepare_shared(u8* shared, const Inputs& in, const Place& at) {
    if (PADDED1 != N1 || PADDED2 != N2) {
        for (int i = at.thread; i < SLOTS * SLOT_BYTES / 16; i += THREADS)
            shared_store(reinterpret_cast<uint4*>(shared) + i, uint4{0, 0, 0, 0});
        block_sync();
    }
    if (HAS_RIGHT && !STREAM_RIGHT)
        for (int i = at.thread; i < RIGHT_BYTES / 16; i += THREADS)
            cp_async_16(shared + RIGHT_AT + i * 16, in.right + i);
    if (NORM_SHARED)
        for (int i = at.thread; i < N; i += THREADS)
            shared_store(reinterpret_cast<u16*>(shared + WEIGHT_AT) + i, load(in.weight + i));
}

// Where the ring is filled: LEAD steps ahead of the work.
struct Ahead {
    int tile, pass, panel;
    DEVICE void advance(int blocks) {
        if (++panel < PANELS) return;
        panel = 0;
        if (++pass < PASSES) return;
        pass = 0;
        tile += blocks;
    }
};
DEVICE void copy_step(u8* shared, const Inputs& in, const Place& at, int slot, const Ahead& ahead, int tiles) {
    if (ahead.tile < tiles) issue(shared, in, at, slot, ahead.tile, PANELS == 1 ? 0 : ahead.panel);
    cp_async_commit();
}

// Grid: any number of blocks; each takes the tiles (of TOKENS tokens) blockIdx.x, blockIdx.x + gridDim.x ...
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    kron_quant(const u16* x, const u16* gate, const u16* weight, float eps, const uint4* left_matrix,
               const uint4* right, const float* clip, u8* codes, float* scale, int* zero, int tokens) {
    FLATQ_SHARED(shared);
    Place at;
    Inputs in{x, gate, weight, eps, right, tokens};
    Outputs out{codes, scale, zero, tokens};
    int tiles = (tokens + TOKENS - 1) / TOKENS;
    int blocks = gridDim.x;
    float clip_high = load(clip), clip_low = load(clip + 1);
    prepare_shared(shared, in, at);

    Ahead ahead{static_cast<int>(blockIdx.x), 0, 0};
    for (int i = 0; i < LEAD; i++) {
        copy_step(shared, in, at, i, ahead, tiles);
        ahead.advance(blocks);
    }

    Left left;
    if (PASSES == 1) left.read(left_matrix, at.member * ROW_TILES, at.lane);
    float factor[WARP_TOKENS];
    int slot = 0;
    auto copy_ahead = [&](int tile) {
        if (STEPS == 1) ahead.tile = tile + LEAD * blocks;  // one register less
        copy_step(shared, in, at, SLOTS == 1 ? 0 : slot == 0 ? SLOTS - 1 : slot - 1, ahead, tiles);
        if (STEPS > 1) ahead.advance(blocks);
    };
    for (int tile = blockIdx.x; tile < tiles; tile += blocks) {
        ZRows z;
        Range range[WARP_TOKENS];
        u32* aside = reinterpret_cast<u32*>(shared + ASIDE_AT) + at.warp * ASIDE_WORDS;
        float aside_step = 0.0f;
        if (PROLOGUE == NORM && PANELS > 1) norm_factors(shared, in, at, 0, tile, factor);
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            int first_tile = (pass * GROUP_WARPS + at.member) * ROW_TILES;
            if (PASSES > 1) {
                if (pass > 0) aside_step = put_aside(aside, z[0], range[0], at.lane);
                left.read(left_matrix, first_tile, at.lane);
            }
            clear(z);
#pragma unroll 1
            for (int panel = 0; panel < PANELS; panel++) {
                cp_async_wait<LEAD - 1>();
                bool first_step = tile == static_cast<int>(blockIdx.x) && pass == 0 && panel == 0;
                // Where a prologue reads what other threads have stored: the weight, and pieces copied by words.
                if (PROLOGUE != NO_PROLOGUE && (BY_WORDS || (NORM_SHARED && first_step))) block_sync();
                if (PROLOGUE == NORM && PANELS == 1 && pass == 0) norm_factors(shared, in, at, slot, tile, factor);
                if (PROLOGUE != NO_PROLOGUE) prologue(shared, in, at, slot, panel, factor);
                block_sync();  // the slot is there for all, and all have left the slot before
                if (SLOTS > 1) copy_ahead(tile);
                const u16* token = tile_of(shared, slot, at.group * WARP_TOKENS, 0);
                int right_at = STREAM_RIGHT ? slot * SLOT_BYTES + X_BYTES : RIGHT_AT + panel * PANEL * N_PAIRS * 32;
                const uint4* rows = reinterpret_cast<const uint4*>(shared + right_at);
                multiply_panel(z, left, token, rows, panel, first_tile, at.lane);
                if (SLOTS == 1) {
                    block_sync();
                    copy_ahead(tile);
                }
                slot = slot + 1 == SLOTS ? 0 : slot + 1;
            }
            add_to_ranges(range, z);
        }
        token_ranges(shared, range, at);
        int last_tile = ((PASSES - 1) * GROUP_WARPS + at.member) * ROW_TILES;
#pragma unroll
        for (int i = 0; i < WARP_TOKENS; i++) {
            int token = tile * TOKENS + at.group * WARP_TOKENS + i;
            Rounding rounding(range[i], clip_high, clip_low, Half::BACK);
            if (at.member == 0 && at.lane == 0 && token < tokens) {
                store(scale + token, rounding.scale);
                if (!SYMMETRIC) store(zero + token, rounding.zero_code());
            }
#pragma unroll
            for (int m = 0; m < ROW_TILES; m++)
                write_unit(shared, out, token, last_tile + m, z[i * ROW_TILES + m], rounding, at);
            if constexpr (PASSES > 1) {
                take_back(z[0], aside, aside_step, at.lane);
                write_unit(shared, out, token, at.member, z[0], rounding, at);
            }
        }
    }
}
