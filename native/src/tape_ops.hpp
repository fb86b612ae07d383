// The ops a tape is made of: each cuts its work into shares and calls a kernel. What each computes is written at the kernel.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "tape.hpp"

namespace hasten {

inline int row_count(Rows rows, const StepInput& step) { return rows == Rows::tokens ? step.tokens : step.logit_rows; }

struct EmbedOp final : TapeOp {
    const bf16* table;
    int width;
    float scale;
    Place y;

    EmbedOp(const bf16* table, int width, float scale, Place y) : table(table), width(width), scale(scale), y(y) {}
    std::string name() const override { return "embed"; }
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const Share part = share(step.tokens, thread, tape.threads());
        embed(table, width, step.token_ids + part.begin, static_cast<int>(part.end - part.begin), scale,
              tape.at<float>(y, step) + part.begin * width);
    }
};

// Cosines and sines of every token's position, once a step for all layers that share them: [tokens, half] each.
struct RotaryTableOp final : TapeOp {
    std::vector<float> frequencies;
    float magnitude;
    Place cos, sin;

    RotaryTableOp(std::vector<float> frequencies, float magnitude, Place cos, Place sin)
        : frequencies(std::move(frequencies)), magnitude(magnitude), cos(cos), sin(sin) {}
    std::string name() const override { return "rotary_table"; }
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const Share part = share(step.tokens, thread, tape.threads());
        const std::size_t half = frequencies.size();
        float* const cosines = tape.at<float>(cos, step);
        float* const sines = tape.at<float>(sin, step);
        for (std::size_t row = part.begin; row < part.end; ++row)
            for (std::size_t i = 0; i < half; ++i) {
                const float angle = static_cast<float>(step.positions[row]) * frequencies[i];
                cosines[row * half + i] = std::cos(angle) * magnitude;
                sines[row * half + i] = std::sin(angle) * magnitude;
            }
    }
};

struct RmsNormOp final : TapeOp {
    Rows rows;
    Place x, y;
    int n, group;
    std::vector<float> weight;
    float eps, offset;

    RmsNormOp(Rows rows, Place x, Place y, int n, int group, std::vector<float> weight, float eps, float offset)
        : rows(rows), x(x), y(y), n(n), group(group), weight(std::move(weight)), eps(eps), offset(offset) {}
    std::string name() const override { return "rms_norm"; }
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const Share part = share(row_count(rows, step), thread, tape.threads());
        rms_norm(tape.isa(), tape.at<float>(x, step) + part.begin * n, static_cast<int>(part.end - part.begin), n, group, weight.data(),
                 static_cast<int>(weight.size()), eps, offset, tape.at<float>(y, step) + part.begin * n);
    }
};

// float32 rows → bf16, or int8 with a scale a row, padded as the product that reads them wants.
struct FeedOp final : TapeOp {
    Rows rows;
    Place x, y, scales;
    int n, padded, stride;
    bool to_int8;

    FeedOp(Rows rows, Place x, Place y, Place scales, int n, int padded, int stride, bool to_int8)
        : rows(rows), x(x), y(y), scales(scales), n(n), padded(padded), stride(stride), to_int8(to_int8) {}
    std::string name() const override { return to_int8 ? "quantize_rows" : "to_bf16"; }
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const Share part = share(row_count(rows, step), thread, tape.threads());
        const int count = static_cast<int>(part.end - part.begin);
        const float* const from = tape.at<float>(x, step) + part.begin * n;
        if (to_int8)
            quantize_rows(tape.isa(), from, n, count, n, padded, tape.at<std::int8_t>(y, step) + part.begin * stride, stride,
                          tape.at<float>(scales, step) + part.begin);
        else
            to_bf16(tape.isa(), from, n, count, n, padded, tape.at<bf16>(y, step) + part.begin * stride, stride);
    }
};

struct LinearOp final : TapeOp {
    Rows rows;
    std::shared_ptr<WeightBuffer> weight;
    Place x, scales, y;
    int stride;  // elements from one row of x to the next
    std::vector<float> bias;

    LinearOp(Rows rows, std::shared_ptr<WeightBuffer> weight, Place x, Place scales, Place y, int stride, std::vector<float> bias)
        : rows(rows), weight(std::move(weight)), x(x), scales(scales), y(y), stride(stride), bias(std::move(bias)) {}
    std::string name() const override { return "linear " + std::to_string(weight->packed().out) + "x" + std::to_string(weight->packed().in); }
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const PackedLinear& w = weight->packed();
        const Share panels = share(w.panels(), thread, tape.threads());
        const bool quantized = w.format != WeightFormat::bf16;
        const Activations fed{tape.at<std::byte>(x, step), quantized ? tape.at<float>(scales, step) : nullptr, row_count(rows, step),
                              stride};
        linear(tape.isa(), w, fed, static_cast<int>(panels.begin), static_cast<int>(panels.end), bias.empty() ? nullptr : bias.data(),
               tape.at<float>(y, step), w.out);
    }
};

