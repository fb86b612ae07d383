// A fixed set of threads that play one step together.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace hasten {

// All threads of a step wait here for each other between ops, by dissemination (Hensgen, Finkel & Manber 1988): in turn k of log2(threads)
// each tells the one 2^k after it, and waits to be told by the one 2^k before it. They spin for a moment, then sleep.
class Barrier {
   public:
    explicit Barrier(unsigned threads);
    void wait(unsigned thread);

   private:
    struct alignas(64) Told {
        std::atomic<std::uint32_t> round{0};
    };
    struct alignas(64) Own {
        std::uint32_t round = 0;
    };
    const unsigned threads_;
    std::vector<Told> told_;  // [turns, threads]; each has one writer and one reader
    std::vector<Own> own_;    // how often each thread was here: what it was told may be a round further
};

// The calling thread is number 0; the others are made once, each pinned to a CPU this process may use, and sleep between steps.
class ThreadPool {
   public:
    explicit ThreadPool(unsigned threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    unsigned size() const { return static_cast<unsigned>(workers_.size()) + 1; }

    // Calls work(thread) on every thread and returns when all are done. One at a time: other callers wait.
    void run(const std::function<void(unsigned)>& work);

    Barrier& barrier() { return barrier_; }

   private:
    void loop(unsigned thread, int cpu);

    std::mutex busy_;
    Barrier barrier_;
    std::vector<std::thread> workers_;
    const std::function<void(unsigned)>* work_ = nullptr;
    bool stop_ = false;
    alignas(64) std::atomic<std::uint32_t> step_{0};
    alignas(64) std::atomic<unsigned> running_{0};
};

// Thread `thread`'s share of `count` equal pieces: contiguous, and the same every time. What cannot be split is thread 0's.
struct Share {
    std::size_t begin, end;
};
inline Share share(std::size_t count, unsigned thread, unsigned threads) {
    const auto before = [&](std::size_t others) { return (count * others + threads - 1) / threads; };
    return {before(thread), before(thread + 1)};
}

}  // namespace hasten
