#include <cstring>

#include "decoder_levels.hpp"

namespace hasten {
namespace {

float widened(bf16 x) {
    const std::uint32_t bits = std::uint32_t{x} << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

// Calls `kernel` of the level that serves `isa`.
#if defined(__x86_64__)
#define HASTEN_AT(isa, call)            \
    switch (isa) {                      \
        case Isa::generic:              \
            return level_generic::call; \
        case Isa::avx2:                 \
            return level_avx2::call;    \
        case Isa::avx512:               \
        case Isa::amx:                  \
            return level_avx512::call;  \
    }
#else
#define HASTEN_AT(isa, call) \
    static_cast<void>(isa);  \
    return level_generic::call
#endif

}  // namespace

void embed(const bf16* table, int width, const std::int32_t* tokens, int rows, float scale, float* y) {
    for (int row = 0; row < rows; ++row, y += width) {
        const bf16* from = table + static_cast<std::size_t>(tokens[row]) * width;
        for (int i = 0; i < width; ++i) y[i] = widened(from[i]) * scale;
    }
}

void rms_norm(Isa isa, const float* x, int rows, int n, int group, const float* weight, int weight_n, float eps, float offset, float* y) {
    HASTEN_AT(isa, rms_norm(x, rows, n, group, weight, weight_n, eps, offset, y));
}

void layer_norm(Isa isa, const float* x, int rows, int n, int group, const float* weight, const float* bias, int weight_n, float eps,
                float* y) {
    HASTEN_AT(isa, layer_norm(x, rows, n, group, weight, bias, weight_n, eps, y));
}

void add(Isa isa, const float* a, const float* b, std::size_t count, float* y) { HASTEN_AT(isa, add(a, b, count, y)); }

void activate(Isa isa, Activation activation, const float* x, std::size_t count, float* y) {
    HASTEN_AT(isa, activate(activation, x, count, y));
}

void gate(Isa isa, Activation activation, const float* gate, const float* up, std::size_t count, float* y) {
    HASTEN_AT(isa, gate(activation, gate, up, count, y));
}

void gate_rows(Isa isa, Activation activation, const float* gate, const float* up, int rows, int n, float* y) {
    HASTEN_AT(isa, gate_rows(activation, gate, up, rows, n, y));
}

void clamped_swiglu(Isa isa, const float* gate, const float* up, std::size_t count, float alpha, float limit, float* y) {
    HASTEN_AT(isa, clamped_swiglu(gate, up, count, alpha, limit, y));
}

void scale(Isa isa, const float* x, std::size_t count, float factor, float* y) { HASTEN_AT(isa, scale(x, count, factor, y)); }

void clip(Isa isa, const float* x, std::size_t count, float limit, float* y) { HASTEN_AT(isa, clip(x, count, limit, y)); }

void soft_cap(Isa isa, const float* x, std::size_t count, float cap, float* y) { HASTEN_AT(isa, soft_cap(x, count, cap, y)); }

void rotate(Isa isa, const float* x, int rows, int heads, int head_dim, int start, int dims, bool interleaved, const float* cos,
            const float* sin, float* y) {
    HASTEN_AT(isa, rotate(x, rows, heads, head_dim, start, dims, interleaved, cos, sin, y));
}

}  // namespace hasten
