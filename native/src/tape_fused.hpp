// Ops played as one: the same kernel calls as alone, without a barrier between. What each joins is written at hasten.program.fused.
#pragma once

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <vector>

#include "tape_ops.hpp"

namespace hasten {

// Row ops one after another over the same rows. A thread plays all of them on a block of `most` rows before it goes on to the next block,
// so that what one makes is still in the cache when the next reads it. Values that nobody else reads lie in the thread's scratch.
class ChainOp final : public RowOp {
   public:
    ChainOp(Rows rows, int most, std::vector<std::unique_ptr<RowOp>> parts) : RowOp(rows), most_(most), parts_(std::move(parts)) {
        for (const auto& part : parts_)
            if (part->rows() != rows) throw std::invalid_argument("the ops of a chain must have the same rows");
    }
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

// Products that read the same rows. The threads share the panels of all weights, laid end to end.
class ProductsOp final : public TapeOp {
   public:
    explicit ProductsOp(std::vector<std::unique_ptr<LinearOp>> parts) : parts_(std::move(parts)) {
        for (const auto& part : parts_) panels_ += part->weight->packed().panels();
    }
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const Share mine = share(panels_, thread, tape.threads());
        std::size_t before = 0;
        for (const auto& part : parts_) {
            const std::size_t count = part->weight->packed().panels();
            const std::size_t first = std::clamp(mine.begin, before, before + count), last = std::clamp(mine.end, before, before + count);
            if (first < last) part->play_panels(tape, step, static_cast<int>(first - before), static_cast<int>(last - before));
            before += count;
        }
    }

   private:
    std::size_t panels_ = 0;
    std::vector<std::unique_ptr<LinearOp>> parts_;
};

}  // namespace hasten
