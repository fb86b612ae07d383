// Linear layers at AVX2, which has neither tiles nor products of bytes that hold their sums. Rows of activations are widened a stretch of
// k at a time, for several panels; weights are widened in registers, for up to five rows. The blocking is that of Goto & van de Geijn 2008.
// The order of sums is written at linear_generic.cpp: it does not depend on how rows and panels are blocked.
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

#include "linear_avx2_products.hpp"

namespace hasten {
namespace {

constexpr int kRows = 5;           // of a register block: 5 × 16 sums take 10 registers of 16; with 6, gcc 12 spills
constexpr int kNibbleRows = 4;     // the same of nibbles; with 5, gcc 12 keeps sums in memory
constexpr int kBlock = 50;         // rows that share a decoding of weights; their widened stretch stays in the second-level cache
constexpr int kPanels = 4;         // panels that share a widening of activations
constexpr int kInRegisters = 8;    // rows up to which taking weights apart in registers for each block is less than once for all
constexpr int kFew = 4;            // up to so many rows memory is the limit: a panel at a time is read in one run

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
