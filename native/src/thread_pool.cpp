#include "thread_pool.hpp"

#include <bit>
#include <chrono>

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

using Clock = std::chrono::steady_clock;
constexpr std::chrono::microseconds kBetweenOps{100};   // longer than an op's imbalance
constexpr std::chrono::microseconds kBetweenSteps{500};  // longer than picking a token takes, shorter than anybody notices an idle core burn
constexpr int kPauses = 64;  // some 1 to 3 µs; then the clock is looked at, and whoever else wants this core goes first

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// Until `value` is no longer `old`: spinning first, asleep after.
template <class T>
void await_change(std::atomic<T>& value, T old, Clock::duration spin) {
    for (Clock::time_point end{};;) {
        for (int i = 0; i < kPauses; ++i) {
            if (value.load(std::memory_order_acquire) != old) return;
            pause();
        }
        const auto now = Clock::now();
        if (end == Clock::time_point{}) end = now + spin;
        if (now >= end) break;
        std::this_thread::yield();
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

Barrier::Barrier(unsigned threads) : threads_(threads), told_(std::bit_width(threads - 1) * threads), own_(threads) {}

void Barrier::wait(unsigned thread) {
    const std::uint32_t before = own_[thread].round++;
    Told* turn = told_.data();
    for (unsigned step = 1; step < threads_; step *= 2, turn += threads_) {
        std::atomic<std::uint32_t>& other = turn[(thread + step) % threads_].round;
        other.store(before + 1, std::memory_order_release);
        other.notify_one();
        await_change(turn[thread].round, before, kBetweenOps);  // it may be a round further already
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
    const std::lock_guard one_at_a_time(busy_);
    work_ = &work;
    running_.store(static_cast<unsigned>(workers_.size()), std::memory_order_relaxed);
    step_.fetch_add(1, std::memory_order_release);
    step_.notify_all();
    work(0);
    for (unsigned left; (left = running_.load(std::memory_order_acquire)) != 0;) await_change(running_, left, kBetweenOps);
}

void ThreadPool::loop(unsigned thread, int cpu) {
    if (cpu >= 0) pin(cpu);
    for (std::uint32_t seen = 0;;) {
        await_change(step_, seen, kBetweenSteps);
        ++seen;
        if (stop_) return;
        (*work_)(thread);
        if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) running_.notify_all();
    }
}

}  // namespace hasten
