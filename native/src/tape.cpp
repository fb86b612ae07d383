#include "tape.hpp"

#include <chrono>

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
    each_op([&](std::size_t index, unsigned thread) { ops_[index]->play(*this, step, thread); });
}

StepProfile Tape::profile(const StepInput& step) const {
    using Clock = std::chrono::steady_clock;
    const auto nanoseconds = [](Clock::duration time) { return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count(); };
    StepProfile profile{std::vector<std::int64_t>(ops_.size() * threads()), 0};
    const auto begin = Clock::now();
    each_op([&](std::size_t index, unsigned thread) {
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
