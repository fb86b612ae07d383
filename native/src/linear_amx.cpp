// Linear layers with AMX tiles. Per element the order over k is that of the tiles, whatever the blocking:
//   bf16: sum of tile products in k order.   Integers: exact sums, then one rounding per group in k order, then one for the row.
// Few rows (a tile's worth) read each weight once, so four panels share one load of the activations; many rows keep a stretch of the
// activations and of two panels in the second-level cache, and park their sums in y from one stretch of k to the next. That is for the
// formats made at load; all others are decoded to tiles of int8 or bf16 first.
#include "linear.hpp"
#include "weight_decode.hpp"

#if defined(__x86_64__)

#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // the headers' undefined vectors (gcc bug 105593)
#endif

#include <cstring>
#include <type_traits>
#include <utility>

#define AMX __attribute__((target("amx-tile,amx-bf16,amx-int8,avx512f,avx512bw,avx512vl,avx512dq")))
#define AMX_INLINE AMX inline __attribute__((always_inline))

namespace hasten {
namespace {

constexpr int kAhead = 4;          // tiles of each panel prefetched ahead: 4 KiB
constexpr int kRowBlock = 256;     // rows that share one pass over the weights
constexpr int kStretch = 64;       // tile products per stretch of k: two panels of it are 128 KiB, 256 rows of it 1 MiB

struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};

    void set(int tile, int height, int bytes) {
        rows[tile] = static_cast<std::uint8_t>(height);
        row_bytes[tile] = static_cast<std::uint16_t>(bytes);
    }
};

// Sums in tiles 0 to 3, one row of panels; activations in 4; weights in 5 to 7.
AMX void configure_few(int rows, int channels, int k_bytes) {
    TileConfig config;
    for (int tile = 0; tile < 4; ++tile) config.set(tile, rows, channels * 4);
    config.set(4, rows, k_bytes);
    for (int tile = 5; tile < 8; ++tile) config.set(tile, k_bytes / 4, channels * 4);
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

// Sums in tiles 0 to 3, a 2 by 2 block; activations in 4 and 5; weights in 6 and 7.
AMX void configure_many(int rows0, int rows1, int channels, int k_bytes) {
    TileConfig config;
    for (int tile = 0; tile < 4; ++tile) config.set(tile, tile < 2 ? rows0 : rows1, channels * 4);
    config.set(4, rows0, k_bytes);
    config.set(5, rows1, k_bytes);
    for (int tile = 6; tile < 8; ++tile) config.set(tile, k_bytes / 4, channels * 4);
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

// The intrinsics of gcc 12 take a tile's number as text, and their loads do not say that they read memory.
template <int tile>
AMX_INLINE void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile));
}
template <int tile>
AMX_INLINE void load(const void* from, std::ptrdiff_t stride) {
    __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(tile), "r"(from), "r"(stride) : "memory");
}
template <int tile>
AMX_INLINE void store(void* to, std::ptrdiff_t stride) {
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(tile), "r"(to), "r"(stride) : "memory");
}
template <WeightFormat format, int sum, int a, int b>
AMX_INLINE void multiply() {
    if constexpr (format == WeightFormat::bf16)
        __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(a), "i"(b));
    else
        __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(a), "i"(b));
}

AMX_INLINE void prefetch_tile(const std::byte* tile) {
    for (int line = 0; line < kTileBytes; line += 64) _mm_prefetch(reinterpret_cast<const char*>(tile + line), _MM_HINT_T0);
}

// One int4 tile → two int8 tiles of 16 · q.
AMX_INLINE void unpack_tile(const std::byte* nibbles, std::int8_t* bytes) {
    const __m512i high = _mm512_set1_epi8(static_cast<char>(0xf0));
    for (int at = 0; at < kTileBytes; at += 64) {
        const __m512i both = _mm512_loadu_si512(nibbles + at);
        _mm512_store_si512(bytes + at, _mm512_and_si512(_mm512_slli_epi16(both, 4), high));
        _mm512_store_si512(bytes + kTileBytes + at, _mm512_and_si512(both, high));
    }
}

