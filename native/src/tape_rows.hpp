// The ops of a tape that keep rows apart: norms, pointwise functions, copies of features. What each computes is written at its kernel.
#pragma once

#include <cstring>
#include <utility>
#include <vector>

#include "row_op.hpp"

namespace hasten {

// Rows of a float32 table by position.
struct EmbedPositionsOp final : RowOp {
    const float* table;
    int width;
    Place y;

    EmbedPositionsOp(const float* table, int width, Place y) : RowOp(Rows::tokens), table(table), width(width), y(y) {}
    void play_rows(const RowBlock& block) const override {
        float* to = block.at<float>(y, width);
        for (std::size_t row = block.begin; row < block.end; ++row, to += width)
            std::memcpy(to, table + static_cast<std::size_t>(block.step.positions[row]) * width, width * sizeof(float));
    }
};

struct LayerNormOp final : RowOp {
    Place x, y;
    int n, group;
    std::vector<float> weight, bias;
    float eps;

    LayerNormOp(Rows rows, Place x, Place y, int n, int group, std::vector<float> weight, std::vector<float> bias, float eps)
        : RowOp(rows), x(x), y(y), n(n), group(group), weight(std::move(weight)), bias(std::move(bias)), eps(eps) {}
    void play_rows(const RowBlock& block) const override {
        layer_norm(block.tape.isa(), block.at<float>(x, n), block.count(), n, group, weight.data(), bias.empty() ? nullptr : bias.data(),
                   static_cast<int>(weight.size()), eps, block.at<float>(y, n));
    }
};

struct ActivateOp final : RowOp {
    Activation activation;
    Place x, y;
    int n;

    ActivateOp(Rows rows, Activation activation, Place x, Place y, int n) : RowOp(rows), activation(activation), x(x), y(y), n(n) {}
    void play_rows(const RowBlock& block) const override {
        activate(block.tape.isa(), activation, block.at<float>(x, n), static_cast<std::size_t>(block.count()) * n, block.at<float>(y, n));
    }
};

// scale, clip or soft_cap: a function of each number and one other.
struct NumberOp final : RowOp {
    using Kernel = void (*)(Isa isa, const float* x, std::size_t count, float number, float* y);

    Kernel kernel;
    Place x, y;
    int n;
    float number;

    NumberOp(Rows rows, Kernel kernel, Place x, Place y, int n, float number)
        : RowOp(rows), kernel(kernel), x(x), y(y), n(n), number(number) {}
    void play_rows(const RowBlock& block) const override {
        kernel(block.tape.isa(), block.at<float>(x, n), static_cast<std::size_t>(block.count()) * n, number, block.at<float>(y, n));
    }
};

struct GateRowsOp final : RowOp {
    Activation activation;
    Place g, up, y;
    int n;

    GateRowsOp(Activation activation, Place g, Place up, Place y, int n)
        : RowOp(Rows::tokens), activation(activation), g(g), up(up), y(y), n(n) {}
    void play_rows(const RowBlock& block) const override {
        gate_rows(block.tape.isa(), activation, block.at<float>(g, 1), block.at<float>(up, n), block.count(), n, block.at<float>(y, n));
    }
};

struct ClampedSwigluOp final : RowOp {
    Place g, up, y;
    int n;
    float alpha, limit;

    ClampedSwigluOp(Place g, Place up, Place y, int n, float alpha, float limit)
        : RowOp(Rows::tokens), g(g), up(up), y(y), n(n), alpha(alpha), limit(limit) {}
    void play_rows(const RowBlock& block) const override {
        clamped_swiglu(block.tape.isa(), block.at<float>(g, n), block.at<float>(up, n), static_cast<std::size_t>(block.count()) * n, alpha,
                       limit, block.at<float>(y, n));
    }
};

// Runs of features copied from one value to another, head by head: what splits values and lays them side by side.
struct CopyFeaturesOp final : RowOp {
    struct Part {
        Place x, y;
        int size;          // features of every head that are copied
        int x_head, x_at;  // features of a head of x, and the first that is read
        int y_head, y_at;
    };

    int heads;
    std::vector<Part> parts;

    CopyFeaturesOp(Rows rows, int heads, std::vector<Part> parts) : RowOp(rows), heads(heads), parts(std::move(parts)) {}
    void play_rows(const RowBlock& block) const override {
        for (const Part& part : parts) {
            const float* from = block.at<float>(part.x, static_cast<std::size_t>(heads) * part.x_head) + part.x_at;
            float* to = block.at<float>(part.y, static_cast<std::size_t>(heads) * part.y_head) + part.y_at;
            for (int head = 0; head < block.count() * heads; ++head, from += part.x_head, to += part.y_head)
                std::memcpy(to, from, part.size * sizeof(float));
        }
    }
};

}  // namespace hasten
