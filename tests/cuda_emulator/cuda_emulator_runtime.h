// What the files of the runtime know of each other: cuda_emulator.cpp (scheduler), _warp, _memory, _cost, _races.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda_emulator.h"

namespace emulator {

using std::size_t;

constexpr int MAX_THREADS = 1024;
constexpr int MAX_WARPS = MAX_THREADS / LANES;

// One launch, as device.py fills it in (the same struct through ctypes).
struct Region {
    uint64_t begin, bytes;
};
struct Counters {
    uint64_t sectors_read, sectors_written, wavefronts, wavefronts_min, mma, warp_barriers, warps, blocks;
};
struct Launch {
    uint32_t grid[3], block, shared_bytes;
    int32_t order;  // 0 ascending, 1 descending, 2 random by `seed`
    uint64_t seed;
    int32_t count, check_memory, check_races, region_count;
    const Region* regions;  // the argument tensors
    uint64_t* region_sectors;  // two a region: sectors read, sectors written
    void** arguments;
    Counters* counters;
    char* error;
    uint32_t error_size;
};
extern const Launch* launch;

struct Copy {  // a cp.async under way
    unsigned char* shared;
    unsigned char data[16];
    int size;
    int site;
};
struct Touch {  // one access of one lane, kept until the warp's lanes meet again
    uint64_t address;
    int32_t site;
    uint8_t size;
    Access kind;
};
struct Warp;
struct Fiber : Thread {
    void* stack_pointer;
    unsigned char* stack;
    size_t stack_bytes;
    void* fake_stack;  // AddressSanitizer's
    Warp* warp;
    int number;  // in the block
    const char* waits_for;
    Site waits_at;
    bool ended;
    std::vector<Copy> copies;
    std::vector<size_t> groups;  // copies in each committed group, oldest first
    size_t grouped;
    std::vector<Touch> touches;
};
struct Warp {
    Fiber* lanes[LANES];
    int number, arrived, ended;
    const char* meets_at;  // what the first lane to arrive waits for, and where
    Site site;
    void* arguments[LANES];
};

Fiber& self();
// Ends the launch with this message about the running thread. Does not return.
[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(Site site, const char* format, ...);
const char* base_name(const char* path);

// Places by number, 0 to 65535.
int site_number(Site site);
Site site_of(int number);

// ---- cuda_emulator_memory.cpp: what a thread may touch. ----
void memory_begin_launch();
void memory_begin_block();
void memory_end_launch();
// The tensor argument that holds the bytes, or -1.
int region_of(uint64_t address, uint64_t bytes);
// The running thread ends: its copies, waited for or not, are done.
void finish_copies(Fiber& fiber);
void access_matrix_rows(const MatrixArguments* const* lanes);

// ---- cuda_emulator_cost.cpp: what accesses cost. ----
inline void count(Fiber& fiber, Access kind, const void* address, int size, int site) {
    if (launch->count)
        fiber.touches.push_back({reinterpret_cast<uint64_t>(address), site, static_cast<uint8_t>(size), kind});
}
void count_matrix_rows(const MatrixArguments* const* lanes);
// All lanes of `warp` stand at one place: what they touched since they last did is grouped and counted.
void converged(Warp& warp);

// ---- cuda_emulator_races.cpp: which accesses to shared memory are not ordered. ----
constexpr int WHOLE_WARP = -1;  // as a thread: all lanes
void races_begin_launch(size_t shared_bytes);
// What the warp's lanes did before happens before what they do after.
void order_lanes(Warp& warp);
// The same for all of these warps.
void order_warps(Warp* const* warps, int count);
void race_read(size_t offset, int size, int warp, int thread, int site);
void race_write(size_t offset, int size, int thread, int site, bool same_value);
void race_copy_begins(size_t offset, int size, int thread, int site);
void race_copy_ends(size_t offset, int size, int thread, int site);

}  // namespace emulator
