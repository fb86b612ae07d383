// Linear layers without tiles. Integers on int8 give the bits of linear_amx.cpp at every level: exact sums, then per group and channel
// fma(float(sum), scale, so far), then per row fma(so far, row scale, bias). Products of bf16 and of float32 are added one by one in k
// order with one rounding each, so the levels here agree with each other; tiles pair them, and differ in the last bits.
#include <bit>
#include <cmath>
#include <cstring>

#include "linear.hpp"
#include "linear_sparse.hpp"
#include "weight_decode.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // the headers' undefined vectors (gcc bug 105593)
#endif
#endif

namespace hasten {
namespace {

constexpr int kRowBlock = 64;  // rows that share one decoding of a panel: their activations stay in the second-level cache

HASTEN_INLINE float to_float(bf16 x) { return std::bit_cast<float>(std::uint32_t{x} << 16); }

// Sums of a panel's channels, one row of activations each.
using Floats = float (*)[kChannels];
using Exacts = std::int32_t (*)[kChannels];

// Each level adds to the sums of `rows` rows what a run of k contributes. Tiles are as PanelReader gives them.
struct Generic {
    static constexpr int kRows = 1;  // at a time; with more, gcc 12 reads rows beyond the last where it vectorizes over them

    template <int rows>
    static void add_f32(const std::byte* tiles, int k, const float* x, std::ptrdiff_t stride, Floats sums) {
        const auto* w = reinterpret_cast<const float*>(tiles);
        for (int i = 0; i < k; ++i, w += kChannels)
            for (int r = 0; r < rows; ++r)
                for (int c = 0; c < kChannels; ++c) sums[r][c] = std::fma(x[r * stride + i], w[c], sums[r][c]);
    }

    template <int rows>
    static void add_bf16(const std::byte* tiles, int k, const bf16* x, std::ptrdiff_t stride, Floats sums) {
        const auto* w = reinterpret_cast<const bf16*>(tiles);
        for (int i = 0; i < k; i += 2, w += 2 * kChannels)
            for (int r = 0; r < rows; ++r) {
                const float even = to_float(x[r * stride + i]), odd = to_float(x[r * stride + i + 1]);
                for (int c = 0; c < kChannels; ++c) sums[r][c] += even * to_float(w[2 * c]);
                for (int c = 0; c < kChannels; ++c) sums[r][c] += odd * to_float(w[2 * c + 1]);
            }
    }

    template <int rows>
    static void add_int8(const std::byte* tiles, int k, const std::int8_t* x, std::ptrdiff_t stride, Exacts sums) {
        const auto* w = reinterpret_cast<const std::int8_t*>(tiles);
        for (int i = 0; i < k; i += 4, w += 4 * kChannels)
            for (int r = 0; r < rows; ++r)
                for (int c = 0; c < kChannels; ++c) {
                    std::int32_t sum = 0;
                    for (int j = 0; j < 4; ++j) sum += x[r * stride + i + j] * w[4 * c + j];
                    sums[r][c] += sum;
                }
    }
};

#if defined(__x86_64__)

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")))

// Inlines all of a level's pieces, which have its target, through the templates between, which have none.
#define FLATTEN __attribute__((flatten))

constexpr int kAheadBytes = 4096;  // of weights, prefetched

// Four bytes of a row as an integer.
HASTEN_INLINE std::int32_t quad(const void* x) {
    std::int32_t bits;
    std::memcpy(&bits, x, sizeof bits);
    return bits;
}

struct Avx512 {
    static constexpr int kRows = 8;

