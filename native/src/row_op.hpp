// Ops whose rows are independent of one another, and so can be played on any run of rows.
#pragma once

#include "tape.hpp"

namespace hasten {

inline int row_count(Rows rows, const StepInput& step) { return rows == Rows::tokens ? step.tokens : step.logit_rows; }

// The rows [begin, end) of a step, as one thread plays them.
struct RowBlock {
    const Tape& tape;
    const StepInput& step;
    unsigned thread;
    std::size_t begin, end;

    int count() const { return static_cast<int>(end - begin); }

    // The block's first row of a value whose rows are `stride` elements apart.
    template <class T>
    T* at(Place place, std::size_t stride) const {
        if (place.in_block()) return reinterpret_cast<T*>(reinterpret_cast<std::byte*>(tape.scratch(thread)) + (place.offset & ~Place::kBlock));
        return tape.at<T>(place, step) + begin * stride;
    }
};

class RowOp : public TapeOp {
   public:
    explicit RowOp(Rows rows) : rows_(rows) {}
    virtual void play_rows(const RowBlock& block) const = 0;

    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const Share part = share(row_count(rows_, step), thread, tape.threads());
        if (part.begin < part.end) play_rows({tape, step, thread, part.begin, part.end});
    }
    bool alone(const StepInput& step) const override { return row_count(rows_, step) <= 1; }
    Rows rows() const { return rows_; }

   private:
    Rows rows_;
};

}  // namespace hasten
