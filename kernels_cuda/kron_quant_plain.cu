// kron_quant for any size and any GPU, without tensor cores: float32 throughout, the first product kept in float32.
//
// One block a token at a time. A step takes as many rows of Z as the block has threads for (n2 threads a row): a thread
// computes one entry of U = leftᵀ X from global memory and, once the step's rows of U lie in shared memory, one entry
// of Z = U right. All rows are done twice: first for the token's range, then for the codes.
//
// Defines: TYPE BITS SYMMETRIC PROLOGUE THREADS (at least 2 · n2, so that a step ends at a whole byte of codes).
#include "kron_quant.cuh"

constexpr int WARPS = THREADS / WARP;

struct Token {
    const u16* x;
    const u16* gate;
    const u16* weight;
    float factor;

    DEVICE float at(int i) const {
        float value = half_float(TYPE{}, load(x + i));
        if (PROLOGUE == NO_PROLOGUE) return value;
        value = PROLOGUE == GATE ? silu_times(half_float(TYPE{}, load(gate + i)), value)
                                 : value * factor * half_float(TYPE{}, load(weight + i));
        return half_float(TYPE{}, round_half(TYPE{}, value));
    }
};

// The sum over the block, for all threads; `partial` has room for one float a warp.
DEVICE float block_sum(float value, float* partial) {
    value = warp_sum(value);
    if (threadIdx.x % WARP == 0) shared_store(partial + threadIdx.x / WARP, value);
    block_sync();
    float sum = 0.0f;
    for (int w = 0; w < WARPS; w++) sum += shared_load(partial + w);
    block_sync();
    return sum;
}
DEVICE float block_max(float value, float* partial) {
    value = warp_max(value);
    if (threadIdx.x % WARP == 0) shared_store(partial + threadIdx.x / WARP, value);
    block_sync();
    float greatest = 0.0f;
    for (int w = 0; w < WARPS; w++) greatest = max_nan(greatest, shared_load(partial + w));
    block_sync();
    return greatest;
}

struct Matrices {
    const u16* left;   // [n1, n1] or null: the identity
    const u16* right;  // [n2, n2] or null
    int n1, n2;
};

// Z[row, column] for the thread's place in a step that begins at row `first`; all threads come here.
DEVICE float transformed(const Matrices& m, const Token& token, float* u, int row, int column, bool inside) {
    int thread = threadIdx.x;
    float sum = 0.0f;
    if (inside && !m.left) sum = token.at(row * m.n2 + column);
    if (inside && m.left)
        for (int k = 0; k < m.n1; k++)
            sum += half_float(TYPE{}, load(m.left + k * m.n1 + row)) * token.at(k * m.n2 + column);
    if (!m.right) return sum;
    shared_store(u + thread, sum);
    block_sync();
    sum = 0.0f;
    if (inside)
        for (int k = 0; k < m.n2; k++)
            sum += shared_load(u + thread - column + k) * half_float(TYPE{}, load(m.right + k * m.n2 + column));
    block_sync();
    return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    kron_quant_plain(const u16* x, const u16* gate, const u16* weight, float eps, const u16* left, const u16* right,
                     const float* clip, u8* codes, float* scale, int* zero, int tokens, int n1, int n2) {
    FLATQ_SHARED(shared);
    float* u = reinterpret_cast<float*>(shared);
    float* partial = u + THREADS;
    u8* step_codes = reinterpret_cast<u8*>(partial + 64);
    Matrices matrices{left, right, n1, n2};
    int n = n1 * n2;
    int thread = threadIdx.x;
    int rows = THREADS / n2 / 2 * 2;  // of a step
    int row = thread / n2, column = thread % n2;
    i64 row_bytes = (static_cast<i64>(n) * BITS + 7) / 8;
    int blocks = gridDim.x;

    for (int t = blockIdx.x; t < tokens; t += blocks) {
        i64 offset = static_cast<i64>(t) * n;
        Token token{x + offset, gate ? gate + offset : gate, weight, 0.0f};
        if (PROLOGUE == NORM) {
            float squares = 0.0f;
            for (int i = thread; i < n; i += THREADS) {
                float value = half_float(TYPE{}, load(token.x + i));
                squares += value * value;
            }
            token.factor = reciprocal_root(block_sum(squares, partial) / n + eps);
        }
        Range range;
        for (int first = 0; first < n1; first += rows) {
            bool inside = row < rows && first + row < n1;
            float z = transformed(matrices, token, u, first + row, column, inside);
            if (inside) range.add(z);
        }
        range.high = block_max(range.high, partial);
        range.low = block_max(range.low, partial);
        Rounding rounding(range, load(clip), load(clip + 1));
        if (thread == 0) {
            store(scale + t, rounding.scale);
            if (!SYMMETRIC) store(zero + t, rounding.zero_code());
        }
        for (int first = 0; first < n1; first += rows) {
            bool inside = row < rows && first + row < n1;
            float z = transformed(matrices, token, u, first + row, column, inside);
            u32 code[1] = {rounding.code(z)};
            shared_store(step_codes + thread, static_cast<u8>(inside ? pack_word(code) & ((1 << BITS) - 1) : 0));
            block_sync();
            int done = (n1 - first < rows ? n1 - first : rows) * n2;  // codes of this step
            u8* to = codes + t * row_bytes + static_cast<i64>(first) * n2 * BITS / 8;
            if (BITS == 8) {
                if (thread < done) store(to + thread, shared_load(step_codes + thread));
            } else if (2 * thread < done) {
                u32 high = 2 * thread + 1 < done ? shared_load(step_codes + 2 * thread + 1) : 0;
                store(to + thread, static_cast<u8>(shared_load(step_codes + 2 * thread) | high << 4));
            }
            block_sync();
        }
    }
}
