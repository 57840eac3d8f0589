// What accesses cost: 32-byte sectors of global memory, wavefronts of shared memory.
//
// An access of a warp is what its lanes do at one place in the source for the n-th time since they last met. Its lanes
// are put together when they meet again.
#include <algorithm>
#include <map>
#include <tuple>

#include "cuda_emulator_runtime.h"

namespace emulator {

namespace {

constexpr int BANKS = 32;

// The 4-byte words of some lanes by the bank they lie in; a word that several lanes want counts once (broadcast).
class Words {
public:
    void add(uint64_t address, int size) {
        for (uint64_t word = address / 4; word <= (address + static_cast<uint64_t>(size) - 1) / 4; ++word) {
            std::vector<uint64_t>& bank = banks_[word % BANKS];
            if (std::find(bank.begin(), bank.end(), word) != bank.end()) continue;
            bank.push_back(word);
            ++distinct_;
            degree_ = std::max(degree_, bank.size());
        }
    }
    void clear() {
        if (distinct_)
            for (auto& bank : banks_) bank.clear();
        distinct_ = degree_ = 0;
    }
    size_t distinct() const { return distinct_; }
    size_t degree() const { return degree_; }  // the greatest number of words in one bank

private:
    std::vector<uint64_t> banks_[BANKS];
    size_t distinct_ = 0, degree_ = 0;
};

// One access of a warp: the lanes that take part, in order.
struct Access32 {
    int lanes = 0;
    uint8_t lane[LANES], size[LANES];
    uint64_t address[LANES];
    void add(int number, const Touch& touch) {
        lane[lanes] = static_cast<uint8_t>(number);
        size[lanes] = touch.size;
        address[lanes++] = touch.address;
    }
};

void count_shared(const Access32& access) {
    static Words all, phase;
    // 8-byte accesses go by half-warps, 16-byte ones by quarter-warps.
    const int lanes_a_phase = access.size[0] == 16 ? 8 : access.size[0] == 8 ? 16 : 32;
    all.clear();
    for (int i = 0; i < access.lanes;) {
        phase.clear();
        const int number = access.lane[i] / lanes_a_phase;
        for (; i < access.lanes && access.lane[i] / lanes_a_phase == number; ++i) {
            phase.add(access.address[i], access.size[i]);
            all.add(access.address[i], access.size[i]);
        }
        launch->counters->wavefronts += phase.degree();
    }
    launch->counters->wavefronts_min += (all.distinct() + BANKS - 1) / BANKS;
}

void count_global(const Access32& access, bool read, bool write) {
    uint64_t sectors[LANES];
    int count = 0;
    for (int i = 0; i < access.lanes; ++i) {
        if (access.size[i] == 0) continue;
        const uint64_t sector = access.address[i] / 32;
        if (std::find(sectors, sectors + count, sector) != sectors + count) continue;
        sectors[count++] = sector;
        if (int region = region_of(access.address[i], access.size[i]); region >= 0) {
            launch->region_sectors[2 * region] += read;
            launch->region_sectors[2 * region + 1] += write;
        }
    }
    if (read) launch->counters->sectors_read += static_cast<uint64_t>(count);
    if (write) launch->counters->sectors_written += static_cast<uint64_t>(count);
}

void count_access(Access kind, const Access32& access) {
    switch (kind) {
        case Access::global_load:
        case Access::global_load_coherent:
        case Access::copy_load: return count_global(access, true, false);
        case Access::global_store: return count_global(access, false, true);
        case Access::global_atomic: return count_global(access, true, true);
        default: return count_shared(access);
    }
}

bool all_lanes_did_the_same(const Warp& warp) {
    const std::vector<Touch>& first = warp.lanes[0]->touches;
    for (int lane = 1; lane < LANES; ++lane) {
        const std::vector<Touch>& other = warp.lanes[lane]->touches;
        if (other.size() != first.size()) return false;
        for (size_t i = 0; i < first.size(); ++i)
            if (other[i].site != first[i].site || other[i].kind != first[i].kind) return false;
    }
    return true;
}

}  // namespace

void converged(Warp& warp) {
    if (!launch->count) return;
    if (all_lanes_did_the_same(warp)) {
        const std::vector<Touch>& first = warp.lanes[0]->touches;
        for (size_t i = 0; i < first.size(); ++i) {
            Access32 access;
            for (int lane = 0; lane < LANES; ++lane) access.add(lane, warp.lanes[lane]->touches[i]);
            count_access(first[i].kind, access);
        }
    } else {
        std::map<std::tuple<int, Access, int>, Access32> accesses;  // by place, kind and occurrence
        for (int lane = 0; lane < LANES; ++lane) {
            std::map<std::pair<int, Access>, int> occurrences;
            for (const Touch& touch : warp.lanes[lane]->touches)
                accesses[{touch.site, touch.kind, occurrences[{touch.site, touch.kind}]++}].add(lane, touch);
        }
        for (const auto& [key, access] : accesses) count_access(std::get<1>(key), access);
    }
    for (Fiber* lane : warp.lanes) lane->touches.clear();
}

// ldmatrix reads one 8 × 16-byte matrix at a time.
void count_matrix_rows(const MatrixArguments* const* lanes) {
    static Words words;
    for (int m = 0; m < lanes[0]->count; ++m) {
        words.clear();
        for (int row = 0; row < 8; ++row) words.add(reinterpret_cast<uint64_t>(lanes[8 * m + row]->row), 16);
        launch->counters->wavefronts += words.degree();
        launch->counters->wavefronts_min += (words.distinct() + BANKS - 1) / BANKS;
    }
}

}  // namespace emulator
