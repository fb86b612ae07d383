// Packing of the dense formats that are made at load, activations, and the choice of a level.
#include "linear.hpp"

#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "levels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // the headers' undefined vectors (gcc bug 105593)
#endif
#endif

namespace hasten {
namespace {

HASTEN_INLINE float to_float(bf16 x) { return std::bit_cast<float>(std::uint32_t{x} << 16); }

// |x| as an integer of the same order, in which a NaN is the largest.
HASTEN_INLINE std::uint32_t magnitude(float x) { return std::bit_cast<std::uint32_t>(x) & 0x7fffffff; }

// Rounds half to even and clips to ±limit. Adding 1.5 · 2²³ leaves the integer in the low bits.
HASTEN_INLINE std::int8_t rounded(float x, float limit) {
    x = x < limit ? x : limit;
    x = x > -limit ? x : -limit;
    return static_cast<std::int8_t>(std::bit_cast<std::uint32_t>(x + 0x1.8p23f) & 0xff);
}

HASTEN_INLINE void to_bf16_body(const float* x, std::ptrdiff_t x_stride, int rows, int n, int padded, bf16* y, std::ptrdiff_t y_stride) {
    for (int r = 0; r < rows; ++r, x += x_stride, y += y_stride) {
        for (int i = 0; i < n; ++i) {
            const auto bits = std::bit_cast<std::uint32_t>(x[i]);
            const std::uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40;
            y[i] = static_cast<bf16>((bits & 0x7fffffff) > 0x7f800000 ? quiet : nearest);
        }
        for (int i = n; i < padded; ++i) y[i] = 0;
    }
}

// Below this a row counts as zero: 127 / max would overflow.
constexpr float kLeastMax = 0x1p-110f;

HASTEN_INLINE void quantize_body(const float* x, std::ptrdiff_t x_stride, int rows, int n, int padded, std::int8_t* q, std::ptrdiff_t q_stride,
                                 float* scales) {
    for (int r = 0; r < rows; ++r, x += x_stride, q += q_stride) {
        std::uint32_t largest = 0;
        for (int i = 0; i < n; ++i) largest = std::max(largest, magnitude(x[i]));
        const bool zero = largest < std::bit_cast<std::uint32_t>(kLeastMax);
        const float max = std::bit_cast<float>(largest), inverse = zero ? 0.0f : 127.0f / max;
        scales[r] = zero ? 1.0f : max / 127.0f;
        for (int i = 0; i < n; ++i) q[i] = rounded(x[i] * inverse, 127.0f);
        for (int i = n; i < padded; ++i) q[i] = 0;
    }
}

HASTEN_INLINE void quantize_fixed_body(const float* x, std::ptrdiff_t x_stride, int rows, int n, int padded, float step, std::int8_t* q,
                                       std::ptrdiff_t q_stride) {
    for (int r = 0; r < rows; ++r, x += x_stride, q += q_stride) {
        for (int i = 0; i < n; ++i) q[i] = rounded(x[i] / step, 127.0f);
        for (int i = n; i < padded; ++i) q[i] = 0;
    }
}

constexpr int kRun = 32;  // k quantized at a time; no group ends inside

// The largest |w| of a row's k in [k, end).
HASTEN_INLINE float largest_body(const bf16* row, int k, int end) {
    std::uint32_t largest = 0;
    for (; k < end; ++k) largest = std::max<std::uint32_t>(largest, row[k] & 0x7fff);
    return to_float(static_cast<bf16>(largest));
}

HASTEN_INLINE void quantize_run_body(const bf16* row, int count, float scale, float limit, std::int8_t* q) {
    for (int i = 0; i < count; ++i) q[i] = rounded(to_float(row[i]) / scale, limit);
}

#if defined(__x86_64__)

#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")))

#endif

void to_bf16_generic(const float* x, std::ptrdiff_t x_stride, int rows, int n, int padded, bf16* y, std::ptrdiff_t y_stride) {
    to_bf16_body(x, x_stride, rows, n, padded, y, y_stride);
}

void quantize_generic(const float* x, std::ptrdiff_t x_stride, int rows, int n, int padded, std::int8_t* q, std::ptrdiff_t q_stride, float* scales) {
    quantize_body(x, x_stride, rows, n, padded, q, q_stride, scales);
}

void quantize_fixed_generic(const float* x, std::ptrdiff_t x_stride, int rows, int n, int padded, float step, std::int8_t* q,
                            std::ptrdiff_t q_stride) {
    quantize_fixed_body(x, x_stride, rows, n, padded, step, q, q_stride);
}

float largest_generic(const bf16* row, int k, int end) { return largest_body(row, k, end); }
void quantize_run_generic(const bf16* row, int count, float scale, float limit, std::int8_t* q) { quantize_run_body(row, count, scale, limit, q); }

#if defined(__x86_64__)

AVX2 void to_bf16_avx2(const float* x, std::ptrdiff_t x_stride, int rows, int n, int padded, bf16* y, std::ptrdiff_t y_stride) {
    to_bf16_body(x, x_stride, rows, n, padded, y, y_stride);
}

AVX512 void to_bf16_avx512(const float* x, std::ptrdiff_t x_stride, int rows, int n, int padded, bf16* y, std::ptrdiff_t y_stride) {
    to_bf16_body(x, x_stride, rows, n, padded, y, y_stride);
}

AVX2 void quantize_avx2(const float* x, std::ptrdiff_t x_stride, int rows, int n, int padded, std::int8_t* q, std::ptrdiff_t q_stride,
                        float* scales) {
    quantize_body(x, x_stride, rows, n, padded, q, q_stride, scales);
}

AVX512 void quantize_avx512(const float* x, std::ptrdiff_t x_stride, int rows, int n, int padded, std::int8_t* q, std::ptrdiff_t q_stride,
                            float* scales) {
    quantize_body(x, x_stride, rows, n, padded, q, q_stride, scales);
}

AVX2 void quantize_fixed_avx2(const float* x, std::ptrdiff_t x_stride, int rows, int n, int padded, float step, std::int8_t* q,
                              std::ptrdiff_t q_stride) {
    quantize_fixed_body(x, x_stride, rows, n, padded, step, q, q_stride);
}

AVX512 void quantize_fixed_avx512(const float* x, std::ptrdiff_t x_stride, int rows, int n, int padded, float step, std::int8_t* q,
                                  std::ptrdiff_t q_stride) {
    quantize_fixed_body(x, x_stride, rows, n, padded, step, q, q_stride);
}

AVX2 float largest_avx2(const bf16* row, int k, int end) { return largest_body(row, k, end); }
AVX2 void quantize_run_avx2(const bf16* row, int count, float scale, float limit, std::int8_t* q) {
    quantize_run_body(row, count, scale, limit, q);
}

#endif

void pack_bf16(int out, int in, const bf16* dense, int first, int last, std::byte* tiles) {
    const int depth = (in + 31) / 32;
    for (int panel = first; panel < last; ++panel)
        for (int t = 0; t < depth; ++t) {
            std::byte* const tile = tiles + (static_cast<std::ptrdiff_t>(panel) * depth + t) * kTileBytes;
            for (int c = 0; c < kChannels; ++c) {
                const int channel = panel * kChannels + c, count = channel < out ? std::min(32, in - t * 32) : 0;
                bf16 run[32] = {};
                if (count) std::memcpy(run, dense + static_cast<std::ptrdiff_t>(channel) * in + t * 32, static_cast<std::size_t>(count) * sizeof(bf16));
                for (int pair = 0; pair < 16; ++pair) std::memcpy(tile + pair * 64 + c * 4, run + 2 * pair, 4);
            }
        }
}

}  // namespace

Isa best_isa(Isa limit) {
    static const Isa best = [] {
        Isa found = Isa::generic;
        for (const Level& level : levels())
            if (refusal(level.isa).empty()) found = level.isa;
        return found;
    }();
    return std::min(best, limit);
}

std::size_t packed_tile_bytes(WeightFormat format, int out, int in) {
    const PackedLinear weight{format, out, in, 0, nullptr, nullptr};
    return static_cast<std::size_t>(weight.panels()) * static_cast<std::size_t>(weight.padded_in() / tile_depth(format)) * static_cast<std::size_t>(tile_shape(format).bytes);
}

std::size_t packed_scale_count(WeightFormat format, int out, int in, int group) {
    const PackedLinear weight{format, out, in, group, nullptr, nullptr};
    return static_cast<std::size_t>(weight.panels()) * static_cast<std::size_t>(scale_groups(weight)) * kChannels;
}

void pack_linear(WeightFormat format, int out, int in, int group, const bf16* dense, int first, int last, std::byte* tiles, float* scales) {
    if (format == WeightFormat::bf16) return pack_bf16(out, in, dense, first, last, tiles);
    if (format != WeightFormat::int8 && format != WeightFormat::int4) {
        std::vector<float> floats(static_cast<std::size_t>(kChannels) * static_cast<std::size_t>(in));
        const PackedLinear whole{format, kChannels, in, group, nullptr, nullptr};
        const TileShape tile = tile_shape(format);
        for (int panel = first; panel < last; ++panel) {  // a panel at a time, as a weight of its own
            const int channels = std::min(kChannels, out - panel * kChannels);
            const bf16* const from = dense + static_cast<std::ptrdiff_t>(panel) * kChannels * in;
            for (std::ptrdiff_t i = 0; i < static_cast<std::ptrdiff_t>(channels) * in; ++i) floats[static_cast<std::size_t>(i)] = to_float(from[i]);
            pack_linear(format, channels, in, group, floats.data(), 0, 1, tiles + static_cast<std::ptrdiff_t>(panel) * (whole.padded_in() / tile.depth) * tile.bytes,
                        scales + static_cast<std::ptrdiff_t>(panel) * scale_groups(whole) * kChannels, nullptr);
        }
        return;
    }
    auto largest = largest_generic;
    auto quantize = quantize_run_generic;
#if defined(__x86_64__)
    if (best_isa() >= Isa::avx2) {
        largest = largest_avx2;
        quantize = quantize_run_avx2;
    }
#endif
    const PackedLinear weight{format, out, in, group, tiles, scales};
    const bool nibbles = format == WeightFormat::int4;
    const float limit = nibbles ? 7.0f : 127.0f;
    const int groups = scale_groups(weight), per_scale = groups > 1 ? group : in, depth = tile_depth(format), tile_count = weight.padded_in() / depth;
    for (int panel = first; panel < last; ++panel) {
        float* const panel_scale = scales + static_cast<std::ptrdiff_t>(panel) * groups * kChannels;
        std::byte* const panel_tile = tiles + static_cast<std::ptrdiff_t>(panel) * tile_count * kTileBytes;
        for (int c = 0; c < kChannels; ++c) {
            const int channel = panel * kChannels + c;
            const bf16* const row = channel < out ? dense + static_cast<std::ptrdiff_t>(channel) * in : nullptr;
            for (int g = 0; g < groups; ++g) {
                const float scale = row ? largest(row, g * per_scale, std::min(in, (g + 1) * per_scale)) / limit : 0.0f;
                panel_scale[g * kChannels + c] = scale == 0 ? 1.0f : scale;  // not a number stays one
            }
            for (int t = 0; t < tile_count; ++t) {
                std::int8_t q[128] = {};
                if (row)
                    for (int k = t * depth; k < std::min(in, (t + 1) * depth); k += kRun)
                        quantize(row + k, std::min(kRun, in - k), panel_scale[k / per_scale * kChannels + c], limit, q + (k - t * depth));
                std::byte* const tile = panel_tile + static_cast<std::ptrdiff_t>(t) * kTileBytes + c * 4;
                if (nibbles)
                    for (int i = 0; i < 64; ++i) q[i] = static_cast<std::int8_t>((q[i] & 0xf) | (q[i + 64] & 0xf) << 4);
                for (int i = 0; i < 64; i += 4) std::memcpy(tile + i * kChannels, q + i, 4);
            }
        }
    }
}

void linear(Isa isa, const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y,
            std::ptrdiff_t y_stride) {
    if (x.count <= 0 || first >= last) return;
    switch (isa) {
#if defined(__x86_64__)
        case Isa::amx: return linear_amx(weight, x, first, last, bias, y, y_stride);
        case Isa::avx512: return linear_avx512(weight, x, first, last, bias, y, y_stride);
        case Isa::avx2: return linear_avx2(weight, x, first, last, bias, y, y_stride);
#endif
        default: return linear_generic(weight, x, first, last, bias, y, y_stride);
    }
}

void to_bf16(Isa isa, const float* x, std::ptrdiff_t x_stride, int rows, int n, int padded, bf16* y, std::ptrdiff_t y_stride) {
    switch (isa) {
#if defined(__x86_64__)
        case Isa::amx:
        case Isa::avx512: return to_bf16_avx512(x, x_stride, rows, n, padded, y, y_stride);
        case Isa::avx2: return to_bf16_avx2(x, x_stride, rows, n, padded, y, y_stride);
#endif
        default: return to_bf16_generic(x, x_stride, rows, n, padded, y, y_stride);
    }
}

void quantize_rows(Isa isa, const float* x, std::ptrdiff_t x_stride, int rows, int n, int padded, std::int8_t* q, std::ptrdiff_t q_stride,
                   float* scales) {
    switch (isa) {
#if defined(__x86_64__)
        case Isa::amx:
        case Isa::avx512: return quantize_avx512(x, x_stride, rows, n, padded, q, q_stride, scales);
        case Isa::avx2: return quantize_avx2(x, x_stride, rows, n, padded, q, q_stride, scales);
#endif
        default: return quantize_generic(x, x_stride, rows, n, padded, q, q_stride, scales);
    }
}

void quantize_fixed(Isa isa, const float* x, std::ptrdiff_t x_stride, int rows, int n, int padded, float step, std::int8_t* q,
                    std::ptrdiff_t q_stride) {
    switch (isa) {
#if defined(__x86_64__)
        case Isa::amx:
        case Isa::avx512: return quantize_fixed_avx512(x, x_stride, rows, n, padded, step, q, q_stride);
        case Isa::avx2: return quantize_fixed_avx2(x, x_stride, rows, n, padded, step, q, q_stride);
#endif
        default: return quantize_fixed_generic(x, x_stride, rows, n, padded, step, q, q_stride);
    }
}

}  // namespace hasten