    template <int rows>
    AVX512 static void add_f32(const std::byte* tiles, int k, const float* x, std::ptrdiff_t stride, Floats sums) {
        __m512 total[rows];
        for (int r = 0; r < rows; ++r) total[r] = _mm512_loadu_ps(sums[r]);
        const auto* w = reinterpret_cast<const float*>(tiles);
        for (int i = 0; i < k; ++i, w += kChannels) {
            _mm_prefetch(reinterpret_cast<const char*>(w) + kAheadBytes, _MM_HINT_T0);
            const __m512 all = _mm512_loadu_ps(w);
            for (int r = 0; r < rows; ++r) total[r] = _mm512_fmadd_ps(_mm512_set1_ps(x[r * stride + i]), all, total[r]);
        }
        for (int r = 0; r < rows; ++r) _mm512_storeu_ps(sums[r], total[r]);
    }

    template <int rows>
    AVX512 static void add_bf16(const std::byte* tiles, int k, const bf16* x, std::ptrdiff_t stride, Floats sums) {
        const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
        __m512 total[rows];
        for (int r = 0; r < rows; ++r) total[r] = _mm512_loadu_ps(sums[r]);
        for (int i = 0; i < k; i += 2, tiles += 64) {
            _mm_prefetch(reinterpret_cast<const char*>(tiles) + kAheadBytes, _MM_HINT_T0);
            const __m512i w = _mm512_loadu_si512(tiles);
            const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), odd = _mm512_castsi512_ps(_mm512_and_si512(w, upper));
            for (int r = 0; r < rows; ++r) {
                const __m512i two = _mm512_set1_epi32(quad(x + r * stride + i));
                total[r] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(two, 16)), even, total[r]);
                total[r] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(two, upper)), odd, total[r]);
            }
        }
        for (int r = 0; r < rows; ++r) _mm512_storeu_ps(sums[r], total[r]);
    }

    // The product of bytes takes one side without a sign: weights + 128, and 128 · (sum of the row) comes off at the end. It wraps and
    // does not saturate, so what is left is exact.
    template <int rows>
    AVX512 static void add_int8(const std::byte* tiles, int k, const std::int8_t* x, std::ptrdiff_t stride, Exacts sums) {
        const __m512i offset = _mm512_set1_epi8(static_cast<char>(0x80));
        __m512i total[rows], excess[rows];
        for (int r = 0; r < rows; ++r) {
            total[r] = _mm512_loadu_si512(sums[r]);
            excess[r] = _mm512_setzero_si512();
            for (int i = 0; i < k; i += 64) {
                const __mmask64 run = k - i >= 64 ? ~__mmask64{0} : (__mmask64{1} << (k - i)) - 1;
                excess[r] = _mm512_dpbusd_epi32(excess[r], offset, _mm512_maskz_loadu_epi8(run, x + r * stride + i));
            }
        }
        for (int i = 0; i < k; i += 4, tiles += 64) {
            _mm_prefetch(reinterpret_cast<const char*>(tiles) + kAheadBytes, _MM_HINT_T0);
            const __m512i w = _mm512_xor_si512(_mm512_loadu_si512(tiles), offset);
            for (int r = 0; r < rows; ++r) total[r] = _mm512_dpbusd_epi32(total[r], w, _mm512_set1_epi32(quad(x + r * stride + i)));
        }
        for (int r = 0; r < rows; ++r)
            _mm512_storeu_si512(sums[r], _mm512_sub_epi32(total[r], _mm512_set1_epi32(_mm512_reduce_add_epi32(excess[r]))));
    }
};

#endif

// body.operator()<count>(row) for all rows, as many at a time as the level takes.
template <class Level, class Body>
HASTEN_INLINE void by_rows(int count, Body body) {
    int row = 0;
    for (; row + Level::kRows <= count; row += Level::kRows) body.template operator()<Level::kRows>(row);
    for (; row < count; ++row) body.template operator()<1>(row);
}

