// 4-bit GEMM for many tokens: a block computes a tile of TILE_TOKENS × TILE_OUT outputs with WARPS_TOKENS × WARPS_OUT
// warps; see w4_gemm.cuh for the arithmetic.
//
//   global --cp.async, STAGES steps ahead--> shared [stage][token or weight row][64 or 128 bytes] --16-byte loads-->
//   fragment words --(unpacked to int8)--> mma --> int32 sums in registers --> (splits meet) --> y
//
// Tokens are the rows (A) and weight rows the columns (B) of the mma. Which weight row is which column is free: column
// c of the j-th of four neighbouring n8 tiles stands for row 8·(c / 2) + 2·j + c % 2, so that a lane ends up with eight
// consecutive outputs of a token and stores them as 16 bytes, four lanes two whole sectors.
//
// FORM, UNSIGNED (codes have a zero point), TYPE (F16 or BF16 outputs), TILE_TOKENS, TILE_OUT, WARPS_TOKENS, WARPS_OUT,
// STAGES, BLOCKS (resident on an SM). Shared memory: STAGES · STAGE_BYTES + 16. in % 32 = 0, in ≤ 65536; pointers to
// multiples of 16 bytes.
#include "w4_gemm.cuh"

constexpr int THREADS = WARPS_TOKENS * WARPS_OUT * WARP;
constexpr int TOKEN_TILES = TILE_TOKENS / WARPS_TOKENS / 16;  // a warp's m16 tiles
constexpr int OUT_TILES = TILE_OUT / WARPS_OUT / 8;           // a warp's n8 tiles
constexpr int STAGE_BYTES = TILE_TOKENS * CODE_BYTES + TILE_OUT * WEIGHT_BYTES;
constexpr int GROUP = 8;  // tiles of tokens whose blocks run side by side and share weights in L2
constexpr int SHIFT = UNSIGNED ? UNSIGNED_SHIFT : SIGNED_SHIFT;
static_assert(OUT_TILES % 4 == 0 && TOKEN_TILES >= 1, "a lane stores the columns of four n8 tiles at once");

struct Tile {
    int token, out;
};

DEVICE Tile tile_at(int index, int token_tiles, int out_tiles) {
    int first = index / (GROUP * out_tiles) * GROUP;
    int height = smaller(token_tiles - first, GROUP);
    int within = index % (GROUP * out_tiles);
    return {(first + within % height) * TILE_TOKENS, within / height * TILE_OUT};
}

// Where chunk `chunk` (16 bytes) of a row lies in that row of shared memory. 16-byte loads read two neighbouring rows
// at once, which fill the 32 banks by themselves if they are of 64 bytes (of 128 bytes: `place`). ldmatrix reads one
// chunk of eight rows: of codes eight neighbours, of weights four pairs of neighbours that lie 8 rows apart.
DEVICE int code_place(int chunk, int row) { return FORM == FORM_S4 ? chunk ^ (row / 2 % 4) : place(chunk, row); }
DEVICE int weight_place(int chunk, int row) { return FORM == FORM_S4 ? chunk ^ (row / 8 % 4) : chunk; }

// How this thread copies its part of ROWS rows, a step of BYTES each at a time: a chunk of every PASS-th row.
template <int ROWS, int BYTES, bool CODES>
struct Copy {
    static constexpr int CHUNKS = BYTES / 16, PASS = THREADS / CHUNKS;
    static_assert(ROWS % PASS == 0 && PASS % (FORM == FORM_S4 ? 32 : 2) == 0, "a thread's chunks have one place");
    const u8* source;  // of the next step
    u32 pitch;         // bytes from one pass to the next
    int rows, bytes;   // left from this thread's first row and from its chunk on
    int target;        // in a stage

    // What does not exist is 0: rows from the start, ends of rows when they come.
    DEVICE Copy(u8* shared, const u8* matrix, int first_row, int row_count, int first_byte, int row_bytes) {
        const int row = static_cast<int>(threadIdx.x) / CHUNKS, chunk = static_cast<int>(threadIdx.x) % CHUNKS;
        source = matrix + static_cast<i64>(first_row + row) * row_bytes + first_byte + 16 * chunk;
        pitch = static_cast<u32>(PASS * row_bytes);
        rows = row_count - first_row - row;
        bytes = row_bytes - first_byte - 16 * chunk;
        target = row * BYTES + 16 * (CODES ? code_place(chunk, row) : weight_place(chunk, row));
        if (rows > ROWS - PASS) return;
        for (int stage = 0; stage < STAGES; stage++) {
            for (int j = 0; j < ROWS / PASS; j++) {
                u8* place = shared + stage * STAGE_BYTES + target + j * PASS * BYTES;
                if (j * PASS >= rows) shared_store(reinterpret_cast<uint4*>(place), uint4{0, 0, 0, 0});
            }
        }
    }
    DEVICE void step(u8* stage) {
        const int size = bytes > 0 ? 16 : 0;
#pragma unroll
        for (int j = 0; j < ROWS / PASS; j++)
            if (j * PASS < rows)
                cp_async_16(stage + target + j * PASS * BYTES, source + static_cast<u64>(pitch) * j, size);
        source += BYTES;
        bytes -= BYTES;
    }
};

