// What both attention kernels share: which keys a query sees, and the step of an online softmax.
#pragma once
#include "ptx.cuh"

DEVICE float minus_infinity() { return bits_float(0xff800000u); }

// The keys that one sequence's queries may see. Query i stands at position length - q_len + i, and sees none behind it
// unless a mask says what is seen.
struct Visible {
    int length, q_len, first, window, capacity;
    bool causal;

    DEVICE int begin(int i) const {  // of query i: its first key
        const int oldest = window > 0 ? length - q_len + i - window + 1 : 0;
        return max(max(first, oldest), 0);
    }
    DEVICE int end(int i) const {  // and behind its last
        const int all = min(length, capacity);
        return causal ? min(length - q_len + i + 1, all) : all;
    }

private:
    static DEVICE int max(int a, int b) { return a > b ? a : b; }
    static DEVICE int min(int a, int b) { return a < b ? a : b; }
};

DEVICE Visible visible_keys(const int* lengths, const int* first, int batch, int q_len, int window, int capacity,
                            bool causal) {
    return {load(lengths + batch), q_len, first ? load(first + batch) : 0, window, capacity, causal};
}

// The factor that takes a sum relative to 2^from to one relative to 2^to; 0 where there is nothing to take.
DEVICE float rescale(float from, float to) { return from == minus_infinity() ? 0.f : fast_exp2(from - to); }