struct RotateOp final : TapeOp {
    Place x, y, cos, sin;
    int heads, head_dim, start, dims;
    bool interleaved;

    RotateOp(Place x, Place y, Place cos, Place sin, int heads, int head_dim, int start, int dims, bool interleaved)
        : x(x), y(y), cos(cos), sin(sin), heads(heads), head_dim(head_dim), start(start), dims(dims), interleaved(interleaved) {}
    std::string name() const override { return "rotate"; }
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const Share part = share(step.tokens, thread, tape.threads());
        const std::size_t width = static_cast<std::size_t>(heads) * head_dim, half = dims / 2;
        rotate(tape.isa(), tape.at<float>(x, step) + part.begin * width, static_cast<int>(part.end - part.begin), heads, head_dim, start,
               dims, interleaved, tape.at<float>(cos, step) + part.begin * half, tape.at<float>(sin, step) + part.begin * half,
               tape.at<float>(y, step) + part.begin * width);
    }
};

struct AppendOp final : TapeOp {
    int group, slot;
    Place k, v;

    AppendOp(int group, int slot, Place k, Place v) : group(group), slot(slot), k(k), v(v) {}
    std::string name() const override { return "append_kv"; }
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const Share part = share(step.tokens, thread, tape.threads());
        append_kv(tape.groups()[group]->layer(slot), tape.at<float>(k, step), tape.at<float>(v, step), step.slots[group],
                  static_cast<int>(part.begin), static_cast<int>(part.end));
    }
};

struct AttendOp final : TapeOp {
    static constexpr int kQueryRows = 64;  // queries that share one pass over the cache

    int group, slot;
    Place q, y;
    AttendShape shape;
    std::vector<float> slopes, sinks;

    AttendOp(int group, int slot, Place q, Place y, AttendShape shape, std::vector<float> slopes, std::vector<float> sinks)
        : group(group), slot(slot), q(q), y(y), shape(shape), slopes(std::move(slopes)), sinks(std::move(sinks)) {
        this->shape.slopes = this->slopes.empty() ? nullptr : this->slopes.data();
        this->shape.sinks = this->sinks.empty() ? nullptr : this->sinks.data();
    }
    // Tasks (sequence, block of queries, key/value head) go round the threads, the longest contexts of a sequence last.
    std::string name() const override { return "attend"; }
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const PagedLayer layer = tape.groups()[group]->layer(slot);
        std::size_t task = 0;
        for (int sequence = 0; sequence < step.sequences; ++sequence) {
            const int begin = step.offsets[sequence], end = step.offsets[sequence + 1];
            const float* const queries = tape.at<float>(q, step) + static_cast<std::size_t>(begin) * shape.heads * shape.key_dim;
            float* const out = tape.at<float>(y, step) + static_cast<std::size_t>(begin) * shape.heads * shape.value_dim;
            const std::int32_t* const table = step.tables[group] + static_cast<std::size_t>(sequence) * step.widths[group];
            for (int first = 0; first < end - begin; first += kQueryRows)
                for (int head = 0; head < shape.kv_heads; ++head)
                    if (task++ % tape.threads() == thread)
                        attend(tape.isa(), shape, layer, table, queries, first, std::min(first + kQueryRows, end - begin),
                               step.positions[begin], head, out, tape.scratch(thread));
        }
    }
};

struct AddOp final : TapeOp {
    Place a, b, y;
    int n;

    AddOp(Place a, Place b, Place y, int n) : a(a), b(b), y(y), n(n) {}
    std::string name() const override { return "add"; }
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const Share part = share(static_cast<std::size_t>(step.tokens) * n, thread, tape.threads());
        add(tape.isa(), tape.at<float>(a, step) + part.begin, tape.at<float>(b, step) + part.begin, part.end - part.begin,
            tape.at<float>(y, step) + part.begin);
    }
};

struct GateOp final : TapeOp {
    Activation activation;
    Place g, up, y;
    int n;

    GateOp(Activation activation, Place g, Place up, Place y, int n) : activation(activation), g(g), up(up), y(y), n(n) {}
    std::string name() const override { return "gate"; }
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const Share part = share(static_cast<std::size_t>(step.tokens) * n, thread, tape.threads());
        gate(tape.isa(), activation, tape.at<float>(g, step) + part.begin, tape.at<float>(up, step) + part.begin, part.end - part.begin,
             tape.at<float>(y, step) + part.begin);
    }
};

struct SelectRowsOp final : TapeOp {
    Place x, y;
    int n;

    SelectRowsOp(Place x, Place y, int n) : x(x), y(y), n(n) {}
    std::string name() const override { return "select_rows"; }
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const Share part = share(step.logit_rows, thread, tape.threads());
        for (std::size_t row = part.begin; row < part.end; ++row)
            std::memcpy(tape.at<float>(y, step) + row * n, tape.at<float>(x, step) + static_cast<std::size_t>(step.rows[row]) * n,
                        n * sizeof(float));
    }
};

}  // namespace hasten
