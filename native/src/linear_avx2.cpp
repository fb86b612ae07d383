// Linear layers at AVX2, which has neither tiles nor products of bytes that hold their sums. Rows of activations are widened a stretch of
// k at a time, for several panels; weights are widened in registers, for up to five rows. The blocking is that of Goto & van de Geijn 2008.
// The order of sums is written at linear_levels.cpp: it does not depend on how rows and panels are blocked.
#include <algorithm>
#include <cstring>
#include <optional>

#include "linear.hpp"
#include "linear_sparse.hpp"
#include "weight_decode.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // the headers' undefined vectors (gcc bug 105593)
#endif

#define AVX2 __attribute__((target("avx2,fma")))
#define UNROLLED _Pragma("GCC unroll 8")  // early, or sums in arrays would go through memory
#define FOUR_TIMES _Pragma("GCC unroll 4")  // a processor that another hardware thread shares has few instructions to spare

namespace hasten {
namespace {

constexpr int kRows = 5;           // of a register block: 5 × 16 sums take 10 registers of 16; with 6, gcc 12 spills
constexpr int kNibbleRows = 4;     // the same of nibbles; with 5, gcc 12 keeps sums in memory
constexpr int kBlock = 50;         // rows that share a decoding of weights; their widened stretch stays in the second-level cache
constexpr int kPanels = 4;         // panels that share a widening of activations
constexpr int kInRegisters = 8;    // rows up to which taking weights apart in registers for each block is less than once for all
constexpr int kFew = 4;            // up to so many rows memory is the limit: a panel at a time is read in one run
constexpr int kAheadBytes = 4096;  // of weights, prefetched

template <class Sum>
using Sums = Sum (*)[kChannels];

AVX2 inline __m256i words(const std::byte* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
AVX2 inline void ahead(const std::byte* at) { _mm_prefetch(reinterpret_cast<const char*>(at) + kAheadBytes, _MM_HINT_T0); }
AVX2 inline __m256i broadcast(const void* at) {
    std::int32_t bits;
    std::memcpy(&bits, at, sizeof bits);
    return _mm256_set1_epi32(bits);
}

AVX2 inline __m256 load(const float* at) { return _mm256_loadu_ps(at); }
AVX2 inline __m256i load(const std::int32_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
AVX2 inline void store(float* at, __m256 value) { _mm256_storeu_ps(at, value); }
AVX2 inline void store(std::int32_t* at, __m256i value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), value); }

template <int rows, class Sum, class Vector>
AVX2 inline void load_sums(Vector (&total)[rows][2], Sums<Sum> sums) {
    UNROLLED for (int r = 0; r < rows; ++r)
        UNROLLED for (int half = 0; half < 2; ++half) total[r][half] = load(sums[r] + 8 * half);
}
template <int rows, class Sum, class Vector>
AVX2 inline void store_sums(const Vector (&total)[rows][2], Sums<Sum> sums) {
    UNROLLED for (int r = 0; r < rows; ++r)
        UNROLLED for (int half = 0; half < 2; ++half) store(sums[r] + 8 * half, total[r][half]);
}

// What a product multiplies: X, activations as widened; Sum, what sums are; kStretch, k widened at a time; widen(), k of one row; add(),
// what `k` of some rows contribute to their sums, with weights as PanelReader gives them, as expand() makes them (W), or, where there is
// nothing to decode them in, as they lie.

struct F32 {
    using X = float;
    using Sum = float;
    static constexpr Feed kFeed = Feed::f32;
    static constexpr int kStretch = 256;

    AVX2 static void widen(const void* row, int at, int k, X* to) { std::memcpy(to, static_cast<const float*>(row) + at, static_cast<std::size_t>(k) * sizeof(X)); }

    template <int rows>
    AVX2 static void add(const std::byte* w, int k, const X* x, std::ptrdiff_t stride, Sums<Sum> sums) {
        __m256 total[rows][2];
        load_sums<rows, Sum>(total, sums);
        for (int i = 0; i < k; ++i, w += 64) {
            ahead(w);
            const __m256 low = _mm256_castsi256_ps(words(w)), high = _mm256_castsi256_ps(words(w + 32));
            UNROLLED for (int r = 0; r < rows; ++r) {
                const __m256 each = _mm256_broadcast_ss(x + r * stride + i);
                total[r][0] = _mm256_fmadd_ps(each, low, total[r][0]);
                total[r][1] = _mm256_fmadd_ps(each, high, total[r][1]);
            }
        }
        store_sums<rows, Sum>(total, sums);
    }
};

struct Bf16 {
    using X = float;
    using Sum = float;
    static constexpr Feed kFeed = Feed::bf16;
    static constexpr int kStretch = 256;

    AVX2 static void widen(const void* row, int at, int k, X* to) {
        const bf16* const from = static_cast<const bf16*>(row) + at;
        for (int i = 0; i < k; i += 8) {
            const __m256i eight = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
            store(to + i, _mm256_castsi256_ps(_mm256_slli_epi32(eight, 16)));
        }
    }

