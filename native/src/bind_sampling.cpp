// Sampling as Python asks for it: every argument is checked here.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <limits>
#include <optional>
#include <string>

#include "bind_arguments.hpp"
#include "bindings.hpp"
#include "sampling.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace hasten {
namespace {

template <class T, std::size_t dims>
using Array = nb::ndarray<T, nb::numpy, nb::ndim<dims>, nb::c_contig, nb::device::cpu>;
using Longs = Array<const std::int64_t, 1>;
using Logits = Array<const float, 2>;
using Masks = Array<const std::uint32_t, 2>;

std::uint32_t word_of(std::int64_t value, const char* name) {
    require(value >= 0 && value <= std::numeric_limits<std::uint32_t>::max(),
            std::string(name) + " is " + std::to_string(value) + "; accepted: 0 to 4294967295");
    return static_cast<std::uint32_t>(value);
}

std::uint64_t seed_of(std::int64_t seed) {
    require(seed >= 0, "seed is " + std::to_string(seed) + "; accepted: 0 to 9223372036854775807");
    return static_cast<std::uint64_t>(seed);
}

// An id that no vocabulary has stands for all that do not fit.
std::int32_t id_of(std::int64_t token) { return token < 0 || token >= kMostVocab ? -1 : static_cast<std::int32_t>(token); }

SamplingRow row_of(double temperature, std::int64_t top_k, double top_p, double min_p, double repetition_penalty, double presence_penalty,
                   double frequency_penalty, std::int64_t seed, std::int64_t choice, std::int64_t logprobs,
                   const std::optional<Longs>& prompt, const std::vector<std::pair<std::int64_t, double>>& bias) {
    require(temperature >= 0 && std::isfinite(temperature), "temperature must be finite, 0 or more");
    require(top_k >= 0, "top_k must be 0 or more");
    require(top_p >= 0 && top_p <= 1 && min_p >= 0 && min_p <= 1, "top_p and min_p must be from 0 to 1");
    require(repetition_penalty > 0 && std::isfinite(repetition_penalty), "repetition_penalty must be finite, above 0");
    require(std::isfinite(presence_penalty) && std::isfinite(frequency_penalty), "penalties must be finite");
    require(logprobs >= -1, "logprobs must be 0 or more, or -1 for none");
    SamplingSettings settings{temperature, top_p, min_p, top_k, repetition_penalty, presence_penalty, frequency_penalty,
                              seed_of(seed), word_of(choice, "choice"), logprobs};
    std::vector<std::pair<std::int32_t, double>> biases;
    for (const auto& [id, value] : bias) {
        require(std::isfinite(value), "a logit bias must be finite; a mask forbids an id");
        biases.emplace_back(id_of(id), value);
    }
    SamplingRow row(settings, biases);
    if (prompt)
        for (std::size_t i = 0; i < prompt->size(); ++i) row.add_prompt(id_of((*prompt)(i)));
    return row;
}

void check_vocab(std::size_t vocab) {
    require(vocab >= 1 && vocab <= kMostVocab,
            "rows of " + std::to_string(vocab) + " logits; accepted: 1 to " + std::to_string(kMostVocab));
}

void check_masks(const std::optional<Masks>& masks, std::size_t rows, std::size_t vocab) {
    const std::size_t words = (vocab + 31) / 32;
    require(!masks || (masks->shape(0) == rows && masks->shape(1) == words),
            "masks must be [" + std::to_string(rows) + ", " + std::to_string(words) + "], a bit per id");
}

void sample(Sampler& self, Logits logits, const nb::list& rows, Longs positions, Array<std::int32_t, 1> tokens, std::optional<Masks> masks,
            std::optional<Array<float, 1>> logprobs, std::optional<Array<std::int32_t, 2>> top_ids,
            std::optional<Array<float, 2>> top_logprobs, std::int64_t purpose) {
    const std::size_t count = logits.shape(0), vocab = logits.shape(1);
    check_vocab(vocab);
    require(rows.size() == count && positions.size() == count && tokens.size() == count,
            "as many rows, positions and tokens are needed as there are rows of logits, " + std::to_string(count));
    require(count <= static_cast<std::size_t>(std::numeric_limits<int>::max()), "too many rows");
    check_masks(masks, count, vocab);
    require(!logprobs || logprobs->size() == count, "as many logprobs as rows are needed");
    require(top_ids.has_value() == top_logprobs.has_value() && (!top_ids || logprobs),
            "top_ids and top_logprobs go together, and with logprobs");
    require(!top_ids || (top_ids->shape(0) == count && top_logprobs->shape(0) == count && top_ids->shape(1) == top_logprobs->shape(1)),
            "top_ids and top_logprobs must be [rows, top]");
    for (std::size_t i = 0; i < count; ++i) word_of(positions(i), "position");
    std::vector<nb::object> kept;  // a row must outlive the step, whoever changes the list meanwhile
    std::vector<const SamplingRow*> settings;
    for (const nb::handle row : rows) {
        kept.push_back(nb::borrow(row));
        settings.push_back(&nb::cast<const SamplingRow&>(row));
    }
    const int top = top_ids ? static_cast<int>(top_ids->shape(1)) : 0;
    const SamplingStep step{static_cast<int>(count), static_cast<int>(vocab), logits.data(), settings.data(), positions.data(),
                            word_of(purpose, "purpose"), masks ? masks->data() : nullptr, tokens.data(),
                            logprobs ? logprobs->data() : nullptr, top, top_ids ? top_ids->data() : nullptr,
                            top_logprobs ? top_logprobs->data() : nullptr};
    nb::gil_scoped_release unlocked;
    self.sample(step);
}

template <class T>
Array<T, 1> owned(std::vector<T> values) {
    auto* kept = new std::vector<T>(std::move(values));
    nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
    return Array<T, 1>(kept->data(), {kept->size()}, owner);
}

}  // namespace

