// Linear layers at AVX-512 without tiles. Rows of activations are widened a stretch of k at a time, for several panels; weights are widened
// in registers, for up to 12 rows of two panels; few rows of four bits are in linear_avx512_nibbles.hpp. The blocking is that of Goto & van de
// Geijn 2008. The order of sums is written at linear_generic.cpp: it does not depend on how rows and panels are blocked.
#include <algorithm>
#include <cstring>
#include <optional>
#include <type_traits>

#include "linear.hpp"
#include "linear_sparse.hpp"
#include "weight_decode.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // the headers' undefined vectors (gcc bug 105593)
#endif

#include "linear_avx512_nibbles.hpp"
#include "linear_avx512_products.hpp"

namespace hasten {
namespace {

constexpr int kBlock = 48;         // rows that share a decoding of weights; their widened stretch stays in the second-level cache
constexpr int kPanels = 16;        // panels that share a widening of activations, which costs a row as much as half a panel
constexpr int kInRegisters = 8;    // rows up to which taking weights apart in registers for each block is less than once for all
constexpr int kFew = 4;            // up to so many rows memory is the limit: a panel at a time is read in one run

// Activations widened: `rows` rows from `row`, k from `begin` to `end`, a stretch after the other.
template <class Product>
struct Widened {
    using X = typename Product::X;
    static constexpr int kStretch = Product::kStretch, kRoom = 64 * 1024;
    static_assert(kRoom >= kBlock * kStretch);
    int row = 0, rows = 0, begin = 0, end = 0;
    alignas(64) X x[kRoom];
    std::int32_t excess[kRoom / kNibbleUnit];  // of bytes: −kExcess · Σ x of a part of a group, where its first unit is

    static int room(int rows, int k) { return rows * ((k + kStretch - 1) / kStretch * kStretch); }
    X* at(int r, int k) { return x + (k - begin) / kStretch * (rows * kStretch) + r * kStretch + (k - begin) % kStretch; }
    std::int32_t* excess_at(int k) { return excess + (k - begin) / kNibbleUnit * rows; }
};

// The sums of one panel with a block of rows, and the reader of a product that has no other way to its weights.
template <class Product>
struct PanelSums {
    alignas(64) typename Product::Sum group[kBlock][kChannels];  // of the group so far
    alignas(64) float total[kBlock][kChannels];                  // of the groups before, scaled
    std::optional<PanelReader> reader;
};

template <class Product>
constexpr bool kTakesPanels = false;  // whose add() finds its k in a panel as it lies
template <>
constexpr bool kTakesPanels<Int8Bf16> = true;
template <>
constexpr bool kTakesPanels<Int4Bf16> = true;

// Room for a stretch of two panels' weights as they are multiplied, where that is not how they lie.
struct Room {
    alignas(64) std::byte tiles[2][PanelReader::kScratch];
};

template <class Product>
struct Body {
    using X = typename Product::X;
    using Sum = typename Product::Sum;
    static constexpr int kStretch = Product::kStretch;
    static constexpr bool kExact = std::is_same_v<Sum, std::int32_t>;
    static constexpr bool kExpands = requires { typename Product::W; };
    static constexpr bool kReads = !kExpands && !kTakesPanels<Product>;
    static constexpr int kElement = [] {
        if constexpr (kExpands)
            return static_cast<int>(sizeof(typename Product::W));
        else
            return element_bytes(Product::kFeed);
    }();

    const PackedLinear& weight;
    const Activations& x;
    const float* bias;
    float* y;
    std::ptrdiff_t y_stride;
    const int groups = scale_groups(weight);
    const int depth = Product::kFeed == Feed::f32 ? weight.in : weight.group && groups ? std::min(weight.padded_in(), groups * weight.group) : weight.padded_in();
    const int per_group = groups && weight.group ? weight.group : depth;
    const float factor = kReads && shifted(weight) ? 0.0625f : 1.0f;

    bool widens_at_once(int rows) const { return Widened<Product>::room(rows, depth) <= Widened<Product>::kRoom; }

