// A Program compiled for this machine: kernels resolved, activations at fixed places of one arena, weights packed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "kernels.hpp"
#include "mapped.hpp"
#include "memory.hpp"
#include "pages.hpp"
#include "thread_pool.hpp"

namespace hasten {

// What a weight [out, in] is stored as; what each field may be is written at PackedLinear.
struct WeightLayout {
    WeightFormat format;
    int out, in, group;
    bool zero_points, sparse;
};

// A packed weight in memory of its own: reserved when made, filled by pack().
class WeightBuffer {
   public:
    explicit WeightBuffer(const WeightLayout& layout);

    // Packs rows of bf16 or float32 [out, in], every thread the panels it will read. Zero points need float32.
    void pack(ThreadPool& pool, const bf16* dense);
    void pack(ThreadPool& pool, const float* dense);

    // Takes codes [out, in] with their scales and (unless null) zero points [out, groups] as they are; of lut4 with its codebook [16].
    void pack_codes(ThreadPool& pool, const std::int8_t* codes, const float* scales, const std::int8_t* zeros, const std::int8_t* codebook = nullptr);

    const PackedLinear& packed() const { return packed_; }
    std::size_t bytes() const { return tiles_.size() + scales_.size() + zeros_.size() + codebook_.size() + masks_.size() + sparse_panels_.size(); }

    bool sparse() const { return sparse_; }

    // Whether every panel has two elements in every four k.
    bool two_of_four() const;

    // All the memory that packing fills, in an order that stays: what a cache writes, and fills again. Not of a sparse weight.
    std::vector<std::span<std::byte>> parts() const;

    // Takes its numbers from a file instead, where its parts() begin at these offsets. Its own memory stays untouched, and reserved.
    // Throws std::invalid_argument for parts that the file does not hold.
    void lie_in(std::shared_ptr<const MappedFile> file, std::span<const std::size_t> offsets);

   private:
    void sparsify(ThreadPool& pool);

    bool sparse_;
    Buffer tiles_, scales_, zeros_, codebook_, masks_, sparse_panels_;
    PackedLinear packed_;
    std::shared_ptr<const MappedFile> file_;
};

// Rows that are looked up, [rows, width] of bf16: in memory of its own, or in a file.
class TableBuffer {
   public:
    TableBuffer(std::size_t rows, std::size_t width) : rows_(rows), width_(width), memory_(rows * width * sizeof(bf16)) {}

    std::size_t rows() const { return rows_; }
    std::size_t width() const { return width_; }
    std::span<std::byte> part() const { return {memory_.data(), memory_.size()}; }
    const bf16* data() const { return reinterpret_cast<const bf16*>(file_ ? file_->data() + offset_ : memory_.data()); }

    // As WeightBuffer::lie_in.
    void lie_in(std::shared_ptr<const MappedFile> file, std::size_t offset);

   private:
    std::size_t rows_, width_, offset_ = 0;
    Buffer memory_;
    std::shared_ptr<const MappedFile> file_;
};

// Keys and values of one state group: a page has those of `page` tokens, of every layer.
class PagePool : public Pages {
   public:
    PagePool(CacheFormat format, int layers, int pages, int page, int kv_heads, int key_dim, int value_dim);

    PagedLayer layer(int slot) const;
    int page() const { return layer_.page; }

   private:
    PagedLayer layer_;  // the first; its base is set by layer()
};

// What sequences keep of one kind, token by token or as one state each.
using StateGroup = std::variant<std::shared_ptr<PagePool>, std::shared_ptr<StatePool>>;

// The pages that hold one sequence, group by group: in the order of its positions, or of recurrent state the one.
struct PageTable {
    std::vector<std::vector<std::int32_t>> pages;
};

// What one step is asked to do. Sequence s owns tokens offsets[s] … offsets[s + 1].
struct StepInput {
    int tokens, sequences, logit_rows;
    const std::int32_t* token_ids;
    const std::int32_t* positions;
    const std::int32_t* offsets;
    const std::int32_t* rows;
    std::vector<const std::int64_t*> slots;  // per group: place of each token's keys and values; of recurrent state null
    std::vector<const PageTable*> tables;    // per sequence
    float* logits;  // [logit_rows, vocab]
};

// Where a value lies: bytes into the arena, or the caller's logits; or, inside a chain, bytes into the thread's own scratch, which holds
// the rows of one block.
struct Place {
    static constexpr std::size_t kLogits = ~std::size_t{0}, kBlock = std::size_t{1} << 62;
    std::size_t offset;

    bool in_block() const { return offset != kLogits && (offset & kBlock); }
};

enum class Rows { tokens, logits };

class Tape;

// One op with everything it needs but the step. `play` does thread `thread`'s share.
class TapeOp {
   public:
    virtual ~TapeOp() = default;
    virtual std::string name() const = 0;  // for people who read a profile
    virtual void play(const Tape& tape, const StepInput& step, unsigned thread) const = 0;

    // Too little work to share: thread 0 plays it alone, and between two such ops nobody waits.
    virtual bool alone(const StepInput&) const { return false; }
};

// Where the time of one step went. The clock is read around each op, so the barrier that follows it is not in its time. What the clock
// itself takes, which no other step pays, is taken off.
struct StepProfile {
    std::int64_t wall_ns;   // from the call to the return, barriers and waking the threads included
    std::int64_t clock_ns;  // taken off wall_ns
};

class Tape {
   public:
    Tape(std::shared_ptr<ThreadPool> pool, Isa isa, std::size_t arena_bytes, int most_tokens);

    void add(std::unique_ptr<TapeOp> op) { ops_.push_back(std::move(op)); }
    int add_group(StateGroup group);

    // Plays the ops in order, with a barrier between two unless thread 0 plays both alone. Returns the number of barriers.
    std::size_t run(const StepInput& step) const;

    // The same step with a clock read before and after each op, whose times are added to op_ns [ops, threads].
    StepProfile profile(const StepInput& step, std::int64_t* op_ns) const;

    template <class T>
    T* at(Place place, const StepInput& step) const {
        if (place.offset == Place::kLogits) return reinterpret_cast<T*>(step.logits);
        return reinterpret_cast<T*>(arena_.data() + place.offset);
    }
    float* scratch(unsigned thread) const { return reinterpret_cast<float*>(scratch_.data()) + thread * scratch_floats_; }
    void need_scratch(std::size_t floats);

    Isa isa() const { return isa_; }
    unsigned threads() const { return pool_->size(); }
    int most_tokens() const { return most_tokens_; }
    std::size_t ops() const { return ops_.size(); }
    std::vector<std::string> op_names() const;
    const std::vector<StateGroup>& groups() const { return groups_; }

    // The pages of a group that is of that kind.
    const PagePool& pages(int group) const { return *std::get<std::shared_ptr<PagePool>>(groups_[static_cast<std::size_t>(group)]); }

    // play(op number, thread) for every op, on every thread that plays it, with the barriers between; how many there were.
    template <class Play>
    std::size_t each_op(const StepInput& step, Play play) const;

    std::shared_ptr<ThreadPool> pool_;
    Isa isa_;
    int most_tokens_;
    Buffer arena_, scratch_;
    std::size_t scratch_floats_ = 0;
    std::vector<std::unique_ptr<TapeOp>> ops_;
    std::vector<StateGroup> groups_;
};

}  // namespace hasten
