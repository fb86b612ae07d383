// One line of a sparse tile, 4 k of 16 channels, from its mask and its elements to what a product multiplies. Bit 4 c + j of a mask is k
// number j of channel c, or, by k, bit 16 j + c is. Up to 64 bytes of elements are read, however many there are.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

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

// The same by k, of bf16 elements as the upper halves of float32. A table of its own is addressed in fewer instructions.
struct SparseFloatPlaces {
    alignas(64) std::uint8_t bytes[256][32];

    constexpr SparseFloatPlaces() : bytes() {
        for (int mask = 0; mask < 256; ++mask)
            for (int i = 0, taken = 0; i < 8; ++i) {
                const bool set = mask >> i & 1;
                bytes[mask][4 * i] = bytes[mask][4 * i + 1] = 0x80;
                bytes[mask][4 * i + 2] = static_cast<std::uint8_t>(set ? 2 * taken : 0x80);
                bytes[mask][4 * i + 3] = static_cast<std::uint8_t>(set ? 2 * taken + 1 : 0x80);
                taken += set;
            }
    }
};
inline constexpr SparseFloatPlaces kSparseFloatPlaces;

// The byte of a dense line at which element i of a mask's bits lies, of bf16.
template <bool by_k>
constexpr int half_place(int i) {
    const int k = by_k ? i / 16 : i % 4, channel = by_k ? i % 16 : i / 4;
    return k / 2 * 64 + channel * 4 + k % 2 * 2;
}

#if defined(__x86_64__)

#define HASTEN_EXPAND_AVX2 __attribute__((target("avx2,fma,f16c,popcnt,bmi,bmi2")))
#define HASTEN_UNROLLED _Pragma("GCC unroll 8")  // early, or what lies in arrays would go through memory
#define HASTEN_EXPAND_VBMI2 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi2,avx2,fma,f16c,popcnt,bmi,bmi2")))

// The number of bits. Compilers clear the result first, for processors that wait for what was in it; that is an instruction in twelve here.
HASTEN_INLINE std::size_t bits_set(std::size_t mask) {
    std::size_t count;
    asm("popcnt %1, %0" : "=r"(count) : "r"(mask));
    return count;
}

// Four bytes of a mask, and how many elements lie before each but the first. `total` waits for nothing else, so that many fours are under
// way at once.
struct FourMasks {
    std::size_t mask[4], before[4], total;

    HASTEN_INLINE explicit FourMasks(const std::byte* from) {
        std::uint32_t all;
        std::memcpy(&all, from, sizeof all);
        for (int i = 0; i < 4; ++i) {
            mask[i] = static_cast<std::size_t>(from[i]);
            before[i] = i ? before[i - 1] + bits_set(mask[i - 1]) : 0;
        }
        total = bits_set(all);
    }
};

struct ExpandAvx2 {
    // Bytes of 8 channels, from 4 bytes of a mask; moves `from` on.
    HASTEN_EXPAND_AVX2 HASTEN_INLINE static __m256i bytes(const std::byte* mask, const std::byte*& from) {
        const FourMasks four(mask);
        const __m256i values = _mm256_inserti128_si256(_mm256_castsi128_si256(sixteen<0>(four, from)), sixteen<2>(four, from), 1);
        from += four.total;
        return values;
    }

    // 16-bit elements of 8 channels, k 0 and 1, and k 2 and 3, from 4 bytes of a mask; moves `from` on.
    HASTEN_EXPAND_AVX2 HASTEN_INLINE static void halves(const std::byte* mask, const std::byte*& from, __m256i& first, __m256i& second) {
        const FourMasks four(mask);
        const __m256i even = alternate<0>(four, from), odd = alternate<1>(four, from);
        from += 2 * four.total;
        first = _mm256_unpacklo_epi64(even, odd);
        second = _mm256_unpackhi_epi64(even, odd);
    }

    // bf16 elements by k as float32: one k of 8 channels, from byte i of a mask; `taken` counts the elements of `from` before and then with them.
    HASTEN_EXPAND_AVX2 HASTEN_INLINE static __m256i floats(std::uint64_t mask, int i, const std::byte* from, std::size_t& taken) {
        const std::size_t place = (i ? mask >> (8 * i - 5) : mask << 5) & 0xff << 5;  // in a table of 32 bytes for every byte of a mask
        const __m256i eight = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * taken)));
        taken += bits_set(place);
        return _mm256_shuffle_epi8(eight, _mm256_load_si256(reinterpret_cast<const __m256i*>(kSparseFloatPlaces.bytes[0] + place)));
    }

    // As halves(), by k, of 16 channels from a whole mask: [half of the channels].
    HASTEN_EXPAND_AVX2 HASTEN_INLINE static void halves_by_k(std::uint64_t mask, const std::byte*& from, __m256i (&first)[2], __m256i (&second)[2]) {
        std::size_t taken = 0;
        __m256i each[4][2];
        HASTEN_UNROLLED for (int i = 0; i < 8; ++i) each[i / 2][i % 2] = floats(mask, i, from, taken);
        HASTEN_UNROLLED for (int half = 0; half < 2; ++half) {
            first[half] = _mm256_or_si256(_mm256_srli_epi32(each[0][half], 16), each[1][half]);
            second[half] = _mm256_or_si256(_mm256_srli_epi32(each[2][half], 16), each[3][half]);
        }
        from += 2 * taken;
    }

   private:
    // Elements of two bytes of the mask, i and i + 1.
    template <int i>
    HASTEN_EXPAND_AVX2 HASTEN_INLINE static __m128i sixteen(const FourMasks& four, const std::byte* from) {
        return _mm_shuffle_epi8(pair(from + four.before[i], from + four.before[i + 1]),
                                pair(kSparsePlaces.bytes[four.mask[i]], kSparsePlaces.later[four.mask[i + 1]]));
    }
    // Of bytes i and i + 2.
    template <int i>
    HASTEN_EXPAND_AVX2 HASTEN_INLINE static __m256i alternate(const FourMasks& four, const std::byte* from) {
        return _mm256_shuffle_epi8(lanes(from + 2 * four.before[i], from + 2 * four.before[i + 2]),
                                   lanes(kSparsePlaces.halves[four.mask[i]], kSparsePlaces.halves[four.mask[i + 2]]));
    }
    HASTEN_EXPAND_AVX2 HASTEN_INLINE static __m256i lanes(const void* low, const void* high) {
        return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(low))),
                                       _mm_loadu_si128(static_cast<const __m128i*>(high)), 1);
    }
    HASTEN_EXPAND_AVX2 HASTEN_INLINE static __m128i pair(const void* low, const void* high) {
        return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(_mm_loadl_epi64(static_cast<const __m128i*>(low))), static_cast<const __m64*>(high)));
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

    // The same by k.
    HASTEN_EXPAND_VBMI2 HASTEN_INLINE static void halves_by_k(std::uint64_t mask, const std::byte*& from, __m512i& first, __m512i& second) {
        const auto low = static_cast<std::uint32_t>(mask), high = static_cast<std::uint32_t>(mask >> 32);
        const std::byte* const middle = from + 2 * std::popcount(low);
        const __m512i a = _mm512_maskz_expand_epi16(low, _mm512_loadu_si512(from)), b = _mm512_maskz_expand_epi16(high, _mm512_loadu_si512(middle));
        const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        from = middle + 2 * std::popcount(high);
        first = _mm512_permutexvar_epi16(pairs, a);
        second = _mm512_permutexvar_epi16(pairs, b);
    }
};

#endif

}  // namespace hasten