DEVICE void multiply(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    if constexpr (FORM == FORM_S4) {
        if constexpr (UNSIGNED)
            mma_m16n8k64_u4s4(d, a, b);
        else
            mma_m16n8k64_s4(d, a, b);
    } else {
        if constexpr (UNSIGNED)
            mma_m16n8k32_u8s8(d, a, b);
        else
            mma_m16n8k32_s8(d, a, b);
    }
}

// Columns of the mma as rows of the warp's weights: see the head of this file.
DEVICE int weight_row(int n_tile, int column) {
    return 32 * (n_tile / 4) + 8 * (column / 2) + 2 * (n_tile % 4) + column % 2;
}

// One step in shared memory onto the sums of a warp's tile.
DEVICE void accumulate(int (&sums)[TOKEN_TILES * OUT_TILES][4], const u8* codes, const u8* weights, int lane) {
    const int g = lane / 4, t = lane % 4;
    if constexpr (FORM == FORM_S4) {
        // Nothing is unpacked, so a fragment's words should arrive where the mma wants them, in neighbouring registers:
        // ldmatrix does that. Its rows of 16 bytes: 8 codes a lane of chunk `2 · part` and of chunk `2 · part + 1`.
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            u32 columns[OUT_TILES / 2][4];
#pragma unroll
            for (int n = 0; n < OUT_TILES; n += 2) {
                int row = weight_row(n + lane / 16, lane % 8), chunk = 2 * part + lane / 8 % 2;
                ldmatrix_x4(columns[n / 2], weights + row * WEIGHT_BYTES + 16 * weight_place(chunk, row));
            }
#pragma unroll
            for (int m = 0; m < TOKEN_TILES; m++) {
                u32 fragment[4];
                int row = 16 * m + lane % 16;
                ldmatrix_x4(fragment, codes + row * CODE_BYTES + 16 * code_place(2 * part + lane / 16, row));
#pragma unroll
                for (int n = 0; n < OUT_TILES; n++) {
                    u32 column[2] = {columns[n / 2][n % 2 * 2], columns[n / 2][n % 2 * 2 + 1]};
                    multiply(sums[m * OUT_TILES + n], fragment, column);
                }
            }
        }
    } else {
        u32 a[2 * TOKEN_TILES][CODE_WORDS], w[OUT_TILES][4];
#pragma unroll
        for (int m = 0; m < 2 * TOKEN_TILES; m++) code_words(a[m], codes + (8 * m + g) * CODE_BYTES, g, t);
#pragma unroll
        for (int n = 0; n < OUT_TILES; n++) {
            const u8* chunk = weights + weight_row(n, g) * WEIGHT_BYTES + 16 * t;
            take_words(w[n], shared_load(reinterpret_cast<const uint4*>(chunk)));
        }
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            u32 fragments[TOKEN_TILES][4];
#pragma unroll
            for (int m = 0; m < TOKEN_TILES; m++) {
                code_pair<!UNSIGNED>(fragments[m][0], fragments[m][2], a[2 * m], part);
                code_pair<!UNSIGNED>(fragments[m][1], fragments[m][3], a[2 * m + 1], part);
            }
#pragma unroll
            for (int n = 0; n < OUT_TILES; n++) {
                u32 column[2];
                weight_pair(column[0], column[1], w[n], part);
#pragma unroll
                for (int m = 0; m < TOKEN_TILES; m++) multiply(sums[m * OUT_TILES + n], fragments[m], column);
            }
        }
    }
}

DEVICE void from_bits(float& value, u32 bits) { value = bits_float(bits); }
DEVICE void from_bits(int& value, u32 bits) { value = static_cast<int>(bits); }
// Eight values of a vector of `count`, from `first` on (a multiple of 8); 0 where there is none.
template <class T>
DEVICE void load_eight(T (&values)[8], const T* p, int first, int count) {
    if (p != nullptr && first + 8 <= count) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint4 v = load(reinterpret_cast<const uint4*>(p + first) + i);
            u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < 4; j++) from_bits(values[4 * i + j], words[j]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] = p != nullptr && first + i < count ? load(p + first + i) : T(0);
    }
}

