// Reading a packed weight as the dense tiles a product multiplies, whatever way it is stored.
#pragma once

#include "linear.hpp"

namespace hasten {

// One panel in k order. A weight stored as it is multiplied is handed out where it lies; others are decoded into `scratch`.
class PanelReader {
   public:
    // Inputs decoded at most at a time, so that what was decoded is still in the first-level cache when it is multiplied.
    static constexpr int kMost = 1024;
    static constexpr std::size_t kScratch = 16 * 1024 + 64;
    // Inputs of one call to next() that fill the scratch.
    static constexpr int step(Feed feed) { return kMost / element_bytes(feed); }

    PanelReader(Isa isa, const PackedLinear& weight, int panel, Feed feed, std::byte* scratch);

    // Tiles of the next `k` inputs (the rest, where fewer remain): 64 k × 16 of int8 quadruples, 32 k × 16 of bf16 pairs, or 16 k × 16 of
    // float32. `k` is a multiple of 256 unless the panel ends. Valid until the next call.
    const std::byte* next(int k);

   private:
    template <class Level>
    const std::byte* decode(int k);
    template <class Level>
    void decode_bytes(int k, std::int8_t* bytes);

    const PackedLinear& weight_;
    const Feed feed_;
    const Isa isa_;
    const int panel_;
    std::byte* const scratch_;
    const std::byte* elements_;
    const std::uint64_t* mask_ = nullptr;
    int at_ = 0;  // k handed out
};

}  // namespace hasten
