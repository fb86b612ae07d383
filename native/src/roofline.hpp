// What this machine can do at most: bytes read and products summed in a second.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "roofline_kernels.hpp"

namespace hasten {

struct Measured {
    double rate;
    std::string isa;
};

// The name that stands for the first kernel of a list.
inline constexpr const char* kBest = "best";

// The least that streaming_read can be asked to read with each thread.
inline constexpr std::size_t kLeastBytesPerThread = std::size_t{1} << 20;

// 1e9 bytes a second, over all threads, read from anonymous memory in huge pages: the median of `repeats` passes over `bytes`.
// Needs 1 <= threads <= allowed_threads(), bytes >= threads * kLeastBytesPerThread, repeats >= 1.
// Throws std::invalid_argument for an isa that is not in read_kernels(), std::bad_alloc where the memory cannot be had.
Measured streaming_read(std::size_t bytes, unsigned threads, unsigned repeats, const std::string& isa);

// 1e12 operations a second, over all threads, a multiply-add being two. Needs 1 <= threads <= allowed_threads(), seconds > 0.
// Throws std::invalid_argument for an isa that is not in `kernels`.
Measured peak(const std::vector<PeakKernel>& kernels, unsigned threads, double seconds, const std::string& isa);

}  // namespace hasten
