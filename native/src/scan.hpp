// Recurrences over time: kernels that take one sequence's rows in order through a part of its state that no other part needs, so that any
// thread may have any part. What each computes is written at the op of that name in hasten/program/ops.py.
//
// Position by position, whatever the number of rows: a step may end anywhere and the next go on with the same bits. All is float32. Every
// pointer but `state` is to the sequence's first row, rows lie one behind the other; `state` is a whole layer's, whose parts lie so that
// each is one run of memory.
#pragma once

#include <cstddef>
#include <vector>

#include "kernels.hpp"

namespace hasten {

// How many channels, or columns of a head's state, a part has at most. The same at every level, so that states lie alike.
constexpr int kConvPart = 64, kChannelPart = 16, kColumnPart = 32;

constexpr int parts_of(int count, int most) { return (count + most - 1) / most; }

// Rows of one sequence in a step. Where it begins with them, the state is zero, whatever its page held.
struct Span {
    int rows;
    bool begins;
};

// x, y [rows, channels]; state [taps − 1, channels]: the rows before. A part is kConvPart channels.
struct ConvShape {
    int channels, taps;
    const float* weight;  // [taps, channels]
    const float* bias;    // [channels], or null
    bool activated;
    Activation activation;
};

// x, dt, y [rows, channels]; b, c [rows, states]. A part is kChannelPart channels: of the state and of `decay` [states, its channels].
struct SelectiveShape {
    int channels, states;
    const float* decay;  // −exp(a_log), laid out as the state
    const float* skip;   // [channels]
    const float* dt_bias;
};

// x, y [rows, heads · head_dim]; dt [rows, heads]; b, c [rows, groups · states]. A part is kColumnPart features of one head: its state is
// [states, its features].
struct DualShape {
    int heads, groups, head_dim, states;
    const float* decay;  // −exp(a_log) [heads]
    const float* skip;
    const float* dt_bias;
    float dt_min, dt_max;
};

// q, k [rows, key_heads · key_dim]; v, y [rows, value_heads · value_dim]; a, b [rows, value_heads]. A part is kColumnPart values of one
// head: its state is [key_dim, its values].
struct DeltaShape {
    int key_heads, value_heads, key_dim, value_dim;
    const float* decay;  // −exp(a_log) [value_heads]
    const float* dt_bias;
};

// q [rows, heads · head_dim]; k [rows, kv_heads · head_dim]; v [rows, kv_heads · value_dim]; y [rows, heads · value_dim]. A part is one
// key/value head, whose 2 · head_dim features all values share: its state is, for kColumnPart values after another, [features, its values],
// and then the sums of the features.
struct LinearScanShape {
    int heads, kv_heads, head_dim, value_dim;
    float floor;  // the least that a feature is

    int ratio() const { return heads / kv_heads; }
    std::size_t scratch() const { return static_cast<std::size_t>(2) * head_dim * (1 + ratio()); }
};

struct ScanKernels {
    void (*causal_conv)(const ConvShape& shape, int part, Span span, const float* x, float* state, float* y);
    void (*selective_scan)(const SelectiveShape& shape, int part, Span span, const float* x, const float* dt, const float* b, const float* c,
                           float* state, float* y);
    void (*dual_scan)(const DualShape& shape, int head, int part, Span span, const float* x, const float* dt, const float* b, const float* c,
                      float* state, float* y);
    // `scratch` has 2 · key_dim floats.
    void (*gated_delta_scan)(const DeltaShape& shape, int head, int part, Span span, const float* q, const float* k, const float* v,
                             const float* a, const float* b, float* state, float* y, float* scratch);
    // `scratch` has shape.scratch() floats.
    void (*linear_scan)(const LinearScanShape& shape, int kv_head, Span span, const float* q, const float* k, const float* v, float* state,
                        float* y, float* scratch);
};

const ScanKernels& scan_kernels(Isa isa);

// a_log → −exp(a_log), one by one.
std::vector<float> decays(const std::vector<float>& a_log);

// [rows, columns] → [columns, rows], in parts of at most `most` rows one behind the other. Throws std::invalid_argument for another size.
std::vector<float> turned(const std::vector<float>& matrix, int rows, int columns, int most);

}  // namespace hasten