// sums += float(exact) · scale for the rows of a tile; both are [16][16].
AMX_INLINE void add_group(const std::int32_t* exact, __m512 scale, int rows, float* sums) {
    for (int r = 0; r < rows; ++r) {
        const __m512 term = _mm512_cvtepi32_ps(_mm512_load_si512(exact + r * kChannels));
        _mm512_store_ps(sums + r * kChannels, _mm512_fmadd_ps(term, scale, _mm512_load_ps(sums + r * kChannels)));
    }
}

AMX_INLINE __m512 finish(__m512 sum, float row_scale, const float* bias, __mmask16 mask) {
    const __m512 scale = _mm512_set1_ps(row_scale);
    return bias ? _mm512_fmadd_ps(sum, scale, _mm512_maskz_loadu_ps(mask, bias)) : _mm512_mul_ps(sum, scale);
}

AMX_INLINE void add_bias(float* y, std::ptrdiff_t stride, int rows, const float* bias, __mmask16 mask) {
    const __m512 b = _mm512_maskz_loadu_ps(mask, bias);
    for (int r = 0; r < rows; ++r, y += stride) _mm512_mask_storeu_ps(y, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y), b));
}

AMX_INLINE __mmask16 mask_of(int channels) { return static_cast<__mmask16>((1u << channels) - 1); }

template <class Body, int... index>
AMX_INLINE void unrolled(std::integer_sequence<int, index...>, Body body) {
    (body.template operator()<index>(), ...);
}

// The sums of some tiles, integers and what they have added up to. None is 4 KiB from its like: a load waits for an earlier store to the
// same lower 12 bits.
template <int count>
struct Sums {
    alignas(64) std::int32_t exact[count][256];
    std::byte apart[2 * kTileBytes];
    alignas(64) float sums[count][256];
};

struct Call {
    const PackedLinear& weight;
    const Activations& x;
    const float* bias;
    float* y;
    std::ptrdiff_t y_stride;
    Units units;

    const std::byte* row(int r) const { return static_cast<const std::byte*>(x.rows) + r * x.stride * element_bytes(feed_of(weight, x)); }
    std::ptrdiff_t row_bytes() const { return row(1) - row(0); }
    float* out(int r, int panel) const { return y + r * y_stride + panel * kChannels; }
    const float* bias_of(int panel) const { return bias ? bias + panel * kChannels : nullptr; }
};

