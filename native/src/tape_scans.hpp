// The ops of a tape that go through a sequence's rows in order and keep a state. What each computes is written at its kernel.
#pragma once

#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "scan.hpp"
#include "tape.hpp"

namespace hasten {

// One sequence of a step: where its rows begin, and its state in this layer.
struct Sequence {
    std::size_t begin;
    Span span;
    float* state;
};

// Parts (sequence, part of the state) go round the threads.
class ScanOp : public TapeOp {
   public:
    static constexpr std::size_t kAlone = 1 << 15;  // multiplications that take a thread no longer than meeting the others: some 2 µs

    // `state` numbers of a sequence are kept at `slot` of the pool, which is the tape's group number `group`; a row takes `work` multiplications.
    ScanOp(std::shared_ptr<const StatePool> pool, int group, int slot, std::size_t state, int parts, std::size_t work)
        : pool_(std::move(pool)), group_(group), slot_(slot), parts_(parts), work_(work) {
        if (slot < 0 || slot >= pool_->layers()) throw std::invalid_argument("slot " + std::to_string(slot) + " is no layer of the group");
        if (state != pool_->size())
            throw std::invalid_argument("a state of " + std::to_string(state) + " numbers is not the group's, which has " + std::to_string(pool_->size()));
    }

    bool alone(const StepInput& step) const override { return static_cast<std::size_t>(step.tokens) * work_ <= kAlone; }
    void play(const Tape& tape, const StepInput& step, unsigned thread) const override {
        const unsigned threads = alone(step) ? 1 : tape.threads();
        const ScanKernels& kernels = scan_kernels(tape.isa());
        std::size_t task = 0;
        for (int number = 0; number < step.sequences; ++number) {
            const int begin = step.offsets[number];
            float* const state = pool_->state(step.tables[number]->pages[static_cast<std::size_t>(group_)][0], slot_);
            const Sequence sequence{static_cast<std::size_t>(begin), {step.offsets[number + 1] - begin, step.positions[begin] == 0}, state};
            for (int part = 0; part < parts_; ++part)
                if (task++ % threads == thread) play_part(kernels, tape, step, thread, sequence, part);
        }
    }

   private:
    virtual void play_part(const ScanKernels& kernels, const Tape& tape, const StepInput& step, unsigned thread, const Sequence& sequence,
                           int part) const = 0;

    std::shared_ptr<const StatePool> pool_;
    int group_, slot_, parts_;
    std::size_t work_;
};

// The sequence's first row of a value whose rows have `width` numbers.
inline float* rows_of(const Tape& tape, const StepInput& step, Place place, const Sequence& sequence, std::size_t width) {
    return tape.at<float>(place, step) + sequence.begin * width;
}

// A weight must have as many numbers as the op's sizes say.
inline void require_size(const char* name, const std::vector<float>& weight, std::size_t size) {
    if (weight.size() != size)
        throw std::invalid_argument(std::string(name) + " has " + std::to_string(weight.size()) + " numbers, not " + std::to_string(size));
}

class CausalConvOp final : public ScanOp {
   public:
    // weight [channels, taps]; bias [channels], or empty.
    CausalConvOp(std::shared_ptr<const StatePool> pool, int group, int slot, Place x, Place y, int channels, int taps, const std::vector<float>& weight,
                 std::vector<float> bias, std::optional<Activation> activation)
        : ScanOp(std::move(pool), group, slot, static_cast<std::size_t>(taps - 1) * channels, parts_of(channels, kConvPart),
                 static_cast<std::size_t>(channels) * (taps + (activation ? 20 : 0))),
          x_(x), y_(y), weight_(turned(weight, channels, taps, channels)), bias_(std::move(bias)),
          shape_{channels, taps, weight_.data(), bias_.empty() ? nullptr : bias_.data(), activation.has_value(), activation.value_or(Activation::silu)} {
        if (!bias_.empty()) require_size("bias", bias_, channels);
    }
    std::string name() const override { return "causal_conv"; }

