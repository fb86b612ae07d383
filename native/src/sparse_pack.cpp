// From dense tiles to masks and elements.
#include <bit>
#include <cstring>

#include "sparse_expand.hpp"

namespace hasten {
namespace {

int mask_words(const PackedLinear& weight) { return tile_depth(weight.format) * kChannels / 64; }

// Where the 64 elements of a line begin.
const std::byte* line_of(WeightFormat format, const std::byte* tile, int line) {
    return format == WeightFormat::bf16 ? tile + line * 128 : tile + line % 16 * 64;
}

// Where, for every byte of a mask, the elements that are taken lie among the eight; the rest does not matter.
struct Taken {
    alignas(64) std::uint8_t bytes[256][8];
    alignas(64) std::uint8_t halves[256][16];

    constexpr Taken() : bytes(), halves() {
        for (int mask = 0; mask < 256; ++mask)
            for (int i = 0, taken = 0; i < 8; ++i) {
                if (!(mask >> i & 1)) continue;
                bytes[mask][taken] = static_cast<std::uint8_t>(i);
                halves[mask][2 * taken] = static_cast<std::uint8_t>(2 * i);
                halves[mask][2 * taken + 1] = static_cast<std::uint8_t>(2 * i + 1);
                ++taken;
            }
    }
};

// Each level says which elements of a line are not zero, and takes those of a mask to `to`, of which it may write up to 16 bytes more.
struct Generic {
    static std::uint64_t bytes_mask(const std::byte* line, std::byte bits) {
        std::uint64_t mask = 0;
        for (int i = 0; i < 64; ++i) mask |= std::uint64_t{(line[i] & bits) != std::byte{0}} << i;
        return mask;
    }
    static std::uint64_t halves_mask(const std::byte* line) {
        std::uint64_t mask = 0;
        for (int i = 0; i < 64; ++i) {
            const std::byte* const two = line + half_place<false>(i);
            mask |= std::uint64_t{(two[0] | (two[1] & std::byte{0x7f})) != std::byte{0}} << i;  // -0 adds nothing
        }
        return mask;
    }
    static std::byte* take_bytes(std::uint64_t mask, const std::byte* line, std::byte* to) {
        for (; mask; mask &= mask - 1) *to++ = line[std::countr_zero(mask)];
        return to;
    }
    template <bool by_k>
    static std::byte* take_halves(std::uint64_t mask, const std::byte* line, std::byte* to) {
        for (; mask; mask &= mask - 1, to += 2) std::memcpy(to, line + half_place<by_k>(std::countr_zero(mask)), 2);
        return to;
    }
};

#if defined(__x86_64__)

#define AVX2 HASTEN_EXPAND_AVX2

constexpr Taken kTaken;

AVX2 HASTEN_INLINE __m256i load(const std::byte* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

struct Avx2 {
    AVX2 static std::uint64_t bytes_mask(const std::byte* line, std::byte bits) {
        const __m256i wanted = _mm256_set1_epi8(static_cast<char>(bits)), zero = _mm256_setzero_si256();
        std::uint64_t mask = 0;
        for (int half = 0; half < 2; ++half) {
            const int zeros = _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_and_si256(load(line + 32 * half), wanted), zero));
            mask |= std::uint64_t{~static_cast<std::uint32_t>(zeros)} << (32 * half);
        }
        return mask;
    }
    AVX2 static std::uint64_t halves_mask(const std::byte* line) {
        const __m256i zero = _mm256_setzero_si256();
        std::uint64_t mask = 0;
        for (int half = 0; half < 2; ++half) {
            // Doubled, both zeros are 0.
            const __m256i first = _mm256_slli_epi16(load(line + 32 * half), 1), second = _mm256_slli_epi16(load(line + 64 + 32 * half), 1);
            const __m256i low = _mm256_cmpeq_epi16(_mm256_unpacklo_epi32(first, second), zero);
            const __m256i high = _mm256_cmpeq_epi16(_mm256_unpackhi_epi32(first, second), zero);
            mask |= std::uint64_t{~static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_packs_epi16(low, high)))} << (32 * half);
        }
        return mask;
    }
    AVX2 static std::byte* take_bytes(std::uint64_t mask, const std::byte* line, std::byte* to) {
        for (; mask; mask >>= 8, line += 8) {
            const auto bits = static_cast<std::size_t>(mask & 0xff);
            const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(line));
            const __m128i places = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kTaken.bytes[bits]));
            _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(eight, places));
            to += bits_set(bits);
        }
        return to;
    }
    template <bool by_k>
    AVX2 static std::byte* take_halves(std::uint64_t mask, const std::byte* line, std::byte* to) {
        for (int sixteen = 0; sixteen < 4; ++sixteen, mask >>= 16) {  // elements: one k, or four channels
            const std::byte* const at = line + (by_k ? sixteen / 2 * 64 : sixteen * 16);
            for (int i = 0; i < 2; ++i) {
                const auto bits = static_cast<std::size_t>(mask >> (8 * i) & 0xff);
                const __m128i first = four(at + (by_k ? 32 * i : 0)), second = four(at + (by_k ? 32 * i + 16 : 64));
                const __m128i eight = by_k ? one_k(first, second, sixteen % 2) : i ? _mm_unpackhi_epi32(first, second) : _mm_unpacklo_epi32(first, second);
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(eight, _mm_load_si128(reinterpret_cast<const __m128i*>(kTaken.halves[bits]))));
                to += 2 * bits_set(bits);
            }
        }
        return to;
    }

   private:
    AVX2 static __m128i four(const std::byte* pairs) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(pairs)); }
    // The even or the odd k of two fours of pairs.
    AVX2 static __m128i one_k(__m128i first, __m128i second, bool odd) {
        const __m128i lower = _mm_set1_epi32(0xffff);
        return odd ? _mm_packus_epi32(_mm_srli_epi32(first, 16), _mm_srli_epi32(second, 16))
                   : _mm_packus_epi32(_mm_and_si128(first, lower), _mm_and_si128(second, lower));
    }
};