    // Panels [first, first + count), rows [row, row + rows); then those from panel `after` on will come.
    AVX512 void play(int first, int count, int after, int row, int rows, Widened<Product>& widened, PanelSums<Product>* panels, Room& room) const {
        for (int p = 0; p < count; ++p) {
            std::memset(panels[p].total, 0, static_cast<std::size_t>(rows) * sizeof panels[p].total[0]);
            if constexpr (kReads) panels[p].reader.emplace(Isa::avx512, weight, first + p, Product::kFeed, room.tiles[p % 2]);
        }
        for (int at = 0; at < depth; at += kStretch) {
            const int end = std::min(at + kStretch, depth);
            if (widened.row != row || widened.rows != rows || at < widened.begin || end > widened.end) {
                const bool all = widens_at_once(rows);  // and then for all panels
                widen(row, rows, all ? 0 : at, all ? depth : end, widened);
            }
            for (int p = 0; p < count; p += 2) {
                const std::byte* const next = p + 2 < count ? lines(first + p + 2, at) : end < depth ? lines(first, end) : lines(after, 0);
                if (p + 1 < count)
                    add_stretch<2>(first + p, rows, at, end, next, widened, panels + p, room);
                else
                    add_stretch<1>(first + p, rows, at, end, next, widened, panels + p, room);
            }
        }
        for (int p = 0; p < count; ++p) finish(first + p, row, rows, panels[p]);
    }

   private:
    AVX512 void widen(int row, int rows, int begin, int end, Widened<Product>& widened) const {
        widened.row = row, widened.rows = rows, widened.begin = begin, widened.end = end;
        for (int r = 0; r < rows; ++r) {
            const std::byte* const from = static_cast<const std::byte*>(x.rows) + (row + r) * x.stride * element_bytes(Product::kFeed);
            for (int at = begin; at < end; at += kStretch) Product::widen(from, at, std::min(kStretch, end - at), widened.at(r, at));
            if constexpr (kExact)
                for (int at = begin, until; at < end; at = until) {
                    until = part_end(at);
                    widened.excess_at(at)[r] = -Product::kExcess * sum_of(widened.at(r, at), until - at);
                }
        }
    }

    // Where the k from `at` on of a panel lie; of sparse weights, of which no k has its place, wherever they begin.
    const std::byte* lines(int panel, int at) const {
        const TileShape tile = tile_shape(weight.format);
        return weight.masks ? weight.tiles : panel_tiles(weight, panel) + static_cast<std::ptrdiff_t>(at) * tile.bytes / tile.depth;
    }

    // What blocks of `rows` rows and `panels` panels ask for, over all their steps, of a stretch whose own lines are at `own` and the next one's at `next`.
    Coming spread(const std::byte* own, const std::byte* next, int rows, int panels) const {
        const TileShape tile = tile_shape(weight.format);
        const int passes = panels == 2 ? rows / 12 + rows % 12 / 8 : rows / 8, per_line = 64 * tile.depth / tile.bytes / kQuad;
        const int every = std::max(passes, 1) * std::max(per_line, 1);
        return {passes > 1 || kExpands ? next : own + kAheadBytes, lines(1, 0) - lines(0, 0), every, every};
    }

    // Where the part of a group and of a stretch that begins at `from` ends.
    int part_end(int from) const { return std::min({depth, (from / per_group + 1) * per_group, (from / kStretch + 1) * kStretch}); }

    template <int count>
    AVX512 void add_stretch(int panel, int rows, int at, int end, const std::byte* next, Widened<Product>& widened, PanelSums<Product>* sums, Room& room) const {
        Coming coming = spread(lines(panel, at), next, rows, count);
        const std::byte* tiles[count];
        for (int p = 0; p < count; ++p) {
            if constexpr (kReads) {
                tiles[p] = sums[p].reader->next(kStretch);
            } else {
                tiles[p] = panel_tiles(weight, panel + p);
                if constexpr (kExpands) {
                    static_assert(kStretch * kChannels * kElement <= sizeof room.tiles[p]);
                    Product::expand(tiles[p], at, end - at, reinterpret_cast<typename Product::W*>(room.tiles[p]));
                    tiles[p] = room.tiles[p];
                }
            }
        }
        const Stretch stretch{panel, at, end};
        int r = 0;
        if constexpr (count == 2) {
            for (; rows - r >= 12; r += 12) add<12, 2>(stretch, tiles, r, widened, sums, coming);
            for (; rows - r >= 8; r += 8) add<8, 2>(stretch, tiles, r, widened, sums, coming);
        }
        for (int p = 0; p < count; ++p) add_rest({panel + p, at, end}, tiles + p, r, rows, widened, sums + p, coming);
    }

