// 4-bit GEMM for 1 to 16 tokens, bound by the bytes of the weights; see w4_gemm.cuh for the arithmetic.
//
//   weights, read exactly once: global --16-byte loads, DEPTH steps ahead--> registers = fragment words (A: 16 rows)
//   codes of all tokens: global --cp.async, once a block--> shared --16-byte loads--> fragment words (B: 8 tokens)
//   --> mma --> sums of a warp --shared--> of its block --(splits meet)--> y
//
// A block has WARPS_OUT × WARPS_IN warps: WARPS_OUT of them stand side by side over 16 rows of weights each, WARPS_IN
// share the steps of `in` between them, and `splits` blocks may share `in` too, where rows are few. A block stays for
// several blocks of rows (every `stride`-th), with the loads of the next one under way while the last one is finished.
// Row m of the mma stands for row 2·m of the warp's 16, row m + 8 for 2·m + 1, so that a lane ends up with neighbours.
//
// Weights are the signed operand A, so codes with a zero point are made signed on the way into B, by flipping their
// uppermost bit: a - 8 or a - 128; the zero point is lowered by as much.
//
// FORM, UNSIGNED (codes have a zero point), TYPE (F16 or BF16 outputs), TOKEN_TILES (of 8: 1 or 2), WARPS_OUT,
// WARPS_IN, BLOCKS (resident on an SM). Shared memory: tokens · CODE_BYTES · split_steps, then MERGE_BYTES + 144.
// in % 32 = 0, in ≤ 65536; pointers to multiples of 16 bytes.
#include "w4_gemm.cuh"

constexpr int THREADS = WARPS_OUT * WARPS_IN * WARP;
constexpr int DEPTH = 4;  // steps that a warp loads at once: 4 KiB
constexpr int BLOCK_ROWS = 16 * WARPS_OUT;
constexpr int MERGE_BYTES = (WARPS_IN - 1) * WARPS_OUT * TOKEN_TILES * WARP * 16;
constexpr u32 FLIP = !UNSIGNED ? 0u : FORM == FORM_A8 ? 0x80808080u : 0x88888888u;
constexpr int FLIPPED = !UNSIGNED ? 0 : FORM == FORM_A8 ? 128 : 8;

DEVICE void multiply(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    if constexpr (FORM == FORM_S4)
        mma_m16n8k64_s4(d, a, b);
    else
        mma_m16n8k32_s8(d, a, b);
}

// Where in a step a token's codes lie. Rows of 64 bytes take half of the banks; a quarter of a warp copies a row of two
// steps at once, so with an even number of tokens odd steps have neighbours exchanged.
DEVICE int token_place(int token, int step, int tokens) {
    return CODE_BYTES == 64 && tokens % 2 == 0 ? token ^ (step & 1) : token;
}
// Every token's codes of the block's steps: [step][token][CODE_BYTES]; what lies past the end of `in` is 0.
DEVICE void stage_codes(u8* shared, const u8* codes, int tokens, int row_bytes, int first, int steps) {
    constexpr int CHUNKS = CODE_BYTES / 16;
    const int warp = static_cast<int>(threadIdx.x) / WARP, lane = static_cast<int>(threadIdx.x) % WARP;
    for (int token = warp; token < tokens; token += THREADS / WARP) {
        for (int i = lane; i < steps * CHUNKS; i += WARP) {
            int step = i / CHUNKS, chunk = i % CHUNKS, byte = (first + step) * CODE_BYTES + 16 * chunk;
            u8* row = shared + (step * tokens + token_place(token, step, tokens)) * CODE_BYTES;
            cp_async_16(row + 16 * place(chunk, token),
                        codes + static_cast<i64>(token) * row_bytes + byte, byte < row_bytes ? 16 : 0);
        }
    }
    cp_async_commit();
}

struct Batch {
    uint4 even[DEPTH], odd[DEPTH];  // the lane's 16 bytes of two neighbouring rows
};

