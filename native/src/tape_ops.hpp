// The ops a tape is made of: each cuts its work into shares and calls a kernel. What each computes is written at the kernel.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "linear.hpp"
#include "tape.hpp"
#include "row_op.hpp"

namespace hasten {

struct EmbedOp final : RowOp {
    const bf16* table;
    std::shared_ptr<const TableBuffer> buffer;  // instead of `table`: it may come to lie elsewhere
    int width;
    float scale;
    Place y;

    EmbedOp(const bf16* table, int width, float scale, Place y)
        : RowOp(Rows::tokens), table(table), width(width), scale(scale), y(y) {}
    EmbedOp(std::shared_ptr<const TableBuffer> buffer, float scale, Place y)
        : RowOp(Rows::tokens), table(nullptr), buffer(std::move(buffer)), width(static_cast<int>(this->buffer->width())), scale(scale), y(y) {}
    std::string name() const override { return "embed"; }
    void play_rows(const RowBlock& block) const override {
        embed(buffer ? buffer->data() : table, width, block.step.token_ids + block.begin, block.count(), scale, block.at<float>(y, width));
    }
};

// Cosines and sines of every token's position, once a step for all layers that share them: [tokens, half] each.
struct RotaryTableOp final : RowOp {
    std::vector<float> frequencies;
    float magnitude;
    Place cos, sin;

    RotaryTableOp(std::vector<float> frequencies, float magnitude, Place cos, Place sin)
        : RowOp(Rows::tokens), frequencies(std::move(frequencies)), magnitude(magnitude), cos(cos), sin(sin) {}
    std::string name() const override { return "rotary_table"; }
    void play_rows(const RowBlock& block) const override {
        const std::size_t half = frequencies.size();
        float* cosines = block.at<float>(cos, half);
        float* sines = block.at<float>(sin, half);
        for (std::size_t row = block.begin; row < block.end; ++row)
            for (const float frequency : frequencies) {
                const float angle = static_cast<float>(block.step.positions[row]) * frequency;
                *cosines++ = std::cos(angle) * magnitude;
                *sines++ = std::sin(angle) * magnitude;
            }
    }
};

struct RmsNormOp final : RowOp {
    Place x, y;
    int n, group;
    std::vector<float> weight;
    float eps, offset;

    RmsNormOp(Rows rows, Place x, Place y, int n, int group, std::vector<float> weight, float eps, float offset)
        : RowOp(rows), x(x), y(y), n(n), group(group), weight(std::move(weight)), eps(eps), offset(offset) {}
    std::string name() const override { return "rms_norm"; }
    void play_rows(const RowBlock& block) const override {
        rms_norm(block.tape.isa(), block.at<float>(x, n), block.count(), n, group, weight.data(), static_cast<int>(weight.size()), eps,
                 offset, block.at<float>(y, n));
    }
};

// float32 rows → as a product reads them: padded, in bf16, or in int8 with a scale a row. `runs` of them make a row of the value.
struct FeedOp final : RowOp {
    Place x, y, scales;
    int runs, n, padded, stride;
    Feed feed;

    FeedOp(Rows rows, Place x, Place y, Place scales, int runs, int n, int padded, int stride, Feed feed)
        : RowOp(rows), x(x), y(y), scales(scales), runs(runs), n(n), padded(padded), stride(stride), feed(feed) {}
    std::string name() const override { return feed == Feed::int8 ? "quantize_rows" : "to_bf16"; }
    void play_rows(const RowBlock& block) const override {
        const float* const from = block.at<float>(x, static_cast<std::size_t>(runs) * n);
        const std::size_t step = static_cast<std::size_t>(runs) * stride;
        const int count = block.count() * runs;
        if (feed == Feed::int8)
            quantize_rows(block.tape.isa(), from, n, count, n, padded, block.at<std::int8_t>(y, step), stride, block.at<float>(scales, runs));
        else
            to_bf16(block.tape.isa(), from, n, count, n, padded, block.at<bf16>(y, step), stride);
    }
};

// float32 rows → int8 of one scale for all, `step`, which is written beside every run.
struct FixedFeedOp final : RowOp {
    Place x, y, scales;
    int runs, n, padded, stride;
    float step;

    FixedFeedOp(Rows rows, Place x, Place y, Place scales, int runs, int n, int padded, int stride, float step)
        : RowOp(rows), x(x), y(y), scales(scales), runs(runs), n(n), padded(padded), stride(stride), step(step) {}
    std::string name() const override { return "quantize_fixed"; }
    void play_rows(const RowBlock& block) const override {
        const int count = block.count() * runs;
        std::fill_n(block.at<float>(scales, runs), count, step);
        quantize_fixed(block.tape.isa(), block.at<float>(x, static_cast<std::size_t>(runs) * n), n, count, n, padded, step,
                       block.at<std::int8_t>(y, static_cast<std::size_t>(runs) * stride), stride);
    }
};

// Played by a ProductsOp, which shares panels between threads.
struct LinearOp {
    Rows rows;
    std::shared_ptr<WeightBuffer> weight;
    Place x;
    std::optional<Place> scales;  // of int8 rows
    Place y;
    int stride;  // elements from one row of x to the next
    std::vector<float> bias;

    LinearOp(Rows rows, std::shared_ptr<WeightBuffer> weight, Place x, std::optional<Place> scales, Place y, int stride, std::vector<float> bias)
        : rows(rows), weight(std::move(weight)), x(x), scales(scales), y(y), stride(stride), bias(std::move(bias)) {}
    std::string name() const { return "linear " + std::to_string(weight->packed().out) + "x" + std::to_string(weight->packed().in); }
    void play_panels(const Tape& tape, const StepInput& step, int first, int last) const {
        const PackedLinear& w = weight->packed();
        const Activations fed{tape.at<std::byte>(x, step), scales ? tape.at<float>(*scales, step) : nullptr, row_count(rows, step), stride};
        linear(tape.isa(), w, fed, first, last, bias.empty() ? nullptr : bias.data(), tape.at<float>(y, step), w.out);
    }
};

struct RotateOp final : RowOp {
    Place x, y, cos, sin;
    int heads, head_dim, start, dims;
    bool interleaved;

