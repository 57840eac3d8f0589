// What the kernels that fill the K/V cache share: where a row lies, and how it becomes codes.
//
// Macros of every specialization: HEAD_DIM; TYPE, F16 or BF16; BITS, 4 or 8.
#pragma once
#include "ptx.cuh"

constexpr int CODE_BYTES = HEAD_DIM * BITS / 8;  // of a row
constexpr float GREATEST = (1 << BITS) - 1;
constexpr float MAGIC = 12582912.f;  // 1.5 · 2^23: adding it rounds a float to the nearest integer, ties to even

// The rows to quantize, in the order (batch, head, token), tokens fastest: a warp's scales then lie together.
struct Rows {
    const u16* x;
    const int* start;
    int count, heads, tokens, capacity;
    int stride_batch, stride_head, stride_token;
};

// One of them. `place` is its row of the cache, [batch · heads · capacity], or -1: beyond the rows or the cache.
struct Row {
    const u16* x;
    long long place;
};

DEVICE Row locate(const Rows& rows, int index) {
    if (index >= rows.count) return {nullptr, -1};
    const int token = index % rows.tokens, batch_head = index / rows.tokens;
    const int head = batch_head % rows.heads, batch = batch_head / rows.heads;
    const long long offset = static_cast<long long>(batch) * rows.stride_batch +
                             static_cast<long long>(head) * rows.stride_head +
                             static_cast<long long>(token) * rows.stride_token;
    const int slot = load(rows.start + batch) + token;
    const bool inside = slot >= 0 && slot < rows.capacity;
    return {rows.x + offset, inside ? static_cast<long long>(batch_head) * rows.capacity + slot : -1};
}

// How a row is rounded: q = clamp(round(y · inverse) + zero).
struct Grid {
    float scale, inverse, zero;
};

// From the row's maximum and its negated minimum, both at least 0, or NaN.
DEVICE Grid grid_of(float greatest, float negated_least, float clip_high, float clip_low) {
    const float high = greatest * clip_high, low = negated_least * clip_low;
    const float reach = (high + low) / GREATEST;
    const float scale = reach == 0.f ? 1.f : reach - reach == 0.f ? reach : bits_float(0x7fc00000u);
    return {scale, 1.f / scale, fmaxf(rintf(low / scale), 0.f)};
}

// A code without a conversion instruction. NaN becomes 0.
DEVICE u32 code_of(float y, const Grid& grid) {
    const float rounded = fmaf(y, grid.inverse, MAGIC) + (grid.zero - MAGIC);  // exact: both are whole numbers
    return float_bits(fminf(fmaxf(rounded, 0.f), GREATEST) + MAGIC) & 0xff;
}

DEVICE u8 zero_of(const Grid& grid) { return static_cast<u8>(float_bits(grid.zero + MAGIC) & 0xff); }
