#include "tape.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>

namespace hasten {

namespace {

// body(first panel, last panel) for every thread's share.
template <class Body>
void by_panels(ThreadPool& pool, int panels, Body body) {
    pool.run([&](unsigned thread) {
        const Share part = share(static_cast<std::size_t>(panels), thread, pool.size());
        body(static_cast<int>(part.begin), static_cast<int>(part.end));
    });
}

constexpr std::size_t kCodebook = 16;

void check_within(const MappedFile& file, std::size_t offset, std::size_t size) {
    if (offset % 64 || offset > file.size() || size > file.size() - offset) throw std::invalid_argument("the file does not hold the weight");
}

using Clock = std::chrono::steady_clock;

std::int64_t nanoseconds(Clock::duration time) { return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count(); }

// Nanoseconds that reading the clock takes, at best.
std::int64_t clock_cost() {
    static const std::int64_t cost = [] {
        constexpr int kReads = 32;
        std::int64_t least = std::numeric_limits<std::int64_t>::max();
        for (int round = 0; round < 64; ++round) {
            const auto begin = Clock::now();
            for (int i = 1; i < kReads; ++i) static_cast<void>(Clock::now());
            least = std::min(least, nanoseconds(Clock::now() - begin) / kReads);
        }
        return least;
    }();
    return cost;
}

}  // namespace

WeightBuffer::WeightBuffer(const WeightLayout& layout)
    : sparse_(layout.sparse),
      tiles_(packed_tile_bytes(layout.format, layout.out, layout.in)),
      scales_(packed_scale_count(layout.format, layout.out, layout.in, layout.group) * sizeof(float)),
      zeros_(layout.zero_points ? scales_.size() / sizeof(float) : 0),
      codebook_(layout.format == WeightFormat::lut4 ? kCodebook : 0),
      packed_{layout.format, layout.out, layout.in, layout.group, tiles_.data(), reinterpret_cast<const float*>(scales_.data()),
              reinterpret_cast<const std::int8_t*>(zeros_.data())} {
    packed_.codebook = reinterpret_cast<const std::int8_t*>(codebook_.data());
}

void WeightBuffer::pack(ThreadPool& pool, const bf16* dense) {
    by_panels(pool, packed_.panels(), [&](int first, int last) {
        pack_linear(packed_.format, packed_.out, packed_.in, packed_.group, dense, first, last, tiles_.data(), reinterpret_cast<float*>(scales_.data()));
    });
    if (sparse_) sparsify(pool);
}

void WeightBuffer::pack(ThreadPool& pool, const float* dense) {
    by_panels(pool, packed_.panels(), [&](int first, int last) {
        pack_linear(packed_.format, packed_.out, packed_.in, packed_.group, dense, first, last, tiles_.data(), reinterpret_cast<float*>(scales_.data()),
                    reinterpret_cast<std::int8_t*>(zeros_.data()));
    });
    if (sparse_) sparsify(pool);
}

void WeightBuffer::pack_codes(ThreadPool& pool, const std::int8_t* codes, const float* scales, const std::int8_t* zeros, const std::int8_t* codebook) {
    if (codebook) std::memcpy(codebook_.data(), codebook, kCodebook);
    by_panels(pool, packed_.panels(), [&](int first, int last) {
        hasten::pack_codes(packed_.format, packed_.out, packed_.in, packed_.group, codes, scales, zeros, codebook, first, last, tiles_.data(),
                           reinterpret_cast<float*>(scales_.data()), reinterpret_cast<std::int8_t*>(zeros_.data()));
    });
    if (sparse_) sparsify(pool);
}

void WeightBuffer::sparsify(ThreadPool& pool) {
    const int panels = packed_.panels();
    masks_ = Buffer(sparse_mask_count(packed_) * sizeof(std::uint64_t));
    sparse_panels_ = Buffer(static_cast<std::size_t>(panels + 1) * sizeof(SparsePanel));
    auto* const masks = reinterpret_cast<std::uint64_t*>(masks_.data());
    auto* const each = reinterpret_cast<SparsePanel*>(sparse_panels_.data());
    by_panels(pool, panels, [&](int first, int last) { sparse_masks(packed_, first, last, masks, each); });
    std::uint64_t end = 0;
    for (int panel = 0; panel <= panels; ++panel) each[panel].start = std::exchange(end, end + each[panel].start);
    Buffer elements(each[panels].start + 64);  // a line may be read beyond the last
    by_panels(pool, panels, [&](int first, int last) { sparse_elements(packed_, masks, each, first, last, elements.data()); });
    tiles_ = std::move(elements);
    packed_.tiles = tiles_.data();
    packed_.masks = masks;
    packed_.sparse_panels = each;
}

bool WeightBuffer::two_of_four() const {
    if (!packed_.masks) return false;
    for (int panel = 0; panel < packed_.panels(); ++panel)
        if (!packed_.sparse_panels[panel].two_of_four) return false;
    return true;
}

std::vector<std::span<std::byte>> WeightBuffer::parts() const {
    std::vector<std::span<std::byte>> filled;
    for (const Buffer* buffer : {&tiles_, &scales_, &zeros_, &codebook_})
        if (buffer->size()) filled.emplace_back(buffer->data(), buffer->size());
    return filled;
}

void WeightBuffer::lie_in(std::shared_ptr<const MappedFile> file, std::span<const std::size_t> offsets) {
    const std::vector<std::span<std::byte>> own = parts();
    if (sparse_ || offsets.size() != own.size()) throw std::invalid_argument("the weight has not as many parts");
    for (std::size_t i = 0; i < own.size(); ++i) check_within(*file, offsets[i], own[i].size());
    std::size_t part = 0;
    const auto place = [&](const Buffer& buffer) { return buffer.size() ? file->data() + offsets[part++] : nullptr; };
    packed_.tiles = place(tiles_);
    packed_.scales = reinterpret_cast<const float*>(place(scales_));
    packed_.zeros = reinterpret_cast<const std::int8_t*>(place(zeros_));
    packed_.codebook = reinterpret_cast<const std::int8_t*>(place(codebook_));
    file_ = std::move(file);
}

void TableBuffer::lie_in(std::shared_ptr<const MappedFile> file, std::size_t offset) {
    check_within(*file, offset, memory_.size());
    offset_ = offset;
    file_ = std::move(file);
}

PagePool::PagePool(CacheFormat format, int layers, int pages, int page, int kv_heads, int key_dim, int value_dim)
    : Pages(pages, PagedLayer{nullptr, 0, format, page, kv_heads, key_dim, value_dim}.bytes() * static_cast<std::size_t>(layers)),
      layer_{nullptr, page_bytes(), format, page, kv_heads, key_dim, value_dim} {}

PagedLayer PagePool::layer(int slot) const {
    PagedLayer layer = layer_;
    layer.base = reinterpret_cast<std::byte*>(page_memory(0)) + layer.bytes() * static_cast<std::size_t>(slot);
    return layer;
}

Tape::Tape(std::shared_ptr<ThreadPool> pool, Isa isa, std::size_t arena_bytes, int most_tokens)
    : pool_(std::move(pool)), isa_(isa), most_tokens_(most_tokens), arena_(arena_bytes) {}

int Tape::add_group(StateGroup group) {
    groups_.push_back(std::move(group));
    return static_cast<int>(groups_.size()) - 1;
}

void Tape::need_scratch(std::size_t floats) {
    if (floats <= scratch_floats_) return;
    scratch_floats_ = (floats + 15) / 16 * 16;
    scratch_ = Buffer(scratch_floats_ * sizeof(float) * threads());
}

template <class Play>
std::size_t Tape::each_op(const StepInput& step, Play play) const {
    std::size_t barriers = 0;
    pool_->run([&](unsigned thread) {
        std::size_t met = 0;
        bool together = false;  // did every thread play since the last barrier, so that whoever comes next must wait?
        for (std::size_t i = 0; i < ops_.size(); ++i) {
            const bool alone = ops_[i]->alone(step);
            if (i && (together || !alone)) {
                pool_->barrier().wait(thread);
                ++met;
            }
            if (!alone || thread == 0) play(i, thread);
            together = !alone;
        }
        if (thread == 0) barriers = met;
    });
    return barriers;
}

std::size_t Tape::run(const StepInput& step) const {
    return each_op(step, [&](std::size_t index, unsigned thread) { ops_[index]->play(*this, step, thread); });
}

StepProfile Tape::profile(const StepInput& step, std::int64_t* op_ns) const {
    const std::int64_t reading = clock_cost();
    std::vector<std::int64_t> played(threads());  // ops that each thread played
    const auto begin = Clock::now();
    each_op(step, [&](std::size_t index, unsigned thread) {
        const auto start = Clock::now();
        ops_[index]->play(*this, step, thread);
        op_ns[index * threads() + thread] += std::max<std::int64_t>(nanoseconds(Clock::now() - start) - reading, 0);
        ++played[thread];
    });
    const std::int64_t wall = nanoseconds(Clock::now() - begin), clocks = 2 * reading * played[0];
    return {std::max<std::int64_t>(wall - clocks, 0), clocks};
}

std::vector<std::string> Tape::op_names() const {
    std::vector<std::string> names;
    for (const auto& op : ops_) names.push_back(op->name());
    return names;
}

}  // namespace hasten