    template <int rows>
    AVX2 static void add(const std::byte* w, int k, const X* x, std::ptrdiff_t stride, Sums<Sum> sums) {
        const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000));
        __m256 total[rows][2];
        load_sums<rows, Sum>(total, sums);
        FOUR_TIMES for (int i = 0; i < k; i += 2, w += 64) {
            ahead(w);
            const __m256 even[2] = {_mm256_castsi256_ps(_mm256_slli_epi32(words(w), 16)), _mm256_castsi256_ps(_mm256_slli_epi32(words(w + 32), 16))};
            UNROLLED for (int r = 0; r < rows; ++r)
                UNROLLED for (int half = 0; half < 2; ++half)
                    total[r][half] = _mm256_fmadd_ps(_mm256_broadcast_ss(x + r * stride + i), even[half], total[r][half]);
            const __m256 odd[2] = {_mm256_castsi256_ps(_mm256_and_si256(words(w), upper)), _mm256_castsi256_ps(_mm256_and_si256(words(w + 32), upper))};
            UNROLLED for (int r = 0; r < rows; ++r)
                UNROLLED for (int half = 0; half < 2; ++half)
                    total[r][half] = _mm256_fmadd_ps(_mm256_broadcast_ss(x + r * stride + i + 1), odd[half], total[r][half]);
        }
        store_sums<rows, Sum>(total, sums);
    }
};

// Bytes with activations in bf16, widened in registers.
struct Int8Bf16 {
    using X = float;
    using Sum = float;
    static constexpr Feed kFeed = Feed::bf16;
    static constexpr int kStretch = 256;

    AVX2 static void widen(const void* row, int at, int k, X* to) { Bf16::widen(row, at, k, to); }

    // `at` is where in the panel the k begin.
    template <int rows>
    AVX2 static void add(const std::byte* panel, int at, int k, const X* x, std::ptrdiff_t stride, Sums<Sum> sums) {
        const std::byte* w = panel + static_cast<std::ptrdiff_t>(at) * kChannels;
        __m256 total[rows][2];
        load_sums<rows, Sum>(total, sums);
        for (int i = 0; i < k; i += 4, w += 64) {
            ahead(w);
            add_one<rows, 0>(w, x + i, stride, total);
            add_one<rows, 1>(w, x + i + 1, stride, total);
            add_one<rows, 2>(w, x + i + 2, stride, total);
            add_one<rows, 3>(w, x + i + 3, stride, total);
        }
        store_sums<rows, Sum>(total, sums);
    }

    // One float32 of each channel and k.
    AVX2 static void expand(const std::byte* panel, int at, int k, float* to) {
        const std::byte* w = panel + static_cast<std::ptrdiff_t>(at) * kChannels;
        for (int i = 0; i < k; i += 4, w += 64, to += 4 * kChannels) {
            ahead(w);
            UNROLLED for (int half = 0; half < 2; ++half) {
                const std::byte* const from = w + 32 * half;
                float* const its = to + 8 * half;
                store(its, widened<0>(from)), store(its + kChannels, widened<1>(from)), store(its + 2 * kChannels, widened<2>(from)), store(its + 3 * kChannels, widened<3>(from));
            }
        }
    }

   private:
    // Byte `place` of each channel's four.
    template <int place>
    AVX2 static __m256 widened(const std::byte* w) {
        return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words(w), 24 - 8 * place), 24));
    }

    template <int rows, int place>
    AVX2 static void add_one(const std::byte* w, const X* x, std::ptrdiff_t stride, __m256 (&total)[rows][2]) {
        const __m256 q[2] = {widened<place>(w), widened<place>(w + 32)};
        UNROLLED for (int r = 0; r < rows; ++r)
            UNROLLED for (int half = 0; half < 2; ++half) total[r][half] = _mm256_fmadd_ps(_mm256_broadcast_ss(x + r * stride), q[half], total[r][half]);
    }
};

// Nibbles the same way.
struct Int4Bf16 {
    using X = float;
    using Sum = float;
    static constexpr Feed kFeed = Feed::bf16;
    static constexpr int kStretch = 256;
    static constexpr int kUnit = 32;  // k

    AVX2 static void widen(const void* row, int at, int k, X* to) { Bf16::widen(row, at, k, to); }

    // `at` is where in the panel the k begin.
    template <int rows>
    AVX2 static void add(const std::byte* panel, int at, int k, const X* x, std::ptrdiff_t stride, Sums<Sum> sums) {
        __m256 total[rows][2];
        load_sums<rows, Sum>(total, sums);
        for (int i = 0; i < k; i += kUnit) {
            const int unit = (at + i) / kUnit;
            const std::byte* const w = panel + unit / 4 * kTileBytes + unit % 2 * (kTileBytes / 2);
            if (unit & 2)
                add_unit<rows, 4>(w, x + i, stride, total);
            else
                add_unit<rows, 0>(w, x + i, stride, total);
        }
        store_sums<rows, Sum>(total, sums);
    }

