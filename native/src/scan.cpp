#include "scan.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "scan_levels.hpp"

namespace hasten {

const ScanKernels& scan_kernels(Isa isa) {
#if defined(__x86_64__)
    if (isa >= Isa::avx512) return level_avx512::kScans;
    if (isa == Isa::avx2) return level_avx2::kScans;
#endif
    static_cast<void>(isa);
    return level_generic::kScans;
}

std::vector<float> decays(const std::vector<float>& a_log) {
    std::vector<float> decay(a_log.size());
    std::transform(a_log.begin(), a_log.end(), decay.begin(), [](float a) { return -std::exp(a); });
    return decay;
}

std::vector<float> turned(const std::vector<float>& matrix, int rows, int columns, int most) {
    if (matrix.size() != static_cast<std::size_t>(rows) * columns)
        throw std::invalid_argument("a weight of " + std::to_string(matrix.size()) + " numbers is not " + std::to_string(rows) + " × " + std::to_string(columns));
    std::vector<float> out;
    out.reserve(matrix.size());
    for (int first = 0; first < rows; first += most)
        for (int column = 0; column < columns; ++column)
            for (int row = first; row < std::min(first + most, rows); ++row) out.push_back(matrix[static_cast<std::size_t>(row) * columns + column]);
    return out;
}

}  // namespace hasten
