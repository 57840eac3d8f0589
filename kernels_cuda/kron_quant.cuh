// What the kernels of kron_quant share: the element-wise prologues, and rounding values to packed codes.
//
// Rounding. With i = 1 / scale, the float z·i + 1.5·2^23 has the integer nearest z·i in its lowest mantissa bits (one
// fma, ties to even); clamped there to the codes' range, the bit patterns of eight 4-bit (four 8-bit) codes are summed
// with weights 16^k (256^k) in one chain of integer multiply-adds: that is the packed word, up to a constant. Signed
// codes pass through this as code + 2^(bits-1), and one exclusive or turns them into two's complement at the end.
#pragma once
#include "ptx.cuh"

using i64 = long long;

constexpr float MAGIC = 12582912.0f;  // 1.5 · 2^23
constexpr int BIAS = SYMMETRIC ? 1 << (BITS - 1) : 0;
constexpr float GREATEST = SYMMETRIC ? (1 << (BITS - 1)) - 1 : (1 << BITS) - 1;  // what the clipped reach becomes
constexpr float TOP = (1 << BITS) - 1;                                             // the greatest biased code
constexpr int WORD_CODES = 32 / BITS;

enum Prologue { NO_PROLOGUE = 0, NORM = 1, GATE = 2 };

// The greatest of 0, z ... and of 0, -z ... of the values seen; NaN stays.
struct Range {
    float high = 0.0f;
    float low = 0.0f;
    DEVICE void add(float z) {
        high = max_nan(high, z);
        low = max_nan(low, -z);
    }
    DEVICE void merge(float other_high, float other_low) {
        high = max_nan(high, other_high);
        low = max_nan(low, other_low);
    }
};

// How a token's values become codes.
struct Rounding {
    float scale;
    float inverse;
    float zero;

    // `back`: a power of two that values were divided by; `scale` is that of the values as they should be.
    DEVICE Rounding(Range range, float clip_high, float clip_low, float back = 1.0f) {
        float high = range.high * clip_high;
        float low = range.low * clip_low;
        float reach = (SYMMETRIC ? max_nan(high, low) : high + low) / GREATEST;
        // An infinity is no range: the whole token is marked NaN. `high` or `low` may be infinite · 0 = NaN as well.
        bool sound = range.high < bits_float(0x7f800000) && range.low < bits_float(0x7f800000) &&
                     reach < bits_float(0x7f800000);
        scale = sound ? (reach == 0.0f ? 1.0f : reach) : bits_float(0x7fc00000);
        inverse = 1.0f / scale;
        // 1 / scale overflows below 2^-128: such a token is 0 to every later step, and so it is here.
        if (!(inverse < bits_float(0x7f800000))) inverse = sound ? bits_float(0x7f7fffff) : scale;
        zero = SYMMETRIC ? 0.0f : (low * inverse + MAGIC) - MAGIC;
        if (reach != 0.0f) scale *= back;
    }
    DEVICE int zero_code() const { return scale == scale ? static_cast<int>(zero) : 0; }
    // The biased code of z, as the lowest bits of a float's pattern.
    DEVICE u32 code(float z) const {
        float shifted = z * inverse + (MAGIC + BIAS + zero);
        shifted = shifted > MAGIC ? shifted : MAGIC;
        shifted = shifted < MAGIC + TOP ? shifted : MAGIC + TOP;
        return float_bits(shifted);
    }
};

// COUNT biased codes, lowest first, to the packed bits of one word.
template <int COUNT>
DEVICE u32 pack_word(const u32 (&code)[COUNT]) {
    u32 sum = code[COUNT - 1];
    u32 excess = float_bits(MAGIC);
    u32 flip = BIAS;
#pragma unroll
    for (int i = COUNT - 2; i >= 0; i--) {
        sum = sum * (1u << BITS) + code[i];
        excess = excess * (1u << BITS) + float_bits(MAGIC);
        flip = flip * (1u << BITS) + BIAS;
    }
    return (sum - excess) ^ flip;
}

// gate · sigmoid(gate) · x.
DEVICE float silu_times(float gate, float x) {
    return gate * fast_reciprocal(1.0f + fast_exp2(gate * -1.4426950408889634f)) * x;
}

// 1 / sqrt(x) to the last bit or so: the approximation and one step of Newton's.
DEVICE float reciprocal_root(float x) {
    float r = fast_rsqrt(x);
    return r * (1.5f - 0.5f * x * r * r);
}