    // One float32 of each channel and k.
    AVX2 static void expand(const std::byte* panel, int at, int k, float* to) {
        for (int i = 0; i < k; i += kUnit, to += kUnit * kChannels) {
            const int unit = (at + i) / kUnit;
            const std::byte* const w = panel + unit / 4 * kTileBytes + unit % 2 * (kTileBytes / 2);
            if (unit & 2)
                expand_unit<4>(w, to);
            else
                expand_unit<0>(w, to);
        }
    }

   private:
    template <int rows, int shift>
    AVX2 static void add_unit(const std::byte* w, const X* x, std::ptrdiff_t stride, __m256 (&total)[rows][2]) {
        for (int i = 0; i < kUnit; i += 4, w += 64) {
            if (shift == 0) ahead(w);
            add_one<rows, shift>(w, x + i, stride, total);
            add_one<rows, shift + 8>(w, x + i + 1, stride, total);
            add_one<rows, shift + 16>(w, x + i + 2, stride, total);
            add_one<rows, shift + 24>(w, x + i + 3, stride, total);
        }
    }

    template <int shift>
    AVX2 static void expand_unit(const std::byte* w, float* to) {
        for (int i = 0; i < kUnit; i += 4, w += 64, to += 4 * kChannels) {
            if (shift == 0) ahead(w);
            UNROLLED for (int half = 0; half < 2; ++half) {
                const std::byte* const from = w + 32 * half;
                float* const its = to + 8 * half;
                store(its, widened<shift>(from)), store(its + kChannels, widened<shift + 8>(from));
                store(its + 2 * kChannels, widened<shift + 16>(from)), store(its + 3 * kChannels, widened<shift + 24>(from));
            }
        }
    }

    // The nibble from bit `place` of each channel's.
    template <int place>
    AVX2 static __m256 widened(const std::byte* w) {
        return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words(w), 28 - place), 28));
    }

    template <int rows, int place>
    AVX2 static void add_one(const std::byte* w, const X* x, std::ptrdiff_t stride, __m256 (&total)[rows][2]) {
        const __m256 q[2] = {widened<place>(w), widened<place>(w + 32)};
        UNROLLED for (int r = 0; r < rows; ++r)
            UNROLLED for (int half = 0; half < 2; ++half) total[r][half] = _mm256_fmadd_ps(_mm256_broadcast_ss(x + r * stride), q[half], total[r][half]);
    }
};

// The products of Weight, for more rows: a stretch of weights is expanded to float32 once.
template <class Weight>
struct Expanded {
    using X = float;
    using W = float;
    using Sum = float;
    static constexpr Feed kFeed = Feed::bf16;
    static constexpr int kStretch = Weight::kStretch;

    AVX2 static void widen(const void* row, int at, int k, X* to) { Bf16::widen(row, at, k, to); }
    AVX2 static void expand(const std::byte* panel, int at, int k, float* to) { Weight::expand(panel, at, k, to); }

    template <int rows>
    AVX2 static void add(const std::byte* w, int k, const X* x, std::ptrdiff_t stride, Sums<Sum> sums) { F32::add<rows>(w, k, x, stride, sums); }
};

// |w| · (x with the sign of w): one side of the product of bytes has no sign, and two products, 2 · 128 · 127 as no x is -128, hold in the
// 16 bits that they are added in.
struct Int8 {
    using X = std::int8_t;
    using Sum = std::int32_t;
    static constexpr Feed kFeed = Feed::int8;
    static constexpr int kStretch = 256;

    AVX2 static void widen(const void* row, int at, int k, X* to) { std::memcpy(to, static_cast<const std::int8_t*>(row) + at, static_cast<std::size_t>(k)); }

    template <int rows>
    AVX2 static void add(const std::byte* w, int k, const X* x, std::ptrdiff_t stride, Sums<Sum> sums) {
        const __m256i one = _mm256_set1_epi16(1);
        __m256i total[rows][2];
        load_sums<rows, Sum>(total, sums);
        FOUR_TIMES for (int i = 0; i < k; i += 4, w += 64) {
            ahead(w);
            const __m256i q[2] = {words(w), words(w + 32)}, size[2] = {_mm256_abs_epi8(q[0]), _mm256_abs_epi8(q[1])};
            UNROLLED for (int r = 0; r < rows; ++r) {
                const __m256i four = broadcast(x + r * stride + i);
                UNROLLED for (int half = 0; half < 2; ++half)
                    total[r][half] = _mm256_add_epi32(total[r][half], _mm256_madd_epi16(_mm256_maddubs_epi16(size[half], _mm256_sign_epi8(four, q[half])), one));
            }
        }
        store_sums<rows, Sum>(total, sums);
    }
};