// At most 16 rows, the panels [panel, panel + count) of equal width.
template <WeightFormat format, int count>
AMX void few(const Call& call, int panel, int channels) {
    constexpr std::make_integer_sequence<int, count> each{};
    const int rows = call.x.count;
    const std::ptrdiff_t row_bytes = call.row_bytes(), y_bytes = call.y_stride * 4;
    const std::byte* const x = call.row(0);
    const std::byte* const tiles = panel_tiles(call.weight, panel);
    const int depth = call.weight.padded_in() / tile_depth(format);
    const std::ptrdiff_t panel_bytes = static_cast<std::ptrdiff_t>(depth) * kTileBytes;
    const __mmask16 mask = mask_of(channels);
    // Near its end a panel prefetches the beginning of the one that comes after this call's.
    const auto ahead = [&](int j, int t) AMX __attribute__((always_inline)) {
        const int next = t + kAhead;
        prefetch_tile(tiles + j * panel_bytes + (next < depth ? next : next + (count - 1) * depth) * std::ptrdiff_t{kTileBytes});
    };
    unrolled(each, []<int j>() AMX __attribute__((always_inline)) { zero<j>(); });

    if constexpr (format == WeightFormat::bf16) {
        for (int t = 0; t < depth; ++t) {
            load<4>(x + t * 64, row_bytes);
            unrolled(each, [&]<int j>() AMX __attribute__((always_inline)) {
                load<5 + j % 3>(tiles + j * panel_bytes + t * std::ptrdiff_t{kTileBytes}, 64);
                multiply<format, j, 4, 5 + j % 3>();
                ahead(j, t);
            });
        }
        unrolled(each, [&]<int j>() AMX __attribute__((always_inline)) {
            store<j>(call.out(0, panel + j), y_bytes);
            if (call.bias) add_bias(call.out(0, panel + j), call.y_stride, rows, call.bias_of(panel + j), mask);
        });
    } else {
        Sums<count> at;
        std::memset(at.sums, 0, sizeof at.sums);
        const Units& units = call.units;
        const float* const scales = panel_scales(call.weight, panel);
        const __m512 fold = _mm512_set1_ps(units.fold);
        // A group's sums are added when the next ends, by when their tile has reached the cache.
        int owed = -1, owed_group = 0;
        const auto settle = [&]() AMX __attribute__((always_inline)) {
            if (owed < 0) return;
            const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(scales + (owed * units.groups + owed_group) * kChannels), fold);
            add_group(at.exact[owed], scale, rows, at.sums[owed]);
        };
        const auto end_group = [&]<int j>(int group) AMX __attribute__((always_inline)) {
            settle();
            store<j>(at.exact[j], 64);
            zero<j>();
            owed = j;
            owed_group = group;
        };
        if constexpr (format == WeightFormat::int8) {
            for (int t = 0; t < depth; ++t) {
                load<4>(x + t * 64, row_bytes);
                unrolled(each, [&]<int j>() AMX __attribute__((always_inline)) {
                    load<5 + j % 3>(tiles + j * panel_bytes + t * std::ptrdiff_t{kTileBytes}, 64);
                    multiply<format, j, 4, 5 + j % 3>();
                    ahead(j, t);
                });
            }
            unrolled(each, [&]<int j>() AMX __attribute__((always_inline)) { end_group.template operator()<j>(0); });
        } else {
            // A tile is unpacked one ahead of its products, so that their loads find it in the cache and not in the store buffer; the
            // two places differ in the lower 12 bits of their addresses, by which a load is held up by an earlier store.
            alignas(4096) std::int8_t unpacked[2][2 * kTileBytes];
            const int per_tile = 128 / units.depth;
            const auto unpack = [&](int j, int t, std::int8_t* to) AMX __attribute__((always_inline)) {
                unpack_tile(tiles + j * panel_bytes + t * std::ptrdiff_t{kTileBytes}, to);
                ahead(j, t);
            };
            unpack(0, 0, unpacked[0]);
            int in_group = 0, group = 0, place = 0;
            for (int t = 0, unit = 0; unit < units.count; ++t) {
                const int here = std::min(per_tile, units.count - unit);
                int counted = in_group, ended = group;
                unrolled(each, [&]<int j>() AMX __attribute__((always_inline)) {
                    if (j + 1 < count)
                        unpack(j + 1, t, unpacked[1 - place]);
                    else if (t + 1 < depth)
                        unpack(0, t + 1, unpacked[1 - place]);
                    counted = in_group;
                    ended = group;
                    for (int u = 0; u < here; ++u) {
                        load<4>(x + (unit + u) * units.depth, row_bytes);
                        load<5 + j % 3>(unpacked[place] + u * units.depth * kChannels, 64);
                        multiply<format, j, 4, 5 + j % 3>();
                        if (++counted == units.per_group || unit + u + 1 == units.count) {
                            end_group.template operator()<j>(ended++);
                            counted = 0;
                        }
                    }
                    place = 1 - place;
                });
                in_group = counted;
                group = ended;
                unit += here;
            }
        }
        settle();
        for (int j = 0; j < count; ++j)
            for (int r = 0; r < rows; ++r) {
                const __m512 sum = _mm512_load_ps(at.sums[j] + r * kChannels);
                _mm512_mask_storeu_ps(call.out(r, panel + j), mask, finish(sum, call.x.scales[r], call.bias_of(panel + j), mask));
            }
    }
}

template <WeightFormat format>
AMX void few_rows(const Call& call, int first, int last) {
    const int full = std::min(last, call.weight.out / kChannels);
    configure_few(call.x.count, kChannels, call.units.depth);
    int panel = first;
    for (; panel + 4 <= full; panel += 4) few<format, 4>(call, panel, kChannels);
    switch (full - panel) {
        case 3: few<format, 3>(call, panel, kChannels); break;
        case 2: few<format, 2>(call, panel, kChannels); break;
        case 1: few<format, 1>(call, panel, kChannels); break;
        default: break;
    }
    if (full < last) {
        const int channels = panel_channels(call.weight, full);
        configure_few(call.x.count, channels, call.units.depth);
        few<format, 1>(call, full, channels);
    }
}

struct Stretch {
    int step, steps;          // tile products before it, and in it
    bool first, last;
    const std::byte* tiles[2];  // its weights, one panel each, unpacked
};

