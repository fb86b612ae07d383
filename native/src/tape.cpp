#include "tape.hpp"

namespace hasten {

WeightBuffer::WeightBuffer(WeightFormat format, int out, int in, int group)
    : tiles_(packed_tile_bytes(format, out, in)),
      scales_(packed_scale_count(format, out, in, group) * sizeof(float)),
      packed_{format, out, in, group, tiles_.data(), reinterpret_cast<const float*>(scales_.data())} {}

void WeightBuffer::pack(ThreadPool& pool, const bf16* dense) {
    const auto scales = reinterpret_cast<float*>(scales_.data());
    pool.run([&](unsigned thread) {
        const Share panels = share(packed_.panels(), thread, pool.size());
        pack_linear(packed_.format, packed_.out, packed_.in, packed_.group, dense, static_cast<int>(panels.begin),
                    static_cast<int>(panels.end), tiles_.data(), scales);
    });
}

std::vector<std::span<std::byte>> WeightBuffer::parts() const {
    std::vector<std::span<std::byte>> filled;
    for (const Buffer* buffer : {&tiles_, &scales_})
        if (buffer->size()) filled.emplace_back(buffer->data(), buffer->size());
    return filled;
}

PagePool::PagePool(int layers, int pages, int page, int kv_heads, int key_dim, int value_dim)
    : layers_(layers),
      pages_(pages),
      page_(page),
      kv_heads_(kv_heads),
      key_dim_(key_dim),
      value_dim_(value_dim),
      layer_elements_(static_cast<std::size_t>(kv_heads) * page * (key_dim + value_dim)),
      memory_(layer_elements_ * layers * pages * sizeof(bf16)) {}

PagedLayer PagePool::layer(int slot) const {
    const auto base = reinterpret_cast<bf16*>(memory_.data()) + layer_elements_ * slot;
    return {base, layer_elements_ * layers_, page_, kv_heads_, key_dim_, value_dim_};
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
