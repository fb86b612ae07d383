// Linear layers of one weight a head, as latent attention has them around its cache.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "tape.hpp"
#include "tape_ops.hpp"

namespace hasten {

// float32 rows of heads side by side → bf16, every head padded as its product wants it.
struct FeedHeadsOp final : TapeOp {
    Place x, y;
    int heads, n, padded, stride;  // n features of a head, `stride` elements from one head to the next

    FeedHeadsOp(Place x, Place y, int heads, int n, int padded, int stride)
        : x(x), y(y), heads(heads), n(n), padded(padded), stride(stride) {}
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const Share part = share(static_cast<std::size_t>(step.tokens) * heads, thread, tape.threads());
        to_bf16(tape.isa(), tape.at<float>(x, step) + part.begin * n, n, static_cast<int>(part.end - part.begin), n, padded,
                tape.at<bf16>(y, step) + part.begin * stride, stride);
    }
};

// y[T, heads · out] of rows that FeedHeadsOp made: head h by weight h.
struct HeadLinearOp final : TapeOp {
    std::vector<std::shared_ptr<WeightBuffer>> weights;
    Place x, y;
    int stride;

    HeadLinearOp(std::vector<std::shared_ptr<WeightBuffer>> weights, Place x, Place y, int stride)
        : weights(std::move(weights)), x(x), y(y), stride(stride) {}
    // Panels of all heads go round as one run, so that two threads share even one head.
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const int heads = static_cast<int>(weights.size()), panels = weights[0]->packed().panels();
        const std::ptrdiff_t out = weights[0]->packed().out;
        const Share part = share(static_cast<std::size_t>(heads) * panels, thread, tape.threads());
        const int begin = static_cast<int>(part.begin), end = static_cast<int>(part.end);
        for (int head = begin / panels; head * panels < end; ++head) {
            const Activations fed{tape.at<bf16>(x, step) + static_cast<std::ptrdiff_t>(head) * stride, nullptr, step.tokens,
                                  static_cast<std::ptrdiff_t>(heads) * stride};
            linear(tape.isa(), weights[head]->packed(), fed, std::max(begin - head * panels, 0), std::min(end - head * panels, panels),
                   nullptr, tape.at<float>(y, step) + head * out, heads * out);
        }
    }
};

}  // namespace hasten
