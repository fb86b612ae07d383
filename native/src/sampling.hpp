// From rows of logits to token ids. What a draw means, step by step, on one row x [vocab] of float32:
//
// 1. bits that the mask has clear forbid their ids: x = -inf;
// 2. logit bias is added; repetition penalty divides what is positive and multiplies what is not, of ids in prompt or output; frequency
//    penalty times the count in the output, then presence penalty, are subtracted. An id that is touched is reckoned in float64 and
//    rounded once to float32, no further than the largest finite one;
// 3. ids rank by x, equal ones by id, the lowest first; -inf is out. At temperature 0 the first is taken;
// 4. log-weights w = (x − largest) · (1 / temperature), float64;
// 5. top-k keeps the k first. Of these, top-p keeps the fewest first whose mass reaches top_p of all; mass is eʷ in integers (see
//    sampling_levels.hpp), so sums are exact in any order. Of these, min-p keeps w ≥ ln min_p;
// 6. the largest w − ln(−ln(1 − u)) wins (Gumbel 1954; Maddison et al. 2014), the lowest id of equals; u is the id's own noise
//    (philox.hpp), keyed by the request's seed, its choice, the token's position and the purpose.
//
// No step's bits depend on the batch, the thread or the instruction-set level: logarithms are this file's own, in float64, of
// additions, multiplications and divisions in a fixed order. Noise belongs to ids and not to ranks, so that a drafter that draws with the
// same noise tends to agree with its target, whatever either has cut off; an inverse of the summed distribution would not have that.
// Few ids are scored: −ln(1 − u) ≥ u, so an id can only win against a score s if u ≤ e^(w − s), which the upper half of u and a bound of
// the exponential, in vectors, rule out for nearly all.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "philox.hpp"
#include "sampling_levels.hpp"
#include "thread_pool.hpp"

namespace hasten {

struct SamplingSettings {
    double temperature = 0, top_p = 1, min_p = 0;
    std::int64_t top_k = 0;  // 0: all
    double repetition_penalty = 1, presence_penalty = 0, frequency_penalty = 0;
    std::uint64_t seed = 0;
    std::uint32_t choice = 0;
    std::int64_t logprobs = -1;  // how many of the likeliest ids are reported; -1: not even the drawn one

    bool counts() const { return repetition_penalty != 1 || presence_penalty != 0 || frequency_penalty != 0; }
};

// One request: its settings, and how often it has seen which id.
class SamplingRow {
   public:
    SamplingRow(SamplingSettings settings, const std::vector<std::pair<std::int32_t, double>>& bias);

    void add_prompt(std::int32_t token);
    void append(std::int32_t token);  // to the output

    const SamplingSettings& settings() const { return settings_; }
    bool changes_logits() const { return !touched_.empty(); }
    void change_logits(float* x, int vocab) const;  // step 2; ids beyond the vocabulary are passed over

   private:
    struct Touched {
        std::int32_t id;
        std::int32_t in_output;
        bool seen;  // in prompt or output
        double bias;
    };
    Touched& touched(std::int32_t id);

    SamplingSettings settings_;
    std::vector<Touched> touched_;
    std::unordered_map<std::int32_t, std::size_t> places_;
};

// One step's rows, all [rows, …] row-major.
struct SamplingStep {
    int rows, vocab;
    const float* logits;
    const SamplingRow* const* settings;
    const std::int64_t* positions;  // the drawn token's place in its sequence, from the prompt's start; below 2³²
    std::uint32_t purpose;          // of the noise
    const std::uint32_t* masks;     // [rows, ⌈vocab / 32⌉], bit i % 32 of word i / 32 allows id i; or null
    std::int32_t* tokens;
    float* logprobs;                // of the drawn token, or null; NaN where the row asks for none. ln softmax of the logits as they came
    int top;                        // the likeliest ids of the logits as they came, [rows, top], -1 and -inf beyond what a row asks for
    std::int32_t* top_ids;
    float* top_logprobs;
};

// Draws for many rows, which share the threads of `pool` (null: the caller's alone). Keeps what rows are worked in. One step at a time:
// a second caller waits.
class Sampler {
   public:
    Sampler(std::shared_ptr<ThreadPool> pool, Isa isa);
    ~Sampler();

    // Throws std::invalid_argument naming the first row whose logits hold NaN or +inf or leave no id, after all others were drawn.
    void sample(const SamplingStep& step);

    // The ids that a draw from this row may give, ascending, and their log-weights (step 4; 0 at temperature 0).
    std::vector<std::pair<std::int32_t, double>> candidates(const float* logits, int vocab, const SamplingRow& row,
                                                            const std::uint32_t* mask);

   private:
    struct Work;
    void prepare(int vocab);

    std::shared_ptr<ThreadPool> pool_;
    std::vector<std::unique_ptr<Work>> work_;  // one a thread
    SamplingPasses passes_;
    std::mutex one_at_a_time_;
};

}  // namespace hasten