    // k of some panels, the first of which is `panel`.
    struct Stretch {
        int panel, begin, end;
    };

    // The rows from r on of one panel.
    AVX512 void add_rest(const Stretch& stretch, const std::byte* const* tiles, int r, int rows, Widened<Product>& widened, PanelSums<Product>* sums,
                         Coming& coming) const {
        for (; rows - r >= 8; r += 8) add<8, 1>(stretch, tiles, r, widened, sums, coming);
        for (; rows - r >= 4; r += 4) add<4, 1>(stretch, tiles, r, widened, sums, coming);
        switch (rows - r) {
            case 1: return add<1, 1>(stretch, tiles, r, widened, sums, coming);
            case 2: return add<2, 1>(stretch, tiles, r, widened, sums, coming);
            case 3: return add<3, 1>(stretch, tiles, r, widened, sums, coming);
            default: return;
        }
    }

    // What a stretch adds to the sums of rows [row, row + rows) and `panels` panels, group by group.
    template <int rows, int panels>
    AVX512 __attribute__((noinline)) void add(const Stretch& stretch, const std::byte* const* from, int row, Widened<Product>& widened,
                                              PanelSums<Product>* sums, Coming& coming) const {
        const std::byte* tiles[panels];
        for (int p = 0; p < panels; ++p) tiles[p] = from[p];
        Coming asking = coming;  // in registers
        int group = stretch.begin / per_group;
        for (int at = stretch.begin, until; at < stretch.end; at = until) {
            const int end = std::min((group + 1) * per_group, depth);
            until = std::min(end, stretch.end);
            Block<Sum, rows, panels> block;
            start(stretch.panel, group, at, at == group * per_group, row, widened, sums, block);
            if constexpr (kExact)
                Product::add(tiles, at, until - at, widened.at(row, at), block, asking);
            else
                Product::add(tiles, at, until - at, widened.at(row, at), block);
            if constexpr (!kTakesPanels<Product>)
                UNROLLED for (int p = 0; p < panels; ++p) tiles[p] += static_cast<std::ptrdiff_t>(until - at) * kChannels * kElement;
            if (groups && until == end)
                fold(stretch.panel, group++, row, sums, block);
            else
                UNROLLED for (int p = 0; p < panels; ++p)
                    UNROLLED for (int r = 0; r < rows; ++r) store(sums[p].group[row + r], block.at[p][r]);
        }
        coming = asking;
    }

    // What sums are before the k from `at` on: what they came to, nothing where a group begins, less what bytes will have too much.
    template <int rows, int panels>
    AVX512_INLINE void start(int panel, int group, int at, bool begins, int row, Widened<Product>& widened, const PanelSums<Product>* sums,
                             Block<Sum, rows, panels>& block) const {
        if constexpr (kExact) {
            const std::int32_t* const excess = widened.excess_at(at) + row;
            UNROLLED for (int p = 0; p < panels; ++p)
                UNROLLED for (int r = 0; r < rows; ++r) block.at[p][r] = _mm512_set1_epi32(excess[r]);
            if (weight.zeros && !kReads)
                UNROLLED for (int p = 0; p < panels; ++p) {
                    const auto* const its = panel_zeros(weight, panel + p) + group * kChannels;
                    const __m512i zeros = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(its)));
                    UNROLLED for (int r = 0; r < rows; ++r)
                        block.at[p][r] = _mm512_add_epi32(block.at[p][r], _mm512_mullo_epi32(zeros, _mm512_set1_epi32(excess[r] / Product::kExcess)));
                }
            if (!begins)
                UNROLLED for (int p = 0; p < panels; ++p)
                    UNROLLED for (int r = 0; r < rows; ++r) block.at[p][r] = _mm512_add_epi32(block.at[p][r], load(sums[p].group[row + r]));
        } else {
            UNROLLED for (int p = 0; p < panels; ++p)
                UNROLLED for (int r = 0; r < rows; ++r) block.at[p][r] = begins ? _mm512_setzero_ps() : load(sums[p].group[row + r]);
        }
    }

