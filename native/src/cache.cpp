#include "cache.hpp"

#include <cstring>
#include <stdexcept>

namespace hasten {
namespace {

std::uint32_t bits_of(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

float float_of(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// To nearest even; NaN stays NaN.
std::uint16_t bf16_of(float x) {
    const std::uint32_t bits = bits_of(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = bits >> 16 | 0x40;
    return static_cast<std::uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

// |x| < 2²² to the nearest whole number, half to even.
float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }

// |x| ≤ 127 and a rounding error.
std::byte int8_of(float x) { return static_cast<std::byte>(static_cast<std::int8_t>(nearest(x))); }

// |x| ≤ 448 and a rounding error, to nearest even: 4 bits of exponent (bias 7), 3 of mantissa; multiples of 2⁻⁹ below 2⁻⁶.
std::byte fp8_of(float x) {
    const std::uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff;
    const auto small = static_cast<std::uint32_t>(nearest(float_of(magnitude < bits_of(0x1p-6f) ? magnitude : 0) * 512.0f));
    const std::uint32_t large = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120u << 3);
    return static_cast<std::byte>((magnitude < bits_of(0x1p-6f) ? small : large) | (bits >> 24 & 0x80));
}

// The bits of the least float16 that is no less than x ≥ 0, from 2⁻²⁴ to 65504.
std::uint16_t half_above(float x) {
    if (x <= 0x1p-24f) return 0x0001;
    if (x >= 65504.0f) return 0x7bff;
    if (x >= 0x1p-14f) return static_cast<std::uint16_t>(((bits_of(x) + 0x1fff) >> 13) - (112u << 10));
    const float units = x * 0x1p24f;  // subnormal: whole numbers of 2⁻²⁴
    const auto whole = static_cast<std::uint16_t>(units);
    return static_cast<std::uint16_t>(whole + (static_cast<float>(whole) < units));
}

// Of a positive finite one.
float float_of_half(std::uint16_t half) {
    return half < 0x0400 ? static_cast<float>(half) * 0x1p-24f : float_of((std::uint32_t{half} << 13) + (112u << 23));
}

constexpr std::uint16_t kHalfNan = 0x7e00;

// The bits of the scale of a row whose largest element becomes `largest`; NaN where one is not finite.
std::uint16_t scale_of(const float* x, int n, float largest) {
    std::uint32_t most = 0;
    for (int i = 0; i < n; ++i) {
        const std::uint32_t magnitude = bits_of(x[i]) & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
    }
    return most >= 0x7f800000 ? kHalfNan : half_above(float_of(most) / largest);
}

template <class Round>
void put_scaled(const float* x, int n, float largest, std::byte* row, std::byte* scale, Round round) {
    const std::uint16_t half = scale_of(x, n, largest);
    std::memcpy(scale, &half, sizeof half);
    const bool finite = half != kHalfNan;  // else its scale makes NaN of every element
    const float unit = float_of_half(half);
    for (int i = 0; i < n; ++i) {
        const float ratio = x[i] / unit;  // beyond `largest` where the scale would have to be more than a float16 can be
        row[i] = finite ? round(ratio > largest ? largest : ratio < -largest ? -largest : ratio) : std::byte{0};
    }
}

void put_row(CacheFormat format, const float* x, int n, std::byte* row, std::byte* scale) {
    switch (format) {
        case CacheFormat::bf16:
            for (int i = 0; i < n; ++i) {
                const std::uint16_t bits = bf16_of(x[i]);
                std::memcpy(row + 2 * i, &bits, sizeof bits);
            }
            return;
        case CacheFormat::int8:
            return put_scaled(x, n, 127.0f, row, scale, int8_of);
        case CacheFormat::fp8:
            return put_scaled(x, n, 448.0f, row, scale, fp8_of);
    }
}

}  // namespace

CacheFormat cache_format_named(const std::string& name) {
    if (name == "bf16") return CacheFormat::bf16;
    if (name == "int8") return CacheFormat::int8;
    if (name == "fp8") return CacheFormat::fp8;
    throw std::invalid_argument("cache format is '" + name + "'; accepted: bf16, int8, fp8");
}

void append_kv(const PagedLayer& layer, const float* k, const float* v, const std::int64_t* slots, int first, int last) {
    const auto page_size = static_cast<std::size_t>(layer.page), scale = scale_bytes(layer.format);
    const std::size_t key_dim = static_cast<std::size_t>(layer.key_dim), value_dim = static_cast<std::size_t>(layer.value_dim);
    for (int row = first; row < last; ++row) {
        const auto offset = static_cast<std::size_t>(slots[row] % layer.page);
        for (int head = 0; head < layer.kv_heads; ++head) {
            std::byte* at = layer.head(slots[row] / layer.page, head);
            std::byte* key_scale = at + layer.scales_offset() + offset * scale;
            const std::size_t source = static_cast<std::size_t>(row) * static_cast<std::size_t>(layer.kv_heads) + static_cast<std::size_t>(head);
            put_row(layer.format, k + source * key_dim, layer.key_dim, at + offset * layer.key_bytes(), key_scale);
            put_row(layer.format, v + source * value_dim, layer.value_dim, at + page_size * layer.key_bytes() + offset * layer.value_bytes(),
                    key_scale + page_size * scale);
        }
    }
}

}  // namespace hasten