// One stretch of k for a block of row tiles and panels; `fresh` if its weights are still in memory.
template <WeightFormat format, int row_tiles, int count, bool grouped, bool fresh>
AMX_INLINE void block(const Call& call, const Stretch& stretch, int row, const int (&rows)[2], int panel, int channels) {
    constexpr std::make_integer_sequence<int, 4> each{};
    const std::ptrdiff_t row_bytes = call.row_bytes(), y_bytes = call.y_stride * 4;
    const int k_bytes = call.units.depth, unit_bytes = k_bytes * kChannels;
    const std::byte* const x0 = call.row(row) + stretch.step * k_bytes;
    const std::byte* const x1 = x0 + kChannels * row_bytes;
    const __mmask16 mask = mask_of(channels);
    const auto used = [](int tile) { return (tile < 2 || row_tiles == 2) && (tile % 2 == 0 || count == 2); };
    const auto out = [&](int tile) { return call.out(row + tile / 2 * kChannels, panel + tile % 2); };

    Sums<grouped ? 4 : 1> at;
    if constexpr (grouped)
        for (int tile = 0; tile < 4; ++tile)
            if (used(tile))
                for (int r = 0; r < rows[tile / 2]; ++r)
                    _mm512_store_ps(at.sums[tile] + r * kChannels,
                                    stretch.first ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, out(tile) + r * call.y_stride));
    unrolled(each, [&]<int tile>() AMX __attribute__((always_inline)) {
        if constexpr ((tile < 2 || row_tiles == 2) && (tile % 2 == 0 || count == 2)) {
            if (grouped || stretch.first)
                zero<tile>();
            else
                load<tile>(out(tile), y_bytes);
        }
    });

    const Units& units = call.units;
    const __m512 fold = _mm512_set1_ps(units.fold);
    int in_group = 0, group = grouped ? stretch.step / units.per_group : 0;
    const auto end_group = [&]() AMX __attribute__((always_inline)) {
        unrolled(each, [&]<int tile>() AMX __attribute__((always_inline)) {
            if constexpr ((tile < 2 || row_tiles == 2) && (tile % 2 == 0 || count == 2)) {
                store<tile>(at.exact[tile], 64);
                zero<tile>();
            }
        });
        for (int tile = 0; tile < 4; ++tile)
            if (used(tile)) {
                const float* const scales = panel_scales(call.weight, panel + tile % 2) + group * kChannels;
                add_group(at.exact[tile], _mm512_mul_ps(_mm512_loadu_ps(scales), fold), rows[tile / 2], at.sums[tile]);
            }
        ++group;
        in_group = 0;
    };
    for (int s = 0; s < stretch.steps; ++s) {
        load<4>(x0 + s * k_bytes, row_bytes);
        load<6>(stretch.tiles[0] + s * unit_bytes, 64);
        multiply<format, 0, 4, 6>();
        if constexpr (count == 2) {
            load<7>(stretch.tiles[1] + s * unit_bytes, 64);
            multiply<format, 1, 4, 7>();
        }
        if constexpr (row_tiles == 2) {
            load<5>(x1 + s * k_bytes, row_bytes);
            multiply<format, 2, 5, 6>();
            if constexpr (count == 2) multiply<format, 3, 5, 7>();
        }
        if constexpr (fresh)
            for (int j = 0; j < count; ++j) prefetch_tile(stretch.tiles[j] + (s + kAhead) * std::ptrdiff_t{kTileBytes});
        if constexpr (grouped)
            if (++in_group == units.per_group) end_group();
    }
    if constexpr (grouped)
        if (in_group) end_group();

    if constexpr (!grouped)
        unrolled(each, [&]<int tile>() AMX __attribute__((always_inline)) {
            if constexpr ((tile < 2 || row_tiles == 2) && (tile % 2 == 0 || count == 2)) store<tile>(out(tile), y_bytes);
        });
    for (int tile = 0; tile < 4; ++tile) {
        if (!used(tile)) continue;
        const float* const bias = call.bias_of(panel + tile % 2);
        float* y = out(tile);
        if constexpr (format == WeightFormat::bf16) {
            if (stretch.last && bias) add_bias(y, call.y_stride, rows[tile / 2], bias, mask);
        } else if (grouped || stretch.last) {
            const __m512 scale = grouped ? fold : _mm512_mul_ps(_mm512_loadu_ps(panel_scales(call.weight, panel + tile % 2)), fold);
            for (int r = 0; r < rows[tile / 2]; ++r, y += call.y_stride) {
                __m512 sum;
                if constexpr (grouped)
                    sum = _mm512_load_ps(at.sums[tile] + r * kChannels);
                else
                    sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(mask, y)), scale, _mm512_setzero_ps());
                if (stretch.last) sum = finish(sum, call.x.scales[row + tile / 2 * kChannels + r], bias, mask);
                _mm512_mask_storeu_ps(y, mask, sum);
            }
        }
    }
}

