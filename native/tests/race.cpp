// A small decoder played over and over by several threads, to be built with ThreadSanitizer: every hand-over between the threads of a
// pool, between ops and between steps. Each step must give the bits that one thread gives. `race on-purpose` leaves a barrier out.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../src/tape_ops.hpp"

namespace {

using namespace hasten;

constexpr int kWidth = 96, kHeads = 6, kKvHeads = 2, kHeadDim = 16, kVocab = 117, kPage = 16, kPages = 16, kMostTokens = 40;
constexpr int kStride = 256;  // elements of a fed row, both formats

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
    void play(const Tape& tape, const StepInput& step, unsigned) const override { tape.at<float>(place, step)[0] += 1.0f; }
};

class Decoder {
   public:
    Decoder(unsigned threads, Isa isa, WeightFormat format)
        : pool_(std::make_shared<ThreadPool>(threads)),
          table_(random_weight(kVocab, kWidth, 1)),
          pages_(std::make_shared<PagePool>(1, kPages, kPage, kKvHeads, kHeadDim, kHeadDim)),
          tape_(pool_, isa, 1 << 20, kMostTokens) {
        const int group = tape_.add_group(pages_);
        const bool quantized = format != WeightFormat::bf16;
        const Place x = place(kWidth), normed = place(kWidth), rows = place(kStride), scales = place(1), q = place(kHeads * kHeadDim),
                    k = place(kKvHeads * kHeadDim), v = place(kKvHeads * kHeadDim), cos = place(kHeadDim / 2), sin = place(kHeadDim / 2),
                    mixed = place(kHeads * kHeadDim), y = place(kWidth), last = place(kWidth);
        const std::vector<float> ones(kWidth, 1.0f);
        const auto product = [&](Rows which, Place from, Place to, int out, unsigned seed) {
            const auto dense = random_weight(out, kWidth, seed);
            auto weight = std::make_shared<WeightBuffer>(*pool_, format, out, kWidth, format == WeightFormat::int4 ? 32 : 0, dense.data());
            tape_.add(std::make_unique<FeedOp>(which, from, rows, scales, kWidth, 128, kStride, quantized));
            tape_.add(std::make_unique<LinearOp>(which, std::move(weight), rows, scales, to, kStride, std::vector<float>()));
        };
        tape_.add(std::make_unique<EmbedOp>(table_.data(), kWidth, 1.0f, x));
        tape_.add(std::make_unique<RotaryTableOp>(std::vector<float>{1, 0.5f, 0.25f, 0.12f, 0.06f, 0.03f, 0.01f, 0.005f}, 1.0f, cos, sin));
        tape_.add(std::make_unique<RmsNormOp>(Rows::tokens, x, normed, kWidth, kWidth, ones, 1e-5f, 0.0f));
        product(Rows::tokens, normed, q, kHeads * kHeadDim, 2);
        product(Rows::tokens, normed, k, kKvHeads * kHeadDim, 3);
        product(Rows::tokens, normed, v, kKvHeads * kHeadDim, 4);
        tape_.add(std::make_unique<RotateOp>(q, q, cos, sin, kHeads, kHeadDim, 0, kHeadDim, false));
        tape_.add(std::make_unique<RotateOp>(k, k, cos, sin, kKvHeads, kHeadDim, 0, kHeadDim, true));
        tape_.add(std::make_unique<AppendOp>(group, 0, k, v));
        const AttendShape shape{kHeads, kKvHeads, kHeadDim, kHeadDim, 0.25f, 0, 0.0f, nullptr, nullptr};
        tape_.need_scratch(attend_scratch(shape, AttendOp::kQueryRows));
        tape_.add(std::make_unique<AttendOp>(group, 0, q, mixed, shape, std::vector<float>(), std::vector<float>()));
        product(Rows::tokens, mixed, y, kWidth, 5);
        tape_.add(std::make_unique<GateOp>(Activation::silu, y, normed, y, kWidth));
        tape_.add(std::make_unique<AddOp>(x, y, x, kWidth));
        tape_.add(std::make_unique<SelectRowsOp>(x, last, kWidth));
        product(Rows::logits, last, Place{Place::kLogits}, kVocab, 6);
    }

    // Logits of a prompt of two sequences and of some tokens after it.
    std::vector<float> play() {
        std::vector<float> all;
        step({5, 9, 2, 110, 7, 1, 3, 3, 90, 41, 42}, {0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3}, {0, 7, 11}, all);
        for (int i = 0; i < 5; ++i) step({i + 1, 100 - i}, {7 + i, 4 + i}, {0, 1, 2}, all);
        return all;
    }

    void race() { tape_.add(std::make_unique<Unwaited>(place(1))); }

   private:
    Place place(int width) {
        const Place its{taken_};
        taken_ += (static_cast<std::size_t>(width) * kMostTokens * sizeof(float) + 63) / 64 * 64;
        return its;
    }

    void step(std::vector<std::int32_t> tokens, std::vector<std::int32_t> positions, std::vector<std::int32_t> offsets,
              std::vector<float>& all) {
        const int sequences = static_cast<int>(offsets.size()) - 1;
        const std::vector<std::int32_t> pages = {3, 1, 0, 2};  // two a sequence
        std::vector<std::int32_t> rows;
        std::vector<std::int64_t> slots;
        for (int s = 0; s < sequences; ++s) {
            rows.push_back(offsets[s + 1] - 1);
            for (int i = offsets[s]; i < offsets[s + 1]; ++i) slots.push_back(pages[2 * s + positions[i] / kPage] * kPage + positions[i] % kPage);
        }
        std::vector<float> logits(rows.size() * kVocab);
        StepInput input{};
        input.tokens = static_cast<int>(tokens.size());
        input.sequences = sequences;
        input.logit_rows = static_cast<int>(rows.size());
        input.token_ids = tokens.data();
        input.positions = positions.data();
        input.offsets = offsets.data();
        input.rows = rows.data();
        input.slots = {slots.data()};
        input.tables = {pages.data()};
        input.widths = {2};
        input.logits = logits.data();
        tape_.run(input);
        all.insert(all.end(), logits.begin(), logits.end());
    }

    std::shared_ptr<ThreadPool> pool_;
    std::vector<bf16> table_;
    std::shared_ptr<PagePool> pages_;
    Tape tape_;
    std::size_t taken_ = 0;
};

int compare(Isa isa, WeightFormat format, unsigned threads) {
    const std::vector<float> alone = Decoder(1, isa, format).play();
    for (int round = 0; round < 4; ++round) {
        Decoder decoder(threads, isa, format);
        for (int repeat = 0; repeat < 3; ++repeat) {
            const std::vector<float> together = decoder.play();
            if (std::memcmp(together.data(), alone.data(), alone.size() * sizeof(float)) != 0) {
                std::printf("isa %d, format %d: %u threads differ from one\n", static_cast<int>(isa), static_cast<int>(format), threads);
                return 1;
            }
        }
    }
    return 0;
}

}  // namespace

int main(int count, char** arguments) {
    if (count > 1 && std::strcmp(arguments[1], "on-purpose") == 0) {
        Decoder decoder(2, Isa::generic, WeightFormat::bf16);
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
