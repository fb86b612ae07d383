// Packing, activations, and linear layers without tiles. Integer formats give the bits of linear_amx.cpp at every level: exact sums,
// then per group and channel fma(float(sum), scale, so far), then per row fma(so far, row scale, bias). bf16 products are exact in
// float32 and added one by one in k order, so the levels here agree with each other; tiles pair them, and differ in the last bits.
#include "linear.hpp"

#include <bit>
#include <cmath>
#include <cstring>

#include "cpu.hpp"

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

// Exact sums of one panel and `rows` rows over a unit of k: `tile` has [depth / 4][16 channels][4], x is where the unit begins.
HASTEN_INLINE void add_unit_body(const std::int8_t* tile, int depth, const std::int8_t* x, std::int32_t* sums) {
    for (int k = 0; k < depth; k += 4)
        for (int c = 0; c < kChannels; ++c) {
            std::int32_t sum = sums[c];
            for (int i = 0; i < 4; ++i) sum += x[k + i] * tile[k * kChannels + c * 4 + i];
            sums[c] = sum;
        }
}

HASTEN_INLINE void unpack_tile_body(const std::byte* nibbles, std::int8_t* bytes) {
    for (int i = 0; i < kTileBytes; ++i) {
        const auto both = static_cast<std::uint8_t>(nibbles[i]);
        bytes[i] = static_cast<std::int8_t>(both << 4 & 0xf0);
        bytes[kTileBytes + i] = static_cast<std::int8_t>(both & 0xf0);
    }
}

HASTEN_INLINE void finish_row(const float* sums, float scale, const float* bias, int channels, float* y) {
    for (int c = 0; c < channels; ++c) y[c] = bias ? std::fma(sums[c], scale, bias[c]) : sums[c] * scale;
}

struct Generic {
    static constexpr int kRows = 2;  // at a time
    static constexpr int kRowsInteger = 2;

    static void unpack(const std::byte* nibbles, std::int8_t* bytes) { unpack_tile_body(nibbles, bytes); }

    template <int rows>
    struct Exact {
        alignas(64) std::int32_t sums[rows][kChannels];

        void clear() { std::memset(sums, 0, sizeof sums); }
        void add(const std::int8_t* tile, int depth, const std::int8_t* x, std::ptrdiff_t stride) {
            for (int r = 0; r < rows; ++r) add_unit_body(tile, depth, x + r * stride, sums[r]);
        }
        void end_group(const float* scales, float fold, float (*so_far)[kChannels]) {
            for (int r = 0; r < rows; ++r)
                for (int c = 0; c < kChannels; ++c) so_far[r][c] = std::fma(static_cast<float>(sums[r][c]), scales[c] * fold, so_far[r][c]);
        }
    };

    template <int rows>
    static void dot_bf16(const std::byte* tiles, int pairs, const bf16* x, std::ptrdiff_t stride, float (*sums)[kChannels]) {
        const auto* w = reinterpret_cast<const bf16*>(tiles);
        float total[rows][kChannels] = {};
        for (int p = 0; p < pairs; ++p, w += 2 * kChannels)
            for (int r = 0; r < rows; ++r) {
                const float even = to_float(x[r * stride + 2 * p]), odd = to_float(x[r * stride + 2 * p + 1]);
                for (int c = 0; c < kChannels; ++c) total[r][c] += even * to_float(w[2 * c]);
                for (int c = 0; c < kChannels; ++c) total[r][c] += odd * to_float(w[2 * c + 1]);
            }
        std::memcpy(sums, total, sizeof total);
    }
};

#if defined(__x86_64__)

#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")))

// Inlines all of a level's pieces, which have its target, through the templates between, which have none.
#define FLATTEN __attribute__((flatten))

// Four bytes of a row as an integer.
HASTEN_INLINE std::int32_t quad(const void* x) {
    std::int32_t bits;
    std::memcpy(&bits, x, sizeof bits);
    return bits;
}

struct Avx2 {
    static constexpr int kRows = 4;
    static constexpr int kRowsInteger = 2;

    AVX2 static void unpack(const std::byte* nibbles, std::int8_t* bytes) { unpack_tile_body(nibbles, bytes); }

    // Bytes are widened to 16 bits, whose products' pairs add up in 32 bits: the product of bytes would saturate. Each sum is two
    // neighbours until the end of a group.
    template <int rows>
    struct Exact {
        __m256i sums[rows][4];

