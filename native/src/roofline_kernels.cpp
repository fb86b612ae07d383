#include "roofline_kernels.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <iterator>
#include <numeric>
#include <type_traits>

#include "cpu.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hasten {
namespace {

// Accumulators of a vector kernel: enough to hide a latency of 5 cycles on 2 ports, few enough for 16 registers with AVX2.
constexpr int kChains = 12;
// Steps of a block: some tens of microseconds, and every partial sum stays exact in f32.
constexpr int kVectorSteps = 8192;

// The sum of an array of vectors, lane by lane; copied out because a vector's lanes may not be read through a pointer of another type.
template <class Lane, class Vector, std::size_t count>
double total(const Vector (&sums)[count]) {
    Lane lanes[count * (sizeof(Vector) / sizeof(Lane))];
    std::memcpy(lanes, sums, sizeof sums);
    return std::accumulate(std::begin(lanes), std::end(lanes), 0.0);
}

std::uint64_t read_generic(const std::uint64_t* words, std::size_t count) {
    std::uint64_t sum = 0;
    for (std::size_t i = 0; i < count; ++i) sum += words[i];
    return sum;
}

using Float4 __attribute__((vector_size(16))) = float;

double f32_generic(const Operands& ones) {
    const auto* x = reinterpret_cast<const Float4*>(ones.f32);
    alignas(64) Float4 sums[kChains] = {};
    for (int step = 0; step < kVectorSteps; ++step)
        for (int i = 0; i < kChains; ++i) sums[i] += x[i] * x[kChains];
    return total<float>(sums);
}

double int8_generic(const Operands& ones) {
    constexpr int kHalf = sizeof ones.int8 / 2;
    std::int32_t sum = 0;
    for (int i = 0; i < kHalf; ++i) sum += ones.int8[i] * ones.int8[kHalf + i];
    return sum;
}

#if defined(__x86_64__)

#define TARGET(isa) __attribute__((target(isa)))

TARGET("avx512f") std::uint64_t read_avx512(const std::uint64_t* words, std::size_t count) {
    __m512i sums[8] = {};
    for (std::size_t at = 0; at < count; at += 64)
        for (int i = 0; i < 8; ++i) sums[i] = _mm512_add_epi64(sums[i], _mm512_load_si512(words + at + 8 * i));
    return static_cast<std::uint64_t>(total<std::uint64_t>(sums));
}

TARGET("avx2") std::uint64_t read_avx2(const std::uint64_t* words, std::size_t count) {
    __m256i sums[8] = {};
    for (std::size_t at = 0; at < count; at += 32)
        for (int i = 0; i < 8; ++i)
            sums[i] = _mm256_add_epi64(sums[i], _mm256_load_si256(reinterpret_cast<const __m256i*>(words + at + 4 * i)));
    return static_cast<std::uint64_t>(total<std::uint64_t>(sums));
}

// Each chain multiplies by a vector of its own from memory, or the compiler could see that all chains are one.

TARGET("avx512f") double f32_avx512(const Operands& ones) {
    __m512 sums[kChains] = {};
    const __m512 y = _mm512_load_ps(ones.f32 + 16 * kChains);
    for (int step = 0; step < kVectorSteps; ++step)
        for (int i = 0; i < kChains; ++i) sums[i] = _mm512_fmadd_ps(_mm512_load_ps(ones.f32 + 16 * i), y, sums[i]);
    return total<float>(sums);
}

TARGET("avx2,fma") double f32_avx2(const Operands& ones) {
    __m256 sums[kChains] = {};
    const __m256 y = _mm256_load_ps(ones.f32 + 8 * kChains);
    for (int step = 0; step < kVectorSteps; ++step)
        for (int i = 0; i < kChains; ++i) sums[i] = _mm256_fmadd_ps(_mm256_load_ps(ones.f32 + 8 * i), y, sums[i]);
    return total<float>(sums);
}

TARGET("avx512f,avx512bw,avx512bf16") double bf16_avx512(const Operands& ones) {
    __m512 sums[kChains] = {};
    const auto load = reinterpret_cast<const __m512bh*>(ones.bf16);
    for (int step = 0; step < kVectorSteps; ++step)
        for (int i = 0; i < kChains; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], load[i], load[kChains]);
    return total<float>(sums);
}

TARGET("avx512f,avx512vnni") double int8_avx512_vnni(const Operands& ones) {
    __m512i sums[kChains] = {};
    const __m512i y = _mm512_load_si512(ones.int8 + 64 * kChains);
    for (int step = 0; step < kVectorSteps; ++step)
        for (int i = 0; i < kChains; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], _mm512_load_si512(ones.int8 + 64 * i), y);
    return total<std::int32_t>(sums);
}