// The rows [row, end) of a stretch of k, for one panel or two.
template <WeightFormat format, int count, bool grouped>
AMX void panel_stretch(const Call& call, const Stretch& stretch, int row, int end, int panel, int channels) {
    const int whole = (end - row) / 32 * 32 + row;
    if (row < whole) configure_many(16, 16, channels, call.units.depth);
    if (format != WeightFormat::int4 && row < whole) {
        block<format, 2, count, grouped, format != WeightFormat::int4>(call, stretch, row, {16, 16}, panel, channels);
        row += 32;
    }
    for (; row < whole; row += 32) block<format, 2, count, grouped, false>(call, stretch, row, {16, 16}, panel, channels);
    if (end - row > 16) {
        configure_many(16, end - row - 16, channels, call.units.depth);
        block<format, 2, count, grouped, false>(call, stretch, row, {16, end - row - 16}, panel, channels);
    } else if (end > row) {
        configure_many(end - row, 1, channels, call.units.depth);
        block<format, 1, count, grouped, false>(call, stretch, row, {end - row, 0}, panel, channels);
    }
}

template <WeightFormat format, bool grouped>
AMX void many_rows(const Call& call, int first, int last) {
    constexpr bool nibbles = format == WeightFormat::int4;
    constexpr int kBuffer = nibbles ? kStretch * kTileBytes : 1;
    alignas(64) std::int8_t unpacked[2][kBuffer];
    const int k_bytes = call.units.depth, steps = call.units.count, full = std::min(last, call.weight.out / kChannels);
    int stretch_steps = kStretch * 64 / k_bytes;
    if (grouped) stretch_steps -= stretch_steps % call.units.per_group;
    for (int row = 0; row < call.x.count; row += kRowBlock) {
        const int end = std::min(call.x.count, row + kRowBlock);
        for (int step = 0; step < steps; step += stretch_steps) {
            Stretch stretch{step, std::min(stretch_steps, steps - step), step == 0, step + stretch_steps >= steps, {}};
            for (int panel = first; panel < last;) {
                const int count = panel + 2 <= full ? 2 : 1;
                for (int j = 0; j < count; ++j) {
                    const std::byte* const tiles = panel_tiles(call.weight, panel + j);
                    if constexpr (nibbles) {
                        const int begin = step * k_bytes / 128, stop = ((step + stretch.steps) * k_bytes + 127) / 128;
                        for (int t = begin; t < stop; ++t) {
                            prefetch_tile(tiles + (t + kAhead) * std::ptrdiff_t{kTileBytes});
                            unpack_tile(tiles + t * std::ptrdiff_t{kTileBytes}, unpacked[j] + (t - begin) * 2 * kTileBytes);
                        }
                        stretch.tiles[j] = reinterpret_cast<const std::byte*>(unpacked[j]) + (step * k_bytes - begin * 128) * kChannels;
                    } else {
                        stretch.tiles[j] = tiles + step * std::ptrdiff_t{kTileBytes};
                    }
                }
                if (count == 2)
                    panel_stretch<format, 2, grouped>(call, stretch, row, end, panel, kChannels);
                else
                    panel_stretch<format, 1, grouped>(call, stretch, row, end, panel, panel_channels(call.weight, panel));
                panel += count;
            }
        }
    }
}

// --- weights stored otherwise than they are multiplied

