#include "tape.hpp"

#include <cstring>

namespace hasten {

WeightBuffer::WeightBuffer(ThreadPool& pool, WeightFormat format, int out, int in, int group, const bf16* dense)
    : tiles_(packed_tile_bytes(format, out, in)),
      scales_(packed_scale_count(format, out, in, group) * sizeof(float)),
      packed_{format, out, in, group, tiles_.data(), reinterpret_cast<const float*>(scales_.data())} {
    const auto scales = reinterpret_cast<float*>(scales_.data());
    pool.run([&](unsigned thread) {
        const Share panels = share(packed_.panels(), thread, pool.size());
        pack_linear(format, out, in, group, dense, static_cast<int>(panels.begin), static_cast<int>(panels.end), tiles_.data(), scales);
    });
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

void PagePool::copy_page(int from, int to) {
    const std::size_t bytes = page_bytes();
    std::memmove(memory_.data() + bytes * static_cast<std::size_t>(to), memory_.data() + bytes * static_cast<std::size_t>(from), bytes);
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

void Tape::run(const StepInput& step) const {
    pool_->run([&](unsigned thread) {
        for (const auto& op : ops_) {
            op->play(*this, step, thread);
            pool_->barrier().wait();
        }
    });
}

}  // namespace hasten
