// Key or value rows times a [head_dim, head_dim] matrix, on tensor cores, quantized into the cache (sm_80 up).
//
// A warp takes 16 rows (token, head) at a time. The rows' elements go from memory to the A fragments of the mma
// directly: in a chunk of 32 columns lane t of a quad loads the 16 bytes of columns 8t … 8t+7 and takes them for the k
// positions (2t, 2t+1, 2t+8, 2t+9) of two mma. The matrix's rows lie in shared memory in that order of k, so that
// ldmatrix hands out the B fragments; a row pitch of an odd multiple of 16 bytes keeps it free of bank conflicts.
// The products stay in float32 registers until the row's extremes are known. Lane t of a quad then holds columns 2t,
// 2t+1 of every 8; the four lanes transpose bytes among themselves so that each stores up to 16 bytes of one row.
//
// Macros besides kv_quant.cuh's: WARPS; BLOCKS, of an SM at a time: what the registers are meant for; PANEL, rows of
// the matrix that lie in shared memory at a time (HEAD_DIM: all of them, loaded once for all of the block's rows; else
// an even part of HEAD_DIM, multiple of 32, double-buffered).
// Alignment: x and its strides, and the matrix, to 16 bytes; codes to 16 bytes.
#include "kv_quant.cuh"

constexpr int K_BLOCKS = PANEL / 16, TILES = HEAD_DIM / 8;
constexpr int PITCH = HEAD_DIM * 2 + 16;
constexpr int PANELS = HEAD_DIM / PANEL;
constexpr int THREADS = WARPS * WARP;

// A fragments: those of the columns that meet one panel of the matrix.
using Fragments = u32[K_BLOCKS][4];
// What stands between these is not reordered: ptxas would work on all tiles at once, and the registers would not do.
#define FEWER_REGISTERS warp_sync()

using Products = float[TILES][4];

// The A fragments' rows g (HALF 0) or g + 8 (HALF 1), from a row's element where the panel begins.
template <int HALF>
DEVICE void load_row(const u16* x, int t, Fragments& a) {
#pragma unroll
    for (int j = 0; j < PANEL / 32; ++j) {
        const uint4 v = x ? load(reinterpret_cast<const uint4*>(x + 32 * j + 8 * t)) : uint4{0, 0, 0, 0};
        a[2 * j][HALF] = v.x;
        a[2 * j][HALF + 2] = v.y;
        a[2 * j + 1][HALF] = v.z;
        a[2 * j + 1][HALF + 2] = v.w;
    }
    if constexpr (PANEL % 32 != 0) {
        const uint2 v = x ? load(reinterpret_cast<const uint2*>(x + PANEL - 16 + 4 * t)) : uint2{0, 0};
        a[K_BLOCKS - 1][HALF] = v.x;
        a[K_BLOCKS - 1][HALF + 2] = v.y;
    }
}

// Where row `row` of the matrix lies in shared memory: the k position that load_row gives its column of x.
DEVICE int slot_of(int row) {
    const int base = row & ~31, column = row & 31;
    if (base + 32 <= HEAD_DIM) return base + 8 * ((column >> 1) & 3) + 2 * (column >> 3) + (column & 1);
    return base + 8 * ((column >> 1) & 1) + 2 * (column >> 2) + (column & 1);
}

DEVICE void load_panel(u8* shared, const u16* matrix, int panel) {
    for (int i = threadIdx.x; i < PANEL * TILES; i += THREADS) {
        const int row = i / TILES, chunk = i % TILES;
        cp_async_16(shared + slot_of(row) * PITCH + chunk * 16, matrix + (panel * PANEL + row) * HEAD_DIM + chunk * 8);
    }
    cp_async_commit();
}

// y += x · matrix over one panel's rows.
DEVICE void multiply(const u8* panel, const Fragments& a, Products& y, int lane) {
#pragma unroll
    for (int j = 0; j < PANEL / 32; ++j) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            if (tile % 4 == 0) FEWER_REGISTERS;
            u32 b[4];
            ldmatrix_x4_trans(b, panel + (32 * j + lane) * PITCH + tile * 16);
            mma_m16n8k16(TYPE{}, y[tile], a[2 * j], {b[0], b[1]});
            mma_m16n8k16(TYPE{}, y[tile], a[2 * j + 1], {b[2], b[3]});
        }
    }
    if constexpr (PANEL % 32 != 0) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile += 2) {
            u32 b[4];
            ldmatrix_x4_trans(b, panel + (PANEL - 16 + (lane & 15)) * PITCH + (tile + (lane >> 4)) * 16);
            mma_m16n8k16(TYPE{}, y[tile], a[K_BLOCKS - 1], {b[0], b[1]});
            mma_m16n8k16(TYPE{}, y[tile + 1], a[K_BLOCKS - 1], {b[2], b[3]});
        }
    }
}

// y += x · matrix, panel by panel; `a` holds the first panel's columns. The panels go round: behind the last one comes
// the first, for the next rows, unless there are none.
DEVICE void multiply_panels(u8* shared, const u16* matrix, const Row (&row)[2], Fragments& a, Products& y, bool last) {
    const int lane = threadIdx.x % WARP, t = lane % 4;
#pragma unroll 1
    for (int panel = 0; panel < PANELS; ++panel) {
        const int next = (panel + 1) % PANELS;
        cp_async_wait<0>();
        block_sync();  // the panel is here, and nobody reads the other buffer any more
        if (next != 0 || !last) load_panel(shared + (next % 2) * PANEL * PITCH, matrix, next);
        multiply(shared + (panel % 2) * PANEL * PITCH, a, y, lane);
        if (next != 0) {
            load_row<0>(row[0].x ? row[0].x + next * PANEL : nullptr, t, a);
            load_row<1>(row[1].x ? row[1].x + next * PANEL : nullptr, t, a);
        }
    }
}