    // total = fma(sum of the group, scale, total).
    template <int rows, int panels>
    AVX512_INLINE void fold(int panel, int group, int row, PanelSums<Product>* sums, const Block<Sum, rows, panels>& block) const {
        UNROLLED for (int p = 0; p < panels; ++p) {
            const __m512 scale = _mm512_mul_ps(load(panel_scales(weight, panel + p) + group * kChannels), _mm512_set1_ps(factor));
            UNROLLED for (int r = 0; r < rows; ++r) {
                float* const total = sums[p].total[row + r];
                store(total, _mm512_fmadd_ps(as_floats(block.at[p][r]), scale, load(total)));
            }
        }
    }

    AVX512_INLINE static __m512 as_floats(__m512i exact) { return _mm512_cvtepi32_ps(exact); }
    AVX512_INLINE static __m512 as_floats(__m512 sum) { return sum; }

    AVX512 void finish(int panel, int row, int rows, const PanelSums<Product>& sums) const {
        if constexpr (kExact) {
            for (int r = 0; r < rows; ++r) finish_exact(weight, panel, load(sums.total[r]), x.scales[row + r], bias, y + (row + r) * y_stride);
        } else {
            const auto real = static_cast<__mmask16>((1u << panel_channels(weight, panel)) - 1);
            const __m512 plus = bias ? _mm512_maskz_loadu_ps(real, bias + panel * kChannels) : _mm512_setzero_ps();
            for (int r = 0; r < rows; ++r)
                _mm512_mask_storeu_ps(y + (row + r) * y_stride + panel * kChannels, real, _mm512_add_ps(groups ? load(sums.total[r]) : load(sums.group[r]), plus));
        }
    }
};

template <class Product>
AVX512 void play(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y, std::ptrdiff_t y_stride) {
    const Body<Product> body{weight, x, bias, y, y_stride};
    Widened<Product> widened;
    PanelSums<Product> panels[kPanels];
    Room room;
    // Where all of some rows are widened at once, panels are read one or two at a time from end to end.
    const bool at_once = x.count <= kBlock && body.widens_at_once(x.count);
    const int together = !at_once ? kPanels : x.count <= kFew ? 1 : 2;
    for (int panel = first; panel < last; panel += together)
        for (int row = 0; row < x.count; row += kBlock) {
            const int count = std::min(together, last - panel), rows = std::min(kBlock, x.count - row);
            const int after = row + rows < x.count ? panel : std::min(panel + count, last - 1);
            body.play(panel, count, after, row, rows, widened, panels, room);
        }
}

// One product for few rows, another for more.
template <class Few, class Many>
AVX512 void play_by_count(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y, std::ptrdiff_t y_stride) {
    if (x.count <= kInRegisters)
        play<Few>(weight, x, first, last, bias, y, y_stride);
    else
        play<Many>(weight, x, first, last, bias, y, y_stride);
}

}  // namespace

AVX512 void linear_avx512(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y, std::ptrdiff_t y_stride) {
    if (weight.masks && linear_sparse_avx512(weight, x, first, last, bias, y, y_stride)) return;
    const auto lies_in = [&](WeightFormat format) { return weight.format == format && !weight.masks; };
    switch (feed_of(weight, x)) {
        case Feed::f32: return play<F32>(weight, x, first, last, bias, y, y_stride);
        case Feed::bf16:
            if (lies_in(WeightFormat::int8)) return play_by_count<Int8Bf16, Expanded<Int8Bf16>>(weight, x, first, last, bias, y, y_stride);
            if (lies_in(WeightFormat::int4) && !weight.zeros) return play_by_count<Int4Bf16, Expanded<Int4Bf16>>(weight, x, first, last, bias, y, y_stride);
            return play<Bf16>(weight, x, first, last, bias, y, y_stride);
        default:
            if (lies_in(WeightFormat::int4) && plays_few_nibbles(PlusEight(), weight, x, first, last, bias, y, y_stride)) return;
            if (lies_in(WeightFormat::lut4) && plays_few_nibbles(Looked(weight.codebook), weight, x, first, last, bias, y, y_stride)) return;
            if (lies_in(WeightFormat::int4)) return play<Int4Expanded>(weight, x, first, last, bias, y, y_stride);
            return play<Int8>(weight, x, first, last, bias, y, y_stride);
    }
}

}  // namespace hasten

#endif
