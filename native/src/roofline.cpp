#include "roofline.hpp"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <functional>
#include <memory>
#include <new>
#include <stdexcept>
#include <thread>

#include "cpu.hpp"

namespace hasten {
namespace {

using Clock = std::chrono::steady_clock;

struct Interval {
    Clock::time_point start, end;
};

// From the first start to the last end, in seconds.
double wall(const std::vector<Interval>& intervals) {
    const auto start = std::ranges::min(intervals, {}, &Interval::start).start;
    const auto end = std::ranges::max(intervals, {}, &Interval::end).end;
    return std::chrono::duration<double>(end - start).count();
}

template <class Kernel>
const Kernel& choose(const std::vector<Kernel>& kernels, const std::string& isa) {
    if (isa == kBest) return kernels.front();
    std::string accepted = kBest;
    for (const Kernel& kernel : kernels) {
        if (isa == kernel.isa) return kernel;
        accepted += std::string(", ") + kernel.isa;
    }
    throw std::invalid_argument("isa is '" + isa + "'; this machine accepts " + accepted);
}

void pin_this_thread(const std::vector<int>& cpus, unsigned index) {
#if defined(__linux__)
    if (cpus.empty()) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpus[index % cpus.size()], &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // A refusal costs only steadiness.
#else
    (void)cpus, (void)index;
#endif
}

// Calls body(index), which must not throw, on new threads with a CPU each; none begins before all exist.
void on_pinned_threads(unsigned threads, const std::function<void(unsigned)>& body) {
    enum State { waiting, go, abandoned };
    std::atomic<State> state = waiting;
    const auto cpus = allowed_cpus();
    std::vector<std::thread> pool;
    const auto release = [&](State next) {
        state = next;
        state.notify_all();
        for (std::thread& thread : pool) thread.join();
    };
    try {
        for (unsigned index = 0; index < threads; ++index)
            pool.emplace_back([&, index] {
                pin_this_thread(cpus, index);
                state.wait(waiting);
                if (state == go) body(index);
            });
    } catch (...) {
        release(abandoned);
        throw;
    }
    release(go);
}

// Anonymous memory that asks for huge pages; untouched until someone writes to it.
class HugeBuffer {
public:
    explicit HugeBuffer(std::size_t bytes) : mapped_(bytes + kPage) {
        map_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (map_ == MAP_FAILED) throw std::bad_alloc();
        data_ = map_;
        std::size_t room = mapped_;
        std::align(kPage, bytes, data_, room);
#if defined(MADV_HUGEPAGE)
        madvise(data_, bytes, MADV_HUGEPAGE);  // A refusal means small pages, which the result then shows.
#endif
    }
    ~HugeBuffer() { munmap(map_, mapped_); }
    HugeBuffer(const HugeBuffer&) = delete;
    HugeBuffer& operator=(const HugeBuffer&) = delete;

    std::uint64_t* words() const { return static_cast<std::uint64_t*>(data_); }

private:
    static constexpr std::size_t kPage = std::size_t{2} << 20;
    std::size_t mapped_;
    void* map_;
    void* data_;
};

void require_exact(bool exact, const char* isa) {
    if (!exact) throw std::runtime_error(std::string("the ") + isa + " roofline kernel computed a wrong sum on this machine");
}

}  // namespace

Measured streaming_read(std::size_t bytes, unsigned threads, unsigned repeats, const std::string& isa) {
    const ReadKernel kernel = choose(read_kernels(), isa);
    const std::size_t words = bytes / sizeof(std::uint64_t) / threads / 512 * 512;  // each thread's part
    const HugeBuffer buffer(threads * words * sizeof(std::uint64_t));
    std::vector<std::vector<Interval>> passes(repeats, std::vector<Interval>(threads));
    std::barrier together(static_cast<std::ptrdiff_t>(threads));
    std::atomic<bool> exact = true;
    on_pinned_threads(threads, [&](unsigned index) {
        std::uint64_t* const part = buffer.words() + index * words;
        std::fill_n(part, words, std::uint64_t{1});  // The reader touches it first, so it lies in its own NUMA node.
        for (auto& pass : passes) {
            together.arrive_and_wait();
            const auto start = Clock::now();
            if (kernel.sum(part, words) != words) exact = false;
            pass[index] = {start, Clock::now()};
        }
    });
    require_exact(exact, kernel.isa);
    std::vector<double> seconds;
    for (const auto& pass : passes) seconds.push_back(wall(pass));
    const auto middle = seconds.begin() + repeats / 2;
    std::ranges::nth_element(seconds, middle);
    return {static_cast<double>(threads * words * sizeof(std::uint64_t)) / *middle / 1e9, kernel.isa};
}

Measured peak(const std::vector<PeakKernel>& kernels, unsigned threads, double seconds, const std::string& isa) {
    const PeakKernel kernel = choose(kernels, isa);
    const auto expected = static_cast<double>(kernel.multiply_adds);
    const auto duration = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    const std::vector<Operands> ones(threads);
    std::vector<Interval> intervals(threads);
    std::barrier together(static_cast<std::ptrdiff_t>(threads));
    std::atomic<std::uint64_t> blocks = 0;
    std::atomic<bool> exact = true;
    on_pinned_threads(threads, [&](unsigned index) {
        if (kernel.block(ones[index]) != expected) exact = false;  // Also wakes the wide units, which sleep when unused.
        together.arrive_and_wait();
        const auto start = Clock::now();
        auto now = start;
        for (; now - start < duration; now = Clock::now(), ++blocks)
            if (kernel.block(ones[index]) != expected) exact = false;
        intervals[index] = {start, now};
    });
    require_exact(exact, kernel.isa);
    return {2 * expected * static_cast<double>(blocks) / wall(intervals) / 1e12, kernel.isa};
}

}  // namespace hasten
