// What the 32 lanes of a warp do together: shuffles, ldmatrix, mma. Each function runs once, in the last lane to
// arrive, with the arguments of all lanes.
#include <cstring>

#include "cuda_emulator_runtime.h"

namespace emulator {

void complete_warp_sync(void* const*) { order_lanes(*self().warp); }

void complete_shuffle(void* const* arguments) {
    auto lanes = reinterpret_cast<ShuffleArguments* const*>(arguments);
    const auto size = static_cast<size_t>(lanes[0]->size);
    unsigned char values[LANES][8];
    for (int lane = 0; lane < LANES; ++lane) memcpy(values[lane], lanes[lane]->value, size);
    for (int lane = 0; lane < LANES; ++lane) memcpy(lanes[lane]->value, values[lanes[lane]->source], size);
}

void complete_ballot(void* const* arguments) {
    auto lanes = reinterpret_cast<BallotArguments* const*>(arguments);
    uint32_t votes = 0;
    for (int lane = 0; lane < LANES; ++lane) votes |= static_cast<uint32_t>(lanes[lane]->vote) << lane;
    for (int lane = 0; lane < LANES; ++lane) lanes[lane]->votes = votes;
}

// PTX ISA, "ldmatrix": lanes 8m … 8m+7 point to the rows of matrix m. Of each matrix, lane l gets two 16-bit elements:
// in row l/4 the columns 2·(l mod 4) and the next; or, transposed, in column l/4 the rows 2·(l mod 4) and the next.
void complete_ldmatrix(void* const* arguments) {
    auto lanes = reinterpret_cast<const MatrixArguments* const*>(arguments);
    access_matrix_rows(lanes);
    const bool transposed = lanes[0]->transposed;
    for (int m = 0; m < lanes[0]->count; ++m) {
        uint16_t rows[8][8];
        for (int row = 0; row < 8; ++row) memcpy(rows[row], lanes[8 * m + row]->row, 16);
        for (int lane = 0; lane < LANES; ++lane) {
            int i = lane / 4, j = 2 * (lane % 4);
            uint32_t low = transposed ? rows[j][i] : rows[i][j], high = transposed ? rows[j + 1][i] : rows[i][j + 1];
            lanes[lane]->d[m] = low | high << 16;
        }
    }
}

namespace {

float f16_value(uint32_t x) {
    uint32_t sign = (x & 0x8000u) << 16, exponent = x >> 10 & 31, mantissa = x & 1023, bits;
    float value;
    if (exponent == 0) {
        value = static_cast<float>(mantissa) * 0x1p-24f;
        return sign ? -value : value;
    }
    bits = sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | mantissa << 13;
    memcpy(&value, &bits, sizeof(value));
    return value;
}
float bf16_value(uint32_t x) {
    uint32_t bits = x << 16;
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

// How elements lie in a 32-bit register: PER_WORD of them, `value(word, i)`.
struct Halves {
    static constexpr int PER_WORD = 2;
    static double value(uint32_t word, int i) { return f16_value(word >> (16 * i) & 0xffff); }
};
struct BrainHalves {
    static constexpr int PER_WORD = 2;
    static double value(uint32_t word, int i) { return bf16_value(word >> (16 * i) & 0xffff); }
};
template <bool SIGNED>
struct Bytes {
    static constexpr int PER_WORD = 4;
    static int value(uint32_t word, int i) {
        int byte = static_cast<int>(word >> (8 * i) & 0xff);
        return SIGNED ? (byte ^ 128) - 128 : byte;
    }
};
template <bool SIGNED>
struct Nibbles {
    static constexpr int PER_WORD = 8;
    static int value(uint32_t word, int i) {
        int nibble = static_cast<int>(word >> (4 * i) & 0xf);
        return SIGNED ? (nibble ^ 8) - 8 : nibble;
    }
};

// PTX ISA, "Matrix fragments for mma.m16n8k16 / k32 / k64". With g = lane / 4, t = lane mod 4, E elements a register:
// A's registers 0 to 3 hold row g, g + 8, g, g + 8, columns t·E … of the left (0, 1) or right (2, 3) half of k;
// B's registers 0, 1 hold column g, rows t·E … of the upper or lower half of k; D's 0 to 3 hold rows g, g, g + 8,
// g + 8, columns 2t, 2t + 1, 2t, 2t + 1. Sums are exact (double, or integers modulo 2^32) and rounded once.
template <class A, class B, class Sum, class Result>
void complete_mma(void* const* arguments) {
    constexpr int E = A::PER_WORD, K = 8 * E;
    auto lanes = reinterpret_cast<const MmaArguments* const*>(arguments);
    Sum a[16][K], b[K][8];
    for (int lane = 0; lane < LANES; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int e = 0; e < E; ++e) {
            for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][t * E + e + r / 2 * (K / 2)] = A::value(lanes[lane]->a[r], e);
            for (int r = 0; r < 2; ++r) b[t * E + e + r * (K / 2)][g] = B::value(lanes[lane]->b[r], e);
        }
    }
    Sum d[16][8] = {};
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < K; ++k)
            for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
    for (int lane = 0; lane < LANES; ++lane) {
        const int g = lane / 4, t = lane % 4;
        auto result = static_cast<Result*>(lanes[lane]->d);
        for (int r = 0; r < 4; ++r)
            result[r] = static_cast<Result>(d[g + r / 2 * 8][2 * t + r % 2] + static_cast<Sum>(result[r]));
    }
    launch->counters->mma += 1;
}

template <class A>
void complete_float_mma(void* const* arguments) {
    complete_mma<A, A, double, float>(arguments);
}
template <class A, class B>
void complete_integer_mma(void* const* arguments) {
    complete_mma<A, B, uint32_t, int>(arguments);
}

}  // namespace

void complete_mma_f16(void* const* arguments) { complete_float_mma<Halves>(arguments); }
void complete_mma_bf16(void* const* arguments) { complete_float_mma<BrainHalves>(arguments); }
void complete_mma_s8(void* const* arguments) { complete_integer_mma<Bytes<true>, Bytes<true>>(arguments); }
void complete_mma_u8s8(void* const* arguments) { complete_integer_mma<Bytes<false>, Bytes<true>>(arguments); }
void complete_mma_s4(void* const* arguments) { complete_integer_mma<Nibbles<true>, Nibbles<true>>(arguments); }
void complete_mma_u4s4(void* const* arguments) { complete_integer_mma<Nibbles<false>, Nibbles<true>>(arguments); }

}  // namespace emulator
