// Philox4x32-10, a counter-based generator (Salmon, Moraes, Dror & Shaw, SC 2011): four words from a counter and a key, nothing kept.
#pragma once

#include <array>
#include <cstdint>

namespace hasten {

constexpr std::uint32_t kPhiloxMultipliers[2] = {0xD2511F53, 0xCD9E8D57}, kPhiloxWeyl[2] = {0x9E3779B9, 0xBB67AE85};

inline std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> c, std::array<std::uint32_t, 2> key) {
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t a = std::uint64_t{kPhiloxMultipliers[0]} * c[0], b = std::uint64_t{kPhiloxMultipliers[1]} * c[2];
        c = {static_cast<std::uint32_t>(b >> 32) ^ c[1] ^ key[0], static_cast<std::uint32_t>(b),
             static_cast<std::uint32_t>(a >> 32) ^ c[3] ^ key[1], static_cast<std::uint32_t>(a)};
        key[0] += kPhiloxWeyl[0];
        key[1] += kPhiloxWeyl[1];
    }
    return c;
}

// Whose noise it is. An id's noise depends on this and the id alone, never on how many ids there are.
struct NoiseKey {
    std::uint64_t seed = 0;
    std::uint32_t position = 0, choice = 0, purpose = 0;
};

constexpr std::uint32_t kLowHalf = 1u << 31;  // set in a counter whose words are the lower halves of ids' noise

// The noise of an id in 2⁶⁴ths. The upper half is word id % 4 of the counter (⌊id / 4⌋, position, choice, purpose) under the seed as
// key, the lower half is that of (⌊id / 4⌋ + 2³¹, …), which most ids are never asked for.
inline std::uint32_t noise_half(const NoiseKey& key, std::uint32_t id, std::uint32_t half) {
    return philox({id / 4 | half, key.position, key.choice, key.purpose},
                  {static_cast<std::uint32_t>(key.seed), static_cast<std::uint32_t>(key.seed >> 32)})[id % 4];
}

// Uniform, (⌊noise / 2¹²⌋ + ½) · 2⁻⁵²: never 0 or 1, and exact in float64, as is what it lacks of 1.
inline double uniform(std::uint32_t upper, std::uint32_t lower) {
    return (static_cast<double>(std::uint64_t{upper} << 20 | lower >> 12) + 0.5) * 0x1p-52;
}

}  // namespace hasten