// sums += exact · scale for the rows of a tile whose sums were float32 all along.
AMX_INLINE void add_group(const float* exact, __m512 scale, int rows, float* sums) {
    for (int r = 0; r < rows; ++r)
        _mm512_store_ps(sums + r * kChannels, _mm512_fmadd_ps(_mm512_load_ps(exact + r * kChannels), scale, _mm512_load_ps(sums + r * kChannels)));
}

// The sums of a block of rows and two panels while k goes by: of the group so far (int32 or float32), and of the groups before.
template <class Exact>
struct Parked {
    static constexpr int kTiles = kRowBlock / 16;
    alignas(64) Exact exact[2][kTiles][256];
    alignas(64) float sums[2][kTiles][256];
};

// Units [at, stop) of k for the row tiles [tile, tile + row_tiles) and `count` panels, decoded.
template <Feed feed, int row_tiles, int count, class Exact>
AMX_INLINE void decoded_block(const Call& call, Parked<Exact>& parked, const std::byte* const (&tiles)[2], int at, int stop, int row, int tile,
                              const int (&rows)[2], int panel) {
    constexpr WeightFormat kind = feed == Feed::int8 ? WeightFormat::int8 : WeightFormat::bf16;
    constexpr std::make_integer_sequence<int, 4> each{};
    const Units& units = call.units;
    const std::ptrdiff_t row_bytes = call.row_bytes();
    const int unit_bytes = units.depth * kChannels;
    const std::byte* const x0 = call.row(row + tile * 16);
    const std::byte* const x1 = x0 + 16 * row_bytes;
    const auto for_each = [&](auto body) AMX __attribute__((always_inline)) {
        unrolled(each, [&]<int sum>() AMX __attribute__((always_inline)) {
            if constexpr ((sum < 2 || row_tiles == 2) && (sum % 2 == 0 || count == 2)) body.template operator()<sum>(parked.exact[sum % 2][tile + sum / 2]);
        });
    };
    for_each([&]<int sum>(Exact* exact) AMX __attribute__((always_inline)) { load<sum>(exact, 64); });
    for (int unit = at, step = 0; unit < stop; ++unit, ++step) {
        load<4>(x0 + unit * units.depth, row_bytes);
        load<6>(tiles[0] + step * unit_bytes, 64);
        multiply<kind, 0, 4, 6>();
        if constexpr (count == 2) {
            load<7>(tiles[1] + step * unit_bytes, 64);
            multiply<kind, 1, 4, 7>();
        }
        if constexpr (row_tiles == 2) {
            load<5>(x1 + unit * units.depth, row_bytes);
            multiply<kind, 2, 5, 6>();
            if constexpr (count == 2) multiply<kind, 3, 5, 7>();
        }
        if ((unit + 1) % units.per_group != 0 && unit + 1 != units.count) continue;
        const int group = unit / units.per_group;
        for_each([&]<int sum>(Exact* exact) AMX __attribute__((always_inline)) {
            store<sum>(exact, 64);
            zero<sum>();
            const __m512 scale = units.groups ? _mm512_loadu_ps(panel_scales(call.weight, panel + sum % 2) + group * kChannels) : _mm512_set1_ps(1.0f);
            add_group(exact, _mm512_mul_ps(scale, _mm512_set1_ps(units.fold)), rows[sum / 2], parked.sums[sum % 2][tile + sum / 2]);
        });
    }
    for_each([&]<int sum>(Exact* exact) AMX __attribute__((always_inline)) { store<sum>(exact, 64); });
}