    RotateOp(Place x, Place y, Place cos, Place sin, int heads, int head_dim, int start, int dims, bool interleaved)
        : RowOp(Rows::tokens), x(x), y(y), cos(cos), sin(sin), heads(heads), head_dim(head_dim), start(start), dims(dims),
          interleaved(interleaved) {}
    std::string name() const override { return "rotate"; }
    void play_rows(const RowBlock& block) const override {
        const std::size_t width = static_cast<std::size_t>(heads) * head_dim, half = dims / 2;
        rotate(block.tape.isa(), block.at<float>(x, width), block.count(), heads, head_dim, start, dims, interleaved,
               block.at<float>(cos, half), block.at<float>(sin, half), block.at<float>(y, width));
    }
};

struct AppendOp final : RowOp {
    int group, slot;
    Place k, v;

    AppendOp(int group, int slot, Place k, Place v) : RowOp(Rows::tokens), group(group), slot(slot), k(k), v(v) {}
    std::string name() const override { return "append_kv"; }
    void play_rows(const RowBlock& block) const override {
        const PagedLayer layer = block.tape.pages(group).layer(slot);
        append_kv(layer, block.at<float>(k, layer.kv_heads * layer.key_dim), block.at<float>(v, layer.kv_heads * layer.value_dim),
                  block.step.slots[group] + block.begin, 0, block.count());
    }
};

struct AttendOp final : TapeOp {
    static constexpr int kQueryRows = 64;  // queries that share one pass over the cache
    static constexpr std::size_t kAlone = 1 << 15;  // products that take a thread no longer than meeting the others: some 2 µs

    int group, slot;
    Place q, y;
    AttendShape shape;
    std::vector<float> slopes, sinks;

    AttendOp(int group, int slot, Place q, Place y, AttendShape shape, std::vector<float> slopes, std::vector<float> sinks)
        : group(group), slot(slot), q(q), y(y), shape(shape), slopes(std::move(slopes)), sinks(std::move(sinks)) {
        this->shape.slopes = this->slopes.empty() ? nullptr : this->slopes.data();
        this->shape.sinks = this->sinks.empty() ? nullptr : this->sinks.data();
    }
    std::string name() const override { return "attend"; }
    bool alone(const StepInput& step) const override {
        std::size_t seen = 0;
        for (int i = 0; i < step.tokens && seen <= kAlone; ++i)
            seen += static_cast<std::size_t>(step.positions[i] + 1) * shape.heads * (shape.key_dim + shape.value_dim);
        return seen <= kAlone;
    }
    // Tasks (sequence, block of queries, key/value head) go round the threads, the longest contexts of a sequence last.
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const PagedLayer layer = tape.pages(group).layer(slot);
        const unsigned threads = alone(step) ? 1 : tape.threads();
        std::size_t task = 0;
        for (int sequence = 0; sequence < step.sequences; ++sequence) {
            const int begin = step.offsets[sequence], end = step.offsets[sequence + 1];
            const float* const queries = tape.at<float>(q, step) + static_cast<std::size_t>(begin) * shape.heads * shape.key_dim;
            float* const out = tape.at<float>(y, step) + static_cast<std::size_t>(begin) * shape.heads * shape.value_dim;
            const std::int32_t* const table = step.tables[sequence]->pages[group].data();
            for (int first = 0; first < end - begin; first += kQueryRows)
                for (int head = 0; head < shape.kv_heads; ++head)
                    if (task++ % threads == thread)
                        attend(tape.isa(), shape, layer, table, queries, first, std::min(first + kQueryRows, end - begin),
                               step.positions[begin], head, out, tape.scratch(thread));
        }
    }
};

struct AddOp final : RowOp {
    Place a, b, y;
    int n;

    AddOp(Place a, Place b, Place y, int n) : RowOp(Rows::tokens), a(a), b(b), y(y), n(n) {}
    std::string name() const override { return "add"; }
    void play_rows(const RowBlock& block) const override {
        add(block.tape.isa(), block.at<float>(a, n), block.at<float>(b, n), static_cast<std::size_t>(block.count()) * n,
            block.at<float>(y, n));
    }
};

struct GateOp final : RowOp {
    Activation activation;
    Place g, up, y;
    int n;

    GateOp(Activation activation, Place g, Place up, Place y, int n)
        : RowOp(Rows::tokens), activation(activation), g(g), up(up), y(y), n(n) {}
    std::string name() const override { return "gate"; }
    void play_rows(const RowBlock& block) const override {
        gate(block.tape.isa(), activation, block.at<float>(g, n), block.at<float>(up, n), static_cast<std::size_t>(block.count()) * n,
             block.at<float>(y, n));
    }
};

struct SelectRowsOp final : RowOp {
    Place x, y;
    int n;

    SelectRowsOp(Place x, Place y, int n) : RowOp(Rows::logits), x(x), y(y), n(n) {}
    std::string name() const override { return "select_rows"; }
    void play_rows(const RowBlock& block) const override {
        const float* const from = block.tape.at<float>(x, block.step);
        float* to = block.at<float>(y, n);
        for (std::size_t row = block.begin; row < block.end; ++row, to += n)
            std::memcpy(to, from + static_cast<std::size_t>(block.step.rows[row]) * n, n * sizeof(float));
    }
};

}  // namespace hasten