// Nibbles as they are stored, q + 8: without a sign, their products with bytes hold in 16 bits over 32 k (8 · 2 · 15 · 128 < 2¹⁵). What
// is too much, (8 + zero) · the sum of the row, comes off once a group.
struct Int4 {
    using X = std::int8_t;
    using Sum = std::int32_t;
    static constexpr Feed kFeed = Feed::int8;
    static constexpr int kStretch = 1024;
    static constexpr int kUnit = 32;  // k

    AVX2 static void widen(const void* row, int at, int k, X* to) { std::memcpy(to, static_cast<const std::int8_t*>(row) + at, static_cast<std::size_t>(k)); }

    // Σ x of k of one row.
    AVX2 static std::int32_t sum(const X* x, int k) {
        const __m256i ones = _mm256_set1_epi8(1), one = _mm256_set1_epi16(1);
        __m256i total = _mm256_setzero_si256();
        for (int i = 0; i < k; i += kUnit)
            total = _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_maddubs_epi16(ones, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i))), one));
        __m128i four = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
        four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
    }

    // `at` is where in the panel the k begin.
    template <int rows>
    AVX2 static void add(const std::byte* panel, int at, int k, const X* x, std::ptrdiff_t stride, Sums<Sum> sums) {
        for (int i = 0; i < k;) {
            const int unit = (at + i) / kUnit;
            const std::byte* const w = panel + unit / 4 * kTileBytes + unit % 2 * (kTileBytes / 2);
            if constexpr (rows <= 2)  // registers for both nibbles' sums
                if (unit % 4 == 0 && k - i >= 4 * kUnit) {
                    add_tile<rows>(w, x + i, stride, sums);
                    i += 4 * kUnit;
                    continue;
                }
            if (unit & 2)
                add_unit<rows, 4>(w, x + i, stride, sums);
            else
                add_unit<rows, 0>(w, x + i, stride, sums);
            i += kUnit;
        }
    }

   private:
    // All 128 k of a tile: each byte is taken apart once.
    template <int rows>
    AVX2 static void add_tile(const std::byte* w, const X* x, std::ptrdiff_t stride, Sums<Sum> sums) {
        const __m256i low = _mm256_set1_epi8(0x0f), eights = _mm256_set1_epi8(static_cast<char>(0x88)), one = _mm256_set1_epi16(1);
        __m256i total[rows][2];
        load_sums<rows, Sum>(total, sums);
        for (int unit = 0; unit < 2; ++unit, x += kUnit) {
            __m256i pairs[rows][2][2];  // by half of the channels and nibble
            UNROLLED for (int r = 0; r < rows; ++r)
                UNROLLED for (int i = 0; i < 4; ++i) pairs[r][i / 2][i % 2] = _mm256_setzero_si256();
            FOUR_TIMES for (int i = 0; i < kUnit; i += 4, w += 64) {
                ahead(w);
                UNROLLED for (int half = 0; half < 2; ++half) {
                    const __m256i both = _mm256_xor_si256(words(w + 32 * half), eights);
                    const __m256i first = _mm256_and_si256(both, low), second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
                    UNROLLED for (int r = 0; r < rows; ++r) {
                        pairs[r][half][0] = _mm256_add_epi16(pairs[r][half][0], _mm256_maddubs_epi16(first, broadcast(x + r * stride + i)));
                        pairs[r][half][1] = _mm256_add_epi16(pairs[r][half][1], _mm256_maddubs_epi16(second, broadcast(x + r * stride + 2 * kUnit + i)));
                    }
                }
            }
            UNROLLED for (int r = 0; r < rows; ++r)
                UNROLLED for (int half = 0; half < 2; ++half)
                    UNROLLED for (int nibble = 0; nibble < 2; ++nibble)
                        total[r][half] = _mm256_add_epi32(total[r][half], _mm256_madd_epi16(pairs[r][half][nibble], one));
        }
        store_sums<rows, Sum>(total, sums);
    }

    template <int rows, int shift>
    AVX2 static void add_unit(const std::byte* w, const X* x, std::ptrdiff_t stride, Sums<Sum> sums) {
        const __m256i low = _mm256_set1_epi8(0x0f), eight = _mm256_set1_epi8(0x08), one = _mm256_set1_epi16(1);
        __m256i total[rows][2];
        for (auto& row : total) row[0] = row[1] = _mm256_setzero_si256();
        FOUR_TIMES for (int i = 0; i < kUnit; i += 4, w += 64) {
            if (shift == 0) ahead(w);
            __m256i q[2];
            UNROLLED for (int half = 0; half < 2; ++half) q[half] = _mm256_xor_si256(_mm256_and_si256(_mm256_srli_epi16(words(w + 32 * half), shift), low), eight);
            UNROLLED for (int r = 0; r < rows; ++r) {
                const __m256i four = broadcast(x + r * stride + i);
                UNROLLED for (int half = 0; half < 2; ++half) total[r][half] = _mm256_add_epi16(total[r][half], _mm256_maddubs_epi16(q[half], four));
            }
        }
        UNROLLED for (int r = 0; r < rows; ++r)
            UNROLLED for (int half = 0; half < 2; ++half)
                store(sums[r] + 8 * half, _mm256_add_epi32(load(sums[r] + 8 * half), _mm256_madd_epi16(total[r][half], one)));
    }
};