void bind_sampling(nb::module_& module) {
    nb::class_<SamplingRow>(module, "SamplingRow", "How one request's tokens are drawn, and which ids it has seen how often.")
        .def("__init__",
             [](SamplingRow* self, double temperature, std::int64_t top_k, double top_p, double min_p, double repetition_penalty,
                double presence_penalty, double frequency_penalty, std::int64_t seed, std::int64_t choice, std::int64_t logprobs,
                std::optional<Longs> prompt, const std::vector<std::pair<std::int64_t, double>>& logit_bias) {
                 new (self) SamplingRow(row_of(temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty,
                                               seed, choice, logprobs, prompt, logit_bias));
             },
             nb::kw_only(), "temperature"_a = 0.0, "top_k"_a = 0, "top_p"_a = 1.0, "min_p"_a = 0.0, "repetition_penalty"_a = 1.0,
             "presence_penalty"_a = 0.0, "frequency_penalty"_a = 0.0, "seed"_a = 0, "choice"_a = 0, "logprobs"_a = -1,
             "prompt"_a = nb::none(), "logit_bias"_a = std::vector<std::pair<std::int64_t, double>>{})
        .def("append", [](SamplingRow& self, std::int64_t token) { self.append(id_of(token)); }, "token"_a,
             "Note a token of the output. Not while a step that draws for this row is running.");

    nb::class_<Sampler>(module, "Sampler", "Draws for many rows at once, which share the threads of a pool.")
        .def("__init__",
             [](Sampler* self, std::shared_ptr<ThreadPool> pool, const std::string& isa) {
                 new (self) Sampler(std::move(pool), isa_of(isa));
             },
             "pool"_a.none(), "isa"_a = "best")
        .def("sample", sample, "logits"_a, "rows"_a, "positions"_a, "tokens"_a, nb::kw_only(), "masks"_a = nb::none(),
             "logprobs"_a = nb::none(), "top_ids"_a = nb::none(), "top_logprobs"_a = nb::none(), "purpose"_a = 0,
             "Draw a token for every row of logits.")
        .def("candidates",
             [](Sampler& self, Logits logits, const SamplingRow& row, std::optional<Masks> mask) {
                 check_vocab(logits.shape(1));
                 require(logits.shape(0) == 1, "one row of logits is looked at");
                 check_masks(mask, 1, logits.shape(1));
                 std::vector<std::int32_t> ids;
                 std::vector<double> weights;
                 const int vocab = static_cast<int>(logits.shape(1));
                 for (const auto& [id, weight] : self.candidates(logits.data(), vocab, row, mask ? mask->data() : nullptr)) {
                     ids.push_back(id);
                     weights.push_back(weight);
                 }
                 return std::pair(owned(std::move(ids)), owned(std::move(weights)));
             },
             "logits"_a, "row"_a, "mask"_a = nb::none(), "The ids that a draw may give, and their log-weights.");

    module.def("noise",
               [](std::int64_t seed, std::int64_t choice, std::int64_t position, std::int64_t purpose, std::int64_t n) {
                   require(n >= 0 && n <= kMostVocab, "n is " + std::to_string(n) + "; accepted: 0 to " + std::to_string(kMostVocab));
                   const NoiseKey key{seed_of(seed), word_of(position, "position"), word_of(choice, "choice"),
                                      word_of(purpose, "purpose")};
                   std::vector<double> values;
                   for (std::uint32_t id = 0; id < n; ++id) values.push_back(uniform(noise_half(key, id, 0), noise_half(key, id, kLowHalf)));
                   return owned(std::move(values));
               },
               "seed"_a, "choice"_a, "position"_a, "purpose"_a, "n"_a, "The uniform noise of ids 0 to n - 1.");
}

}  // namespace hasten