        AVX2 void clear() {
            for (auto& row : sums)
                for (auto& sum : row) sum = _mm256_setzero_si256();
        }
        AVX2 void add(const std::int8_t* tile, int depth, const std::int8_t* x, std::ptrdiff_t stride) {
            for (int k = 0; k < depth; k += 4, tile += 4 * kChannels) {
                __m256i w[4];
                for (int i = 0; i < 4; ++i) w[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tile + 16 * i)));
                for (int r = 0; r < rows; ++r) {
                    const __m256i four = _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(quad(x + r * stride + k))));
                    for (int i = 0; i < 4; ++i) sums[r][i] = _mm256_add_epi32(sums[r][i], _mm256_madd_epi16(w[i], four));
                }
            }
        }
        AVX2 void end_group(const float* scales, float fold, float (*so_far)[kChannels]) {
            for (int r = 0; r < rows; ++r)
                for (int half = 0; half < 2; ++half) {
                    // Channels 0 1 4 5 2 3 6 7 of the half.
                    const __m256i mixed = _mm256_hadd_epi32(sums[r][2 * half], sums[r][2 * half + 1]);
                    const __m256 exact = _mm256_cvtepi32_ps(_mm256_permute4x64_epi64(mixed, 0xd8));
                    const __m256 scale = _mm256_mul_ps(_mm256_loadu_ps(scales + 8 * half), _mm256_set1_ps(fold));
                    float* const to = so_far[r] + 8 * half;
                    _mm256_storeu_ps(to, _mm256_fmadd_ps(exact, scale, _mm256_loadu_ps(to)));
                }
        }
    };

    template <int rows>
    AVX2 static void dot_bf16(const std::byte* tiles, int pairs, const bf16* x, std::ptrdiff_t stride, float (*sums)[kChannels]) {
        const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000));
        __m256 total[rows][2];
        for (auto& row : total) row[0] = row[1] = _mm256_setzero_ps();
        for (int p = 0; p < pairs; ++p, tiles += 64)
            for (int half = 0; half < 2; ++half) {
                const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tiles + 32 * half));
                const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), odd = _mm256_castsi256_ps(_mm256_and_si256(w, high));
                for (int r = 0; r < rows; ++r) {
                    const __m256i two = _mm256_set1_epi32(quad(x + r * stride + 2 * p));
                    total[r][half] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(two, 16)), even, total[r][half]);
                    total[r][half] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(two, high)), odd, total[r][half]);
                }
            }
        for (int r = 0; r < rows; ++r)
            for (int half = 0; half < 2; ++half) _mm256_storeu_ps(sums[r] + 8 * half, total[r][half]);
    }
};

struct Avx512 {
    static constexpr int kRows = 8;
    static constexpr int kRowsInteger = 8;

    AVX512 static void unpack(const std::byte* nibbles, std::int8_t* bytes) { unpack_tile_body(nibbles, bytes); }

    // The product of bytes takes one side without a sign: weights + 128, and 128 · (sum of the row) comes off at the end of a group.
    // It wraps and does not saturate, so what is left is exact.
    template <int rows>
    struct Exact {
        __m512i sums[rows], excess[rows];

        AVX512 void clear() {
            for (auto& sum : sums) sum = _mm512_setzero_si512();
            for (auto& sum : excess) sum = _mm512_setzero_si512();
        }
        AVX512 void add(const std::int8_t* tile, int depth, const std::int8_t* x, std::ptrdiff_t stride) {
            const __m512i offset = _mm512_set1_epi8(static_cast<char>(0x80));
            const __mmask64 unit = depth == 64 ? ~__mmask64{0} : (__mmask64{1} << depth) - 1;
            for (int r = 0; r < rows; ++r) excess[r] = _mm512_dpbusd_epi32(excess[r], offset, _mm512_maskz_loadu_epi8(unit, x + r * stride));
            for (int k = 0; k < depth; k += 4, tile += 4 * kChannels) {
                _mm_prefetch(reinterpret_cast<const char*>(tile) + 4 * kTileBytes, _MM_HINT_T0);
                const __m512i w = _mm512_xor_si512(_mm512_loadu_si512(tile), offset);
                for (int r = 0; r < rows; ++r) sums[r] = _mm512_dpbusd_epi32(sums[r], w, _mm512_set1_epi32(quad(x + r * stride + k)));
            }
        }
        AVX512 void end_group(const float* scales, float fold, float (*so_far)[kChannels]) {
            const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(scales), _mm512_set1_ps(fold));
            for (int r = 0; r < rows; ++r) {
                const __m512i exact = _mm512_sub_epi32(sums[r], _mm512_set1_epi32(_mm512_reduce_add_epi32(excess[r])));
                _mm512_storeu_ps(so_far[r], _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), scale, _mm512_loadu_ps(so_far[r])));
            }
        }
    };

    template <int rows>
    AVX512 static void dot_bf16(const std::byte* tiles, int pairs, const bf16* x, std::ptrdiff_t stride, float (*sums)[kChannels]) {
        const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
        __m512 total[rows];
        for (auto& row : total) row = _mm512_setzero_ps();
        for (int p = 0; p < pairs; ++p, tiles += 64) {
            _mm_prefetch(reinterpret_cast<const char*>(tiles) + 4 * kTileBytes, _MM_HINT_T0);
            const __m512i w = _mm512_loadu_si512(tiles);
            const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), odd = _mm512_castsi512_ps(_mm512_and_si512(w, high));
            for (int r = 0; r < rows; ++r) {
                const __m512i two = _mm512_set1_epi32(quad(x + r * stride + 2 * p));
                total[r] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(two, 16)), even, total[r]);
                total[r] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(two, high)), odd, total[r]);
            }
        }
        for (int r = 0; r < rows; ++r) _mm512_storeu_ps(sums[r], total[r]);
    }
};

