#include "sampling.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>

namespace hasten {

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr double kNoLeast = -std::numeric_limits<double>::max();  // of log-weights: all but -inf

template <class To, class From>
To bits_of(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

// ln x of a normal x > 0, within two units in the last place. x = 2ⁿ · m with m about 1, and ln m = 2 artanh(s) with s = (m − 1) / (m + 1),
// at most 0.172, where the series to s²⁵ is exact enough.
double natural_log(double x) {
    const std::uint64_t bits = bits_of<std::uint64_t>(x);
    std::int64_t n = static_cast<std::int64_t>(bits >> 52) - 1023;
    double m = bits_of<double>((bits & ((std::uint64_t{1} << 52) - 1)) | (std::uint64_t{1023} << 52));
    if (m > 0x1.6a09e667f3bcdp0) {  // √2
        m *= 0.5;
        ++n;
    }
    const double s = (m - 1.0) / (m + 1.0), square = s * s;
    double series = 1.0 / 25.0;
    for (int odd = 23; odd >= 3; odd -= 2) series = series * square + 1.0 / odd;
    const double exponent = static_cast<double>(n);
    return exponent * 0x1.62e42fee00000p-1 + (exponent * 0x1.a39ef35793c76p-33 + (2.0 * s + 2.0 * s * (square * series)));
}

// At least eᵗ, and at most 1.07 of it, for t ≤ 0: as in contenders() of sampling_body.hpp.
double exp_bound(double t) {
    const double y = t * 0x1.71547652b82fep0 + 1e-6;
    if (y > 0) return 2.0;
    if (!(y > -1000)) return 0.0;
    return bits_of<double>(static_cast<std::int64_t>((1023.0 + y) * 0x1p52));
}

// Larger for what ranks first: the logit, then the lower id.
std::uint64_t rank_of(float x, std::int32_t id) {
    const std::uint32_t bits = bits_of<std::uint32_t>(x + 0.0f);  // -0 ranks as 0
    const std::uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
    return std::uint64_t{ordered} << 32 | (0xffffffffu - static_cast<std::uint32_t>(id));
}
std::int32_t id_of(std::uint64_t rank) { return static_cast<std::int32_t>(0xffffffffu - static_cast<std::uint32_t>(rank)); }
float logit_of(std::uint64_t rank) {
    const std::uint32_t ordered = static_cast<std::uint32_t>(rank >> 32);
    return bits_of<float>(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}
std::uint64_t rank_of_all() { return rank_of(-kLargest, std::numeric_limits<std::int32_t>::max()); }  // below every id that is not at -inf

struct Weighed {
    std::uint64_t rank, mass;
    bool operator>(const Weighed& other) const { return rank > other.rank; }
};

// The last kept of the fewest first of `all` whose mass reaches `target`, which is 1 or more and at most the mass of all.
std::uint64_t last_reaching(std::vector<Weighed>& all, std::uint64_t target) {
    auto begin = all.begin(), end = all.end();
    while (end - begin > 1) {
        const auto middle = begin + (end - begin) / 2;
        std::nth_element(begin, middle, end, std::greater<>());
        std::uint64_t upper = 0;
        for (auto it = begin; it != middle; ++it) upper += it->mass;
        if (upper >= target) {
            end = middle;
        } else {
            target -= upper;
            begin = middle;
        }
    }
    return begin->rank;
}

// The least mass that is `share` of `whole`: 1 at least, so that the likeliest id stays.
std::uint64_t target_mass(double share, std::uint64_t whole) {
    const double target = std::ceil(share * static_cast<double>(whole));
    if (target >= static_cast<double>(whole)) return whole;
    return std::max<std::uint64_t>(static_cast<std::uint64_t>(target), 1);
}

}  // namespace

SamplingRow::SamplingRow(SamplingSettings settings, const std::vector<std::pair<std::int32_t, double>>& bias) : settings_(settings) {
    for (const auto& [id, value] : bias) touched(id).bias += value;
}

SamplingRow::Touched& SamplingRow::touched(std::int32_t id) {
    const auto [place, is_new] = places_.try_emplace(id, touched_.size());
    if (is_new) touched_.push_back({id, 0, false, 0.0});
    return touched_[place->second];
}

void SamplingRow::add_prompt(std::int32_t token) {
    if (settings_.repetition_penalty != 1) touched(token).seen = true;
}

void SamplingRow::append(std::int32_t token) {
    if (!settings_.counts()) return;
    Touched& its = touched(token);
    its.seen = true;
    ++its.in_output;
}

void SamplingRow::change_logits(float* x, int vocab) const {
    for (const Touched& its : touched_) {
        if (its.id < 0 || its.id >= vocab || x[its.id] == -kInf) continue;
        double y = x[its.id] + its.bias;
        if (its.seen) y = y > 0 ? y / settings_.repetition_penalty : y * settings_.repetition_penalty;
        y -= settings_.frequency_penalty * its.in_output;
        if (its.in_output > 0) y -= settings_.presence_penalty;
        x[its.id] = static_cast<float>(std::clamp<double>(y, -kLargest, kLargest));
    }
}

// One row at a time, on one thread.
struct Sampler::Work {
    std::vector<float> changed, picked;
    std::vector<std::int32_t> ids;
    std::vector<std::uint64_t> ranks, picked_masses;
    std::vector<Weighed> weighed;

    // The row being worked on, after step 2.
    const float* x = nullptr;
    int vocab = 0;
    float largest = 0;
    std::int32_t likeliest = 0;
    Scale scale{};
    std::uint64_t last = 0;   // the rank of the last id kept
    double least = 0;         // the least log-weight kept

    // All that a row can need, so that no thread of the pool has to allocate.
    void prepare(int n) {
        vocab = n;
        changed.resize(n);
        ids.resize(n);
        picked.reserve(n);
        picked_masses.reserve(n);
        ranks.reserve(n);
        weighed.reserve(n);
    }

    // Steps 1 and 2, and the likeliest id. An error's text, or none.
    std::string start(const SamplingPasses& passes, const float* logits, const SamplingRow& row, const std::uint32_t* mask);
    // Steps 4 and 5: what `last` and `least` are.
    void cut(const SamplingPasses& passes, const SamplingSettings& settings);
    // The `k` ids of x that rank first, as ranks in no order, into `ranks`.
    void select(const SamplingPasses& passes, const float* from, std::size_t k);
    // Candidates, ascending, into `ids`: all that are kept, and a few more that rounding cannot tell apart here. Returns how many.
    int gather(const SamplingPasses& passes);
    bool keeps(std::int32_t id) const { return rank_of(x[id], id) >= last && log_weight(id) >= least; }
    double log_weight(std::int32_t id) const { return (x[id] - scale.largest) * scale.inverse; }
    std::int32_t draw(const SamplingPasses& passes, const NoiseKey& key);
    void report(const SamplingPasses& passes, const SamplingStep& step, int row);
};

std::string Sampler::Work::start(const SamplingPasses& passes, const float* logits, const SamplingRow& row, const std::uint32_t* mask) {
    bool has_nan = false;
    passes.scan(logits, vocab, &largest, &has_nan);
    if (has_nan || largest == kInf) {
        const float* wrong = std::find_if(logits, logits + vocab, [&](float value) { return has_nan ? std::isnan(value) : value == kInf; });
        return std::string("logits hold ") + (has_nan ? "NaN" : "+inf") + ", first at id " + std::to_string(wrong - logits) +
               ": the model overflowed; check its weights, or run it in wider activations";
    }
    x = logits;
    if (mask != nullptr || row.changes_logits()) {
        std::copy(logits, logits + vocab, changed.begin());
        for (int word = 0; mask != nullptr && word * 32 < vocab; ++word)
            for (std::uint32_t clear = ~mask[word]; clear != 0; clear &= clear - 1)
                if (const int id = word * 32 + __builtin_ctz(clear); id < vocab) changed[id] = -kInf;
        row.change_logits(changed.data(), vocab);
        x = changed.data();
        passes.scan(x, vocab, &largest, &has_nan);
    }
    if (largest == -kInf) return "every logit is -inf: masks and forbidden ids leave no id to choose; allow at least one";
    passes.gather_above(x, vocab, std::nextafter(largest, -kInf), ids.data());
    likeliest = ids[0];
    return "";
}

void Sampler::Work::select(const SamplingPasses& passes, const float* from, std::size_t k) {
    constexpr int kChunk = 4096;
    const std::size_t room = 2 * k + 1024;  // so that all the cutting costs no more than a few times the row
    float low = -kInf;
    ranks.clear();
    for (int begin = 0; begin < vocab; begin += kChunk) {
        const int count = passes.gather_above(from + begin, std::min(kChunk, vocab - begin), low, ids.data());
        for (int i = 0; i < count; ++i) {
            const std::int32_t id = begin + ids[i];
            if (from[id] <= low) continue;  // an id that comes later loses a tie
            ranks.push_back(rank_of(from[id], id));
            if (ranks.size() < room) continue;
            std::nth_element(ranks.begin(), ranks.begin() + (k - 1), ranks.end(), std::greater<>());
            ranks.resize(k);
            low = logit_of(ranks[k - 1]);
        }
    }
    if (ranks.size() > k) {
        std::nth_element(ranks.begin(), ranks.begin() + (k - 1), ranks.end(), std::greater<>());
        ranks.resize(k);
    }
}

void Sampler::Work::cut(const SamplingPasses& passes, const SamplingSettings& settings) {
    scale = {largest, std::min(1.0 / settings.temperature, std::numeric_limits<double>::max())};
    last = rank_of_all();
    least = settings.min_p > 0 ? natural_log(std::max(settings.min_p, std::numeric_limits<double>::min())) : kNoLeast;
    const bool top_k = settings.top_k > 0 && settings.top_k < vocab, top_p = settings.top_p < 1;
    weighed.clear();
    std::uint64_t target = 0;
    if (top_k) {
        select(passes, x, static_cast<std::size_t>(settings.top_k));
        last = *std::min_element(ranks.begin(), ranks.end());
        picked.clear();
        for (std::uint64_t rank : ranks) picked.push_back(x[id_of(rank)]);
    } else if (top_p) {
        std::uint64_t buckets[kBuckets] = {}, whole = 0;
        passes.bucket_masses(x, vocab, scale, buckets);
        for (std::uint64_t mass : buckets) whole += mass;
        target = target_mass(settings.top_p, whole);
        int bucket = 0;
        for (; buckets[bucket] < target; ++bucket) target -= buckets[bucket];
        const int count = passes.gather_bucket(x, vocab, scale, bucket, ids.data());
        ranks.clear();
        picked.clear();
        for (int i = 0; i < count; ++i) {
            ranks.push_back(rank_of(x[ids[i]], ids[i]));
            picked.push_back(x[ids[i]]);
        }
    }
    if (!top_p) return;
    picked_masses.resize(picked.size());
    passes.masses(picked.data(), static_cast<int>(picked.size()), scale, picked_masses.data());
    std::uint64_t whole = 0;
    for (std::size_t i = 0; i < ranks.size(); ++i) {
        weighed.push_back({ranks[i], picked_masses[i]});
        whole += picked_masses[i];
    }
    last = last_reaching(weighed, top_k ? target_mass(settings.top_p, whole) : target);
}

int Sampler::Work::gather(const SamplingPasses& passes) {
    // Below the last one's logit by a unit, and below what min-p asks for by more than rounding.
    double low = std::nextafter(logit_of(last), -kInf);
    const double reach = least / scale.inverse;
    low = std::max(low, scale.largest + reach - 1e-5 * (std::abs(scale.largest) - reach) - 1e-30);
    return passes.gather_above(x, vocab, low < -kLargest ? -kInf : std::nextafter(static_cast<float>(low), -kInf), ids.data());
}

std::int32_t Sampler::Work::draw(const SamplingPasses& passes, const NoiseKey& key) {
    const auto score = [&](std::int32_t id, double weight, std::uint32_t upper) {
        return weight - natural_log(-natural_log(1.0 - uniform(upper, noise_half(key, static_cast<std::uint32_t>(id), kLowHalf))));
    };
    const auto upper_of = [&](std::int32_t id) { return noise_half(key, static_cast<std::uint32_t>(id), 0); };
    std::int32_t winner = likeliest;
    double best = score(winner, 0.0, upper_of(winner));
    const auto consider = [&](std::int32_t id) {
        if (!keeps(id)) return;
        const double its = score(id, log_weight(id), upper_of(id));
        if (its > best || (its == best && id < winner)) {
            best = its;
            winner = id;
        }
    };
    if (last > rank_of_all() || least > kNoLeast) {
        if (const int count = gather(passes); count < vocab / 16) {
            for (int i = 0; i < count; ++i)
                if (upper_of(ids[i]) * 0x1p-32 <= exp_bound(log_weight(ids[i]) - best)) consider(ids[i]);
            return winner;
        }
    }
    constexpr int kChunk = 512;  // after which the best so far is better known
    for (std::int32_t begin = 0; begin < vocab; begin += kChunk) {
        const int count = passes.contenders(x + begin, std::min(kChunk, vocab - begin), scale, best, key, static_cast<std::uint32_t>(begin),
                                            ids.data());
        for (int i = 0; i < count; ++i) consider(begin + ids[i]);
    }
    return winner;
}

void Sampler::Work::report(const SamplingPasses& passes, const SamplingStep& step, int row) {
    const float* logits = step.logits + static_cast<std::size_t>(row) * vocab;
    const std::int64_t wanted = step.settings[row]->settings().logprobs;
    if (step.logprobs != nullptr) step.logprobs[row] = std::numeric_limits<float>::quiet_NaN();
    std::int32_t* top_ids = step.top_ids + static_cast<std::size_t>(row) * step.top;
    float* top_logprobs = step.top_logprobs + static_cast<std::size_t>(row) * step.top;
    std::fill(top_ids, top_ids + step.top, -1);
    std::fill(top_logprobs, top_logprobs + step.top, -kInf);
    if (step.logprobs == nullptr || wanted < 0) return;
    bool has_nan = false;
    float top = 0;
    passes.scan(logits, vocab, &top, &has_nan);
    std::uint64_t buckets[kBuckets] = {}, whole = 0;
    passes.bucket_masses(logits, vocab, {top, 1.0}, buckets);
    for (std::uint64_t mass : buckets) whole += mass;
    const double normaliser = top + natural_log(static_cast<double>(whole) * (1.0 / static_cast<double>(kMassOne)));
    const auto logprob = [&](std::int32_t id) { return static_cast<float>(logits[id] - normaliser); };
    step.logprobs[row] = logprob(step.tokens[row]);
    const std::size_t count = static_cast<std::size_t>(std::min({wanted, std::int64_t{step.top}, std::int64_t{vocab}}));
    if (count == 0) return;
    select(passes, logits, count);
    std::sort(ranks.begin(), ranks.end(), std::greater<>());
    for (std::size_t i = 0; i < ranks.size(); ++i) {
        top_ids[i] = id_of(ranks[i]);
        top_logprobs[i] = logprob(top_ids[i]);
    }
}

Sampler::Sampler(std::shared_ptr<ThreadPool> pool, Isa isa) : pool_(std::move(pool)), passes_(sampling_passes(isa)) {
    for (unsigned thread = 0; thread < (pool_ ? pool_->size() : 1); ++thread) work_.push_back(std::make_unique<Work>());
}

Sampler::~Sampler() = default;

void Sampler::prepare(int vocab) {
    for (const auto& work : work_) work->prepare(vocab);
}

void Sampler::sample(const SamplingStep& step) {
    const std::lock_guard alone(one_at_a_time_);
    prepare(step.vocab);
    std::vector<std::string> errors(static_cast<std::size_t>(step.rows));
    const std::size_t words = (static_cast<std::size_t>(step.vocab) + 31) / 32;
    const auto play = [&](Work& work, int row) {
        const SamplingRow& its = *step.settings[row];
        const std::size_t place = static_cast<std::size_t>(row);
        step.tokens[row] = -1;
        const std::uint32_t* mask = step.masks == nullptr ? nullptr : step.masks + place * words;
        errors[place] = work.start(passes_, step.logits + place * step.vocab, its, mask);
        if (!errors[place].empty()) return;
        const SamplingSettings& settings = its.settings();
        step.tokens[row] = work.likeliest;
        if (settings.temperature > 0) {
            work.cut(passes_, settings);
            const NoiseKey key{settings.seed, static_cast<std::uint32_t>(step.positions[row]), settings.choice, step.purpose};
            step.tokens[row] = work.draw(passes_, key);
        }
        work.report(passes_, step, row);
    };
    if (pool_ && step.rows > 1) {
        std::atomic<int> next{0};
        pool_->run([&](unsigned thread) {
            for (int row; (row = next.fetch_add(1, std::memory_order_relaxed)) < step.rows;) play(*work_[thread], row);
        });
    } else {
        for (int row = 0; row < step.rows; ++row) play(*work_[0], row);
    }
    for (int row = 0; row < step.rows; ++row)
        if (!errors[row].empty()) throw std::invalid_argument("row " + std::to_string(row) + ": " + errors[row]);
}

std::vector<std::pair<std::int32_t, double>> Sampler::candidates(const float* logits, int vocab, const SamplingRow& row,
                                                                 const std::uint32_t* mask) {
    const std::lock_guard alone(one_at_a_time_);
    prepare(vocab);
    Work& work = *work_[0];
    if (const std::string error = work.start(passes_, logits, row, mask); !error.empty()) throw std::invalid_argument("row 0: " + error);
    if (row.settings().temperature == 0) return {{work.likeliest, 0.0}};
    work.cut(passes_, row.settings());
    const int count = work.gather(passes_);
    std::vector<std::pair<std::int32_t, double>> kept;
    for (int i = 0; i < count; ++i)
        if (const std::int32_t id = work.ids[i]; work.keeps(id)) kept.emplace_back(id, work.log_weight(id));
    return kept;
}

}  // namespace hasten