// Byte i of the result is byte t of lane i's word, within the quad.
DEVICE u32 transpose_bytes(u32 word, int t) {
    word = byte_permute(word, shuffle_xor(word, 1), t & 1 ? 0x3715 : 0x6240);
    return byte_permute(word, shuffle_xor(word, 2), t & 2 ? 0x3276 : 0x5410);
}

template <int HALF>
DEVICE u32 code_pair(const Products& y, int tile, const Grid& grid) {
    return code_of(y[tile][2 * HALF], grid) | code_of(y[tile][2 * HALF + 1], grid) << 4;
}

// Stores the codes of row g (HALF 0) or g + 8 (HALF 1), tiles FIRST and up: lane t of the quad those of WORDS tiles.
template <int HALF, int FIRST>
DEVICE void store_codes(u8* codes, const Products& y, const Grid& grid, int t, bool valid) {
    constexpr int LEFT = TILES - FIRST;
    if constexpr (BITS == 8) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            const u32 pair = code_of(y[tile][2 * HALF], grid) | code_of(y[tile][2 * HALF + 1], grid) << 8;
            if (valid) store(reinterpret_cast<u16*>(codes + 8 * tile + 2 * t), static_cast<u16>(pair));
        }
    } else if constexpr (LEFT > 0) {
        constexpr int WORDS = LEFT >= 16 && CODE_BYTES % 16 == 0 ? 4 : LEFT >= 8 ? 2 : 1;
        u32 words[WORDS];
#pragma unroll
        for (int j = 0; j < WORDS; ++j) {
            u32 word = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {  // byte i is for lane i
                const int tile = FIRST + WORDS * i + j;
                if (tile < TILES) word |= code_pair<HALF>(y, tile, grid) << (8 * i);
            }
            words[j] = transpose_bytes(word, t);
            FEWER_REGISTERS;
        }
        const int tile = FIRST + WORDS * t;
        u8* const to = codes + 4 * tile;
        if (valid && tile < TILES) {
            if constexpr (WORDS == 4) {
                store(reinterpret_cast<uint4*>(to), uint4{words[0], words[1], words[2], words[3]});
            }
            if constexpr (WORDS == 2) store(reinterpret_cast<uint2*>(to), uint2{words[0], words[1]});
            if constexpr (WORDS == 1) store(reinterpret_cast<u32*>(to), words[0]);
        }
        store_codes<HALF, FIRST + 4 * WORDS>(codes, y, grid, t, valid);
    }
}

template <int HALF>
DEVICE Grid row_grid(const Products& y, float clip_high, float clip_low) {
    float greatest = 0.f, negated_least = 0.f;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int e = 2 * HALF; e < 2 * HALF + 2; ++e) {
            greatest = max_nan(greatest, y[tile][e]);
            negated_least = max_nan(negated_least, -y[tile][e]);
        }
    }
#pragma unroll
    for (int mask = 1; mask < 4; mask <<= 1) {
        greatest = max_nan(greatest, shuffle_xor(greatest, mask));
        negated_least = max_nan(negated_least, shuffle_xor(negated_least, mask));
    }
    return grid_of(greatest, negated_least, clip_high, clip_low);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
kv_quant_tensor(const u16* x, const u16* matrix, const float* clip, u8* codes, float* scale, u8* zero, const int* start,
                int count, int heads, int tokens, int capacity, int stride_batch, int stride_head, int stride_token) {
    FLATQ_SHARED(shared);
    const Rows rows{x, start, count, heads, tokens, capacity, stride_batch, stride_head, stride_token};
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const float clip_high = load(clip), clip_low = load(clip + 1);
    const int groups = (count + 16 * WARPS - 1) / (16 * WARPS);  // of 16 rows for each warp

    load_panel(shared, matrix, 0);
    Fragments a;
    Row row[2];
    auto fetch = [&](int group) {
        const int first = (group * WARPS + warp) * 16 + g;
        row[0] = locate(rows, first);
        row[1] = locate(rows, first + 8);
        load_row<0>(row[0].x, t, a);
        load_row<1>(row[1].x, t, a);
    };
    fetch(blockIdx.x);
    if constexpr (PANELS == 1) {
        cp_async_wait<0>();
        block_sync();
    }
    for (int group = blockIdx.x; group < groups; group += gridDim.x) {
        Products y = {};
        const int next = group + gridDim.x;
        if constexpr (PANELS == 1) {
            multiply(shared, a, y, lane);
        } else {
            multiply_panels(shared, matrix, row, a, y, next >= groups);
        }
        const long long place[2] = {row[0].place, row[1].place};
        if (next < groups) fetch(next);  // under way while this group is rounded

        const Grid upper = row_grid<0>(y, clip_high, clip_low), lower = row_grid<1>(y, clip_high, clip_low);
        store_codes<0, 0>(codes + place[0] * CODE_BYTES, y, upper, t, place[0] >= 0);
        store_codes<1, 0>(codes + place[1] * CODE_BYTES, y, lower, t, place[1] >= 0);
        const Grid grid = t == 0 ? upper : lower;  // lane 0 of the quad stores row g's, lane 1 row g + 8's
        const long long at = t == 0 ? place[0] : place[1];
        if (t < 2 && at >= 0) {
            store(scale + at, grid.scale);
            store(zero + at, zero_of(grid));
        }
    }
}
