// Kernels of the native backend: plain functions over one task's share of an op, single-threaded; the executor cuts ops into tasks.
//
// Values are row-major, float32 unless a name says otherwise; row strides are in elements. A kernel never allocates, never fails on
// sizes (zero rows are fine) and writes every element of its share. Sums accumulate in one fixed order whatever the share, so that
// results do not depend on how an op was cut, on the batch, or on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cache.hpp"

namespace hasten {

using bf16 = std::uint16_t;  // the upper half of a float32, rounded to nearest even

enum class Isa { generic, avx2, avx512, amx };

// The best level this machine runs, at most `limit`. avx2 has FMA; avx512 has F, BW, VL, DQ and VNNI; amx has all of that and the
// kernel's permission.
Isa best_isa(Isa limit = Isa::amx);

// --- linear layers -------------------------------------------------------------------------------------------------------------

enum class WeightFormat { f32, f16, bf16, fp8, int8, int4, int3, int2, lut4 };

struct SparsePanel {
  std::uint64_t start;        // byte of `tiles` at which its elements begin
  std::uint64_t two_of_four;  // 1: two elements in every four k
};

constexpr int kMostIn = 131072;  // inputs of a linear layer

// A weight [out, in] rearranged into panels of 16 output channels, each a run of tiles in the order a product reads them, so that one
// path serves every instruction set. K is padded with zeros to whole tiles, out to whole panels. A tile is, of 16 channels,
//   f32:  16 k, channel by channel.                              No scales.
//   f16, bf16: 32 k, pairs of k adjacent.                        No scales.
//   fp8:  64 k: e4m3 in the order of two tiles of bf16.          Scales.
//   int8: 64 k, quadruples of k adjacent.                        Scales.
//   int4: two int8 tiles (128 k) in the nibbles of 1 KiB, the first in the low ones.                                   Scales.
//   int2: four int8 tiles (256 k) in the bit pairs of 1 KiB, the first in the lowest, as q + 2.                        Scales.
//   int3: q + 4 of four int8 tiles: their lower bits as in int2, then 512 bytes whose bits 2j and 2j + 1 are the third bit of the
//         first and second half of tile j.                                                                             Scales.
//   lut4: two tiles (128 k) in the nibbles of 1 KiB, as int4, but places in the codebook, which stand for its bytes.        Scales.
// Scales [panels][groups][16] are one per channel and group of `group` k: 0 (one group), 32, 64 or a multiple of 128 up to 1024.
// Zero points, where there are any (int4, int3, int2), have the same shape; an element stands for (q − zero) · scale.
// A sparse weight (bf16, int8, int4) has masks and its nonzero elements. Masks are 64 bits for 4 k of 16 channels: bit 4 c + j for k number
// j of channel c, but bit 16 j + c in panels of bf16 that are not 2:4. Elements follow one another in the order of the bits, panel by panel.
// Of int4 a tile's two halves lie beside each other in the nibbles of as many bytes as the fuller half has elements. Where a panel is 2:4,
// zeros are added so that every four k have two elements exactly, which a product may then find without counting. Up to 64 bytes beyond
// the last are read.
// A sparse weight of int8 never has -128. `in` is at most kMostIn, up to which no int32 sum overflows.
struct PackedLinear {
  WeightFormat format;
  int out, in;
  int group;  // k per scale; 0: one scale per channel
  const std::byte* tiles;
  const float* scales;
  const std::int8_t* zeros = nullptr;       // null: symmetric
  const std::uint64_t* masks = nullptr;     // null: dense
  const SparsePanel* sparse_panels = nullptr;  // [panels + 1], sparse only; the last one's start is the end
  const std::int8_t* codebook = nullptr;       // [16], of lut4: ascending, 0 among them, never -128

