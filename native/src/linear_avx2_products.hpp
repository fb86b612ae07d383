// What linear layers at AVX2 multiply: one struct for each pairing of weights and activations. linear_avx2.cpp blocks them.
#pragma once

#include <cstring>

#include "linear.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,fma")))
#define UNROLLED _Pragma("GCC unroll 8")  // early, or sums in arrays would go through memory
#define FOUR_TIMES _Pragma("GCC unroll 4")  // a processor that another hardware thread shares has few instructions to spare

namespace hasten {
namespace {

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

    // Sums of a unit, two in each 32 bits, to those of the group.
    template <int rows>
    AVX2 static void add_pairs(const __m256i (&pairs)[rows][2], Sums<Sum> sums) {
        const __m256i one = _mm256_set1_epi16(1);
        UNROLLED for (int r = 0; r < rows; ++r)
            UNROLLED for (int half = 0; half < 2; ++half)
                store(sums[r] + 8 * half, _mm256_add_epi32(load(sums[r] + 8 * half), _mm256_madd_epi16(pairs[r][half], one)));
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
        const __m256i low = _mm256_set1_epi8(0x0f), eight = _mm256_set1_epi8(0x08);
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
        add_pairs<rows>(total, sums);
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
            Int4::add_pairs<rows>(total, sums);
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

}  // namespace
}  // namespace hasten

#endif
