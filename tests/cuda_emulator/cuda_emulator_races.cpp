// Races in shared memory: two threads touch a byte, one of them writes, and nothing orders the two.
//
// Order comes from warp_sync (a warp's lanes), block_sync and named_sync (whole warps); from no other collective. So it
// is enough to count, per warp, the syncs it has passed (its epoch), and to know for each pair of warps up to which
// epoch of the other one a warp has heard. For every cell of shared memory we keep the last write, and the last read of
// each warp. A cell is a 4-byte word until something smaller touches the word, then its bytes.
#include "cuda_emulator_runtime.h"

#include <algorithm>

namespace emulator {

namespace {

struct Mark {
    uint32_t epoch;  // of the thread's warp; 0: never
    int16_t thread;
    uint16_t site;
};

std::vector<Mark> writes, reads;  // per byte; per byte and warp
std::vector<uint8_t> copies;  // cp.async under way to a byte
std::vector<Mark> copy_marks;
std::vector<bool> in_bytes;  // per word
int warp_count;
uint32_t epochs[MAX_WARPS];
uint32_t heard[MAX_WARPS][MAX_WARPS];  // [w][v]: what warp v did before this epoch of it happened before warp w's now

bool ordered(const Mark& mark, int by_warp, int now) { return mark.epoch < heard[now][by_warp]; }

void split_word(size_t word) {
    in_bytes[word] = true;
    for (size_t cell = 4 * word + 1; cell < std::min(4 * word + 4, writes.size()); ++cell) {
        writes[cell] = writes[4 * word];
        copies[cell] = copies[4 * word];
        copy_marks[cell] = copy_marks[4 * word];
        for (int w = 0; w < warp_count; ++w)
            reads[cell * static_cast<size_t>(warp_count) + static_cast<size_t>(w)] =
                reads[4 * word * static_cast<size_t>(warp_count) + static_cast<size_t>(w)];
    }
}

template <class Function>
void for_cells(size_t offset, int size, Function&& function) {
    const size_t end = offset + static_cast<size_t>(size);
    for (size_t byte = offset; byte < end;) {
        const size_t word = byte / 4;
        if (size < 4 && !in_bytes[word]) split_word(word);
        function(byte);
        byte += in_bytes[word] ? 1 : 4;
    }
}

Mark* reads_of(size_t cell) { return &reads[cell * static_cast<size_t>(warp_count)]; }

void check_no_copy(size_t cell, int site, const char* does) {
    if (!copies[cell]) return;
    const Mark& copy = copy_marks[cell];
    Site from = site_of(copy.site);
    fail(site_of(site),
         "%s byte %zu of shared memory, which thread %d's cp_async (%s:%d) may still be writing: no cp_async_wait covers "
         "it",
         does, cell, copy.thread, base_name(from.file), from.line);
}

[[noreturn]] void fail_race(size_t cell, int site, const char* does, const char* did, const Mark& mark, int warp) {
    const Site from = site_of(mark.site);
    const bool one = mark.thread != WHOLE_WARP;
    fail(site_of(site), "race: %s byte %zu of shared memory, which %s %d %s (%s:%d) with no barrier between", does,
         cell, one ? "thread" : "warp", one ? mark.thread : warp, did, base_name(from.file), from.line);
}

void check_write(size_t cell, int thread, int site, bool same_value) {
    const int warp = thread / LANES;
    const Mark& write = writes[cell];
    if (!same_value && write.thread != thread && !ordered(write, write.thread / LANES, warp))
        fail_race(cell, site, "writes", "wrote", write, 0);
    const Mark* marks = reads_of(cell);
    for (int w = 0; w < warp_count; ++w)
        if (marks[w].thread != thread && !ordered(marks[w], w, warp))
            fail_race(cell, site, "writes", "read", marks[w], w);
}

Mark mark_now(int warp, int thread, int site) {
    return {epochs[warp], static_cast<int16_t>(thread), static_cast<uint16_t>(site)};
}

}  // namespace

void races_begin_launch(size_t shared_bytes) {
    warp_count = static_cast<int>(launch->block) / LANES;
    shared_bytes = (shared_bytes + 3) / 4 * 4;
    writes.assign(shared_bytes, {});
    reads.assign(shared_bytes * static_cast<size_t>(warp_count), {});
    copies.assign(shared_bytes, 0);
    copy_marks.assign(shared_bytes, {});
    in_bytes.assign(shared_bytes / 4, false);
    for (int w = 0; w < warp_count; ++w) {
        epochs[w] = 1;
        std::fill(heard[w], heard[w] + warp_count, 1u);
    }
}

void order_lanes(Warp& warp) { heard[warp.number][warp.number] = ++epochs[warp.number]; }

void order_warps(Warp* const* warps, int count) {
    uint32_t all[MAX_WARPS] = {};
    for (int i = 0; i < count; ++i) {
        order_lanes(*warps[i]);
        for (int v = 0; v < warp_count; ++v) all[v] = std::max(all[v], heard[warps[i]->number][v]);
    }
    for (int i = 0; i < count; ++i) std::copy(all, all + warp_count, heard[warps[i]->number]);
}

void race_read(size_t offset, int size, int warp, int thread, int site) {
    for_cells(offset, size, [&](size_t cell) {
        check_no_copy(cell, site, "reads");
        const Mark& write = writes[cell];
        if (write.thread != thread && !ordered(write, write.thread / LANES, warp))
            fail_race(cell, site, "reads", "wrote", write, 0);
        Mark& read = reads_of(cell)[warp];
        const bool several = read.epoch == epochs[warp] && read.thread != thread;
        read = mark_now(warp, several ? WHOLE_WARP : thread, site);
    });
}

void race_write(size_t offset, int size, int thread, int site, bool same_value) {
    for_cells(offset, size, [&](size_t cell) {
        check_no_copy(cell, site, "writes");
        check_write(cell, thread, site, same_value);
        writes[cell] = mark_now(thread / LANES, thread, site);
    });
}

void race_copy_begins(size_t offset, int size, int thread, int site) {
    for_cells(offset, size, [&](size_t cell) {
        check_no_copy(cell, site, "copies to");
        check_write(cell, thread, site, false);
        copies[cell] = 1;
        copy_marks[cell] = mark_now(thread / LANES, thread, site);
    });
}

void race_copy_ends(size_t offset, int size, int thread, int site) {
    for_cells(offset, size, [&](size_t cell) {
        copies[cell] = 0;
        writes[cell] = mark_now(thread / LANES, thread, site);
    });
}

}  // namespace emulator