#endif

constexpr std::uint64_t kFirstOfFour = 0x1111111111111111u;

// The number of bits in each four.
std::uint64_t in_fours(std::uint64_t mask) {
    mask -= mask >> 1 & 5 * kFirstOfFour;
    return (mask & 3 * kFirstOfFour) + (mask >> 2 & 3 * kFirstOfFour);
}

// Adds the first zeros of each four that has less than two bits.
std::uint64_t filled_to_two(std::uint64_t mask) {
    for (int bit = 0; bit < 4; ++bit) {
        const std::uint64_t count = in_fours(mask), lacking = ~(count >> 1 | count >> 2) & kFirstOfFour;
        mask |= lacking << bit;
    }
    return mask;
}

// The bits of 4 k of 16 channels by k.
std::uint64_t by_k(std::uint64_t mask) {
    std::uint64_t turned = 0;
    for (int k = 0; k < 4; ++k) {
        std::uint64_t bits = mask >> k & kFirstOfFour;  // brought together, twice as many at a time
        bits = (bits | bits >> 3) & 0x0303030303030303u;
        bits = (bits | bits >> 6) & 0x000f000f000f000fu;
        bits = (bits | bits >> 12) & 0x000000ff000000ffu;
        turned |= ((bits | bits >> 24) & 0xffff) << (16 * k);
    }
    return turned;
}

// Bytes that the elements of a tile take.
int element_count_bytes(WeightFormat format, const std::uint64_t* mask, int words) {
    int counts[2] = {};
    for (int i = 0; i < words; ++i) counts[i * 2 / words] += std::popcount(mask[i]);
    return format == WeightFormat::bf16 ? 2 * (counts[0] + counts[1]) : format == WeightFormat::int8 ? counts[0] + counts[1] : std::max(counts[0], counts[1]);
}

