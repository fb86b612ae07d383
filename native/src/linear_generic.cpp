// Linear layers in plain C++, and the order of sums that every level without tiles keeps. Integers on int8 give the bits of linear_amx.cpp at
// every level: exact sums, then per group and channel fma(float(sum), scale, so far), then per row fma(so far, row scale, bias). Products of
// bf16 and of float32 are added one by one in k order with one rounding each, so these levels agree with each other; tiles pair them, and
// differ in the last bits.
#include <bit>
#include <cmath>
#include <cstring>

#include "linear.hpp"
#include "weight_decode.hpp"

namespace hasten {
namespace {

constexpr int kRowBlock = 64;  // rows that share one decoding of a panel: their activations stay in the second-level cache

HASTEN_INLINE float to_float(bf16 x) { return std::bit_cast<float>(std::uint32_t{x} << 16); }

// Each adds to the sums of a panel's channels, for one row of activations, what a run of k contributes; tiles are as PanelReader gives them.
// One row at a time: with more, gcc 12 reads rows beyond the last where it vectorizes over them.

void add_f32(const std::byte* tiles, int k, const float* x, float* sums) {
    const auto* w = reinterpret_cast<const float*>(tiles);
    for (int i = 0; i < k; ++i, w += kChannels)
        for (int c = 0; c < kChannels; ++c) sums[c] = std::fma(x[i], w[c], sums[c]);
}

void add_bf16(const std::byte* tiles, int k, const bf16* x, float* sums) {
    const auto* w = reinterpret_cast<const bf16*>(tiles);
    for (int i = 0; i < k; i += 2, w += 2 * kChannels) {
        const float even = to_float(x[i]), odd = to_float(x[i + 1]);
        for (int c = 0; c < kChannels; ++c) sums[c] += even * to_float(w[2 * c]);
        for (int c = 0; c < kChannels; ++c) sums[c] += odd * to_float(w[2 * c + 1]);
    }
}

void add_int8(const std::byte* tiles, int k, const std::int8_t* x, std::int32_t* sums) {
    const auto* w = reinterpret_cast<const std::int8_t*>(tiles);
    for (int i = 0; i < k; i += 4, w += 4 * kChannels)
        for (int c = 0; c < kChannels; ++c) {
            std::int32_t sum = 0;
            for (int j = 0; j < 4; ++j) sum += x[i + j] * w[4 * c + j];
            sums[c] += sum;
        }
}

}  // namespace

void linear_generic(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y, std::ptrdiff_t y_stride) {
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
            PanelReader reader(Isa::generic, weight, panel, feed, scratch);
            for (int at = 0, group = 0; at < units.count;) {
                const int stop = std::min(at + stretch, units.count);
                const std::byte* tiles = reader.next(stretch * unit);
                while (at < stop) {
                    const int end = std::min(stop, units.groups ? (group + 1) * units.per_group : stop), k = (end - at) * unit;
                    for (int r = 0; r < rows; ++r) {
                        const std::byte* const from = begin + r * x.stride * element + at * units.depth;
                        switch (feed) {
                            case Feed::int8: add_int8(tiles, k, reinterpret_cast<const std::int8_t*>(from), exact[r]); break;
                            case Feed::bf16: add_bf16(tiles, k, reinterpret_cast<const bf16*>(from), sums[r]); break;
                            case Feed::f32: add_f32(tiles, std::min(k, weight.in - at * unit), reinterpret_cast<const float*>(from), sums[r]); break;
                        }
                    }
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

}  // namespace hasten
