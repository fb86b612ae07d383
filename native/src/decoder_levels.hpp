// The kernels of the rest of a decoder once for each instruction-set level; decoder.cpp and attention.cpp pick one by their `Isa`.
#pragma once

#include "kernels.hpp"

#define HASTEN_DECLARE_LEVEL(level)                                                                                                     \
  namespace level {                                                                                                                     \
  void rms_norm(const float* x, int rows, int n, int group, const float* weight, int weight_n, float eps, float offset, float* y);      \
  void layer_norm(const float* x, int rows, int n, int group, const float* weight, const float* bias, int weight_n, float eps, float* y); \
  void add(const float* a, const float* b, std::size_t count, float* y);                                                                \
  void activate(Activation activation, const float* x, std::size_t count, float* y);                                                    \
  void gate(Activation activation, const float* gate, const float* up, std::size_t count, float* y);                                    \
  void gate_rows(Activation activation, const float* gate, const float* up, int rows, int n, float* y);                                 \
  void clamped_swiglu(const float* gate, const float* up, std::size_t count, float alpha, float limit, float* y);                       \
  void scale(const float* x, std::size_t count, float factor, float* y);                                                                \
  void clip(const float* x, std::size_t count, float limit, float* y);                                                                  \
  void soft_cap(const float* x, std::size_t count, float cap, float* y);                                                                \
  void rotate(const float* x, int rows, int heads, int head_dim, int start, int dims, bool interleaved, const float* cos,               \
              const float* sin, float* y);                                                                                              \
  void attend(const AttendShape& shape, const PagedLayer& layer, const std::int32_t* table, const float* q, int first, int last,        \
              int position, int kv_head, float* y, float* scratch);                                                                     \
  }

namespace hasten {

HASTEN_DECLARE_LEVEL(level_generic)
#if defined(__x86_64__)
HASTEN_DECLARE_LEVEL(level_avx2)
HASTEN_DECLARE_LEVEL(level_avx512)
namespace level_amx {  // the rest is as in level_avx512
void attend(const AttendShape& shape, const PagedLayer& layer, const std::int32_t* table, const float* q, int first, int last,
            int position, int kv_head, float* y, float* scratch);
}
#endif

}  // namespace hasten

#undef HASTEN_DECLARE_LEVEL
