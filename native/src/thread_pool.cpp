#include "thread_pool.hpp"

#include "cpu.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace hasten {

namespace {

constexpr int kSpins = 2'000;  // some 100 µs: longer than an op's imbalance, shorter than anybody notices an idle core burn

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// Until `value` is no longer `old`: spinning first, asleep after.
template <class T>
void await_change(std::atomic<T>& value, T old) {
    for (int spin = 0; spin < kSpins; ++spin) {
        if (value.load(std::memory_order_acquire) != old) return;
        pause();
    }
    while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

void pin(int cpu) {
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // a refusal costs speed only
#else
    (void)cpu;
#endif
}

}  // namespace

void Barrier::wait() {
    if (threads_ == 1) return;
    const std::uint32_t round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
        arrived_.store(0, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
        round_.notify_all();
    } else {
        await_change(round_, round);
    }
}

ThreadPool::ThreadPool(unsigned threads) : barrier_(threads) {
    const std::vector<int> cpus = allowed_cpus();
    for (unsigned thread = 1; thread < threads; ++thread)
        workers_.emplace_back([this, thread, cpu = cpus.empty() ? -1 : cpus[thread % cpus.size()]] { loop(thread, cpu); });
}

ThreadPool::~ThreadPool() {
    stop_ = true;
    step_.fetch_add(1, std::memory_order_release);
    step_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(const std::function<void(unsigned)>& work) {
    work_ = &work;
    running_.store(static_cast<unsigned>(workers_.size()), std::memory_order_relaxed);
    step_.fetch_add(1, std::memory_order_release);
    step_.notify_all();
    work(0);
    for (unsigned left; (left = running_.load(std::memory_order_acquire)) != 0;) await_change(running_, left);
}

void ThreadPool::loop(unsigned thread, int cpu) {
    if (cpu >= 0) pin(cpu);
    for (std::uint32_t seen = 0;;) {
        await_change(step_, seen);
        ++seen;
        if (stop_) return;
        (*work_)(thread);
        if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) running_.notify_all();
    }
}

}  // namespace hasten