TARGET("avx2") double int8_avx2(const Operands& ones) {
    __m256i sums[kChains] = {};
    const auto* x = reinterpret_cast<const __m256i*>(ones.int8);
    const __m256i one = _mm256_set1_epi16(1);
    for (int step = 0; step < kVectorSteps; ++step)
        for (int i = 0; i < kChains; ++i) {
            const __m256i pairs = _mm256_maddubs_epi16(_mm256_load_si256(x + i), _mm256_load_si256(x + (step + i) % 256));
            sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, one));
        }
    return total<std::int32_t>(sums);
}

constexpr int kTileSteps = 1024;  // as many as keep a block, too, to some tens of microseconds

struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles 0 to 3 are a 2 by 2 block of sums, 4 and 5 its rows, 6 and 7 its columns: four products for four loads.
template <class Operand, class Sum>
TARGET("amx-tile,amx-bf16,amx-int8") double amx_block(const Operand* ones) {
    constexpr int kTile = 1024 / sizeof(Operand);
    const TileConfig config;
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int step = 0; step < kTileSteps; ++step) {
        const Operand* at = ones + step % 4 * 4 * kTile;
        _tile_loadd(4, at, 64);
        _tile_loadd(5, at + kTile, 64);
        _tile_loadd(6, at + 2 * kTile, 64);
        _tile_loadd(7, at + 3 * kTile, 64);
        if constexpr (std::is_same_v<Sum, float>) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        } else {
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 4, 7);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
    }
    alignas(64) Sum sums[4][256];
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    _tile_release();
    return total<Sum>(sums);
}

double bf16_amx(const Operands& ones) { return amx_block<std::uint16_t, float>(ones.bf16); }
double int8_amx(const Operands& ones) { return amx_block<std::int8_t, std::int32_t>(ones.int8); }

// Multiply-adds a second of one thread, the best of some blocks.
double rate(const PeakKernel& kernel) {
    static const Operands ones;
    double most = 0;
    for (int block = 0; block < 8; ++block) {
        const auto start = std::chrono::steady_clock::now();
        kernel.block(ones);
        most = std::max(most, static_cast<double>(kernel.multiply_adds) / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return most;
}

constexpr std::uint64_t tile_work(int products_per_sum) { return std::uint64_t{kTileSteps} * 4 * 256 * products_per_sum; }

#endif

constexpr std::uint64_t vector_work(int products_per_vector) { return std::uint64_t{kVectorSteps} * kChains * products_per_vector; }

}  // namespace

Operands::Operands() {
    std::ranges::fill(bf16, 0x3f80);
    std::ranges::fill(int8, 1);
    std::ranges::fill(f32, 1.0f);
}

std::vector<ReadKernel> read_kernels() {
    std::vector<ReadKernel> kernels;
#if defined(__x86_64__)
    const Features& has = cpu().features;
    if (has.avx512f) kernels.push_back({"avx512f", read_avx512});
    if (has.avx2) kernels.push_back({"avx2", read_avx2});
#endif
    kernels.push_back({"generic", read_generic});
    return kernels;
}

std::vector<PeakKernel> f32_kernels() {
    std::vector<PeakKernel> kernels;
#if defined(__x86_64__)
    const Features& has = cpu().features;
    if (has.avx512f) kernels.push_back({"avx512f", vector_work(16), f32_avx512});
    if (has.avx2 && has.fma) kernels.push_back({"avx2", vector_work(8), f32_avx2});
#endif
    kernels.push_back({"generic", vector_work(4), f32_generic});
    return kernels;
}

std::vector<PeakKernel> bf16_kernels() {
    std::vector<PeakKernel> kernels = f32_kernels();
#if defined(__x86_64__)
    const Features& has = cpu().features;
    if (has.avx512_bf16 && has.avx512bw) {
        const PeakKernel dots{"avx512_bf16", vector_work(32), bf16_avx512};
        static const bool pays = rate(dots) > rate(kernels.front());  // some processors take four cycles where float32 takes two
        kernels.insert(kernels.begin() + (pays ? 0 : 1), dots);
    }
    if (has.amx_bf16 && amx_granted()) kernels.insert(kernels.begin(), {"amx_bf16", tile_work(32), bf16_amx});
#endif
    return kernels;
}

std::vector<PeakKernel> int8_kernels() {
    std::vector<PeakKernel> kernels;
#if defined(__x86_64__)
    const Features& has = cpu().features;
    if (has.amx_int8 && amx_granted()) kernels.push_back({"amx_int8", tile_work(64), int8_amx});
    if (has.avx512_vnni) kernels.push_back({"avx512_vnni", vector_work(64), int8_avx512_vnni});
    if (has.avx2) kernels.push_back({"avx2", vector_work(32), int8_avx2});
#endif
    kernels.push_back({"generic", sizeof(Operands::int8) / 2, int8_generic});
    return kernels;
}

}  // namespace hasten