   private:
    void play_part(const ScanKernels& kernels, const Tape& tape, const StepInput& step, unsigned, const Sequence& sequence, int part) const override {
        kernels.causal_conv(shape_, part, sequence.span, rows_of(tape, step, x_, sequence, shape_.channels), sequence.state,
                            rows_of(tape, step, y_, sequence, shape_.channels));
    }

    Place x_, y_;
    std::vector<float> weight_, bias_;
    ConvShape shape_;
};

class SelectiveScanOp final : public ScanOp {
   public:
    struct Places {
        Place x, dt, b, c, y;
    };
    // a_log [channels, states]; d, dt_bias [channels].
    SelectiveScanOp(std::shared_ptr<const StatePool> pool, int group, int slot, Places at, int channels, int states, const std::vector<float>& a_log,
                    std::vector<float> d, std::vector<float> dt_bias)
        : ScanOp(std::move(pool), group, slot, static_cast<std::size_t>(channels) * states, parts_of(channels, kChannelPart),
                 static_cast<std::size_t>(channels) * states * 15),
          at_(at), decay_(turned(decays(a_log), channels, states, kChannelPart)), d_(std::move(d)), dt_bias_(std::move(dt_bias)),
          shape_{channels, states, decay_.data(), d_.data(), dt_bias_.data()} {
        require_size("d", d_, channels);
        require_size("dt_bias", dt_bias_, channels);
    }
    std::string name() const override { return "selective_scan"; }

   private:
    void play_part(const ScanKernels& kernels, const Tape& tape, const StepInput& step, unsigned, const Sequence& sequence, int part) const override {
        const auto rows = [&](Place place, int width) { return rows_of(tape, step, place, sequence, width); };
        kernels.selective_scan(shape_, part, sequence.span, rows(at_.x, shape_.channels), rows(at_.dt, shape_.channels), rows(at_.b, shape_.states),
                               rows(at_.c, shape_.states), sequence.state, rows(at_.y, shape_.channels));
    }

    Places at_;
    std::vector<float> decay_, d_, dt_bias_;
    SelectiveShape shape_;
};

class DualScanOp final : public ScanOp {
   public:
    struct Places {
        Place x, dt, b, c, y;
    };
    struct Sizes {
        int heads, groups, head_dim, states;
    };
    // a_log, d, dt_bias [heads].
    DualScanOp(std::shared_ptr<const StatePool> pool, int group, int slot, Places at, Sizes sizes, const std::vector<float>& a_log, std::vector<float> d,
               std::vector<float> dt_bias, float dt_min, float dt_max)
        : ScanOp(std::move(pool), group, slot, numbers(sizes), sizes.heads * parts_of(sizes.head_dim, kColumnPart), numbers(sizes) * 3),
          at_(at), decay_(decays(a_log)), d_(std::move(d)), dt_bias_(std::move(dt_bias)),
          shape_{sizes.heads, sizes.groups, sizes.head_dim, sizes.states, decay_.data(), d_.data(), dt_bias_.data(), dt_min, dt_max} {
        for (const auto& [name, weight] : {std::pair{"a_log", &decay_}, {"d", &d_}, {"dt_bias", &dt_bias_}}) require_size(name, *weight, sizes.heads);
        if (sizes.groups < 1 || sizes.heads % sizes.groups) throw std::invalid_argument("groups must divide the heads");
    }
    std::string name() const override { return "dual_scan"; }

   private:
    static std::size_t numbers(Sizes sizes) { return static_cast<std::size_t>(sizes.heads) * sizes.head_dim * sizes.states; }
    void play_part(const ScanKernels& kernels, const Tape& tape, const StepInput& step, unsigned, const Sequence& sequence, int part) const override {
        const auto rows = [&](Place place, int width) { return rows_of(tape, step, place, sequence, width); };
        const int parts = parts_of(shape_.head_dim, kColumnPart), inner = shape_.heads * shape_.head_dim, shared = shape_.groups * shape_.states;
        kernels.dual_scan(shape_, part / parts, part % parts, sequence.span, rows(at_.x, inner), rows(at_.dt, shape_.heads), rows(at_.b, shared),
                          rows(at_.c, shared), sequence.state, rows(at_.y, inner));
    }

