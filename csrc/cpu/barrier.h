// A barrier for the threads of a team inside one parallel region, where OpenMP has one for all of
// them alone.
#pragma once

#if defined(__x86_64__) || defined(__i386__)
#define FLOWOPS_PAUSE() __builtin_ia32_pause()
#else
#define FLOWOPS_PAUSE() __asm__ volatile("" ::: "memory")
#endif

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

namespace flowops::FLOWOPS_ISA {
namespace {

// Spins first: a stage of a small block is a matter of microseconds. Sleeps after that: where other
// programs want the cores, a thread that was asleep is run at once when it is woken, while one that
// yielded waits for its turn, at every stage.
class Barrier {
public:
    void wait(int threads) {
        if (threads == 1) return;
        const int now = __atomic_load_n(&generation, __ATOMIC_ACQUIRE);
        if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == threads) {
            __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
            __atomic_store_n(&generation, now + 1, __ATOMIC_SEQ_CST);
            if (__atomic_load_n(&sleepers, __ATOMIC_SEQ_CST)) wake();
            return;
        }
        for (int spins = 0; spins < 2048; ++spins) {
            if (__atomic_load_n(&generation, __ATOMIC_ACQUIRE) != now) return;
            FLOWOPS_PAUSE();
        }
        __atomic_add_fetch(&sleepers, 1, __ATOMIC_SEQ_CST);
        while (__atomic_load_n(&generation, __ATOMIC_SEQ_CST) == now) sleep(now);
        __atomic_sub_fetch(&sleepers, 1, __ATOMIC_SEQ_CST);
    }

private:
#ifdef __linux__
    void sleep(int now) { syscall(SYS_futex, &generation, FUTEX_WAIT_PRIVATE, now, nullptr); }
    void wake() { syscall(SYS_futex, &generation, FUTEX_WAKE_PRIVATE, 1 << 30); }
#else
    void sleep(int) { sched_yield(); }
    void wake() {}
#endif

    alignas(64) int arrived = 0;
    alignas(64) int generation = 0;
    int sleepers = 0;
};

}  // namespace
}  // namespace flowops::FLOWOPS_ISA
