// Products with sparse weights for few rows, which expand in registers what they multiply.
#pragma once

#include "linear.hpp"

namespace hasten {

#if defined(__x86_64__)
// linear() for what these know: false, and nothing done, for anything else. The bits are those of the dense product of the same weight.
bool linear_sparse_avx2(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y, std::ptrdiff_t y_stride);
bool linear_sparse_avx512(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y, std::ptrdiff_t y_stride);
#endif

}  // namespace hasten
