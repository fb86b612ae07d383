// One line of a sparse tile, 4 k of 16 channels, from its mask and its elements to what a product multiplies. Bit 4 c + j of a mask is k
// number j of channel c. Up to 64 bytes of elements are read, however many there are.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "linear.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hasten {

// For every byte of a mask, two channels', where each of eight elements comes from: its place among those taken, or 0x80 for none.
struct SparsePlaces {
    alignas(64) std::uint8_t bytes[256][8], later[256][8];  // `later` counts from 8 on, for the upper half of 16 bytes
    alignas(64) std::uint8_t halves[256][16];               // k 0 and 1 of both channels, then k 2 and 3

    constexpr SparsePlaces() : bytes(), later(), halves() {
        for (int mask = 0; mask < 256; ++mask)
            for (int i = 0, taken = 0; i < 8; ++i) {
                const bool set = mask >> i & 1;
                const int half = i % 4 / 2 * 4 + i / 4 * 2 + i % 2;
                bytes[mask][i] = static_cast<std::uint8_t>(set ? taken : 0x80);
                later[mask][i] = static_cast<std::uint8_t>(set ? taken + 8 : 0x80);
                halves[mask][2 * half] = static_cast<std::uint8_t>(set ? 2 * taken : 0x80);
                halves[mask][2 * half + 1] = static_cast<std::uint8_t>(set ? 2 * taken + 1 : 0x80);
                taken += set;
            }
    }
};
inline constexpr SparsePlaces kSparsePlaces;

#if defined(__x86_64__)

#define HASTEN_EXPAND_AVX2 __attribute__((target("avx2,fma,f16c,popcnt,bmi,bmi2")))
#define HASTEN_EXPAND_VBMI2 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi2,avx2,fma,f16c,popcnt,bmi,bmi2")))

struct ExpandAvx2 {
    // Bytes of 8 channels, from 4 bytes of a mask; moves `from` on.
    HASTEN_EXPAND_AVX2 HASTEN_INLINE static __m256i bytes(const std::byte* mask, const std::byte*& from) {
        const __m128i low = sixteen(mask, from), high = sixteen(mask + 2, from);
        return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }

    // 16-bit elements of 8 channels, k 0 and 1, and k 2 and 3, from 4 bytes of a mask; moves `from` on.
    HASTEN_EXPAND_AVX2 HASTEN_INLINE static void halves(const std::byte* mask, const std::byte*& from, __m256i& first, __m256i& second) {
        const auto bits = [&](int i) { return static_cast<unsigned>(mask[i]); };
        const auto load = [](const void* at) { return _mm_loadu_si128(static_cast<const __m128i*>(at)); };
        const unsigned m0 = bits(0), m1 = bits(1), m2 = bits(2), m3 = bits(3);
        const std::byte *const at1 = from + 2 * std::popcount(m0), *const at2 = at1 + 2 * std::popcount(m1), *const at3 = at2 + 2 * std::popcount(m2);
        const auto& places = kSparsePlaces.halves;
        const __m256i even = _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(load(from)), load(at2), 1),
                                                 _mm256_inserti128_si256(_mm256_castsi128_si256(load(places[m0])), load(places[m2]), 1));
        const __m256i odd = _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(load(at1)), load(at3), 1),
                                                _mm256_inserti128_si256(_mm256_castsi128_si256(load(places[m1])), load(places[m3]), 1));
        from = at3 + 2 * std::popcount(m3);
        first = _mm256_unpacklo_epi64(even, odd);
        second = _mm256_unpackhi_epi64(even, odd);
    }

   private:
    HASTEN_EXPAND_AVX2 HASTEN_INLINE static __m128i sixteen(const std::byte* mask, const std::byte*& from) {
        const auto pair = [](const void* low, const void* high) {
            return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(_mm_loadl_epi64(static_cast<const __m128i*>(low))), static_cast<const __m64*>(high)));
        };
        const unsigned first = static_cast<unsigned>(mask[0]), second = static_cast<unsigned>(mask[1]);
        const std::byte* const at = from + std::popcount(first);
        const __m128i values = pair(from, at);
        from = at + std::popcount(second);
        return _mm_shuffle_epi8(values, pair(kSparsePlaces.bytes[first], kSparsePlaces.later[second]));
    }
};

struct ExpandVbmi2 {
    // Bytes of 16 channels.
    HASTEN_EXPAND_VBMI2 HASTEN_INLINE static __m512i bytes(std::uint64_t mask, const std::byte*& from) {
        const __m512i values = _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(from));
        from += std::popcount(mask);
        return values;
    }

    // 16-bit elements of 16 channels, k 0 and 1, and k 2 and 3.
    HASTEN_EXPAND_VBMI2 HASTEN_INLINE static void halves(std::uint64_t mask, const std::byte*& from, __m512i& first, __m512i& second) {
        const auto low = static_cast<std::uint32_t>(mask), high = static_cast<std::uint32_t>(mask >> 32);
        const std::byte* const middle = from + 2 * std::popcount(low);
        const __m512i a = _mm512_maskz_expand_epi16(low, _mm512_loadu_si512(from)), b = _mm512_maskz_expand_epi16(high, _mm512_loadu_si512(middle));
        const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
        from = middle + 2 * std::popcount(high);
        first = _mm512_permutex2var_epi32(a, even, b);
        second = _mm512_permutex2var_epi32(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b);
    }
};

#endif

}  // namespace hasten
