#include "tape.hpp"

#include <chrono>
#include <cstring>

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

}  // namespace

WeightBuffer::WeightBuffer(const WeightLayout& layout)
    : sparse_(layout.sparse),
      tiles_(packed_tile_bytes(layout.format, layout.out, layout.in)),
      scales_(packed_scale_count(layout.format, layout.out, layout.in, layout.group) * sizeof(float)),
      zeros_(layout.zero_points ? scales_.size() / sizeof(float) : 0),
      packed_{layout.format, layout.out, layout.in, layout.group, tiles_.data(), reinterpret_cast<const float*>(scales_.data()),
              reinterpret_cast<const std::int8_t*>(zeros_.data())} {}

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

void WeightBuffer::sparsify(ThreadPool& pool) {
    const int panels = packed_.panels();
    masks_ = Buffer(sparse_mask_count(packed_) * sizeof(std::uint64_t));
    starts_ = Buffer(static_cast<std::size_t>(panels + 1) * sizeof(std::uint64_t));
    auto* const masks = reinterpret_cast<std::uint64_t*>(masks_.data());
    auto* const starts = reinterpret_cast<std::uint64_t*>(starts_.data());
    by_panels(pool, panels, [&](int first, int last) { sparse_masks(packed_, first, last, masks, starts + 1); });
    for (int panel = 0; panel < panels; ++panel) starts[panel + 1] += starts[panel];
    Buffer elements(starts[panels] + 64);  // a line may be read beyond the last
    by_panels(pool, panels, [&](int first, int last) { sparse_elements(packed_, masks, starts, first, last, elements.data()); });
    tiles_ = std::move(elements);
    packed_.tiles = tiles_.data();
    packed_.masks = masks;
    packed_.starts = starts;
}

std::vector<std::span<std::byte>> WeightBuffer::parts() const {
    std::vector<std::span<std::byte>> filled;
    for (const Buffer* buffer : {&tiles_, &scales_, &zeros_})
        if (buffer->size()) filled.emplace_back(buffer->data(), buffer->size());
    return filled;
}

PagePool::PagePool(CacheFormat format, int layers, int pages, int page, int kv_heads, int key_dim, int value_dim)
    : pages_(pages), layer_{nullptr, 0, format, page, kv_heads, key_dim, value_dim} {
    layer_.page_stride = layer_.bytes() * static_cast<std::size_t>(layers);
    memory_ = Buffer(layer_.page_stride * static_cast<std::size_t>(pages));
}

PagedLayer PagePool::layer(int slot) const {
    PagedLayer layer = layer_;
    layer.base = memory_.data() + layer.bytes() * static_cast<std::size_t>(slot);
    return layer;
}

void PagePool::copy_page(int from, int to) { std::memmove(page_memory(to), page_memory(from), page_bytes()); }

std::uint8_t* PagePool::page_memory(int page) const {
    return reinterpret_cast<std::uint8_t*>(memory_.data()) + page_bytes() * static_cast<std::size_t>(page);
}

Tape::Tape(std::shared_ptr<ThreadPool> pool, Isa isa, std::size_t arena_bytes, int most_tokens)
    : pool_(std::move(pool)), isa_(isa), most_tokens_(most_tokens), arena_(arena_bytes) {}

int Tape::add_group(std::shared_ptr<PagePool> pages) {
    groups_.push_back(std::move(pages));
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
                pool_->barrier().wait();
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

StepProfile Tape::profile(const StepInput& step) const {
    using Clock = std::chrono::steady_clock;
    const auto nanoseconds = [](Clock::duration time) { return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count(); };
    StepProfile profile{std::vector<std::int64_t>(ops_.size() * threads()), 0};
    const auto begin = Clock::now();
    each_op(step, [&](std::size_t index, unsigned thread) {
        const auto start = Clock::now();
        ops_[index]->play(*this, step, thread);
        profile.op_ns[index * threads() + thread] = nanoseconds(Clock::now() - start);
    });
    profile.wall_ns = nanoseconds(Clock::now() - begin);
    return profile;
}

std::vector<std::string> Tape::op_names() const {
    std::vector<std::string> names;
    for (const auto& op : ops_) names.push_back(op->name());
    return names;
}

}  // namespace hasten
