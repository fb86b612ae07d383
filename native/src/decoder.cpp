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

// To nearest even; NaN stays NaN.
bf16 narrowed(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const std::uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = bits >> 16 | 0x40;
    return static_cast<bf16>((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
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

void append_kv(const PagedLayer& layer, const float* k, const float* v, const std::int64_t* slots, int first, int last) {
    const std::size_t key_width = static_cast<std::size_t>(layer.kv_heads) * layer.key_dim;
    const std::size_t value_width = static_cast<std::size_t>(layer.kv_heads) * layer.value_dim;
    for (int row = first; row < last; ++row) {
        bf16* page = layer.base + static_cast<std::size_t>(slots[row] / layer.page) * layer.page_stride;
        const std::size_t offset = static_cast<std::size_t>(slots[row] % layer.page);
        for (int head = 0; head < layer.kv_heads; ++head) {
            bf16* key = page + (static_cast<std::size_t>(head) * layer.page + offset) * layer.key_dim;
            bf16* value = page + layer.page * key_width + (static_cast<std::size_t>(head) * layer.page + offset) * layer.value_dim;
            const float* from_key = k + row * key_width + static_cast<std::size_t>(head) * layer.key_dim;
            const float* from_value = v + row * value_width + static_cast<std::size_t>(head) * layer.value_dim;
            for (int i = 0; i < layer.key_dim; ++i) key[i] = narrowed(from_key[i]);
            for (int i = 0; i < layer.value_dim; ++i) value[i] = narrowed(from_value[i]);
        }
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
