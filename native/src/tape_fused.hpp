// Ops played as one: the same kernel calls as alone, without a barrier between. What each joins is written at hasten.program.fused.
#pragma once

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "pieces.hpp"
#include "tape_ops.hpp"

namespace hasten {

template <class Op>
std::string joined(const std::vector<std::unique_ptr<Op>>& parts) {
    std::string names;
    for (const auto& part : parts) names += (names.empty() ? "" : " + ") + part->name();
    return names;
}

// Row ops one after another over the same rows. A thread plays all of them on a block of `most` rows before it goes on to the next block,
// so that what one makes is still in the cache when the next reads it. Values that nobody else reads lie in the thread's scratch.
class ChainOp final : public RowOp {
   public:
    ChainOp(Rows rows, int most, std::vector<std::unique_ptr<RowOp>> parts) : RowOp(rows), most_(most), parts_(std::move(parts)) {
        for (const auto& part : parts_)
            if (part->rows() != rows) throw std::invalid_argument("the ops of a chain must have the same rows");
    }
    std::string name() const override { return joined(parts_); }
    void play_rows(const RowBlock& block) const override {
        for (std::size_t begin = block.begin; begin < block.end; begin += most_) {
            const RowBlock some{block.tape, block.step, block.thread, begin, std::min(begin + most_, block.end)};
            for (const auto& part : parts_) part->play_rows(some);
        }
    }

   private:
    std::size_t most_;
    std::vector<std::unique_ptr<RowOp>> parts_;
};

// Products that read the same rows. The threads share the panels of all weights, laid end to end: for few rows in pieces of some 15 µs of
// reading, many times what taking one costs; for many, at levels that widen rows for each piece, in pieces of so many panels that this is little beside them.
class ProductsOp final : public TapeOp {
   public:
    ProductsOp(std::vector<std::unique_ptr<LinearOp>> parts, unsigned threads, std::size_t piece_bytes = 256 * 1024)
        : parts_(std::move(parts)),
          for_few_(panel_count(parts_), panels_of_piece(parts_, piece_bytes), threads),
          for_many_(panel_count(parts_), std::max(kManyPanels, panels_of_piece(parts_, piece_bytes)), threads) {}
    std::string name() const override { return joined(parts_); }
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const bool widens = tape.isa() == Isa::avx2 || tape.isa() == Isa::avx512;
        const Pieces& pieces = widens && row_count(parts_.front()->rows, step) > kFewRows ? for_many_ : for_few_;
        pieces.take(thread, [&](std::size_t begin, std::size_t end) {
            std::size_t before = 0;
            for (const auto& part : parts_) {
                const std::size_t count = part->weight->packed().panels();
                const std::size_t first = std::clamp(begin, before, before + count), last = std::clamp(end, before, before + count);
                if (first < last) part->play_panels(tape, step, static_cast<int>(first - before), static_cast<int>(last - before));
                before += count;
            }
        });
    }

   private:
    static constexpr int kFewRows = 8;
    static constexpr std::size_t kManyPanels = 16;

    static std::size_t panel_count(const std::vector<std::unique_ptr<LinearOp>>& parts) {
        std::size_t panels = 0;
        for (const auto& part : parts) panels += static_cast<std::size_t>(part->weight->packed().panels());
        return panels;
    }
    // A multiple of four: AVX2 and tiles take so many together.
    static std::size_t panels_of_piece(const std::vector<std::unique_ptr<LinearOp>>& parts, std::size_t piece_bytes) {
        std::size_t bytes = 0;
        for (const auto& part : parts) bytes += part->weight->bytes();
        return std::max<std::size_t>(1, piece_bytes * panel_count(parts) / std::max<std::size_t>(bytes, 1) / 4) * 4;
    }

    std::vector<std::unique_ptr<LinearOp>> parts_;
    Pieces for_few_, for_many_;
};

}  // namespace hasten