template <class Level>
void masks_body(const PackedLinear& dense, int first, int last, std::uint64_t* masks, SparsePanel* panels) {
    const int tiles = dense.padded_in() / tile_depth(dense.format), words = mask_words(dense);
    for (int panel = first; panel < last; ++panel) {
        std::uint64_t* const mask = masks + static_cast<std::ptrdiff_t>(panel) * tiles * words;
        std::int64_t present = 0;
        std::uint64_t more_than_two = 0;
        for (int word = 0; word < tiles * words; ++word) {
            const int line = word % words;
            const std::byte* const from = line_of(dense.format, panel_tiles(dense, panel) + static_cast<std::ptrdiff_t>(word / words) * kTileBytes, line);
            const auto bits = static_cast<std::byte>(dense.format == WeightFormat::int8 ? 0xff : line < 16 ? 0x0f : 0xf0);
            mask[word] = dense.format == WeightFormat::bf16 ? Level::halves_mask(from) : Level::bytes_mask(from, bits);
            const std::uint64_t count = in_fours(mask[word]);
            more_than_two |= ((count & count >> 1) | count >> 2) & kFirstOfFour;
            present += std::popcount(mask[word]);
        }
        // Not where that adds more than an eighth to what is not padding.
        const std::int64_t half = std::int64_t{panel_channels(dense, panel)} * dense.in / 2;
        const bool regular = !more_than_two && present * 9 >= half * 8;
        panels[panel] = {0, regular};
        for (int t = 0; t < tiles; ++t) {
            std::uint64_t* const its = mask + static_cast<std::ptrdiff_t>(t) * words;
            for (int word = 0; word < words; ++word)
                its[word] = regular ? filled_to_two(its[word]) : dense.format == WeightFormat::bf16 ? by_k(its[word]) : its[word];
            panels[panel].start += static_cast<std::uint64_t>(element_count_bytes(dense.format, its, words));
        }
    }
}

// The nibbles of a tile: its halves beside each other.
std::byte* take_nibbles(const std::uint64_t* mask, int words, const std::byte* tile, std::byte* to) {
    const int bytes = element_count_bytes(WeightFormat::int4, mask, words);
    std::memset(to, 0, static_cast<std::size_t>(bytes));
    for (int half = 0; half < 2; ++half) {
        int taken = 0;
        for (int word = 0; word < 16; ++word)
            for (std::uint64_t left = mask[16 * half + word]; left; left &= left - 1)
                to[taken++] |= tile[word * 64 + std::countr_zero(left)] & static_cast<std::byte>(half ? 0xf0 : 0x0f);
    }
    return to + bytes;
}

template <class Level>
void elements_body(const PackedLinear& dense, const std::uint64_t* masks, const SparsePanel* panels, int first, int last, std::byte* elements) {
    const int tiles = dense.padded_in() / tile_depth(dense.format), words = mask_words(dense);
    for (int panel = first; panel < last; ++panel) {
        std::byte* to = elements + panels[panel].start;
        const std::byte* const end = elements + panels[panel + 1].start;  // where another thread may be writing
        for (int word = 0; word < tiles * words; ++word) {
            const std::uint64_t* const mask = masks + static_cast<std::ptrdiff_t>(panel) * tiles * words + word;
            const std::byte* const tile = panel_tiles(dense, panel) + static_cast<std::ptrdiff_t>(word / words) * kTileBytes;
            if (dense.format == WeightFormat::int4) {
                to = take_nibbles(mask, words, tile, to);
                word += words - 1;
                continue;
            }
            const std::byte* const from = line_of(dense.format, tile, word % words);
            const bool room = end - to >= 128 + 16;
            if (dense.format == WeightFormat::bf16 && panels[panel].two_of_four)
                to = room ? Level::template take_halves<false>(*mask, from, to) : Generic::take_halves<false>(*mask, from, to);
            else if (dense.format == WeightFormat::bf16)
                to = room ? Level::template take_halves<true>(*mask, from, to) : Generic::take_halves<true>(*mask, from, to);
            else
                to = room ? Level::take_bytes(*mask, from, to) : Generic::take_bytes(*mask, from, to);
        }
    }
}

}  // namespace

std::size_t sparse_mask_count(const PackedLinear& dense) {
    return static_cast<std::size_t>(dense.panels()) * static_cast<std::size_t>(dense.padded_in() / tile_depth(dense.format) * mask_words(dense));
}

void sparse_masks(const PackedLinear& dense, int first, int last, std::uint64_t* masks, SparsePanel* panels) {
#if defined(__x86_64__)
    if (best_isa() >= Isa::avx2) return masks_body<Avx2>(dense, first, last, masks, panels);
#endif
    masks_body<Generic>(dense, first, last, masks, panels);
}

void sparse_elements(const PackedLinear& dense, const std::uint64_t* masks, const SparsePanel* panels, int first, int last, std::byte* elements) {
#if defined(__x86_64__)
    if (best_isa() >= Isa::avx2) return elements_body<Avx2>(dense, masks, panels, first, last, elements);
#endif
    elements_body<Generic>(dense, masks, panels, first, last, elements);
}

}  // namespace hasten
