// The inner loops that the roofline times, one for each instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace hasten {

// Adds up `count` 64-bit words: 64-byte aligned, a multiple of 512 of them.
struct ReadKernel {
    const char* isa;
    std::uint64_t (*sum)(const std::uint64_t* words, std::size_t count);
};

// Ones in each number format, small enough for the first-level cache: 16 KiB are 16 AMX tiles.
struct alignas(64) Operands {
    std::uint16_t bf16[8192];
    std::int8_t int8[16384];
    float f32[1024];

    Operands();
};

// Does `multiply_adds` of them on operands that are all one, so the sum of its accumulators, which it returns, is `multiply_adds` too.
struct PeakKernel {
    const char* isa;
    std::uint64_t multiply_adds;
    double (*block)(const Operands& ones);
};

// The kernels that this machine runs, best first; the last is "generic" and runs everywhere.
std::vector<ReadKernel> read_kernels();
std::vector<PeakKernel> bf16_kernels();  // without faster bf16 instructions products are taken in f32, so those kernels are the bound
std::vector<PeakKernel> int8_kernels();
std::vector<PeakKernel> f32_kernels();

}  // namespace hasten
