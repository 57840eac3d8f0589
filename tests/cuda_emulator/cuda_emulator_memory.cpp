// Memory: what a thread may touch, and when an asynchronous copy happens.
#include "cuda_emulator_runtime.h"

#include <cstdlib>
#include <cstring>

// `__shared__` variables lie in a section of their own; the linker says where, if there are any.
extern "C" __attribute__((weak, visibility("hidden"))) unsigned char __start_flatq_shared[], __stop_flatq_shared[];

namespace emulator {

namespace {

constexpr unsigned char POISON = 0xff;  // NaN in every float format, -1 in integers

const char* const NAMES[] = {"load",        "load_coherent", "store",        "atomic_add", "cp_async (from)",
                             "shared_load", "shared_store",  "cp_async (to)", "ldmatrix"};

int last_region;  // the one found last: accesses come in runs
std::vector<std::vector<bool>> written;  // bytes of each region that this launch stored to

size_t static_bytes() { return static_cast<size_t>(__stop_flatq_shared - __start_flatq_shared); }

// Where in the block's shared memory (the dynamic part, then the static one) the bytes are, or -1.
int64_t shared_offset(const void* address, int size) {
    auto p = static_cast<const unsigned char*>(address);
    if (p >= shared_memory && p + size <= shared_memory + launch->shared_bytes) return p - shared_memory;
    if (p >= __start_flatq_shared && p + size <= __stop_flatq_shared)
        return (launch->shared_bytes + 15) / 16 * 16 + (p - __start_flatq_shared);
    return -1;
}

[[noreturn]] void fail_global(const char* what, const void* pointer, int size, Site site) {
    auto address = reinterpret_cast<uint64_t>(pointer);
    if (shared_offset(pointer, 1) >= 0) fail(site, "%s of shared memory: global memory expected", what);
    int nearest = -1;
    int64_t distance = 0;
    for (int i = 0; i < launch->region_count; ++i) {
        const Region& r = launch->regions[i];
        auto from_begin = static_cast<int64_t>(address - r.begin);
        int64_t outside = from_begin < 0 ? -from_begin : from_begin - static_cast<int64_t>(r.bytes);
        if (nearest < 0 || outside < distance) nearest = i, distance = outside;
    }
    if (nearest < 0 || !pointer) fail(site, "%s of %d bytes at %p: no tensor is there", what, size, pointer);
    const Region& r = launch->regions[nearest];
    fail(site, "%s of %d bytes outside of every tensor: at byte %lld of tensor %d, which has %llu bytes", what, size,
         static_cast<long long>(address - r.begin), nearest, static_cast<unsigned long long>(r.bytes));
}

void check_alignment(const char* what, const void* address, int alignment, Site site) {
    if (launch->check_memory && reinterpret_cast<uint64_t>(address) % static_cast<uint64_t>(alignment))
        fail(site, "%s at %p: the address is not a multiple of %d", what, address, alignment);
}

// Checks; the offset in shared memory.
size_t check_shared(const char* what, const void* address, int size, Site site) {
    check_alignment(what, address, size, site);
    int64_t offset = shared_offset(address, size);
    if (offset < 0 && launch->check_memory)
        fail(site, "%s of %d bytes outside of shared memory: at byte %lld of %u", what, size,
             static_cast<long long>(static_cast<const unsigned char*>(address) - shared_memory), launch->shared_bytes);
    return static_cast<size_t>(offset);
}

void check_global(Access kind, const void* pointer, int size, Site site) {
    if (!launch->check_memory) return;
    const char* what = NAMES[static_cast<int>(kind)];
    auto address = reinterpret_cast<uint64_t>(pointer);
    int region = region_of(address, static_cast<uint64_t>(size));
    if (region < 0) fail_global(what, pointer, size, site);
    if (!launch->check_races) return;
    size_t first = address - launch->regions[region].begin;
    std::vector<bool>& bytes = written[static_cast<size_t>(region)];
    for (size_t i = first; i < first + static_cast<size_t>(size); ++i) {
        if (kind == Access::global_store || kind == Access::global_atomic)
            bytes[i] = true;
        else if (kind == Access::global_load && bytes[i])
            fail(site, "load of bytes that this launch has written (tensor %d, byte %zu): load_coherent would see them",
                 region, i);
    }
}

std::vector<Site> sites;
constexpr unsigned SITE_SLOTS = 4096;
int site_slots[SITE_SLOTS];  // number + 1; 0 is free

}  // namespace

int site_number(Site site) {
    const uint64_t hash = static_cast<uint64_t>(site.line) * 97 + (reinterpret_cast<uint64_t>(site.file) >> 4);
    for (uint64_t i = hash % SITE_SLOTS;; i = (i + 1) % SITE_SLOTS) {
        int& slot = site_slots[i];
        if (slot == 0) {
            sites.push_back(site);
            return (slot = static_cast<int>(sites.size())) - 1;
        }
        const Site& known = sites[static_cast<size_t>(slot) - 1];
        if (known.line == site.line && known.file == site.file) return slot - 1;
    }
}
Site site_of(int number) { return sites[static_cast<size_t>(number)]; }

int region_of(uint64_t address, uint64_t bytes) {
    auto holds = [&](int i) {
        const Region& r = launch->regions[i];
        return address >= r.begin && address + bytes <= r.begin + r.bytes;
    };
    if (last_region < launch->region_count && holds(last_region)) return last_region;
    for (int i = 0; i < launch->region_count; ++i)
        if (holds(i)) return last_region = i;
    return -1;
}

void access(Access kind, const void* address, int size, Site site, const void* value) {
    Fiber& fiber = self();
    const char* what = NAMES[static_cast<int>(kind)];
    const int number = site_number(site);
    if (kind == Access::shared_load || kind == Access::shared_store) {
        size_t offset = check_shared(what, address, size, site);
        if (launch->check_races && kind == Access::shared_load) {
            race_read(offset, size, fiber.warp->number, fiber.number, number);
        } else if (launch->check_races) {
            bool same = value && memcmp(address, value, static_cast<size_t>(size)) == 0;
            race_write(offset, size, fiber.number, number, same);
        }
    } else {
        check_alignment(what, address, size, site);
        check_global(kind, address, size, site);
    }
    count(fiber, kind, address, size, number);
}

void access_matrix_rows(const MatrixArguments* const* lanes) {
    for (int lane = 0; lane < 8 * lanes[0]->count; ++lane) {
        size_t offset = check_shared("ldmatrix", lanes[lane]->row, 16, lanes[lane]->site);
        if (launch->check_races) race_read(offset, 16, self().warp->number, WHOLE_WARP, site_number(lanes[lane]->site));
    }
    if (launch->count) count_matrix_rows(lanes);
}

// The source is read at once (nobody may write it meanwhile); what counts is when the destination changes.
void copy_async(void* shared, const void* global, int size, int bytes, Site site) {
    Fiber& fiber = self();
    if (bytes < 0 || bytes > size) fail(site, "cp_async_%d of %d bytes", size, bytes);
    check_alignment("cp_async (from)", global, size, site);
    if (bytes) check_global(Access::copy_load, global, bytes, site);
    size_t offset = check_shared("cp_async (to)", shared, size, site);
    Copy copy{static_cast<unsigned char*>(shared), {}, size, site_number(site)};
    memcpy(copy.data, global, static_cast<size_t>(bytes));
    if (launch->check_races) race_copy_begins(offset, size, fiber.number, copy.site);
    fiber.copies.push_back(copy);
    count(fiber, Access::copy_load, global, bytes, copy.site);
    count(fiber, Access::copy_store, shared, size, copy.site);
}

void copy_commit() {
    Fiber& fiber = self();
    fiber.groups.push_back(fiber.copies.size() - fiber.grouped);
    fiber.grouped = fiber.copies.size();
}

namespace {
void finish_oldest(Fiber& fiber, size_t copies) {
    auto end = fiber.copies.begin() + static_cast<std::ptrdiff_t>(copies);
    for (auto copy = fiber.copies.begin(); copy != end; ++copy) {
        memcpy(copy->shared, copy->data, static_cast<size_t>(copy->size));
        if (!launch->check_races) continue;
        auto offset = static_cast<size_t>(shared_offset(copy->shared, copy->size));
        race_copy_ends(offset, copy->size, fiber.number, copy->site);
    }
    fiber.copies.erase(fiber.copies.begin(), end);
}
}  // namespace

void copy_wait(int pending) {
    Fiber& fiber = self();
    const size_t keep = static_cast<size_t>(pending);
    if (fiber.groups.size() <= keep) return;
    auto end = fiber.groups.end() - static_cast<std::ptrdiff_t>(keep);
    size_t copies = 0;
    for (auto group = fiber.groups.begin(); group != end; ++group) copies += *group;
    finish_oldest(fiber, copies);
    fiber.groups.erase(fiber.groups.begin(), end);
    fiber.grouped -= copies;
}

void finish_copies(Fiber& fiber) { finish_oldest(fiber, fiber.copies.size()); }

void memory_begin_launch() {
    last_region = 0;
    sites.clear();
    memset(site_slots, 0, sizeof(site_slots));
    void* memory = nullptr;
    // Exactly as large as asked for, so that AddressSanitizer sees the end.
    if (posix_memalign(&memory, 1024, launch->shared_bytes ? launch->shared_bytes : 1)) abort();
    shared_memory = static_cast<unsigned char*>(memory);
    if (!launch->check_races) return;
    written.clear();
    for (int i = 0; i < launch->region_count; ++i) written.emplace_back(launch->regions[i].bytes);
    races_begin_launch((launch->shared_bytes + 15) / 16 * 16 + static_bytes());
}

void memory_begin_block() {
    memset(shared_memory, POISON, launch->shared_bytes);
    if (static_bytes()) memset(__start_flatq_shared, POISON, static_bytes());
}

void memory_end_launch() {
    free(shared_memory);
    shared_memory = nullptr;
}

}  // namespace emulator