// The same for more rows: a stretch of nibbles is taken apart once, to bytes of q + 8.
struct Int4Expanded {
    using X = std::int8_t;
    using W = std::uint8_t;
    using Sum = std::int32_t;
    static constexpr Feed kFeed = Feed::int8;
    static constexpr int kStretch = 256;

    AVX2 static void widen(const void* row, int at, int k, X* to) { Int4::widen(row, at, k, to); }
    AVX2 static std::int32_t sum(const X* x, int k) { return Int4::sum(x, k); }

    // Quadruples of k for each channel, as bytes lie.
    AVX2 static void expand(const std::byte* panel, int at, int k, W* to) {
        const __m256i low = _mm256_set1_epi8(0x0f), eight = _mm256_set1_epi8(0x08);
        for (int i = 0; i < k; i += Int4::kUnit) {
            const int unit = (at + i) / Int4::kUnit;
            const std::byte* const w = panel + unit / 4 * kTileBytes + unit % 2 * (kTileBytes / 2);
            for (int j = 0; j < kTileBytes / 2; j += 32, to += 32) {
                const __m256i both = words(w + j), nibbles = _mm256_and_si256(unit & 2 ? _mm256_srli_epi16(both, 4) : both, low);
                if (!(unit & 2)) ahead(w + j);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_xor_si256(nibbles, eight));
            }
        }
    }

    template <int rows>
    AVX2 static void add(const std::byte* w, int k, const X* x, std::ptrdiff_t stride, Sums<Sum> sums) {
        const __m256i one = _mm256_set1_epi16(1);
        for (int unit = 0; unit < k; unit += Int4::kUnit, x += Int4::kUnit) {
            __m256i total[rows][2];
            UNROLLED for (int r = 0; r < rows; ++r) total[r][0] = total[r][1] = _mm256_setzero_si256();
            FOUR_TIMES for (int i = 0; i < Int4::kUnit; i += 4, w += 64) {
                const __m256i q[2] = {words(w), words(w + 32)};
                UNROLLED for (int r = 0; r < rows; ++r) {
                    const __m256i four = broadcast(x + r * stride + i);
                    UNROLLED for (int half = 0; half < 2; ++half) total[r][half] = _mm256_add_epi16(total[r][half], _mm256_maddubs_epi16(q[half], four));
                }
            }
            UNROLLED for (int r = 0; r < rows; ++r)
                UNROLLED for (int half = 0; half < 2; ++half)
                    store(sums[r] + 8 * half, _mm256_add_epi32(load(sums[r] + 8 * half), _mm256_madd_epi16(total[r][half], one)));
        }
    }
};

// Places in a codebook, looked up in registers; the product is Int8's.
struct Lut4 {
    using X = std::int8_t;
    using Sum = std::int32_t;
    static constexpr Feed kFeed = Feed::int8;
    static constexpr int kStretch = 1024;
    static constexpr int kUnit = 32;  // k

    AVX2 static void widen(const void* row, int at, int k, X* to) { Int4::widen(row, at, k, to); }

    // `at` is where in the panel the k begin.
    template <int rows>
    AVX2 static void add(const std::int8_t* codebook, const std::byte* panel, int at, int k, const X* x, std::ptrdiff_t stride, Sums<Sum> sums) {
        const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook)));
        for (int i = 0; i < k;) {
            const int unit = (at + i) / kUnit;
            const std::byte* const w = panel + unit / 4 * kTileBytes + unit % 2 * (kTileBytes / 2);
            if constexpr (rows <= 2)
                if (unit % 4 == 0 && k - i >= 4 * kUnit) {
                    add_tile<rows>(table, w, x + i, stride, sums);
                    i += 4 * kUnit;
                    continue;
                }
            if (unit & 2)
                add_unit<rows, 4>(table, w, x + i, stride, sums);
            else
                add_unit<rows, 0>(table, w, x + i, stride, sums);
            i += kUnit;
        }
    }

   private:
    // Four k of eight channels, with the numbers `q`.
    AVX2 static __m256i product(__m256i q, const X* x) {
        return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(broadcast(x), q)), _mm256_set1_epi16(1));
    }

    // All 128 k of a tile: each byte is taken apart once.
    template <int rows>
    AVX2 static void add_tile(__m256i table, const std::byte* w, const X* x, std::ptrdiff_t stride, Sums<Sum> sums) {
        const __m256i low = _mm256_set1_epi8(0x0f);
        __m256i total[rows][2];
        load_sums<rows, Sum>(total, sums);
        for (int unit = 0; unit < 2; ++unit, x += kUnit)
            FOUR_TIMES for (int i = 0; i < kUnit; i += 4, w += 64) {
                ahead(w);
                UNROLLED for (int half = 0; half < 2; ++half) {
                    const __m256i both = words(w + 32 * half);
                    const __m256i first = _mm256_shuffle_epi8(table, _mm256_and_si256(both, low));
                    const __m256i second = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(both, 4), low));
                    UNROLLED for (int r = 0; r < rows; ++r) {
                        const X* const from = x + r * stride + i;
                        total[r][half] = _mm256_add_epi32(total[r][half], _mm256_add_epi32(product(first, from), product(second, from + 2 * kUnit)));
                    }
                }
            }
        store_sums<rows, Sum>(total, sums);
    }

    template <int rows, int shift>
    AVX2 static void add_unit(__m256i table, const std::byte* w, const X* x, std::ptrdiff_t stride, Sums<Sum> sums) {
        const __m256i low = _mm256_set1_epi8(0x0f);
        __m256i total[rows][2];
        load_sums<rows, Sum>(total, sums);
        FOUR_TIMES for (int i = 0; i < kUnit; i += 4, w += 64) {
            if (shift == 0) ahead(w);
            UNROLLED for (int half = 0; half < 2; ++half) {
                const __m256i q = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(words(w + 32 * half), shift), low));
                UNROLLED for (int r = 0; r < rows; ++r) total[r][half] = _mm256_add_epi32(total[r][half], product(q, x + r * stride + i));
            }
        }
        store_sums<rows, Sum>(total, sums);
    }
};

