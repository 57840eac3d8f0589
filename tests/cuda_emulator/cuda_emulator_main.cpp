// The sanitizers' program: one launch, read from a file (device.py writes it), with each tensor in heap memory of its
// very size, so that AddressSanitizer's red zones begin where the tensor ends.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "cuda_emulator_runtime.h"

extern "C" int flatq_launch(emulator::Launch* request);

namespace {

constexpr size_t ALIGNMENT = 128;

template <class T>
T read(FILE* file) {
    T value;
    if (fread(&value, sizeof(value), 1, file) != 1) abort();
    return value;
}

// A tensor's memory: its bytes end where the block ends, and its address has the remainder that it had in torch.
struct Tensor {
    unsigned char* data;
    size_t bytes;
};
Tensor read_tensor(FILE* file) {
    const auto address = read<uint64_t>(file), bytes = read<uint64_t>(file);
    if (address == 0) return {nullptr, 0};
    void* block = nullptr;
    const size_t offset = address % ALIGNMENT;
    if (posix_memalign(&block, ALIGNMENT, offset + bytes ? offset + bytes : 1)) abort();
    Tensor tensor{static_cast<unsigned char*>(block) + offset, bytes};
    if (bytes && fread(tensor.data, bytes, 1, file) != 1) abort();
    return tensor;
}

}  // namespace

int main(int count, char** names) {
    if (count != 3) return 2;
    FILE* request = fopen(names[1], "rb");
    if (!request) return 2;
    emulator::Counters counters{};
    char error[8192] = "";
    emulator::Launch launch{};
    for (uint32_t& size : launch.grid) size = static_cast<uint32_t>(read<uint64_t>(request));
    launch.block = static_cast<uint32_t>(read<uint64_t>(request));
    launch.shared_bytes = static_cast<uint32_t>(read<uint64_t>(request));
    launch.order = static_cast<int32_t>(read<uint64_t>(request));
    launch.seed = read<uint64_t>(request);
    launch.counters = &counters;
    launch.error = error;
    launch.error_size = sizeof(error);

    const auto arguments = read<uint64_t>(request);
    std::vector<Tensor> tensors;
    std::vector<std::unique_ptr<uint64_t>> values;
    std::vector<void*> pointers;
    for (uint64_t i = 0; i < arguments; ++i) {
        values.push_back(std::make_unique<uint64_t>(0));
        pointers.push_back(values.back().get());
        if (read<char>(request) == 'p') {
            tensors.push_back(read_tensor(request));
            memcpy(pointers.back(), &tensors.back().data, sizeof(void*));
        } else {
            const auto bits = read<uint32_t>(request);
            memcpy(pointers.back(), &bits, sizeof(bits));
        }
    }
    fclose(request);
    launch.arguments = pointers.data();
    if (flatq_launch(&launch)) {
        fprintf(stderr, "%s\n", error);
        return 3;
    }
    FILE* answer = fopen(names[2], "wb");
    if (!answer) return 2;
    for (const Tensor& tensor : tensors)
        if (tensor.bytes && fwrite(tensor.data, tensor.bytes, 1, answer) != 1) return 2;
    return fclose(answer) ? 2 : 0;
}
