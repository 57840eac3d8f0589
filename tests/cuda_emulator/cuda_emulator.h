// What a kernel's text, compiled for the CPU, asks of the emulator's runtime. See README.md.
//
// Every thread of a block is a fiber. A fiber runs until it meets others: at a warp collective (`meet`), at a barrier
// (`meet_at_barrier`) or at its end. Whatever touches memory first says so (`access`), with the place in the source.
#pragma once

#include <cstdint>
#include <utility>

namespace emulator {

constexpr int LANES = 32;

// A place in a kernel's source. As the last parameter of a function, FLATQ_SITE is the place of the call.
struct Site {
    const char* file;
    int line;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};
#define FLATQ_SITE ::emulator::Site site = ::emulator::Site::here()

struct Index3 {
    unsigned x, y, z;
};

// The part of a fiber that a kernel sees.
struct Thread {
    Index3 index;
    unsigned lane;
};
extern Thread* current;
extern Index3 block_index, grid_size, block_size;
extern unsigned char* shared_memory;

enum class Access : unsigned char {
    global_load,
    global_load_coherent,
    global_store,
    global_atomic,
    copy_load,
    shared_load,
    shared_store,
    copy_store,
    matrix_row,
};

// The running thread is about to touch `size` bytes at `address`: checked and counted. A store brings its value (two
// threads that store the same value do not race).
void access(Access kind, const void* address, int size, Site site, const void* value = nullptr);

// A copy from global to shared memory that happens when `copy_wait` (or the thread's end) requires it, not before.
void copy_async(void* shared, const void* global, int size, int bytes, Site site);
void copy_commit();
void copy_wait(int pending);

// The running lane waits until all 32 lanes of its warp are here; then `complete` gets their arguments in lane order.
// Lanes at different places, or a lane that has ended, are an error.
using Complete = void (*)(void* const* arguments);
void meet(const char* what, Site site, void* argument, Complete complete);

// Waits for `threads` threads of the block (0: all) at barrier `id`.
void meet_at_barrier(const char* what, Site site, int id, int threads);

struct ShuffleArguments {
    void* value;  // in and out
    int size, source;
};
void complete_shuffle(void* const* arguments);

struct BallotArguments {
    bool vote;
    uint32_t votes;  // out
};
void complete_ballot(void* const* arguments);

void complete_warp_sync(void* const* arguments);

struct MatrixArguments {
    unsigned* d;
    const void* row;
    int count;  // matrices: 2 or 4
    bool transposed;
    Site site;
};
void complete_ldmatrix(void* const* arguments);

struct MmaArguments {
    void* d;
    const unsigned *a, *b;
};
void complete_mma_f16(void* const* arguments);
void complete_mma_bf16(void* const* arguments);
void complete_mma_s8(void* const* arguments);
void complete_mma_u8s8(void* const* arguments);
void complete_mma_s4(void* const* arguments);
void complete_mma_u4s4(void* const* arguments);

// ---- A kernel's parameters, unpacked from the array of pointers that launches pass. ----

template <class A>
struct Letter;  // parameters are pointers, int and float
template <class A>
struct Letter<A*> {
    static constexpr char value = 'p';
};
template <>
struct Letter<int> {
    static constexpr char value = 'i';
};
template <>
struct Letter<float> {
    static constexpr char value = 'f';
};

template <class... A>
struct Parameters {
    static constexpr char letters[] = {Letter<A>::value..., 0};
    static void call(void (*kernel)(A...), void** arguments) {
        call(kernel, arguments, std::index_sequence_for<A...>{});
    }
    template <std::size_t... I>
    static void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
        kernel(*static_cast<A*>(arguments[I])...);
    }
};
template <class... A>
Parameters<A...> parameters(void (*)(A...)) {
    return {};
}

}  // namespace emulator

// Stands at the end of a kernel's translation unit.
#define FLATQ_EMULATOR_ENTRY(kernel)                                                                      \
    extern "C" void flatq_kernel(void** arguments) {                                                      \
        decltype(emulator::parameters(&kernel))::call(&kernel, arguments);                                \
    }                                                                                                     \
    extern "C" __attribute__((visibility("default"))) const char* flatq_signature() {                    \
        return decltype(emulator::parameters(&kernel))::letters;                                          \
    }
