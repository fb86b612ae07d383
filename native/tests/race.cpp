// A small decoder played over and over by several threads, to be built with ThreadSanitizer: every hand-over between the threads of a
// pool, between ops and between steps. Each step must give the bits that one thread gives. `race on-purpose` leaves a barrier out.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../src/tape_fused.hpp"
#include "../src/tape_scans.hpp"

namespace {

using namespace hasten;

constexpr int kWidth = 96, kHeads = 6, kKvHeads = 2, kHeadDim = 16, kVocab = 1037, kPage = 16, kPages = 16, kMostTokens = 40;
constexpr int kStride = 256;  // elements of a fed row, both formats
constexpr int kStates = kKvHeads * kHeadDim, kTaps = 4;

std::vector<bf16> random_weight(int out, int in, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0.0f, 1.0f / std::sqrt(static_cast<float>(in)));
    std::vector<bf16> bits(static_cast<std::size_t>(out) * in);
    for (bf16& each : bits) {
        const float value = normal(random);
        std::uint32_t whole;
        std::memcpy(&whole, &value, sizeof whole);
        each = static_cast<bf16>(whole >> 16);
    }
    return bits;
}

// Waits for nobody, so that the threads of one op run into the next: what the sanitizer must report.
struct Unwaited final : TapeOp {
    Place place;
    explicit Unwaited(Place place) : place(place) {}
    std::string name() const override { return "unwaited"; }
    void play(const Tape& tape, const StepInput& step, unsigned) const override { tape.at<float>(place, step)[0] += 1.0f; }
};

class Decoder {
   public:
    Decoder(unsigned threads, Isa isa, WeightFormat format, bool fused)
        : pool_(std::make_shared<ThreadPool>(threads)),
          table_(random_weight(kVocab, kWidth, 1)),
          pages_(std::make_shared<PagePool>(CacheFormat::bf16, 1, kPages, kPage, kKvHeads, kHeadDim, kHeadDim)),
          scanned_(std::make_shared<StatePool>(1, kPages, kHeads * kHeadDim * kStates)),
          convolved_(std::make_shared<StatePool>(1, kPages, (kTaps - 1) * kHeads * kHeadDim)),
          tape_(pool_, isa, 1 << 20, kMostTokens) {
        const int group = tape_.add_group(pages_), scan = tape_.add_group(scanned_), conv = tape_.add_group(convolved_);
        const bool quantized = format != WeightFormat::bf16;
        const Place x = place(kWidth), normed = place(kWidth), rows = place(kStride), scales = place(1), q = place(kHeads * kHeadDim),
                    k = place(kKvHeads * kHeadDim), v = place(kKvHeads * kHeadDim), cos = place(kHeadDim / 2), sin = place(kHeadDim / 2),
                    mixed = place(kHeads * kHeadDim), states = place(kHeads * kHeadDim), y = place(kWidth), last = place(kWidth);
        const std::vector<float> ones(kWidth, 1.0f);
        const auto feed = [&](Rows which, Place from) {
            return std::make_unique<FeedOp>(which, from, rows, scales, 1, kWidth, 128, kStride, quantized ? Feed::int8 : Feed::bf16);
        };
        const auto product = [&](Rows which, Place to, int out, unsigned seed) {
            const auto dense = random_weight(out, kWidth, seed);
            auto weight = std::make_shared<WeightBuffer>(WeightLayout{format, out, kWidth, format == WeightFormat::int4 ? 32 : 0, false, false});
            weight->pack(*pool_, dense.data());
            return std::make_unique<LinearOp>(which, std::move(weight), rows, quantized ? std::optional(scales) : std::nullopt, to, kStride,
                                              std::vector<float>());
        };
        // Pieces as small as can be, so that threads take each other's.
        const auto add = [&](std::vector<std::unique_ptr<LinearOp>> parts) { tape_.add(std::make_unique<ProductsOp>(std::move(parts), threads, 1)); };
        const auto add_one = [&](std::unique_ptr<LinearOp> part) {
            std::vector<std::unique_ptr<LinearOp>> parts;
            parts.push_back(std::move(part));
            add(std::move(parts));
        };
        tape_.add(std::make_unique<EmbedOp>(table_.data(), kWidth, 1.0f, x));
        tape_.add(std::make_unique<RotaryTableOp>(std::vector<float>{1, 0.5f, 0.25f, 0.12f, 0.06f, 0.03f, 0.01f, 0.005f}, 1.0f, cos, sin));
        auto norm = std::make_unique<RmsNormOp>(Rows::tokens, x, normed, kWidth, kWidth, ones, 1e-5f, 0.0f);
        std::vector<std::unique_ptr<LinearOp>> products;
        products.push_back(product(Rows::tokens, q, kHeads * kHeadDim, 2));
        products.push_back(product(Rows::tokens, k, kKvHeads * kHeadDim, 3));
        products.push_back(product(Rows::tokens, v, kKvHeads * kHeadDim, 4));
        if (fused) {
            std::vector<std::unique_ptr<RowOp>> chain;
            chain.push_back(std::move(norm));
            chain.push_back(feed(Rows::tokens, normed));
            tape_.add(std::make_unique<ChainOp>(Rows::tokens, 3, std::move(chain)));
            add(std::move(products));
        } else {
            tape_.add(std::move(norm));
            tape_.add(feed(Rows::tokens, normed));
            for (auto& each : products) add_one(std::move(each));
        }
        tape_.add(std::make_unique<RotateOp>(q, q, cos, sin, kHeads, kHeadDim, 0, kHeadDim, false));
        tape_.add(std::make_unique<RotateOp>(k, k, cos, sin, kKvHeads, kHeadDim, 0, kHeadDim, true));
        tape_.add(std::make_unique<AppendOp>(group, 0, k, v));
        const AttendShape shape{kHeads, kKvHeads, kHeadDim, kHeadDim, 0.25f, 0, 0.0f, nullptr, nullptr};
        tape_.need_scratch(attend_scratch(shape, AttendOp::kQueryRows));
        tape_.add(std::make_unique<AttendOp>(group, 0, q, mixed, shape, std::vector<float>(), std::vector<float>()));
        const std::vector<float> channels(kHeads * kHeadDim, 0.5f);
        tape_.add(std::make_unique<SelectiveScanOp>(scanned_, scan, 0, SelectiveScanOp::Places{mixed, q, k, v, states}, kHeads * kHeadDim, kStates,
                                                    std::vector<float>(kHeads * kHeadDim * kStates, 0.25f), channels, channels));
        tape_.add(std::make_unique<CausalConvOp>(convolved_, conv, 0, states, mixed, kHeads * kHeadDim, kTaps,
                                                 std::vector<float>(kHeads * kHeadDim * kTaps, 0.3f), channels, Activation::silu));
        tape_.add(feed(Rows::tokens, mixed));
        add_one(product(Rows::tokens, y, kWidth, 5));
        tape_.add(std::make_unique<GateOp>(Activation::silu, y, normed, y, kWidth));
        tape_.add(std::make_unique<AddOp>(x, y, x, kWidth));
        tape_.add(std::make_unique<SelectRowsOp>(x, last, kWidth));
        tape_.add(feed(Rows::logits, last));
        add_one(product(Rows::logits, Place{Place::kLogits}, kVocab, 6));
    }

