// What this machine's processor can run, and what this process may use of it.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace hasten {

// Instruction sets that the processor has and whose registers the operating system saves; all false away from x86-64.
struct Features {
    bool avx2 = false;
    bool fma = false;
    bool f16c = false;
    bool avx512f = false;
    bool avx512bw = false;
    bool avx512vl = false;
    bool avx512dq = false;
    bool avx512_vnni = false;
    bool avx512_bf16 = false;
    bool avx512_vbmi = false;
    bool avx512_vbmi2 = false;
    bool avx512_fp16 = false;
    bool amx_tile = false;
    bool amx_int8 = false;
    bool amx_bf16 = false;
};

struct Cpu {
    std::string vendor;  // "GenuineIntel"; empty away from x86-64
    std::string brand;   // "Intel(R) Xeon(R) Platinum 8481C"; empty where the processor does not say
    Features features;
};

struct NamedFeature {
    const char* name;
    bool Features::* flag;
};

// Every member of Features with its name, in the order of the struct.
std::span<const NamedFeature> named_features();

// Detected at the first call; safe from any thread.
const Cpu& cpu();

// Asks the kernel to let this process use AMX tiles, which stays granted; false where there are none or it refuses.
bool amx_granted();

// The CPU numbers this process may be scheduled on; empty where the system has no such notion.
std::vector<int> allowed_cpus();

// How many threads can run at once: the allowed CPUs, or all of them where there is no such notion. At least 1.
unsigned allowed_threads();

// Bytes that can be allocated without swapping, as the kernel estimates; cgroup limits are not looked at.
std::uint64_t available_memory();

}  // namespace hasten