#endif

// One panel and `rows` rows from `row` on, in a level's registers.
template <class Level, int rows>
HASTEN_INLINE void panel_integer(const PackedLinear& weight, const Units& units, const Activations& x, int row, int panel, const float* bias,
                                 float* y, std::ptrdiff_t y_stride) {
    const auto* q = static_cast<const std::int8_t*>(x.rows) + row * x.stride;
    const std::byte* const tiles = panel_tiles(weight, panel);
    const float* scales = panel_scales(weight, panel);
    const int per_tile = weight.format == WeightFormat::int4 ? 128 / units.depth : 1, channels = panel_channels(weight, panel);
    alignas(64) std::int8_t unpacked[2 * kTileBytes];
    alignas(64) float so_far[rows][kChannels] = {};
    typename Level::template Exact<rows> exact;
    exact.clear();
    for (int unit = 0, in_group = 0; unit < units.count; ++unit) {
        const std::byte* const tile = tiles + unit / per_tile * std::ptrdiff_t{kTileBytes};
        const std::int8_t* from = reinterpret_cast<const std::int8_t*>(tile);
        if (weight.format == WeightFormat::int4) {
            if (unit % per_tile == 0) Level::unpack(tile, unpacked);
            from = unpacked + unit % per_tile * units.depth * kChannels;
        }
        exact.add(from, units.depth, q + unit * units.depth, x.stride);
        if (++in_group == units.per_group || unit + 1 == units.count) {
            exact.end_group(scales, units.fold, so_far);
            exact.clear();
            scales += kChannels;
            in_group = 0;
        }
    }
    for (int r = 0; r < rows; ++r)
        finish_row(so_far[r], x.scales[row + r], bias, channels, y + (row + r) * y_stride);
}

template <class Level, int rows>
HASTEN_INLINE void panel_bf16(const PackedLinear& weight, const Activations& x, int row, int panel, const float* bias, float* y,
                              std::ptrdiff_t y_stride) {
    const auto* from = static_cast<const bf16*>(x.rows) + row * x.stride;
    const int channels = panel_channels(weight, panel);
    alignas(64) float sums[rows][kChannels];
    Level::template dot_bf16<rows>(panel_tiles(weight, panel), weight.padded_in() / 2, from, x.stride, sums);
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < channels; ++c) y[(row + r) * y_stride + c] = bias ? sums[r][c] + bias[c] : sums[r][c];
}

// A panel is read once for as many rows as fit in the registers, then again from the cache.
template <class Level>
HASTEN_INLINE void linear_body(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y,
                               std::ptrdiff_t y_stride) {
    const Units units(weight);
    for (int panel = first; panel < last; ++panel) {
        const float* const b = bias ? bias + panel * kChannels : nullptr;
        float* const to = y + panel * kChannels;
        int row = 0;
        if (weight.format == WeightFormat::bf16) {
            for (; row + Level::kRows <= x.count; row += Level::kRows) panel_bf16<Level, Level::kRows>(weight, x, row, panel, b, to, y_stride);
            for (; row < x.count; ++row) panel_bf16<Level, 1>(weight, x, row, panel, b, to, y_stride);
        } else {
            for (; row + Level::kRowsInteger <= x.count; row += Level::kRowsInteger)
                panel_integer<Level, Level::kRowsInteger>(weight, units, x, row, panel, b, to, y_stride);
            for (; row < x.count; ++row) panel_integer<Level, 1>(weight, units, x, row, panel, b, to, y_stride);
        }
    }
}

