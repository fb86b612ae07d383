#include "attention.hpp"

#include "decoder_levels.hpp"

namespace hasten {

std::size_t attend_scratch(const AttendShape& shape, int rows) {
    const std::size_t pairs = static_cast<std::size_t>(up_to_multiple(rows_together(shape, rows) * (shape.heads / shape.kv_heads), 16));
    const std::size_t key_dim = static_cast<std::size_t>(up_to_multiple(shape.key_dim, 32));
    const std::size_t value_dim = static_cast<std::size_t>(up_to_multiple(shape.value_dim, 32));
    const std::size_t softmax = pairs * (kKeyBlock + value_dim + 3);  // level_*::attend
    const std::size_t products = pairs * key_dim + kKeyBlock * (key_dim + value_dim);  // Products of either kind
    const std::size_t vectors = softmax + products;
    const std::size_t tiles =  // level_amx::attend: its bf16 pieces are half floats
        (pairs * key_dim + kKeyBlock * (key_dim + value_dim + 16)) / 2 + 16 * kKeyBlock + 16 * value_dim + pairs * (value_dim + 3);
    return (vectors > tiles ? vectors : tiles) + 16 * 16;  // aligning each piece
}

void attend(Isa isa, const AttendShape& shape, const PagedLayer& layer, const std::int32_t* table, const float* q, int first, int last,
            int position, int kv_head, float* y, float* scratch) {
    switch (isa) {
#if defined(__x86_64__)
        case Isa::avx2:
            return level_avx2::attend(shape, layer, table, q, first, last, position, kv_head, y, scratch);
        case Isa::avx512:
            return level_avx512::attend(shape, layer, table, q, first, last, position, kv_head, y, scratch);
        case Isa::amx:
            return level_amx::attend(shape, layer, table, q, first, last, position, kv_head, y, scratch);
#endif
        default:
            return level_generic::attend(shape, layer, table, q, first, last, position, kv_head, y, scratch);
    }
}

}  // namespace hasten