  int panels() const { return (out + 15) / 16; }
  int padded_in() const;  // k in whole tiles
};

std::size_t packed_tile_bytes(WeightFormat format, int out, int in);
std::size_t packed_scale_count(WeightFormat format, int out, int in, int group);

// Fill panels [first, last) of tiles, scales and (unless null) zeros from the rows of `dense` [out, in], rounding to nearest, half to
// even. Symmetric: q = w / scale with scale = max|w| / limit, limit 127, 7, 3, 1 for int8 to int2, 448 for fp8, and scale 1 where all are
// zero. With zero points: scale = (max(w, 0) − min(w, 0)) / (2^bits − 1), q = w / scale + zero, clipped to the format's integers, where
// zero is what 0 rounds to. lut4 is packed from codes alone.
void pack_linear(WeightFormat format, int out, int in, int group, const bf16* dense, int first, int last, std::byte* tiles, float* scales);
void pack_linear(WeightFormat format, int out, int in, int group, const float* dense, int first, int last, std::byte* tiles, float* scales,
                 std::int8_t* zeros);

// The same from a weight that is quantized already: `codes` [out, in] (of fp8 their bytes), `code_scales` and, with zero points,
// `code_zeros` [out, groups] as they are. Of lut4 they are places in `codebook`.
void pack_codes(WeightFormat format, int out, int in, int group, const std::int8_t* codes, const float* code_scales, const std::int8_t* code_zeros,
                const std::int8_t* codebook, int first, int last, std::byte* tiles, float* scales, std::int8_t* zeros);

// The sparse form of a dense one: masks [panels · tiles][depth · 16 / 64] and, as `start`, the bytes of each panel's elements; then, where
// starts are what they say, the elements.
std::size_t sparse_mask_count(const PackedLinear& dense);
void sparse_masks(const PackedLinear& dense, int first, int last, std::uint64_t* masks, SparsePanel* panels);
void sparse_elements(const PackedLinear& dense, const std::uint64_t* masks, const SparsePanel* panels, int first, int last, std::byte* elements);

// The value of each element as the product sees it (q · scale), float32 [out, in]: the meaning of the packed form, for tests.
void unpack_linear(const PackedLinear& weight, float* dense);

// Activations as a product reads them. bf16 rows, or int8 rows (never -128) with one scale each. Rows are `stride` elements apart; the first
// padded_in() elements of each (of float32 rows `in`) are readable, zeros beyond `in`; rows beyond `count` are not touched. Fastest where rows begin at cache
// lines, an odd number of lines apart: a stride that is a multiple of 4 KiB puts a tile's rows in one set of the cache.
struct Activations {
  const void* rows;      // bf16 or int8; float32 for weights in f32 and f16
  const float* scales;   // [rows] for int8, else null
  int count;
  std::ptrdiff_t stride;
};

// y[r, c] = x · wᵀ + bias for every row and the channels of panels [first, last). bias may be null. y row stride in elements.
// f32 and f16 weights take float32 rows, bf16 and fp8 bf16 rows, integers int8 or bf16 rows. Integers on int8 give the same bits at every
// isa: exact sums s, then per group in k order t = fma(float(s), scale, t), then fma(t, row scale, bias). Otherwise sums are float32 in k
// order, with scales t = fma(s, scale, t) at the end of each group; their bits depend on whether isa is amx, and on nothing else. All of that
// holds of finite rows, and of scales that are not subnormal when divided by 16; a sparse weight may leave 0 · inf out.
// y may hold partial sums until the call returns. `isa` must be one that runs here.
void linear(Isa isa, const PackedLinear& weight, const Activations& x, int first, int last, const float* bias, float* y, std::ptrdiff_t y_stride);

// x [rows, n] → bf16, or → int8 as x · (127 / max|x|) rounded half to even, with scale = max|x| / 127 per row (1, and zeros, where
// max|x| < 2⁻¹¹⁰; not finite where x is not); padded with zeros to `padded`. The same bits at every isa.
void to_bf16(Isa isa, const float* x, std::ptrdiff_t x_stride, int rows, int n, int padded, bf16* y, std::ptrdiff_t y_stride);
void quantize_rows(Isa isa, const float* x, std::ptrdiff_t x_stride, int rows, int n, int padded, std::int8_t* q, std::ptrdiff_t q_stride, float* scales);
// x [rows, n] → int8 as x / step rounded half to even and brought within ±127 (NaN: 127); padded with zeros. The same bits at every isa.
void quantize_fixed(Isa isa, const float* x, std::ptrdiff_t x_stride, int rows, int n, int padded, float step, std::int8_t* q, std::ptrdiff_t q_stride);

// --- the rest of a decoder -----------------------------------------------------------------------------------------------------

void embed(const bf16* table, int width, const std::int32_t* tokens, int rows, float scale, float* y);  // y [rows, width]

// y = x / sqrt(mean(x²) + eps) · (offset + weight) over each run of `group` of the n features; weight [group] (weight_n = group) or [n].
void rms_norm(Isa isa, const float* x, int rows, int n, int group, const float* weight, int weight_n, float eps, float offset, float* y);

// y = (x − mean) / sqrt(var + eps) · weight + bias, runs and weights as in rms_norm; bias as weight, or null.
void layer_norm(Isa isa, const float* x, int rows, int n, int group, const float* weight, const float* bias, int weight_n, float eps, float* y);

void add(Isa isa, const float* a, const float* b, std::size_t count, float* y);

enum class Activation { relu, relu_squared, gelu, gelu_tanh, silu, sigmoid, tanh };
void activate(Isa isa, Activation activation, const float* x, std::size_t count, float* y);
void gate(Isa isa, Activation activation, const float* gate, const float* up, std::size_t count, float* y);  // activation(gate) · up
// y[r, c] = activation(gate[r]) · up[r, c] of up [rows, n].
void gate_rows(Isa isa, Activation activation, const float* gate, const float* up, int rows, int n, float* y);
// g · sigmoid(alpha·g) · (u + 1) with g = min(gate, limit) and u = up clipped to ±limit.
void clamped_swiglu(Isa isa, const float* gate, const float* up, std::size_t count, float alpha, float limit, float* y);

void scale(Isa isa, const float* x, std::size_t count, float factor, float* y);   // x · factor
void clip(Isa isa, const float* x, std::size_t count, float limit, float* y);     // min(max(x, −limit), limit)
void soft_cap(Isa isa, const float* x, std::size_t count, float cap, float* y);   // cap · tanh(x / cap)

// Rotary embedding: cos, sin [rows, dims / 2] of each row; `dims` features of every head from `start` are rotated, the others copied.
void rotate(Isa isa, const float* x, int rows, int heads, int head_dim, int start, int dims, bool interleaved, const float* cos, const float* sin, float* y);

struct AttendShape {
  int heads, kv_heads, key_dim, value_dim;
  float scale;
  int window;         // keys a query sees, its own among them; 0: all
  float softcap;      // 0: none
  const float* slopes; // ALiBi, [heads], or null
  const float* sinks;  // [heads], or null
};

// y[r, h] for the query rows [first, last) of one sequence and the heads of one key/value head: softmax over the sequence's cached
// positions 0 … position(r), in blocks of 64 at absolute positions with a running maximum (Milakov & Gimelshein 2018; Dao et al. 2022).
// q [rows, heads·key_dim], y [rows, heads·value_dim]; `position` is that of row 0 of q, rows follow one another; `table` lists the
// sequence's pages, of which those that no row sees are not looked at. Scales of the cache multiply scores and softmax weights, never
// elements. `scratch` has attend_scratch(shape, last − first) floats or more.
// Up to avx512 everything is float32; amx rounds queries and softmax weights to bf16, for every number of rows.
std::size_t attend_scratch(const AttendShape& shape, int rows);
void attend(Isa isa, const AttendShape& shape, const PagedLayer& layer, const std::int32_t* table, const float* q, int first, int last,
            int position, int kv_head, float* y, float* scratch);

}  // namespace hasten
