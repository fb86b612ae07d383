// Mixture-of-experts ops of a tape. How their values lie is written in experts.hpp.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "experts.hpp"
#include "tape.hpp"

namespace hasten {

// The packed weights of a layer's experts, each a linear layer of its own.
class ExpertWeights {
   public:
    explicit ExpertWeights(std::vector<std::shared_ptr<WeightBuffer>> experts) : experts_(std::move(experts)) {}

    // As they are now: a weight may come to lie elsewhere.
    std::vector<PackedLinear> packed() const {
        std::vector<PackedLinear> all;
        all.reserve(experts_.size());
        for (const auto& each : experts_) all.push_back(each->packed());
        return all;
    }
    std::size_t bytes() const {
        std::size_t sum = 0;
        for (const auto& each : experts_) sum += each->bytes();
        return sum;
    }

   private:
    std::vector<std::shared_ptr<WeightBuffer>> experts_;
};

// The tokens whose choices `thread` handles.
inline Share tokens_of(const Tape& tape, const StepInput& step, unsigned thread) {
    return share(static_cast<std::size_t>(step.tokens), thread, tape.threads());
}

struct RouteOp final : TapeOp {
    RouteShape shape;
    std::vector<float> correction;
    Place logits, experts, weights;

    RouteOp(RouteShape shape, std::vector<float> correction, Place logits, Place experts, Place weights)
        : shape(shape), correction(std::move(correction)), logits(logits), experts(experts), weights(weights) {}
    std::string name() const override { return "route"; }
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const Share part = tokens_of(tape, step, thread);
        route(shape, correction.empty() ? nullptr : correction.data(), tape.at<float>(logits, step) + part.begin * shape.experts,
              static_cast<int>(part.end - part.begin), tape.scratch(thread), tape.at<std::int32_t>(experts, step) + part.begin * shape.top_k,
              tape.at<float>(weights, step) + part.begin * shape.top_k);
    }
};

// One thread counts: a few thousand choices take microseconds.
struct GroupByExpertOp final : TapeOp {
    int count, top_k;
    Place experts, starts, places;

    GroupByExpertOp(int count, int top_k, Place experts, Place starts, Place places)
        : count(count), top_k(top_k), experts(experts), starts(starts), places(places) {}
    std::string name() const override { return "group_by_expert"; }
    bool alone(const StepInput&) const override { return true; }
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        if (thread == 0)
            group_by_expert(tape.at<std::int32_t>(experts, step), step.tokens * top_k, count, tape.at<std::int32_t>(starts, step),
                            tape.at<std::int32_t>(places, step));
    }
};

// Rows of tokens as a product reads them → rows of assignments.
struct GatherRowsOp final : TapeOp {
    int top_k;
    std::size_t row_bytes;
    bool scaled;
    Place x, scales, places, y, y_scales;

    GatherRowsOp(int top_k, std::size_t row_bytes, bool scaled, Place x, Place scales, Place places, Place y, Place y_scales)
        : top_k(top_k), row_bytes(row_bytes), scaled(scaled), x(x), scales(scales), places(places), y(y), y_scales(y_scales) {}
    std::string name() const override { return "gather_rows"; }
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const Share part = tokens_of(tape, step, thread);
        gather_rows(tape.at<std::byte>(x, step), scaled ? tape.at<float>(scales, step) : nullptr, row_bytes,
                    tape.at<std::int32_t>(places, step), static_cast<int>(part.begin), static_cast<int>(part.end), top_k,
                    tape.at<std::byte>(y, step), scaled ? tape.at<float>(y_scales, step) : nullptr);
    }
};

struct ExpertLinearOp final : TapeOp {
    std::shared_ptr<ExpertWeights> weights;
    bool scaled;  // x is int8
    Place x, scales, starts, y;
    int stride;  // elements from one row of x to the next
    std::vector<float> bias;

    ExpertLinearOp(std::shared_ptr<ExpertWeights> weights, bool scaled, Place x, Place scales, Place starts, Place y, int stride,
                   std::vector<float> bias)
        : weights(std::move(weights)), scaled(scaled), x(x), scales(scales), starts(starts), y(y), stride(stride), bias(std::move(bias)) {}
    std::string name() const override { return "expert_linear"; }
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const std::vector<PackedLinear> experts = weights->packed();
        const int count = static_cast<int>(experts.size());
        const std::int32_t* const runs = tape.at<std::int32_t>(starts, step);
        const Activations fed{tape.at<std::byte>(x, step), scaled ? tape.at<float>(scales, step) : nullptr, runs[count], stride};
        expert_linear(tape.isa(), experts.data(), count, runs, fed, thread, tape.threads(), bias.empty() ? nullptr : bias.data(),
                      tape.at<float>(y, step));
    }
};

struct CombineOp final : TapeOp {
    int top_k, n;
    Place x, weights, places, y;

    CombineOp(int top_k, int n, Place x, Place weights, Place places, Place y) : top_k(top_k), n(n), x(x), weights(weights), places(places), y(y) {}
    std::string name() const override { return "combine"; }
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const Share part = tokens_of(tape, step, thread);
        combine(tape.at<float>(x, step), n, tape.at<float>(weights, step), tape.at<std::int32_t>(places, step), static_cast<int>(part.begin),
                static_cast<int>(part.end), top_k, tape.at<float>(y, step));
    }
};

}  // namespace hasten