// `bytes`: what is left of a row from the lane's first byte on, up to the end of its steps; `rows`: how many of the two
// exist.
DEVICE void load_batch(Batch& batch, const u8* row, i64 pitch, int bytes, int rows) {
#pragma unroll
    for (int i = 0; i < DEPTH; i++) {
        const bool inside = i * WEIGHT_BYTES < bytes;
        const u8* p = row + i * WEIGHT_BYTES;
        batch.even[i] = inside && rows > 0 ? load(reinterpret_cast<const uint4*>(p)) : uint4{0, 0, 0, 0};
        batch.odd[i] = inside && rows > 1 ? load(reinterpret_cast<const uint4*>(p + pitch)) : uint4{0, 0, 0, 0};
    }
}

// A batch of `steps` steps (more of them are zeros) onto the sums. `shared`: the codes of its first step.
DEVICE void accumulate(int (&sums)[TOKEN_TILES][4], const Batch& batch, const u8* shared, int tokens, int steps,
                       int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < DEPTH; i++) {
        if (i >= steps) break;
        u32 even[4], odd[4], codes[TOKEN_TILES][CODE_WORDS];
        take_words(even, batch.even[i]);
        take_words(odd, batch.odd[i]);
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++) {
            const int token = 8 * n + g;
            if (token < tokens) {
                // A batch begins with an even step of the block's.
                code_words(codes[n], shared + (i * tokens + token_place(token, i, tokens)) * CODE_BYTES, token, t);
            } else {
#pragma unroll
                for (int word = 0; word < CODE_WORDS; word++) codes[n][word] = 0;
            }
#pragma unroll
            for (int word = 0; word < CODE_WORDS; word++) codes[n][word] ^= FLIP;
        }
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            u32 rows[4];
            weight_pair(rows[0], rows[2], even, part);
            weight_pair(rows[1], rows[3], odd, part);
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; n++) {
                u32 columns[2];
                code_pair<true>(columns[0], columns[1], codes[n], part);
                multiply(sums[n], rows, columns);
            }
        }
    }
}

// The sums of the WARPS_IN warps over the same rows, into those of the first.
DEVICE void merge_warps(int (&sums)[TOKEN_TILES][4], u8* shared, int warp_in, int warp_out, int lane) {
    if constexpr (WARPS_IN > 1) {
        auto place_of = [&](int other, int n) {
            int tile = ((other - 1) * WARPS_OUT + warp_out) * TOKEN_TILES + n;
            return reinterpret_cast<uint4*>(shared) + tile * WARP + lane;
        };
        if (warp_in > 0) {
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; n++)
                shared_store(place_of(warp_in, n), uint4{static_cast<u32>(sums[n][0]), static_cast<u32>(sums[n][1]),
                                                         static_cast<u32>(sums[n][2]), static_cast<u32>(sums[n][3])});
        }
        block_sync();
        if (warp_in == 0) {
#pragma unroll 2
            for (int other = 1; other < WARPS_IN; other++) {
#pragma unroll
                for (int n = 0; n < TOKEN_TILES; n++) {
                    uint4 v = shared_load(place_of(other, n));
                    sums[n][0] += static_cast<int>(v.x);
                    sums[n][1] += static_cast<int>(v.y);
                    sums[n][2] += static_cast<int>(v.z);
                    sums[n][3] += static_cast<int>(v.w);
                }
            }
        }
        block_sync();  // the place is free for the next rows
    }
}

// What an epilogue needs of the two rows of a lane; loaded early, so that its latency hides behind the weights.
struct Outputs {
    float scale[2] = {}, bias[2] = {};
    int sum[2] = {};