template <class Level>
HASTEN_INLINE void linear_body(Isa isa, const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y,
                               std::ptrdiff_t y_stride) {
    const Feed feed = feed_of(weight, x);
    const Units units(weight, feed);
    const int element = element_bytes(feed), unit = units.depth / element, stretch = PanelReader::step(feed) / unit;
    alignas(64) std::byte scratch[PanelReader::kScratch];
    alignas(64) std::int32_t exact[kRowBlock][kChannels];  // of the group so far, on int8
    alignas(64) float sums[kRowBlock][kChannels];          // of the group so far, otherwise
    alignas(64) float so_far[kRowBlock][kChannels];        // of the groups before, scaled
    for (int panel = first; panel < last; ++panel) {
        const int channels = panel_channels(weight, panel);
        const float* const scales = units.groups ? panel_scales(weight, panel) : nullptr;
        for (int row = 0; row < x.count; row += kRowBlock) {
            const int rows = std::min(kRowBlock, x.count - row);
            const auto* const begin = static_cast<const std::byte*>(x.rows) + row * x.stride * element;
            const auto clear = [&](auto& of) { std::memset(of, 0, static_cast<std::size_t>(rows) * sizeof of[0]); };
            clear(exact), clear(sums), clear(so_far);
            PanelReader reader(isa, weight, panel, feed, scratch);
            for (int at = 0, group = 0; at < units.count;) {
                const int stop = std::min(at + stretch, units.count);
                const std::byte* tiles = reader.next(stretch * unit);
                while (at < stop) {
                    const int end = std::min(stop, units.groups ? (group + 1) * units.per_group : stop), k = (end - at) * unit;
                    const std::byte* const from = begin + at * units.depth;
                    if (feed == Feed::int8)
                        by_rows<Level>(rows, [&]<int count>(int r) __attribute__((always_inline)) {
                            Level::template add_int8<count>(tiles, k, reinterpret_cast<const std::int8_t*>(from) + r * x.stride, x.stride, exact + r);
                        });
                    else if (feed == Feed::bf16)
                        by_rows<Level>(rows, [&]<int count>(int r) __attribute__((always_inline)) {
                            Level::template add_bf16<count>(tiles, k, reinterpret_cast<const bf16*>(from) + r * x.stride, x.stride, sums + r);
                        });
                    else
                        by_rows<Level>(rows, [&]<int count>(int r) __attribute__((always_inline)) {
                            Level::template add_f32<count>(tiles, std::min(k, weight.in - at * unit), reinterpret_cast<const float*>(from) + r * x.stride, x.stride,
                                                           sums + r);
                        });
                    tiles += static_cast<std::ptrdiff_t>(k) * kChannels * element;
                    at = end;
                    if (units.groups && (at == (group + 1) * units.per_group || at == units.count)) {
                        for (int r = 0; r < rows; ++r)
                            for (int c = 0; c < kChannels; ++c) {
                                const float sum = feed == Feed::int8 ? static_cast<float>(exact[r][c]) : sums[r][c];
                                so_far[r][c] = std::fma(sum, scales[group * kChannels + c] * units.fold, so_far[r][c]);
                            }
                        clear(exact), clear(sums);
                        ++group;
                    }
                }
            }
            const float* const b = bias ? bias + panel * kChannels : nullptr;
            for (int r = 0; r < rows; ++r) {
                float* const to = y + (row + r) * y_stride + panel * kChannels;
                for (int c = 0; c < channels; ++c) {
                    if (feed == Feed::int8)
                        to[c] = b ? std::fma(so_far[r][c], x.scales[row + r], b[c]) : so_far[r][c] * x.scales[row + r];
                    else
                        to[c] = (units.groups ? so_far[r][c] : sums[r][c]) + (b ? b[c] : 0.0f);
                }
            }
        }
    }
}

}  // namespace

void linear_generic(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y, std::ptrdiff_t y_stride) {
    linear_body<Generic>(Isa::generic, weight, x, first, last, bias, y, y_stride);
}

#if defined(__x86_64__)

AVX512 FLATTEN void linear_avx512(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y,
                                  std::ptrdiff_t y_stride) {
    if (weight.masks && linear_sparse_avx512(weight, x, first, last, bias, y, y_stride)) return;
    linear_body<Avx512>(Isa::avx512, weight, x, first, last, bias, y, y_stride);
}

#endif

}  // namespace hasten
