// The scheduler: fibers, and where they meet.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cuda_emulator_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

extern "C" void flatq_kernel(void** arguments);

// void flatq_switch(void** save, void* load): push what a call must keep, swap stacks, pop. No system call.
extern "C" void flatq_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.globl flatq_switch
.hidden flatq_switch
.type flatq_switch, @function
flatq_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size flatq_switch, .-flatq_switch
)");
constexpr int RETURN_WORD = 6, FRAME_WORDS = 8;  // of the first frame: six registers, the return address, alignment
#elif defined(__aarch64__)
asm(R"(
.text
.globl flatq_switch
.hidden flatq_switch
.type flatq_switch, %function
flatq_switch:
    stp x19, x20, [sp, #-160]!
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    ldp x19, x20, [sp], #160
    ret
.size flatq_switch, .-flatq_switch
)");
constexpr int RETURN_WORD = 11, FRAME_WORDS = 20;  // x30 is what ret jumps to
#else
#error "the emulator's fibers know x86-64 and aarch64"
#endif

namespace emulator {

Thread* current;
Index3 block_index, grid_size, block_size;
unsigned char* shared_memory;
const Launch* launch;

namespace {

constexpr size_t STACK_BYTES = 256 * 1024, GUARD_BYTES = 64 * 1024;

Fiber host;  // the thread that called flatq_launch
std::vector<Fiber> fibers;
std::vector<Warp> warps;
int ended_fibers;
bool failed;
uint64_t random_state;

struct Barrier {
    int threads, arrived, warp_count;
    Warp* waiting[MAX_WARPS];
} barriers[16];

// Fibers that can run, in the order in which they will. A ring that grows at both ends.
struct Ready {
    Fiber* ring[2 * MAX_THREADS];
    unsigned head = 0, size = 0;
    static constexpr unsigned MASK = 2 * MAX_THREADS - 1;
    void push_back(Fiber* fiber) { ring[(head + size++) & MASK] = fiber; }
    void push_front(Fiber* fiber) {
        head = (head - 1) & MASK;
        ring[head] = fiber;
        ++size;
    }
    Fiber* pop() {
        Fiber* fiber = ring[head];
        head = (head + 1) & MASK;
        --size;
        return fiber;
    }
} ready;

unsigned random_below(unsigned bound) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return static_cast<unsigned>((random_state >> 32) * bound >> 32);
}

// 0 … count-1 in the launch's order.
void make_order(int* order, int count) {
    for (int i = 0; i < count; ++i) order[i] = launch->order == 1 ? count - 1 - i : i;
    if (launch->order == 2)
        for (int i = count - 1; i > 0; --i) std::swap(order[i], order[random_below(static_cast<unsigned>(i) + 1)]);
}

// The warp's lanes may run, before or (in random order, sometimes) after all others.
void wake(Warp& warp, bool first) {
    int order[LANES];
    make_order(order, LANES);
    if (first && launch->order == 2) first = random_below(4) != 0;
    for (int i = 0; i < LANES; ++i) {
        if (first)
            ready.push_front(warp.lanes[order[LANES - 1 - i]]);
        else
            ready.push_back(warp.lanes[order[i]]);
    }
}

void switch_to(Fiber& next) {
    Fiber& previous = self();
    if (&next == &previous) return;
    current = &next;
#if defined(__SANITIZE_ADDRESS__)
    void** kept = previous.ended ? nullptr : &previous.fake_stack;
    __sanitizer_start_switch_fiber(kept, next.stack, next.stack_bytes);
#endif
    flatq_switch(&previous.stack_pointer, next.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(previous.fake_stack, nullptr, nullptr);
#endif
}

void append(std::string& text, const char* format, ...) {
    char line[512];
    va_list list;
    va_start(list, format);
    vsnprintf(line, sizeof(line), format, list);
    va_end(list);
    text += line;
}

// "threads 0-31 wait at block_sync (x.cu:12); threads 32-63 have ended"
std::string where_threads_are() {
    std::string text;
    for (size_t i = 0; i < fibers.size();) {
        Fiber& a = fibers[i];
        size_t j = i + 1;
        while (j < fibers.size() && fibers[j].ended == a.ended &&
               (a.ended || (fibers[j].waits_for == a.waits_for && fibers[j].waits_at.line == a.waits_at.line)))
            ++j;
        append(text, "%sthread%s %zu", i ? "; " : "", j - i > 1 ? "s" : "", i);
        if (j - i > 1) append(text, "-%zu", j - 1);
        if (a.ended)
            text += j - i > 1 ? " have ended" : " has ended";
        else
            append(text, " wait%s at %s (%s:%d)", j - i > 1 ? "" : "s", a.waits_for, base_name(a.waits_at.file),
                   a.waits_at.line);
        i = j;
        if (text.size() > 1500) return text + " …";
    }
    return text;
}

int an_ended_thread(const Warp& warp) {
    for (const Fiber* lane : warp.lanes)
        if (lane->ended) return lane->number;
    return -1;
}

// Runs another fiber; comes back when this one is woken.
void sleep() {
    if (ready.size == 0) {
        const Fiber* waiting = nullptr;
        for (const Fiber& fiber : fibers)
            if (!fiber.ended && !waiting) waiting = &fiber;
        fail(waiting->waits_at, "deadlock: %s", where_threads_are().c_str());
    }
    switch_to(*ready.pop());
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (!host.stack) {  // the first switch of all comes from the host's stack
        host.stack = static_cast<unsigned char*>(const_cast<void*>(bottom));
        host.stack_bytes = size;
    }
#endif
    flatq_kernel(launch->arguments);
    Fiber& fiber = self();
    Warp& warp = *fiber.warp;
    finish_copies(fiber);
    fiber.ended = true;
    ++ended_fibers;
    if (++warp.ended == LANES) converged(warp);
    if (warp.arrived && warp.arrived + warp.ended == LANES)
        fail(warp.site, "%s: %d lanes of the warp wait here and %d have ended, thread %d among them", warp.meets_at,
             warp.arrived, warp.ended, an_ended_thread(warp));
    if (ended_fibers == static_cast<int>(fibers.size()))
        switch_to(host);
    else
        sleep();
    abort();  // an ended fiber is never resumed
}

void prepare(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
    // A fiber never returns from its first function: what it poisoned around its variables would stay for its successor.
    __asan_unpoison_memory_region(fiber.stack, STACK_BYTES);
#endif
    auto* top = reinterpret_cast<uint64_t*>(fiber.stack + STACK_BYTES) - FRAME_WORDS;
    memset(top, 0, FRAME_WORDS * sizeof(uint64_t));
    top[RETURN_WORD] = reinterpret_cast<uint64_t>(&fiber_main);
    fiber.stack_pointer = top;
    fiber.ended = false;
    fiber.waits_for = "its start";
    fiber.waits_at = {"", 0};
    fiber.copies.clear();
    fiber.groups.clear();
    fiber.grouped = 0;
    fiber.touches.clear();
}

void run_block() {
    for (Barrier& barrier : barriers) barrier = {};
    ended_fibers = 0;
    ready.head = ready.size = 0;
    for (Fiber& fiber : fibers) prepare(fiber);
    for (Warp& warp : warps) warp.arrived = warp.ended = 0;
    memory_begin_block();
    std::vector<Warp*> all;
    for (Warp& warp : warps) all.push_back(&warp);
    order_warps(all.data(), static_cast<int>(all.size()));  // after everything in the block before
    std::vector<int> order(warps.size());
    make_order(order.data(), static_cast<int>(order.size()));
    for (int i : order) wake(warps[static_cast<size_t>(i)], false);
    switch_to(*ready.pop());
    launch->counters->warps += warps.size();
    launch->counters->blocks += 1;
}

bool differ(const char* a, const char* b) { return a != b && strcmp(a, b) != 0; }

// The running lane is at a meeting point; true in the lane that is the last of its warp.
bool last_lane_arrives(const char* what, Site site, void* argument) {
    Fiber& fiber = self();
    Warp& warp = *fiber.warp;
    fiber.waits_for = what;
    fiber.waits_at = site;
    if (warp.ended)
        fail(site, "%s: %d lanes of the warp have ended, thread %d among them", what, warp.ended, an_ended_thread(warp));
    if (warp.arrived == 0) {
        warp.meets_at = what;
        warp.site = site;
    } else if (warp.site.line != site.line || differ(warp.meets_at, what) || differ(warp.site.file, site.file)) {
        fail(site, "the lanes of a warp part: this one is at %s, others wait at %s (%s:%d)", what, warp.meets_at,
             base_name(warp.site.file), warp.site.line);
    }
    warp.arguments[fiber.lane] = argument;
    if (++warp.arrived < LANES) return false;
    warp.arrived = 0;
    converged(warp);
    return true;
}

}  // namespace

Fiber& self() { return *static_cast<Fiber*>(current); }

const char* base_name(const char* path) {
    const char* slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

void fail(Site site, const char* format, ...) {
    Fiber& fiber = self();
    char message[4096];
    va_list list;
    va_start(list, format);
    vsnprintf(message, sizeof(message), format, list);
    va_end(list);
    snprintf(launch->error, launch->error_size, "%s:%d, block (%u, %u, %u), thread %d: %s", base_name(site.file),
             site.line, block_index.x, block_index.y, block_index.z, fiber.number, message);
    failed = true;
    switch_to(host);
    abort();
}

void meet(const char* what, Site site, void* argument, Complete complete) {
    if (last_lane_arrives(what, site, argument)) {
        Warp& warp = *self().warp;
        complete(warp.arguments);
        wake(warp, true);
    }
    sleep();
}

void meet_at_barrier(const char* what, Site site, int id, int threads) {
    int block = static_cast<int>(block_size.x);
    if (id < 0 || id > 15) fail(site, "%s: barriers are 0 to 15, not %d", what, id);
    if (threads % LANES || threads < 0 || threads > block)
        fail(site, "%s: %d threads: must be whole warps of the block's %d threads", what, threads, block);
    if (last_lane_arrives(what, site, nullptr)) {
        Barrier& barrier = barriers[id];
        if (barrier.arrived == 0) barrier.threads = threads ? threads : block;
        if (barrier.threads != (threads ? threads : block))
            fail(site, "%s: barrier %d for %d threads, but others wait there for %d threads", what, id, threads,
                 barrier.threads);
        barrier.waiting[barrier.warp_count++] = self().warp;
        barrier.arrived += LANES;
        launch->counters->warp_barriers += 1;
        if (barrier.arrived == barrier.threads) {
            order_warps(barrier.waiting, barrier.warp_count);
            // By number first, so that the order does not depend on who came last.
            std::sort(barrier.waiting, barrier.waiting + barrier.warp_count,
                      [](const Warp* a, const Warp* b) { return a->number < b->number; });
            int order[MAX_WARPS];
            make_order(order, barrier.warp_count);
            for (int i = 0; i < barrier.warp_count; ++i) wake(*barrier.waiting[order[i]], false);
            barrier.arrived = barrier.warp_count = 0;
        }
    }
    sleep();
}

}  // namespace emulator

// Runs one launch: 0, or 1 with the reason in `error`.
extern "C" __attribute__((visibility("default"))) int flatq_launch(emulator::Launch* request) {
    using namespace emulator;
    launch = request;
    failed = false;
    random_state = request->seed * 0x9e3779b97f4a7c15ull + 0x9e3779b97f4a7c15ull;
    if (random_state == 0) random_state = 1;
    grid_size = {request->grid[0], request->grid[1], request->grid[2]};
    block_size = {request->block, 1, 1};
    fibers = std::vector<Fiber>(request->block);
    warps = std::vector<Warp>(request->block / LANES);
    current = &host;

    const size_t stride = STACK_BYTES + GUARD_BYTES, all = stride * fibers.size();
    void* stacks = mmap(nullptr, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) {
        snprintf(request->error, request->error_size, "no memory for %zu stacks", fibers.size());
        return 1;
    }
    for (size_t i = 0; i < fibers.size(); ++i) {
        Fiber& fiber = fibers[i];
        fiber.number = static_cast<int>(i);
        fiber.index = {static_cast<unsigned>(i), 0, 0};
        fiber.lane = static_cast<unsigned>(i) % LANES;
        fiber.warp = &warps[i / LANES];
        fiber.warp->number = static_cast<int>(i) / LANES;
        fiber.warp->lanes[fiber.lane] = &fiber;
        fiber.stack = static_cast<unsigned char*>(stacks) + i * stride + GUARD_BYTES;
        fiber.stack_bytes = STACK_BYTES;
        mprotect(fiber.stack, STACK_BYTES, PROT_READ | PROT_WRITE);
    }
    memory_begin_launch();
    const int blocks = static_cast<int>(grid_size.x * grid_size.y * grid_size.z);
    std::vector<int> order(static_cast<size_t>(blocks));
    make_order(order.data(), blocks);
    for (int i = 0; i < blocks && !failed; ++i) {
        auto b = static_cast<unsigned>(order[static_cast<size_t>(i)]);
        block_index = {b % grid_size.x, b / grid_size.x % grid_size.y, b / (grid_size.x * grid_size.y)};
        run_block();
    }
    memory_end_launch();
    munmap(stacks, all);
    fibers.clear();
    warps.clear();
    return failed;
}