template <Feed feed, int count>
AMX void decoded_panels(const Call& call, int row, int rows, int panel, int channels) {
    using Exact = std::conditional_t<feed == Feed::int8, std::int32_t, float>;
    const Units& units = call.units;
    const int unit = units.depth / element_bytes(feed), stretch = PanelReader::step(feed) / unit, row_tiles = (rows + 15) / 16;
    alignas(64) std::byte scratch[2][PanelReader::kScratch];
    PanelReader readers[2] = {{Isa::amx, call.weight, panel, feed, scratch[0]}, {Isa::amx, call.weight, panel + count - 1, feed, scratch[1]}};
    Parked<Exact> parked;
    for (int j = 0; j < count; ++j) {
        std::memset(parked.exact[j], 0, static_cast<std::size_t>(row_tiles) * sizeof parked.exact[j][0]);
        std::memset(parked.sums[j], 0, static_cast<std::size_t>(row_tiles) * sizeof parked.sums[j][0]);
    }
    for (int at = 0; at < units.count; at += stretch) {
        const int stop = std::min(units.count, at + stretch);
        const std::byte* tiles[2] = {};
        for (int j = 0; j < count; ++j) tiles[j] = readers[j].next(stretch * unit);
        int tile = 0;
        if (rows >= 32) configure_many(16, 16, channels, units.depth);
        for (; tile * 16 + 32 <= rows; tile += 2) decoded_block<feed, 2, count>(call, parked, tiles, at, stop, row, tile, {16, 16}, panel);
        const int left = rows - tile * 16;
        if (left > 16) {
            configure_many(16, left - 16, channels, units.depth);
            decoded_block<feed, 2, count>(call, parked, tiles, at, stop, row, tile, {16, left - 16}, panel);
        } else if (left > 0) {
            configure_many(left, 1, channels, units.depth);
            decoded_block<feed, 1, count>(call, parked, tiles, at, stop, row, tile, {left, 0}, panel);
        }
    }
    const __mmask16 mask = mask_of(channels);
    for (int j = 0; j < count; ++j) {
        const float* const bias = call.bias_of(panel + j);
        for (int r = 0; r < rows; ++r) {
            const __m512 sum = _mm512_load_ps(parked.sums[j][r / 16] + r % 16 * kChannels);
            const __m512 y = feed == Feed::int8 ? finish(sum, call.x.scales[row + r], bias, mask)
                             : bias             ? _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, bias))
                                                : sum;
            _mm512_mask_storeu_ps(call.out(row + r, panel + j), mask, y);
        }
    }
}

template <Feed feed>
AMX void decoded_rows(const Call& call, int first, int last) {
    const int full = std::min(last, call.weight.out / kChannels);
    for (int row = 0; row < call.x.count; row += kRowBlock) {
        const int rows = std::min(kRowBlock, call.x.count - row);
        for (int panel = first; panel < last;) {
            if (panel + 2 <= full)
                decoded_panels<feed, 2>(call, row, rows, panel, kChannels), panel += 2;
            else
                decoded_panels<feed, 1>(call, row, rows, panel, panel_channels(call.weight, panel)), ++panel;
        }
    }
}

template <WeightFormat format>
AMX void dispatch(const Call& call, int first, int last) {
    if (call.x.count <= 16) {
        few_rows<format>(call, first, last);
    } else if (format == WeightFormat::int4 && call.x.count <= 64) {
        // Unpacking four panels again from the cache for every 16 rows is less than parking their sums.
        for (int panel = first; panel < last; panel += 4)
            for (int row = 0; row < call.x.count; row += 16) {
                const Activations some{call.row(row), call.x.scales + row, std::min(16, call.x.count - row), call.x.stride};
                few_rows<format>(Call{call.weight, some, call.bias, call.out(row, 0), call.y_stride, call.units}, panel, std::min(panel + 4, last));
            }
    } else if (format == WeightFormat::int4 && call.weight.group) {
        many_rows<format, format == WeightFormat::int4>(call, first, last);
    } else {
        many_rows<format, false>(call, first, last);
    }
}

}  // namespace

AMX void linear_amx(const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y,
                    std::ptrdiff_t y_stride) {
    const Feed feed = feed_of(weight, x);
    if (feed == Feed::f32) return linear_avx512(weight, x, first, last, bias, y, y_stride);  // there are no tiles of float32
    Call call{weight, x, bias, y, y_stride, Units(weight, feed)};
    const bool plain = !weight.masks && !weight.zeros;
    if (plain && feed == Feed::bf16 && weight.format == WeightFormat::bf16)
        dispatch<WeightFormat::bf16>(call, first, last);
    else if (plain && feed == Feed::int8 && weight.format == WeightFormat::int8 && !weight.group)
        dispatch<WeightFormat::int8>(call, first, last);
    else if (plain && feed == Feed::int8 && weight.format == WeightFormat::int4)
        dispatch<WeightFormat::int4>(call, first, last);
    else if (feed == Feed::int8)
        decoded_rows<Feed::int8>(call, first, last);
    else
        decoded_rows<Feed::bf16>(call, first, last);
    __asm__ volatile("tilerelease");
}

}  // namespace hasten

#endif