// body.operator()<count>(row) for all rows, in blocks as even as can be.
template <int most, class Body>
AVX2 inline void by_rows(int rows, const Body& body) {
    const int blocks = (rows + most - 1) / most;
    for (int block = 0, row = 0; block < blocks; ++block) {
        const int end = rows * (block + 1) / blocks;
        switch (end - row) {
            case 1: body.template operator()<1>(row); break;
            case 2: body.template operator()<2>(row); break;
            case 3: body.template operator()<3>(row); break;
            case 4: body.template operator()<4>(row); break;
            default: body.template operator()<most>(row);
        }
        row = end;
    }
}

// Activations widened: `rows` rows from `row`, k from `begin` to `end`.
template <class Product>
struct Widened {
    static constexpr int kRoom = kBlock * Product::kStretch;
    int row = 0, rows = 0, begin = 0, end = 0;
    alignas(64) typename Product::X x[kRoom];
    std::int32_t sums[kRoom / Int4::kUnit];  // of Int4: Σ x of a part of a group, where its first unit is

    const typename Product::X* at(int r, int k) const { return x + r * (end - begin) + (k - begin); }
    std::int32_t* sum(int k) { return sums + (k - begin) / Int4::kUnit * rows; }
    const std::int32_t* sum(int k) const { return sums + (k - begin) / Int4::kUnit * rows; }
};

// What decodes a panel's tiles, where they are not multiplied as they lie.
template <class Product>
struct PanelTiles {
    std::optional<PanelReader> reader;
    alignas(64) std::byte scratch[PanelReader::kScratch];
};
template <class Product>
    requires requires { typename Product::W; }
struct PanelTiles<Product> {
    alignas(64) typename Product::W expanded[Product::kStretch * kChannels];
};
template <>
struct PanelTiles<Int4> {};
template <>
struct PanelTiles<Lut4> {};
template <>
struct PanelTiles<Int8Bf16> {};
template <>
struct PanelTiles<Int4Bf16> {};

// The sums of one panel with a block of rows.
template <class Product>
struct PanelSums : PanelTiles<Product> {
    alignas(64) typename Product::Sum group[kBlock][kChannels];  // of the group so far
    alignas(64) float total[kBlock][kChannels];                  // of the groups before, scaled
};

// total = fma(group sum, scale, total); the group begins anew.
template <class Sum>
AVX2 void fold(Sums<Sum> group, Sums<float> total, int rows, const float* scales, float factor) {
    const __m256 by[2] = {_mm256_mul_ps(load(scales), _mm256_set1_ps(factor)), _mm256_mul_ps(load(scales + 8), _mm256_set1_ps(factor))};
    for (int r = 0; r < rows; ++r)
        UNROLLED for (int half = 0; half < 2; ++half) {
            __m256 sum;
            if constexpr (std::is_same_v<Sum, float>)
                sum = load(group[r] + 8 * half);
            else
                sum = _mm256_cvtepi32_ps(load(group[r] + 8 * half));
            store(total[r] + 8 * half, _mm256_fmadd_ps(sum, by[half], load(total[r] + 8 * half)));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(group[r] + 8 * half), _mm256_setzero_si256());
        }
}

// What nibbles that lie as q + 8 have too much in a group, for each row's sum of activations: 8 + zero.
struct Excess {
    __m256i by[2];

