// The passes over a row of logits that sampling makes, once for each instruction-set level. All give the same bits at every level:
// comparisons, integer sums, and element-wise float64 operations that IEEE 754 rounds one way.
#pragma once

#include <cstdint>

#include "kernels.hpp"
#include "philox.hpp"

namespace hasten {

// The likeliest id of a row has mass kMassOne, others exp((x − largest) · inverse_temperature) of it, rounded. Up to 2²¹ sum exactly.
constexpr int kMassBits = 42;
constexpr std::uint64_t kMassOne = std::uint64_t{1} << kMassBits;
constexpr int kMostVocab = 1 << 21;

// Ids in order of x: bucket b has those whose log-weight, sixteenfold and negated, rounds to b; the last one also has all beyond.
constexpr int kBuckets = 512;

struct Scale {
    double largest;  // logit
    double inverse;  // of the temperature
};

struct SamplingPasses {
    // The largest of x that is no NaN, and whether there is one that is.
    void (*scan)(const float* x, int n, float* largest, bool* has_nan);
    // Indices of x above `low`, ascending; returns how many. `ids` has room for n.
    int (*gather_above)(const float* x, int n, float low, std::int32_t* ids);
    // Adds the mass of each x to its bucket.
    void (*bucket_masses)(const float* x, int n, Scale scale, std::uint64_t* buckets);
    // Indices of the x of one bucket, ascending; returns how many. `ids` has room for n.
    int (*gather_bucket)(const float* x, int n, Scale scale, int bucket, std::int32_t* ids);
    // The mass of each x.
    void (*masses)(const float* x, int n, Scale scale, std::uint64_t* out);
    // Indices of the x, of ids from `first` on (a multiple of 4), that may reach `score` with their noise, ascending; returns how many.
    // `ids` has room for n. A few more than those that do: the noise's upper half is looked at, and e^(w − score) is a bound.
    int (*contenders)(const float* x, int n, Scale scale, double score, const NoiseKey& key, std::uint32_t first, std::int32_t* ids);
};

SamplingPasses sampling_passes(Isa isa);

}  // namespace hasten