    DEVICE void load_rows(const float* scales, const int* sums, const float* biases, int row, int out) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (row + i >= out) break;
            scale[i] = load(scales + row + i);
            bias[i] = biases != nullptr ? load(biases + row + i) : 0.0f;
            if constexpr (UNSIGNED) sum[i] = load(sums + row + i);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    w4_gemm_decode(const u8* codes, const float* scale, const int* zero, const u8* weight, const float* weight_scale,
                   const int* weight_sum, const float* bias, u16* y, int* parts, int* counters, int tokens, int out,
                   int in, int split_steps, int splits) {
    FLATQ_SHARED(shared);
    const int warp = static_cast<int>(threadIdx.x) / WARP, lane = static_cast<int>(threadIdx.x) % WARP;
    const int g = lane / 4, t = lane % 4, warp_out = warp / WARPS_IN, warp_in = warp % WARPS_IN;
    const int split = static_cast<int>(blockIdx.x) % splits, stride = static_cast<int>(gridDim.x) / splits;
    const int row_blocks = (out + BLOCK_ROWS - 1) / BLOCK_ROWS, row_bytes = in / 2;
    const int first = split * split_steps, steps = smaller(split_steps, (in + STEP - 1) / STEP - first);
    const int rounds = (steps + WARPS_IN * DEPTH - 1) / (WARPS_IN * DEPTH);
    u8* const merging = shared + tokens * CODE_BYTES * split_steps;
    float* const token_scale = reinterpret_cast<float*>(merging + MERGE_BYTES);
    int* const token_zero = reinterpret_cast<int*>(token_scale + 16);
    int* const last = token_zero + 16;

    // Batch `round` of this warp begins at step (round · WARPS_IN + warp_in) · DEPTH of the block's.
    auto load_round = [&](Batch& batch, int row_block, int round) {
        const int row = row_block * BLOCK_ROWS + 16 * warp_out + 2 * g, step = (round * WARPS_IN + warp_in) * DEPTH;
        const int byte = (first + step) * WEIGHT_BYTES + 16 * t;
        const int end = smaller((first + steps) * WEIGHT_BYTES, row_bytes);
        load_batch(batch, weight + static_cast<i64>(row) * row_bytes + byte, row_bytes, end - byte, out - row);
    };

    int row_block = static_cast<int>(blockIdx.x) / splits;
    Batch next;
    load_round(next, row_block, 0);
    stage_codes(shared, codes, tokens, FORM == FORM_A8 ? in : in / 2, first, steps);
    if (static_cast<int>(threadIdx.x) < tokens) {
        shared_store(token_scale + threadIdx.x, load(scale + threadIdx.x));
        if constexpr (UNSIGNED) shared_store(token_zero + threadIdx.x, load(zero + threadIdx.x) - FLIPPED);
    }
    cp_async_wait<0>();
    block_sync();

    for (; row_block < row_blocks; row_block += stride) {
        const int row = row_block * BLOCK_ROWS + 16 * warp_out + 2 * g;
        Outputs outputs;
        if (warp_in == 0) outputs.load_rows(weight_scale, weight_sum, bias, row, out);
        int sums[TOKEN_TILES][4] = {};
#pragma unroll 1
        for (int round = 0; round < rounds; round++) {
            Batch batch = next;
            if (round + 1 < rounds)
                load_round(next, row_block, round + 1);
            else if (row_block + stride < row_blocks)
                load_round(next, row_block + stride, 0);
            const int step = (round * WARPS_IN + warp_in) * DEPTH;
            accumulate(sums, batch, shared + step * tokens * CODE_BYTES, tokens, steps - step, lane);
        }
        merge_warps(sums, merging, warp_in, warp_out, lane);
        if (!merge_splits(sums, parts, counters, last, row_block, row_blocks, split, splits,
                          warp_in == 0 ? warp_out * WARP + lane : -1, WARPS_OUT * WARP))
            continue;
        if (warp_in > 0) continue;
#pragma unroll
        for (int i = 0; i < 2 * TOKEN_TILES; i++) {
            const int n = i / 2, j = i % 2, token = 8 * n + 2 * t + j;
            if (token >= tokens || row >= out) continue;
            const float own_scale = shared_load(token_scale + token);
            int own_zero = 0;
            if constexpr (UNSIGNED) own_zero = shared_load(token_zero + token);
            float value[2];
#pragma unroll
            for (int k = 0; k < 2; k++)
                value[k] = output(sums[n][2 * k + j] >> SIGNED_SHIFT, own_scale, own_zero, outputs.scale[k],
                                  outputs.sum[k], outputs.bias[k]);
            u16* p = y + static_cast<i64>(token) * out + row;
            const u32 pair = pack_halves(TYPE{}, value[0], value[1]);
            if (out % 2 == 0) {
                store(reinterpret_cast<u32*>(p), pair);
            } else {
                store(p, static_cast<u16>(pair & 0xffff));
                if (row + 1 < out) store(p + 1, static_cast<u16>(pair >> 16));
            }
        }
    }
}