    AVX2 explicit Excess(const std::int8_t* zeros) {
        UNROLLED for (int half = 0; half < 2; ++half) {
            by[half] = _mm256_set1_epi32(8);
            if (zeros) by[half] = _mm256_add_epi32(by[half], _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros + 8 * half))));
        }
    }
    AVX2 __m256i off(__m256i group, int half, std::int32_t sum) const { return _mm256_sub_epi32(group, _mm256_mullo_epi32(by[half], _mm256_set1_epi32(sum))); }
};

// group −= excess · sums, row by row.
AVX2 void take_off(Sums<std::int32_t> group, int rows, const Excess& excess, const std::int32_t* sums) {
    for (int r = 0; r < rows; ++r)
        UNROLLED for (int half = 0; half < 2; ++half) store(group[r] + 8 * half, excess.off(load(group[r] + 8 * half), half, sums[r]));
}

// Both in one: total = fma(group − excess · sums, scale, total); the group begins anew.
AVX2 void take_off_and_fold(Sums<std::int32_t> group, Sums<float> total, int rows, const Excess& excess, const std::int32_t* sums, const float* scales) {
    const __m256 by[2] = {load(scales), load(scales + 8)};
    for (int r = 0; r < rows; ++r)
        UNROLLED for (int half = 0; half < 2; ++half) {
            const __m256 sum = _mm256_cvtepi32_ps(excess.off(load(group[r] + 8 * half), half, sums[r]));
            store(total[r] + 8 * half, _mm256_fmadd_ps(sum, by[half], load(total[r] + 8 * half)));
            store(group[r] + 8 * half, _mm256_setzero_si256());
        }
}

template <class Product>
struct Body {
    static constexpr int kStretch = Product::kStretch;

    const PackedLinear& weight;
    const Activations& x;
    const float* bias;
    float* y;
    std::ptrdiff_t y_stride;
    const int groups = scale_groups(weight);
    const int depth = Product::kFeed == Feed::f32 ? weight.in : weight.group && groups ? std::min(weight.padded_in(), groups * weight.group) : weight.padded_in();
    const int per_group = groups && weight.group ? weight.group : depth;
    static constexpr bool kNibbles = requires { Product::sum; }, kPlaces = std::is_same_v<Product, Lut4>;
    static constexpr bool kAsStored = std::is_empty_v<PanelTiles<Product>>;
    static constexpr bool kExpands = requires { typename Product::W; };
    const float factor = !kAsStored && !kExpands && shifted(weight) ? 0.0625f : 1.0f;

    // Panels [first, first + count), rows [row, row + rows).
    AVX2 void play(int first, int count, int row, int rows, Widened<Product>& widened, PanelSums<Product>* panels) const {
        for (int p = 0; p < count; ++p) {
            std::memset(panels[p].group, 0, static_cast<std::size_t>(rows) * sizeof panels[p].group[0]);
            std::memset(panels[p].total, 0, static_cast<std::size_t>(rows) * sizeof panels[p].total[0]);
            if constexpr (!kAsStored && !kExpands) panels[p].reader.emplace(Isa::avx2, weight, first + p, Product::kFeed, panels[p].scratch);
        }
        for (int at = 0; at < depth; at += kStretch) {
            const int end = std::min(at + kStretch, depth);
            if (widened.row != row || widened.rows != rows || at < widened.begin || end > widened.end) {
                const bool all = rows * depth <= Widened<Product>::kRoom;  // and then for all panels
                widen(row, rows, all ? 0 : at, all ? depth : end, widened);
            }
            for (int p = 0; p < count; ++p) add_stretch(first + p, rows, at, end, widened, panels[p]);
        }
        for (int p = 0; p < count; ++p) finish(first + p, row, rows, panels[p]);
    }

   private:
    AVX2 void widen(int row, int rows, int begin, int end, Widened<Product>& widened) const {
        widened.row = row, widened.rows = rows, widened.begin = begin, widened.end = end;
        for (int r = 0; r < rows; ++r) {
            typename Product::X* const to = widened.x + r * (end - begin);
            Product::widen(static_cast<const std::byte*>(x.rows) + (row + r) * x.stride * element_bytes(Product::kFeed), begin, end - begin, to);
            if constexpr (kNibbles)
                for (int from = begin, until; from < end; from = until) {
                    until = part_end(from);
                    widened.sum(from)[r] = Product::sum(to + (from - begin), until - from);
                }
        }
    }

    // Where the part of a group and of a stretch that begins at `from` ends.
    int part_end(int from) const { return std::min({depth, (from / per_group + 1) * per_group, (from / kStretch + 1) * kStretch}); }

