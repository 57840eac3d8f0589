// kron_quant's sizes, what lies where in a block's shared memory, and which warp stands where.
#pragma once
#include "kron_quant.cuh"

// How U is held between the two products. Tensor cores need 16 bits of it, and bf16 would leave 8 of its mantissa: so it
// becomes fp16, and so does `right`. bf16's range is brought into fp16's by a factor in leftᵀ (a power of two: exact),
// which the token's scale gets back. U beyond 2^18 overflows (the token's scale is NaN then), and a token all of whose
// values lie below 2^-14 loses what fp16 cannot hold.
template <class T>
struct Between {
    using Type = T;
    static constexpr float BACK = 1.0f;
};
template <>
struct Between<BF16> {
    using Type = F16;
    static constexpr float BACK = 4.0f;  // kron_quant.py: BF16_SHRINK
};
template <bool BOTH, class T>
struct Second : Between<T> {};
template <class T>
struct Second<false, T> {  // no U is rounded
    using Type = T;
    static constexpr float BACK = 1.0f;
};
using Half = Second<HAS_LEFT && HAS_RIGHT, TYPE>;

constexpr int PADDED1 = (N1 + 15) / 16 * 16;
constexpr int PADDED2 = (N2 + 15) / 16 * 16;
constexpr int N = N1 * N2;
constexpr int M_TILES = PADDED1 / 16;
constexpr int K1_STEPS = PADDED1 / 16;
constexpr int N_TILES = (N2 + 7) / 8;
constexpr int N_PAIRS = (N_TILES + 1) / 2;
constexpr int GROUP_WARPS = (M_TILES + ROW_TILES * PASSES - 1) / (ROW_TILES * PASSES);  // warps that share a token
constexpr int GROUP_THREADS = GROUP_WARPS * WARP;
constexpr int WARPS = GROUP_WARPS * GROUPS;
constexpr int THREADS = WARPS * WARP;
constexpr int TOKENS = GROUPS * WARP_TOKENS;  // a block's tokens at a time
constexpr int UNITS = ROW_TILES * WARP_TOKENS;
constexpr int PANELS = (PADDED2 + PANEL - 1) / PANEL;
constexpr int CHUNKS = PANELS == 1 ? N_TILES : PANEL / 8;  // of 16 bytes in a row of a panel
constexpr int PITCH = CHUNKS * 8;                            // halves
constexpr int PIECE = N2 % 8 == 0 ? 8 : N2 % 2 == 0 ? 2 : 1;  // halves of one copy into shared memory
constexpr bool BY_WORDS = PIECE == 1 && PANELS == 1;  // see copy_by_words
constexpr int TILE_HALVES = PADDED1 * PITCH;
constexpr int INPUTS = PROLOGUE == GATE ? 2 : 1;
constexpr int RIGHT_BYTES = HAS_RIGHT ? (STREAM_RIGHT ? PANEL : PADDED2) / 16 * N_PAIRS * 512 : 0;
constexpr int X_BYTES = TOKENS * INPUTS * TILE_HALVES * 2;
constexpr int STEPS = PANELS * PASSES;               // of the ring for a token
constexpr int LEAD = SLOTS > 1 ? SLOTS - 1 : 1;  // steps by which copies run ahead of the work
constexpr int SLOT_BYTES = X_BYTES + (STREAM_RIGHT ? RIGHT_BYTES : 0);

// Runs of tiles in which a lane's codes are consecutive; the same rule as in kron_quant.py, column_order.
constexpr int RUN = !HAS_RIGHT ? 1 : N2 % 64 == 0 ? 8 : 4;
constexpr bool DIRECT = HAS_RIGHT && (N2 % 64 == 0 || N2 == 32 || N2 == 16);  // stores cover whole sectors
constexpr int STAGE_PITCH = ((N_TILES * BITS + 15) / 32 * 32 + 16);  // bytes; 8 rows of 4 lanes fall into 32 banks
constexpr int STAGE_BYTES = DIRECT ? 0 : 16 * STAGE_PITCH;
constexpr int ASIDE_WORDS = PASSES > 1 ? N_TILES * 2 * WARP : 0;
constexpr i64 ROW_BYTES = (static_cast<i64>(N) * BITS + 7) / 8;

constexpr int RIGHT_AT = SLOTS * SLOT_BYTES;
constexpr int ASIDE_AT = RIGHT_AT + (STREAM_RIGHT ? 0 : RIGHT_BYTES);
constexpr int STAGE_AT = ASIDE_AT + WARPS * ASIDE_WORDS * 4;
constexpr int WEIGHT_AT = STAGE_AT + WARPS * STAGE_BYTES;
constexpr int REDUCE_AT = WEIGHT_AT + (NORM_SHARED ? (N * 2 + 15) / 16 * 16 : 0);
constexpr int TOTAL_BYTES = REDUCE_AT + WARPS * WARP_TOKENS * 12;
static_assert(TOTAL_BYTES == SHARED_BYTES, "kron_plan.py and kron_quant.cu disagree about shared memory");

// Where chunk c of a row lies: at c ^ swizzle(row). So the chunks of one number of eight rows (ldmatrix) lie in
// different banks though rows follow each other without gaps, and copies of neighbouring chunks meet no conflicts
// either. With 2^v the greatest power of two, up to 8, in CHUNKS, the eight rows begin at 8 / 2^v different places;
// v bits of the row spread them to eight.
constexpr int SWIZZLE_BITS = CHUNKS % 8 == 0 ? 3 : CHUNKS % 4 == 0 ? 2 : CHUNKS % 2 == 0 ? 1 : 0;
DEVICE int swizzle(int row) { return row >> (3 - SWIZZLE_BITS) & ((1 << SWIZZLE_BITS) - 1); }
DEVICE int element(int row, int column) { return row * PITCH + ((column / 8 ^ swizzle(row)) * 8 | column % 8); }

// The last 8 of the last 16 columns are padding: they are not in shared memory, and their products are left out.
constexpr bool HALF_STEP = PADDED2 - N2 >= 8;

struct Place {
    int thread, lane, warp, group, member;  // member: of the group's warps
    DEVICE Place()
        : thread(threadIdx.x), lane(thread % WARP), warp(thread / WARP), group(warp / GROUP_WARPS),
          member(warp % GROUP_WARPS) {}
    DEVICE int group_thread() const { return member * WARP + lane; }
};

struct Inputs {
    const u16* x;
    const u16* gate;
    const u16* weight;
    float eps;
    const uint4* right;
    int tokens;
};

// Of 16 columns each.
DEVICE int panel_steps(int panel) {
    if (PANELS == 1) return PADDED2 / 16;
    return (PADDED2 - panel * PANEL < PANEL ? PADDED2 - panel * PANEL : PANEL) / 16;
}

DEVICE u16* tile_of(u8* shared, int slot, int token, int input) {
    return reinterpret_cast<u16*>(shared + slot * SLOT_BYTES) + (token * INPUTS + input) * TILE_HALVES;
}

// The warps of one token (or pair of tokens) wait for each other.
DEVICE void group_sync(int group) {
    if (GROUP_WARPS == 1) {
        warp_sync();
    } else if (GROUPS == 1) {
        block_sync();
    } else {
        named_sync(1 + group, GROUP_THREADS);
    }
}