void linear_generic(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y, std::ptrdiff_t y_stride) {
    linear_body<Generic>(weight, x, first, last, bias, y, y_stride);
}

void to_bf16_generic(const float* x, std::ptrdiff_t x_stride, int rows, int n, int padded, bf16* y, std::ptrdiff_t y_stride) {
    to_bf16_body(x, x_stride, rows, n, padded, y, y_stride);
}

void quantize_generic(const float* x, std::ptrdiff_t x_stride, int rows, int n, int padded, std::int8_t* q, std::ptrdiff_t q_stride, float* scales) {
    quantize_body(x, x_stride, rows, n, padded, q, q_stride, scales);
}

float largest_generic(const bf16* row, int k, int end) { return largest_body(row, k, end); }
void quantize_run_generic(const bf16* row, int count, float scale, float limit, std::int8_t* q) { quantize_run_body(row, count, scale, limit, q); }

#if defined(__x86_64__)

AVX2 FLATTEN void linear_avx2(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y, std::ptrdiff_t y_stride) {
    linear_body<Avx2>(weight, x, first, last, bias, y, y_stride);
}

AVX512 FLATTEN void linear_avx512(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y,
                          std::ptrdiff_t y_stride) {
    linear_body<Avx512>(weight, x, first, last, bias, y, y_stride);
}

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
#if defined(__x86_64__)
    static const Isa best = [] {
        const Features& has = cpu().features;
        if (!(has.avx2 && has.fma)) return Isa::generic;
        if (!(has.avx512f && has.avx512bw && has.avx512vl && has.avx512dq && has.avx512_vnni)) return Isa::avx2;
        return has.amx_tile && has.amx_bf16 && has.amx_int8 && has.avx512_bf16 && amx_granted() ? Isa::amx : Isa::avx512;
    }();
    return std::min(best, limit);
#else
    (void)limit;
    return Isa::generic;
#endif
}

std::size_t packed_tile_bytes(WeightFormat format, int out, int in) {
    const PackedLinear weight{format, out, in, 0, nullptr, nullptr};
    return static_cast<std::size_t>(weight.panels()) * static_cast<std::size_t>(weight.padded_in() / tile_depth(format)) * kTileBytes;
}

std::size_t packed_scale_count(WeightFormat format, int out, int in, int group) {
    const PackedLinear weight{format, out, in, group, nullptr, nullptr};
    return static_cast<std::size_t>(weight.panels()) * static_cast<std::size_t>(scale_groups(weight)) * kChannels;
}

void pack_linear(WeightFormat format, int out, int in, int group, const bf16* dense, int first, int last, std::byte* tiles, float* scales) {
    if (format == WeightFormat::bf16) return pack_bf16(out, in, dense, first, last, tiles);
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

void unpack_linear(const PackedLinear& weight, float* dense) {
    const int depth = tile_depth(weight.format), groups = scale_groups(weight), per_scale = groups > 1 ? weight.group : weight.in;
    for (int channel = 0; channel < weight.out; ++channel) {
        const int panel = channel / kChannels, c = channel % kChannels;
        const std::byte* const tiles = panel_tiles(weight, panel);
        for (int k = 0; k < weight.in; ++k) {
            const std::byte* const tile = tiles + static_cast<std::ptrdiff_t>(k / depth) * kTileBytes;
            const int at = k % depth;
            float& value = dense[static_cast<std::ptrdiff_t>(channel) * weight.in + k];
            if (weight.format == WeightFormat::bf16) {
                bf16 bits;
                std::memcpy(&bits, tile + at / 2 * 64 + c * 4 + at % 2 * 2, sizeof bits);
                value = to_float(bits);
                continue;
            }
            const int in_tile = at % 64;
            int q = static_cast<std::int8_t>(tile[in_tile / 4 * 64 + c * 4 + in_tile % 4]);
            if (weight.format == WeightFormat::int4) q = static_cast<std::int8_t>(at < 64 ? q << 4 : q & 0xf0) / 16;
            value = static_cast<float>(q) * panel_scales(weight, panel)[k / per_scale * kChannels + c];
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

}  // namespace hasten
