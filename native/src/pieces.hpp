// Work that threads share as they come free: on a shared machine no two threads are equally fast.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "thread_pool.hpp"

namespace hasten {

// `count` things in pieces of `most`. Every thread has a share of its own, the same every time, for that memory is near it where it was the
// first to touch it; it takes its share piece by piece, then what the others have not begun. Where shares are small they are one piece each, and stay.
class Pieces {
   public:
    Pieces(std::size_t count, std::size_t most, unsigned threads) : count_(count), most_(most), taken_(threads) {}

    // body(begin, end) for the pieces that come to `thread`. All threads of a step call this once each, and wait for one another before
    // any calls it again.
    template <class Body>
    void take(unsigned thread, Body body) const {
        const auto threads = static_cast<unsigned>(taken_.size());
        for (unsigned other = 0; other < threads; ++other) {
            const unsigned owner = (thread + other) % threads;
            const Share whole = share(count_, owner, threads);
            const std::size_t pieces = (whole.end - whole.begin + most_ - 1) / most_;
            if (pieces <= 1) {
                if (pieces && owner == thread) body(whole.begin, whole.end);
                continue;
            }
            // Each thread asks once too often, so a round takes the same number every time and nobody sets it back.
            for (;;) {
                const std::size_t piece = taken_[owner].pieces.fetch_add(1, std::memory_order_relaxed) % (pieces + threads);
                if (piece >= pieces) break;
                const std::size_t begin = whole.begin + piece * most_;
                body(begin, std::min(begin + most_, whole.end));
            }
        }
    }

   private:
    struct alignas(64) Taken {
        mutable std::atomic<std::uint64_t> pieces{0};
        Taken() = default;
        Taken(const Taken&) noexcept {}  // a vector asks for it; none is copied after a round has begun
    };
    std::size_t count_, most_;
    std::vector<Taken> taken_;
};

}  // namespace hasten