    Places at_;
    std::vector<float> decay_, d_, dt_bias_;
    DualShape shape_;
};

class GatedDeltaScanOp final : public ScanOp {
   public:
    struct Places {
        Place q, k, v, a, b, y;
    };
    struct Sizes {
        int key_heads, value_heads, key_dim, value_dim;
    };
    // a_log, dt_bias [value_heads]. The tape needs 2 · key_dim floats of scratch.
    GatedDeltaScanOp(std::shared_ptr<const StatePool> pool, int group, int slot, Places at, Sizes sizes, const std::vector<float>& a_log,
                     std::vector<float> dt_bias)
        : ScanOp(std::move(pool), group, slot, numbers(sizes), sizes.value_heads * parts_of(sizes.value_dim, kColumnPart), numbers(sizes) * 4),
          at_(at), decay_(decays(a_log)), dt_bias_(std::move(dt_bias)),
          shape_{sizes.key_heads, sizes.value_heads, sizes.key_dim, sizes.value_dim, decay_.data(), dt_bias_.data()} {
        require_size("a_log", decay_, sizes.value_heads);
        require_size("dt_bias", dt_bias_, sizes.value_heads);
        if (sizes.key_heads < 1 || sizes.value_heads % sizes.key_heads) throw std::invalid_argument("key_heads must divide the value_heads");
    }
    std::string name() const override { return "gated_delta_scan"; }

   private:
    static std::size_t numbers(Sizes sizes) { return static_cast<std::size_t>(sizes.value_heads) * sizes.key_dim * sizes.value_dim; }
    void play_part(const ScanKernels& kernels, const Tape& tape, const StepInput& step, unsigned thread, const Sequence& sequence,
                   int part) const override {
        const auto rows = [&](Place place, int width) { return rows_of(tape, step, place, sequence, width); };
        const int parts = parts_of(shape_.value_dim, kColumnPart), keys = shape_.key_heads * shape_.key_dim, values = shape_.value_heads * shape_.value_dim;
        kernels.gated_delta_scan(shape_, part / parts, part % parts, sequence.span, rows(at_.q, keys), rows(at_.k, keys), rows(at_.v, values),
                                 rows(at_.a, shape_.value_heads), rows(at_.b, shape_.value_heads), sequence.state, rows(at_.y, values),
                                 tape.scratch(thread));
    }

    Places at_;
    std::vector<float> decay_, dt_bias_;
    DeltaShape shape_;
};

class LinearScanOp final : public ScanOp {
   public:
    struct Places {
        Place q, k, v, y;
    };
    // The tape needs shape.scratch() floats of scratch.
    LinearScanOp(std::shared_ptr<const StatePool> pool, int group, int slot, Places at, LinearScanShape shape)
        : ScanOp(std::move(pool), group, slot, static_cast<std::size_t>(shape.kv_heads) * 2 * shape.head_dim * (shape.value_dim + 1), shape.kv_heads,
                 static_cast<std::size_t>(shape.heads) * 2 * shape.head_dim * (shape.value_dim + 40) * 2),
          at_(at), shape_(shape) {}
    std::string name() const override { return "linear_scan"; }

   private:
    void play_part(const ScanKernels& kernels, const Tape& tape, const StepInput& step, unsigned thread, const Sequence& sequence,
                   int part) const override {
        const auto rows = [&](Place place, int heads, int dim) { return rows_of(tape, step, place, sequence, static_cast<std::size_t>(heads) * dim); };
        kernels.linear_scan(shape_, part, sequence.span, rows(at_.q, shape_.heads, shape_.head_dim), rows(at_.k, shape_.kv_heads, shape_.head_dim),
                            rows(at_.v, shape_.kv_heads, shape_.value_dim), sequence.state, rows(at_.y, shape_.heads, shape_.value_dim),
                            tape.scratch(thread));
    }

    Places at_;
    LinearScanShape shape_;
};

}  // namespace hasten
