// A sound kernel and planted faults, chosen by number. 64 threads; x and y [64], shared memory of 64 floats.
#include "ptx.cuh"

enum {
    SOUND,
    READ_PAST_END,
    WRITE_PAST_END,
    SHARED_PAST_END,
    MISALIGNED,
    NO_BLOCK_SYNC,
    NO_WARP_SYNC,
    NO_COPY_WAIT,
    WAIT_TOO_SHORT,
    BARRIER_FOR_SOME_WARPS,
    BARRIER_FOR_SOME_LANES,
    SHUFFLE_AFTER_EXIT,
    LANES_PART,
    WRITE_AFTER_READ,
    LOAD_OF_WRITTEN,
    NAMED_SYNC_OF_DIFFERENT_SIZES,
    SAME_VALUE,
    RAW_READ_PAST_END,
    BUFFER_REUSED_TOO_EARLY,
};

extern "C" __global__ void faults(int fault, const float* x, float* y) {
    FLATQ_SHARED(memory);
    float* words = reinterpret_cast<float*>(memory);
    const int i = threadIdx.x, lane = i % WARP;
    float value = 0;
    switch (fault) {
        case READ_PAST_END: value = load(x + i + 1); break;
        case WRITE_PAST_END: store(y + i + 1, 1.0f); break;
        case SHARED_PAST_END: shared_store(words + i + 1, 1.0f); break;
        case RAW_READ_PAST_END: value = x[i + 1]; break;
        case MISALIGNED: value = load(reinterpret_cast<const float4*>(x + i / 2)).x; break;
        case NO_BLOCK_SYNC:
            shared_store(words + i, load(x + i));
            value = shared_load(words + (i ^ WARP));
            break;
        case NO_WARP_SYNC:
            shared_store(words + i, load(x + i));
            value = shared_load(words + (i ^ 1));
            break;
        case NO_COPY_WAIT:
            cp_async_4(words + i, x + i);
            cp_async_commit();
            block_sync();
            value = shared_load(words + i);
            break;
        case WAIT_TOO_SHORT:
            cp_async_4(words + i, x + i);
            cp_async_commit();
            if (lane < 16) cp_async_4(words + i, x + i);
            cp_async_wait<1>();
            value = shared_load(words + i);
            break;
        case BARRIER_FOR_SOME_WARPS:
            if (i < WARP) block_sync();
            break;
        case BARRIER_FOR_SOME_LANES:
            if (lane < 16) block_sync();
            break;
        case SHUFFLE_AFTER_EXIT:
            if (lane == 7) return;
            value = shuffle(load(x + i), 0);
            break;
        case LANES_PART:
            if (lane < 16)
                warp_sync();
            else
                value = shuffle(1.0f, 0);
            break;
        case WRITE_AFTER_READ:
            shared_store(words + i, load(x + i));
            block_sync();
            value = shared_load(words + (i ^ WARP));
            shared_store(words + i, 0.0f);
            break;
        case LOAD_OF_WRITTEN:
            store(y + i, load(x + i));
            block_sync();
            value = load(y + (i ^ 1));
            break;
        case NAMED_SYNC_OF_DIFFERENT_SIZES: named_sync(2, i < WARP ? 32 + WARP : WARP); break;
        case SAME_VALUE:
            shared_store(words, 5.0f);
            block_sync();
            value = shared_load(words);
            break;
        case BUFFER_REUSED_TOO_EARLY:  // warp 1 may still read what warp 0's next copy overwrites
            cp_async_4(words + i, x + i);
            cp_async_commit();
            cp_async_wait<0>();
            block_sync();
            value = shared_load(words + (i ^ WARP));
            cp_async_4(words + i, x + i);
            break;
        default:
            shared_store(words + i, load(x + i));
            block_sync();
            value = shared_load(words + (i ^ WARP));
    }
    store(y + i, value);
}

// Two groups of copies under way; `waited` says for how many the kernel waits before it reads both. y [2, 32].
extern "C" __global__ void lateness(int waited, const float* x, float* y) {
    FLATQ_SHARED(memory);
    float* words = reinterpret_cast<float*>(memory);
    const int lane = threadIdx.x;
    cp_async_4(words + lane, x + lane);
    cp_async_commit();
    cp_async_4(words + 32 + lane, x + lane, lane < 16 ? 4 : 0);
    cp_async_commit();
    if (waited == 1) cp_async_wait<1>();
    if (waited == 2) cp_async_wait<0>();
    store(y + lane, shared_load(words + lane));
    store(y + 32 + lane, shared_load(words + 32 + lane));
}

// Warps 0 and 1 meet at one barrier, warps 2 and 3 at another; y [128] gets the word of thread i ^ partner.
extern "C" __global__ void named(int partner, const float* x, float* y) {
    FLATQ_SHARED(memory);
    float* words = reinterpret_cast<float*>(memory);
    const int i = threadIdx.x;
    shared_store(words + i, load(x + i));
    named_sync(i < 64 ? 1 : 2, 64);
    store(y + i, shared_load(words + (i ^ partner)));
}

// tickets [blocks]: when each block ran. statics: the value that thread 0 put into a static shared variable.
extern "C" __global__ void order(int* counter, int* tickets, float* statics) {
    __shared__ float word;
    if (threadIdx.x == 0) {
        store(tickets + blockIdx.x, atomic_add(counter, 1));
        shared_store(&word, 2.5f);
    }
    block_sync();
    store(statics + blockIdx.x * blockDim.x + threadIdx.x, shared_load(&word));
}
