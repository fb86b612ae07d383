#include "cpu.hpp"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <thread>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#endif

namespace hasten {
namespace {

constexpr std::array<NamedFeature, 15> kNamedFeatures = {{
    {"avx2", &Features::avx2},
    {"fma", &Features::fma},
    {"f16c", &Features::f16c},
    {"avx512f", &Features::avx512f},
    {"avx512bw", &Features::avx512bw},
    {"avx512vl", &Features::avx512vl},
    {"avx512dq", &Features::avx512dq},
    {"avx512_vnni", &Features::avx512_vnni},
    {"avx512_bf16", &Features::avx512_bf16},
    {"avx512_vbmi", &Features::avx512_vbmi},
    {"avx512_vbmi2", &Features::avx512_vbmi2},
    {"avx512_fp16", &Features::avx512_fp16},
    {"amx_tile", &Features::amx_tile},
    {"amx_int8", &Features::amx_int8},
    {"amx_bf16", &Features::amx_bf16},
}};
static_assert(sizeof(Features) == kNamedFeatures.size(), "every feature has its name");

#if defined(__x86_64__)

struct Registers {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zero where the processor has no such leaf.
Registers cpuid(unsigned leaf, unsigned subleaf = 0) {
    Registers r;
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
    return r;
}

// XCR0: one bit for each kind of register that the operating system saves.
std::uint64_t saved_state() {
    constexpr unsigned kOsxsave = 1u << 27;
    if (!(cpuid(1).ecx & kOsxsave)) return 0;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return std::uint64_t{high} << 32 | low;
}

Features detect_features() {
    const Registers one = cpuid(1), seven = cpuid(7), seven_one = seven.eax >= 1 ? cpuid(7, 1) : Registers{};
    const std::uint64_t saved = saved_state();
    const auto reader = [saved](std::uint64_t needed) {
        return [usable = (saved & needed) == needed](unsigned reg, unsigned bit) { return usable && (reg >> bit & 1); };
    };
    const auto ymm = reader(0x6), zmm = reader(0xe6), tile = reader(0x60000);
    return {
        .avx2 = ymm(seven.ebx, 5),
        .fma = ymm(one.ecx, 12),
        .f16c = ymm(one.ecx, 29),
        .avx512f = zmm(seven.ebx, 16),
        .avx512bw = zmm(seven.ebx, 30),
        .avx512vl = zmm(seven.ebx, 31),
        .avx512dq = zmm(seven.ebx, 17),
        .avx512_vnni = zmm(seven.ecx, 11),
        .avx512_bf16 = zmm(seven_one.eax, 5),
        .avx512_vbmi = zmm(seven.ecx, 1),
        .avx512_vbmi2 = zmm(seven.ecx, 6),
        .avx512_fp16 = zmm(seven.edx, 23),
        .amx_tile = tile(seven.edx, 24),
        .amx_int8 = tile(seven.edx, 25),
        .amx_bf16 = tile(seven.edx, 22),
    };
}

void append(std::string& text, unsigned reg) {
    for (int shift = 0; shift < 32; shift += 8) text.push_back(static_cast<char>(reg >> shift & 0xff));
}

std::string trimmed(const std::string& text) {
    const std::string blank(" \0", 2);
    const auto first = text.find_first_not_of(blank);
    return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(blank) - first + 1);
}

Cpu detect() {
    Cpu found;
    const Registers zero = cpuid(0);
    for (unsigned reg : {zero.ebx, zero.edx, zero.ecx}) append(found.vendor, reg);
    for (unsigned leaf = 0x80000002; leaf <= 0x80000004; ++leaf) {
        const Registers r = cpuid(leaf);
        for (unsigned reg : {r.eax, r.ebx, r.ecx, r.edx}) append(found.brand, reg);
    }
    found.vendor = trimmed(found.vendor);
    found.brand = trimmed(found.brand);
    found.features = detect_features();
    return found;
}

#else

Cpu detect() { return {}; }

#endif

}  // namespace

std::span<const NamedFeature> named_features() { return kNamedFeatures; }

const Cpu& cpu() {
    static const Cpu found = detect();
    return found;
}

bool amx_granted() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA: not in older headers
    return cpu().features.amx_tile && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

std::vector<int> allowed_cpus() {
    std::vector<int> cpus;
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) != 0) return cpus;
    for (int i = 0; i < CPU_SETSIZE; ++i)
        if (CPU_ISSET(i, &set)) cpus.push_back(i);
#endif
    return cpus;
}

unsigned allowed_threads() {
    const auto cpus = allowed_cpus();
    return cpus.empty() ? std::max(1u, std::thread::hardware_concurrency()) : static_cast<unsigned>(cpus.size());
}

std::uint64_t available_memory() {
    std::ifstream meminfo("/proc/meminfo");
    for (std::string key, line; meminfo >> key; std::getline(meminfo, line)) {
        std::uint64_t kibibytes = 0;
        if (key == "MemAvailable:" && meminfo >> kibibytes) return kibibytes * 1024;
    }
    return static_cast<std::uint64_t>(std::max(0L, sysconf(_SC_PHYS_PAGES))) * static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
}

}  // namespace hasten
