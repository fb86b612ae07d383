// The ops of a tape that keep rows apart: norms, pointwise functions, copies of features. What each computes is written at its kernel.
#pragma once

#include <cstring>
#include <utility>
#include <vector>

#include "tape.hpp"
#include "tape_ops.hpp"

namespace hasten {

// Rows of a float32 table by position.
struct EmbedPositionsOp final : TapeOp {
    const float* table;
    int width;
    Place y;

    EmbedPositionsOp(const float* table, int width, Place y) : table(table), width(width), y(y) {}
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const Share part = share(step.tokens, thread, tape.threads());
        for (std::size_t row = part.begin; row < part.end; ++row)
            std::memcpy(tape.at<float>(y, step) + row * width, table + static_cast<std::size_t>(step.positions[row]) * width,
                        width * sizeof(float));
    }
};

struct LayerNormOp final : TapeOp {
    Rows rows;
    Place x, y;
    int n, group;
    std::vector<float> weight, bias;
    float eps;

    LayerNormOp(Rows rows, Place x, Place y, int n, int group, std::vector<float> weight, std::vector<float> bias, float eps)
        : rows(rows), x(x), y(y), n(n), group(group), weight(std::move(weight)), bias(std::move(bias)), eps(eps) {}
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const Share part = share(row_count(rows, step), thread, tape.threads());
        layer_norm(tape.isa(), tape.at<float>(x, step) + part.begin * n, static_cast<int>(part.end - part.begin), n, group, weight.data(),
                   bias.empty() ? nullptr : bias.data(), static_cast<int>(weight.size()), eps, tape.at<float>(y, step) + part.begin * n);
    }
};

struct ActivateOp final : TapeOp {
    Rows rows;
    Activation activation;
    Place x, y;
    int n;

    ActivateOp(Rows rows, Activation activation, Place x, Place y, int n) : rows(rows), activation(activation), x(x), y(y), n(n) {}
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const Share part = share(static_cast<std::size_t>(row_count(rows, step)) * n, thread, tape.threads());
        activate(tape.isa(), activation, tape.at<float>(x, step) + part.begin, part.end - part.begin, tape.at<float>(y, step) + part.begin);
    }
};

// scale, clip or soft_cap: a function of each number and one other.
struct NumberOp final : TapeOp {
    using Kernel = void (*)(Isa isa, const float* x, std::size_t count, float number, float* y);

    Rows rows;
    Kernel kernel;
    Place x, y;
    int n;
    float number;

    NumberOp(Rows rows, Kernel kernel, Place x, Place y, int n, float number)
        : rows(rows), kernel(kernel), x(x), y(y), n(n), number(number) {}
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const Share part = share(static_cast<std::size_t>(row_count(rows, step)) * n, thread, tape.threads());
        kernel(tape.isa(), tape.at<float>(x, step) + part.begin, part.end - part.begin, number, tape.at<float>(y, step) + part.begin);
    }
};

struct GateRowsOp final : TapeOp {
    Activation activation;
    Place g, up, y;
    int n;

    GateRowsOp(Activation activation, Place g, Place up, Place y, int n) : activation(activation), g(g), up(up), y(y), n(n) {}
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const Share part = share(step.tokens, thread, tape.threads());
        gate_rows(tape.isa(), activation, tape.at<float>(g, step) + part.begin, tape.at<float>(up, step) + part.begin * n,
                  static_cast<int>(part.end - part.begin), n, tape.at<float>(y, step) + part.begin * n);
    }
};

struct ClampedSwigluOp final : TapeOp {
    Place g, up, y;
    int n;
    float alpha, limit;

    ClampedSwigluOp(Place g, Place up, Place y, int n, float alpha, float limit) : g(g), up(up), y(y), n(n), alpha(alpha), limit(limit) {}
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const Share part = share(static_cast<std::size_t>(step.tokens) * n, thread, tape.threads());
        clamped_swiglu(tape.isa(), tape.at<float>(g, step) + part.begin, tape.at<float>(up, step) + part.begin, part.end - part.begin, alpha,
                       limit, tape.at<float>(y, step) + part.begin);
    }
};

// Runs of features copied from one value to another, head by head: what splits values and lays them side by side.
struct CopyFeaturesOp final : TapeOp {
    struct Part {
        Place x, y;
        int size;        // features of every head that are copied
        int x_head, x_at;  // features of a head of x, and the first that is read
        int y_head, y_at;
    };

    Rows rows;
    int heads;
    std::vector<Part> parts;

    CopyFeaturesOp(Rows rows, int heads, std::vector<Part> parts) : rows(rows), heads(heads), parts(std::move(parts)) {}
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const Share share_of_rows = share(row_count(rows, step), thread, tape.threads());
        for (const Part& part : parts)
            for (std::size_t head = share_of_rows.begin * heads; head < share_of_rows.end * heads; ++head)
                std::memcpy(tape.at<float>(part.y, step) + head * part.y_head + part.y_at,
                            tape.at<float>(part.x, step) + head * part.x_head + part.x_at, part.size * sizeof(float));
    }
};

}  // namespace hasten