    AVX2 void add_stretch(int panel, int rows, int at, int end, const Widened<Product>& widened, PanelSums<Product>& sums) const {
        const std::byte* tiles;
        if constexpr (kAsStored) {
            tiles = panel_tiles(weight, panel);
        } else if constexpr (kExpands) {
            Product::expand(panel_tiles(weight, panel), at, end - at, sums.expanded);
            tiles = reinterpret_cast<const std::byte*>(sums.expanded);
        } else {
            tiles = sums.reader->next(kStretch);
        }
        const int stride = widened.end - widened.begin;
        for (int from = at, until; from < end; from = until) {
            until = part_end(from);
            const int k = until - from, group = from / per_group;
            by_rows<kNibbles ? kNibbleRows : kRows>(rows, [&]<int some>(int r) {
                if constexpr (kPlaces)
                    Product::template add<some>(weight.codebook, tiles, from, k, widened.at(r, from), stride, sums.group + r);
                else if constexpr (kAsStored)
                    Product::template add<some>(tiles, from, k, widened.at(r, from), stride, sums.group + r);
                else
                    Product::template add<some>(tiles, k, widened.at(r, from), stride, sums.group + r);
            });
            const bool ends = groups && (until % per_group == 0 || until == depth);
            const float* const scales = ends ? panel_scales(weight, panel) + group * kChannels : nullptr;
            if constexpr (kExpands)
                tiles += static_cast<std::ptrdiff_t>(k) * kChannels * static_cast<int>(sizeof(typename Product::W));
            else if constexpr (!kAsStored)
                tiles += static_cast<std::ptrdiff_t>(k) * kChannels * element_bytes(Product::kFeed);
            if constexpr (kNibbles) {
                const Excess excess(weight.zeros ? panel_zeros(weight, panel) + group * kChannels : nullptr);
                if (ends)
                    take_off_and_fold(sums.group, sums.total, rows, excess, widened.sum(from), scales);
                else
                    take_off(sums.group, rows, excess, widened.sum(from));
            } else if (ends) {
                fold<typename Product::Sum>(sums.group, sums.total, rows, scales, factor);
            }
        }
    }

    AVX2 void finish(int panel, int row, int rows, const PanelSums<Product>& sums) const {
        const int channels = panel_channels(weight, panel);
        alignas(32) float b[kChannels] = {};
        if (bias) std::memcpy(b, bias + panel * kChannels, static_cast<std::size_t>(channels) * sizeof(float));
        for (int r = 0; r < rows; ++r) {
            alignas(32) float line[kChannels];
            UNROLLED for (int half = 0; half < 2; ++half) {
                const __m256 plus = load(b + 8 * half), total = load(sums.total[r] + 8 * half);
                if constexpr (Product::kFeed == Feed::int8) {
                    const __m256 by = _mm256_set1_ps(x.scales[row + r]);
                    store(line + 8 * half, bias ? _mm256_fmadd_ps(total, by, plus) : _mm256_mul_ps(total, by));
                } else {
                    store(line + 8 * half, _mm256_add_ps(groups ? total : load(sums.group[r] + 8 * half), plus));
                }
            }
            std::memcpy(y + (row + r) * y_stride + panel * kChannels, line, static_cast<std::size_t>(channels) * sizeof(float));
        }
    }
};

template <class Product>
AVX2 void play(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y, std::ptrdiff_t y_stride) {
    const Body<Product> body{weight, x, bias, y, y_stride};
    Widened<Product> widened;
    PanelSums<Product> panels[kPanels];
    const int together = x.count <= kFew ? 1 : kPanels;
    for (int panel = first; panel < last; panel += together)
        for (int row = 0; row < x.count; row += kBlock)
            body.play(panel, std::min(together, last - panel), row, std::min(kBlock, x.count - row), widened, panels);
}

// One product for few rows, another for more.
template <class Few, class Many>
AVX2 void play_by_count(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y, std::ptrdiff_t y_stride) {
    if (x.count <= kInRegisters)
        play<Few>(weight, x, first, last, bias, y, y_stride);
    else
        play<Many>(weight, x, first, last, bias, y, y_stride);
}

}  // namespace

AVX2 void linear_avx2(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y, std::ptrdiff_t y_stride) {
    if (weight.masks && linear_sparse_avx2(weight, x, first, last, bias, y, y_stride)) return;
    const auto lies_in = [&](WeightFormat format) { return weight.format == format && !weight.masks; };
    switch (feed_of(weight, x)) {
        case Feed::f32: return play<F32>(weight, x, first, last, bias, y, y_stride);
        case Feed::bf16:
            if (lies_in(WeightFormat::int8)) return play_by_count<Int8Bf16, Expanded<Int8Bf16>>(weight, x, first, last, bias, y, y_stride);
            if (lies_in(WeightFormat::int4) && !weight.zeros) return play_by_count<Int4Bf16, Expanded<Int4Bf16>>(weight, x, first, last, bias, y, y_stride);
            return play<Bf16>(weight, x, first, last, bias, y, y_stride);
        default:
            if (lies_in(WeightFormat::int4)) return play_by_count<Int4, Int4Expanded>(weight, x, first, last, bias, y, y_stride);
            if (lies_in(WeightFormat::lut4)) return play_by_count<Lut4, Int8>(weight, x, first, last, bias, y, y_stride);
            return play<Int8>(weight, x, first, last, bias, y, y_stride);
    }
}

}  // namespace hasten

#endif