DEVICE void store_eight(u16* y, const float (&v)[8], int first, int out) {
    u32 pairs[4];
#pragma unroll
    for (int i = 0; i < 4; i++) pairs[i] = pack_halves(TYPE{}, v[2 * i], v[2 * i + 1]);
    if (out % 8 == 0) {
        if (first < out) store(reinterpret_cast<uint4*>(y + first), uint4{pairs[0], pairs[1], pairs[2], pairs[3]});
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (first + i < out) store(y + first + i, static_cast<u16>(pairs[i / 2] >> 16 * (i % 2)));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    w4_gemm_tiled(const u8* codes, const float* scale, const int* zero, const u8* weight, const float* weight_scale,
                  const int* weight_sum, const float* bias, u16* y, int* parts, int* counters, int tokens, int out,
                  int in, int split_steps, int splits) {
    FLATQ_SHARED(shared);
    const int token_tiles = (tokens + TILE_TOKENS - 1) / TILE_TOKENS, out_tiles = (out + TILE_OUT - 1) / TILE_OUT;
    const int index = static_cast<int>(blockIdx.x) / splits, split = static_cast<int>(blockIdx.x) % splits;
    const Tile tile = tile_at(index, token_tiles, out_tiles);
    const int warp = static_cast<int>(threadIdx.x) / WARP, lane = static_cast<int>(threadIdx.x) % WARP;
    const int g = lane / 4, t = lane % 4;
    const int warp_token = warp / WARPS_OUT * (TILE_TOKENS / WARPS_TOKENS);
    const int warp_out = warp % WARPS_OUT * (TILE_OUT / WARPS_OUT);

    const int first = split * split_steps, steps = smaller(split_steps, (in + STEP - 1) / STEP - first);
    u8* const shared_weights = shared + TILE_TOKENS * CODE_BYTES;
    Copy<TILE_TOKENS, CODE_BYTES, true> code_copy(shared, codes, tile.token, tokens, first * CODE_BYTES,
                                                  FORM == FORM_A8 ? in : in / 2);
    Copy<TILE_OUT, WEIGHT_BYTES, false> weight_copy(shared_weights, weight, tile.out, out, first * WEIGHT_BYTES,
                                                    in / 2);

    int filled = 0, ahead = 0;  // the stage to fill next, in bytes; steps fetched
    auto fetch = [&] {
        if (ahead++ < steps) {
            code_copy.step(shared + filled);
            weight_copy.step(shared_weights + filled);
        }
        filled = filled == (STAGES - 1) * STAGE_BYTES ? 0 : filled + STAGE_BYTES;
        cp_async_commit();  // empty ones at the end keep the count of groups simple
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) fetch();

    int sums[TOKEN_TILES * OUT_TILES][4] = {};
    int used = 0;
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        block_sync();  // this step has come for all, and all are done with the stage that is filled next
        fetch();
        const u8* stage_codes = shared + used + warp_token * CODE_BYTES;
        accumulate(sums, stage_codes, shared_weights + used + warp_out * WEIGHT_BYTES, lane);
        used = used == (STAGES - 1) * STAGE_BYTES ? 0 : used + STAGE_BYTES;
    }

    int* last = reinterpret_cast<int*>(shared + STAGES * STAGE_BYTES);
    if (!merge_splits(sums, parts, counters, last, index, token_tiles * out_tiles, split, splits,
                      static_cast<int>(threadIdx.x), THREADS))
        return;
#pragma unroll
    for (int quad = 0; quad < OUT_TILES / 4; quad++) {
        const int column = tile.out + warp_out + 32 * quad + 8 * t;
        float scales[8], biases[8];
        int weight_sums[8] = {};
        load_eight(scales, weight_scale, column, out);
        load_eight(biases, bias, column, out);
        if constexpr (UNSIGNED) load_eight(weight_sums, weight_sum, column, out);
#pragma unroll
        for (int m = 0; m < 2 * TOKEN_TILES; m++) {
            const int token = tile.token + warp_token + 8 * m + g;
            if (token >= tokens) continue;
            const float token_scale = load(scale + token);
            int token_zero = 0;
            if constexpr (UNSIGNED) token_zero = load(zero + token);
            float values[8];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                int sum = sums[m / 2 * OUT_TILES + 4 * quad + i / 2][2 * (m % 2) + i % 2] >> SHIFT;
                values[i] = output(sum, token_scale, token_zero, scales[i], weight_sums[i], biases[i]);
            }
            store_eight(y + static_cast<i64>(token) * out, values, column, out);
        }
    }
}
