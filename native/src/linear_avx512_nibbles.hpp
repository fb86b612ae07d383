// Weights of four bits with up to eight rows of bytes, at AVX-512. For so few rows what a group costs counts as much as its products: sums that
// go through arrays from group to group take 37 cycles each.
#pragma once

#include "linear_avx512_products.hpp"

#if defined(__x86_64__)

namespace hasten {
namespace {

// Places in a codebook of bytes, as what is there + 128.
struct Looked {
    static constexpr int kExcess = 128;
    __m512i table;

    AVX512_INLINE explicit Looked(const std::int8_t* codebook)
        : table(_mm512_xor_si512(_mm512_maskz_broadcast_i32x4(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook))),
                                 _mm512_set1_epi8(static_cast<char>(0x80)))) {}
    template <bool upper>
    AVX512_INLINE __m512i of(__m512i both) const { return _mm512_shuffle_epi8(table, half_bytes<upper>(both)); }
};

// A panel from end to end; where groups are whole tiles, all its sums are in registers.
template <class Meaning, int rows>
struct FewNibbles {
    using Sums = Block<std::int32_t, rows, 1>;

    const Meaning meaning;  // of a nibble
    const PackedLinear& weight;
    const Activations& x;
    const int k = weight.padded_in(), groups = scale_groups(weight), per_group = groups > 1 ? weight.group : k;
    const std::int8_t* const from = static_cast<const std::int8_t*>(x.rows);
    std::int32_t activations[kMostIn / kNibbleUnit][rows];  // minus the sum of a group's

    AVX512 FewNibbles(const Meaning& its, const PackedLinear& weight_, const Activations& x_) : meaning(its), weight(weight_), x(x_) {
        for (int group = 0; group < groups; ++group)
            for (int r = 0; r < rows; ++r)
                activations[group][r] = -sum_of(from + r * x.stride + group * per_group, std::min(per_group, k - group * per_group));
    }

    AVX512 void play(int first, int last, const float* bias, float* y, std::ptrdiff_t y_stride) const {
        for (int panel = first; panel < last; ++panel) {
            Block<float, rows, 1> total;
            UNROLLED for (int r = 0; r < rows; ++r) total.at[0][r] = _mm512_setzero_ps();
            if (per_group >= 128)
                add_whole(panel, total);
            else if (per_group == 64)
                add_parts<1>(panel, total);
            else
                add_parts<2>(panel, total);
            for (int r = 0; r < rows; ++r) finish_exact(weight, panel, total.at[0][r], x.scales[r], bias, y + r * y_stride);
        }
    }

   private:
    // Of a tile, or of part of it, the k of `lines` lines in the lower nibbles and the k 64 after them in the upper ones: each byte is taken
    // apart once. Moves w on.
    template <int lines>
    AVX512_INLINE void add_lines(const std::byte*& w, const std::int8_t* of_k, Chains<rows, 1>& lower, Chains<rows, 1>& upper) const {
        UNROLLED for (int line = 0; line < lines; ++line, w += 64, of_k += 4) {
            ahead<rows>(w);
            const __m512i both = words(w), low = meaning.template of<false>(both), high = meaning.template of<true>(both);
            UNROLLED for (int r = 0; r < rows; ++r) {
                __m512i &first = lower.at(2 * line, 0, r), &second = upper.at(2 * line + 1, 0, r);
                first = _mm512_dpbusd_epi32(first, low, quad(of_k + r * x.stride));
                second = _mm512_dpbusd_epi32(second, high, quad(of_k + r * x.stride + 64));
            }
        }
    }

    // Groups of whole tiles.
    AVX512_INLINE void add_whole(int panel, Block<float, rows, 1>& total) const {
        const std::byte* w = panel_tiles(weight, panel);
        for (int group = 0, at = 0; group < groups; ++group) {
            Chains<rows, 1> sums(beginning(panel, group));
            for (const int end = std::min(at + per_group, k); at < end; at += 128)
                add_lines<16>(w, from + at, sums, sums);
            fold(panel, group, sums.sum(), total);
        }
    }

    // Groups of which a tile's half has `parts`.
    template <int parts>
    AVX512_INLINE void add_parts(int panel, Block<float, rows, 1>& total) const {
        const std::byte* w = panel_tiles(weight, panel);
        for (int group = 0, at = 0; group < groups; group += 2 * parts, at += 128) {
            Sums each[2 * parts];
            UNROLLED for (int part = 0; part < parts; ++part) {
                Chains<rows, 1> sums(beginning(panel, group + part)), upper(beginning(panel, group + parts + part));
                add_lines<16 / parts>(w, from + at + 64 / parts * part, sums, upper);
                each[part] = sums.sum(), each[parts + part] = upper.sum();
            }
            UNROLLED for (int i = 0; i < 2 * parts; ++i)
                if (group + i < groups) fold(panel, group + i, each[i], total);
        }
    }

    // What sums of a group are before its first k: less what its weights have too much. Beyond the last group what they are does not matter.
    AVX512_INLINE Sums beginning(int panel, int group) const {
        group = std::min(group, groups - 1);
        Sums begin;
        UNROLLED for (int r = 0; r < rows; ++r) begin.at[0][r] = _mm512_set1_epi32(Meaning::kExcess * activations[group][r]);
        if (weight.zeros) {
            const auto* const its = panel_zeros(weight, panel) + group * kChannels;
            const __m512i zeros = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(its)));
            UNROLLED for (int r = 0; r < rows; ++r)
                begin.at[0][r] = _mm512_add_epi32(begin.at[0][r], _mm512_mullo_epi32(zeros, _mm512_set1_epi32(activations[group][r])));
        }
        return begin;
    }

    AVX512_INLINE void fold(int panel, int group, const Sums& sums, Block<float, rows, 1>& total) const {
        const __m512 scale = load(panel_scales(weight, panel) + group * kChannels);
        UNROLLED for (int r = 0; r < rows; ++r) total.at[0][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums.at[0][r]), scale, total.at[0][r]);
    }
};

// FewNibbles, or false for more rows.
template <class Meaning>
AVX512 bool plays_few_nibbles(const Meaning& meaning, const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y,
                      std::ptrdiff_t y_stride) {
    switch (x.count) {
        case 1: return FewNibbles<Meaning, 1>(meaning, weight, x).play(first, last, bias, y, y_stride), true;
        case 2: return FewNibbles<Meaning, 2>(meaning, weight, x).play(first, last, bias, y, y_stride), true;
        case 3: return FewNibbles<Meaning, 3>(meaning, weight, x).play(first, last, bias, y, y_stride), true;
        case 4: return FewNibbles<Meaning, 4>(meaning, weight, x).play(first, last, bias, y, y_stride), true;
        case 5: return FewNibbles<Meaning, 5>(meaning, weight, x).play(first, last, bias, y, y_stride), true;
        case 6: return FewNibbles<Meaning, 6>(meaning, weight, x).play(first, last, bias, y, y_stride), true;
        case 7: return FewNibbles<Meaning, 7>(meaning, weight, x).play(first, last, bias, y, y_stride), true;
        case 8: return FewNibbles<Meaning, 8>(meaning, weight, x).play(first, last, bias, y, y_stride), true;
        default: return false;
    }
}

}  // namespace
}  // namespace hasten

#endif