    // Logits of two prompts, so long that attention is shared, of single tokens after them, and of one sequence alone, where most ops are too.
    std::vector<float> play() {
        std::vector<float> all;
        step({22, 9}, {0, 0}, all);
        for (int i = 0; i < 4; ++i) step({1, 1}, {22 + i, 9 + i}, all);
        for (int i = 0; i < 3; ++i) step({1}, {26 + i}, all);
        return all;
    }

    void race() { tape_.add(std::make_unique<Unwaited>(place(1))); }

   private:
    Place place(int width) {
        const Place its{taken_};
        taken_ += (static_cast<std::size_t>(width) * kMostTokens * sizeof(float) + 63) / 64 * 64;
        return its;
    }

    // Sequence s goes on with counts[s] tokens at position starts[s].
    void step(const std::vector<int>& counts, const std::vector<int>& starts, std::vector<float>& all) {
        const std::vector<PageTable> tables = {{{{3, 1}, {4}, {0}}}, {{{0, 2}, {1}, {3}}}};
        std::vector<std::int32_t> tokens, positions, offsets = {0}, rows;
        std::vector<std::int64_t> slots;
        StepInput input{};
        for (std::size_t s = 0; s < counts.size(); ++s) {
            for (int i = 0; i < counts[s]; ++i) {
                const int position = starts[s] + i;
                tokens.push_back((7 * position + 31 * static_cast<int>(s)) % kVocab);
                positions.push_back(position);
                slots.push_back(tables[s].pages[0][position / kPage] * kPage + position % kPage);
            }
            offsets.push_back(static_cast<std::int32_t>(tokens.size()));
            rows.push_back(offsets.back() - 1);
            input.tables.push_back(&tables[s]);
        }
        std::vector<float> logits(rows.size() * kVocab);
        input.tokens = static_cast<int>(tokens.size());
        input.sequences = static_cast<int>(counts.size());
        input.logit_rows = static_cast<int>(rows.size());
        input.token_ids = tokens.data();
        input.positions = positions.data();
        input.offsets = offsets.data();
        input.rows = rows.data();
        input.slots = {slots.data(), nullptr, nullptr};
        input.logits = logits.data();
        tape_.run(input);
        all.insert(all.end(), logits.begin(), logits.end());
    }

    std::shared_ptr<ThreadPool> pool_;
    std::vector<bf16> table_;
    std::shared_ptr<PagePool> pages_;
    std::shared_ptr<StatePool> scanned_, convolved_;
    Tape tape_;
    std::size_t taken_ = 0;
};

int compare(Isa isa, WeightFormat format, unsigned threads) {
    const std::vector<float> alone = Decoder(1, isa, format, false).play();
    for (int round = 0; round < 4; ++round) {
        Decoder decoder(threads, isa, format, round % 2 == 1);
        for (int repeat = 0; repeat < 3; ++repeat) {
            const std::vector<float> together = decoder.play();
            if (std::memcmp(together.data(), alone.data(), alone.size() * sizeof(float)) != 0) {
                std::printf("isa %d, format %d, fused %d: %u threads differ from one\n", static_cast<int>(isa), static_cast<int>(format), round % 2,
                            threads);
                return 1;
            }
        }
    }
    return 0;
}

}  // namespace

int main(int count, char** arguments) {
    if (count > 1 && std::strcmp(arguments[1], "on-purpose") == 0) {
        Decoder decoder(2, Isa::generic, WeightFormat::bf16, false);
        decoder.race();
        decoder.play();
        return 0;
    }
    int failures = 0;
    for (Isa isa : {Isa::generic, Isa::avx2, Isa::avx512, Isa::amx})
        if (best_isa(isa) == isa)
            for (WeightFormat format : {WeightFormat::bf16, WeightFormat::int8, WeightFormat::int4})
                for (unsigned threads : {2u, 3u}) failures += compare(isa, format, threads);
    if (failures == 0) std::puts("every step gave the bits that one thread gives");
    return failures != 0;
}
