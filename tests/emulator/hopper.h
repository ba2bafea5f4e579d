// Twins of what csrc/cuda/hopper.cuh has for the GPU.
//
// What is asynchronous there is late here. Copies are done while threads wait at a barrier in
// shared memory. A product is computed, from what shared memory holds then, when its group is
// waited for; until then its accumulator is NaN. Reported are: products without the fences that
// they need, accumulators and operands touched under way, descriptors of tiles that do not lie as
// they say, arrivals too many at a barrier, work that nobody waited for.
#pragma once

#include <array>
#include <deque>
#include <utility>

namespace emulator {

// 8 bytes in shared memory, which begin as 0xff..: no barrier.
struct MBarrier {
    uint16_t expected, pending, phase, mark;
};
static_assert(sizeof(MBarrier) == 8);

// A product d [64, n] += a [64, 16] b [16, n] of a thread's share: two rows.
struct Product {
    float *d;
    int n;
    bool rows_in_shared, down, fresh;
    uint64_t a, b;              // descriptors
    const unsigned *registers;  // of a
    std::array<unsigned, 4> before;
    float left[2][16];
    float (*widen)(uint16_t);
};

// An accumulator under way: what it is worth, while it is NaN for the program.
struct Accumulator {
    std::vector<float> values;
    int products = 0;
};

// A copy of 16 bytes, or the arrival that follows those before it.
struct BarrierCopy {
    unsigned char *to;
    std::array<unsigned char, 16> bytes;
    MBarrier *barrier;
};

struct HopperThread {
    std::deque<BarrierCopy> copies;
    std::deque<std::vector<Product>> groups;
    std::vector<Product> open;
    std::map<float *, Accumulator> accumulators;
    bool fenced = false, proxy_fenced = true;
    unsigned long progress_seen = 0;
};

struct Hopper {
    std::vector<HopperThread> threads;
    ~Hopper() {
        for (HopperThread &t : threads)
            if (!t.copies.empty() || !t.groups.empty() || !t.open.empty())
                fail("a copy or a product that was never waited for");
    }
};

inline Hopper &hopper() {
    auto &kept = current->block->extension;
    if (!kept) {
        auto made = std::make_shared<Hopper>();
        made->threads.resize(blockDim.x * blockDim.y * blockDim.z);
        kept = made;
    }
    return *static_cast<Hopper *>(kept.get());
}
inline HopperThread &hopper_thread() { return hopper().threads[current->linear]; }

template <class T>
T *shared_at(unsigned address) {
    if (address % sizeof(T) || address + sizeof(T) > current->block->shared_bytes) {
        fail("an address that is not in shared memory");
        address = 0;
    }
    return reinterpret_cast<T *>(current->block->shared + address);
}

inline void arrive(MBarrier &barrier) {
    progress++;
    if (barrier.mark != 0xb417) return fail("an arrival at a barrier that was not initialised");
    if (--barrier.pending == 0) {
        barrier.pending = barrier.expected;
        barrier.phase ^= 1;
    }
}

// Lets copies land. In blocks of even index one at a time, at every chance, so that one too early
// shows. In the others only when nothing else moves, then those of one thread up to an arrival, so
// that one that was not waited for shows.
inline void copy_something() {
    Hopper &all = hopper();
    HopperThread &mine = hopper_thread();
    bool late = current->block->index.x % 2;
    unsigned long before = std::exchange(mine.progress_seen, progress);
    if (late && before != progress) return;
    for (size_t i = 0, n = all.threads.size(); i < n; i++) {
        auto &copies = all.threads[(current->linear * 7 + progress + i) % n].copies;
        while (!copies.empty()) {
            BarrierCopy copy = copies.front();
            copies.pop_front();
            progress++;
            if (copy.barrier) return arrive(*copy.barrier);
            std::memcpy(copy.to, copy.bytes.data(), 16);
            if (!late) return;
        }
    }
}

// Address of element (k, m) of a tile that a descriptor with the 128-byte swizzle speaks of; m is
// the row of the left or the column of the right operand.
inline unsigned tile_address(uint64_t descriptor, bool down, int k, int m) {
    auto field = [&](int from) { return unsigned(descriptor >> from & 0x3fff) << 4; };
    unsigned start = field(0), leading = field(16), stride = field(32);
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) || start / 128 % 8 ||
        (down ? start % 128 : start % 128 > 96))
        fail(
            "a descriptor that these twins do not know, or of a tile that does not lie as it says");
    unsigned address = start + (down ? m / 64 * leading + m % 64 * 2 + k / 8 * stride + k % 8 * 128
                                     : m / 8 * stride + m % 8 * 128 + k * 2);
    return address ^ (address >> 7 & 7) << 4;
}

inline int product_row() { return current->linear % 128 / 32 * 16 + lane() / 4; }

inline void compute(const Product &p, Accumulator &d) {
    auto read = [&](uint64_t descriptor, bool down, int k, int m) {
        return p.widen(*shared_at<uint16_t>(tile_address(descriptor, down, k, m)));
    };
    if (p.fresh) std::fill(d.values.begin(), d.values.end(), 0.f);
    for (int k = 0; k < 16; k++) {
        float left[2];
        for (int h = 0; h < 2; h++)
            left[h] = p.rows_in_shared ? read(p.a, false, k, product_row() + 8 * h) : p.left[h][k];
        for (int i = 0; i < p.n / 4; i++) {
            float right = read(p.b, p.down, k, i / 2 * 8 + lane() % 4 * 2 + i % 2);
            for (int h = 0; h < 2; h++) d.values[i / 2 * 4 + 2 * h + i % 2] += left[h] * right;
        }
    }
}

constexpr unsigned UNDER_WAY = 0x7fc0dead;  // a NaN

inline void issue(Product product) {
    HopperThread &t = hopper_thread();
    if (!t.fenced) fail("a product without wgmma_fence before its group");
    if (!t.proxy_fenced) fail("a product without fence_proxy_async after a wait for its data");
    Accumulator &d = t.accumulators[product.d];
    if (!d.products++) {
        d.values.assign(product.d, product.d + product.n / 2);
        for (int i = 0; i < product.n / 2; i++) std::memcpy(&product.d[i], &UNDER_WAY, 4);
    }
    t.open.push_back(product);
    warp_sync();
}

inline void finish(const Product &p) {
    HopperThread &t = hopper_thread();
    Accumulator &d = t.accumulators[p.d];
    if (!p.rows_in_shared && std::memcmp(p.registers, p.before.data(), 16))
        fail("an operand that was changed while its product was under way");
    for (int i = 0; i < p.n / 2; i++)
        if (std::memcmp(&p.d[i], &UNDER_WAY, 4))
            fail("an accumulator that was changed while its product was under way");
    compute(p, d);
    if (--d.products) return;
    std::copy(d.values.begin(), d.values.end(), p.d);
    t.accumulators.erase(p.d);
}

}  // namespace emulator

inline void mbarrier_init(u32 barrier, u32 arrivals) {
    uint16_t count = arrivals;
    *emulator::shared_at<emulator::MBarrier>(barrier) = {count, count, 0, 0xb417};
}
inline void mbarrier_arrive(u32 barrier) {
    emulator::arrive(*emulator::shared_at<emulator::MBarrier>(barrier));
}
inline void mbarrier_wait(u32 barrier, u32 parity) {
    auto *at = emulator::shared_at<emulator::MBarrier>(barrier);
    if (at->mark != 0xb417) emulator::fail("a wait at a barrier that was not initialised");
    while (at->phase == parity) {
        emulator::copy_something();
        __nanosleep(0);
    }
    emulator::hopper_thread().proxy_fenced = false;
}

inline void copy_async(u32 to, const void *from, bool valid) {
    emulator::BarrierCopy copy = {emulator::shared_at<unsigned char>(to), {}, nullptr};
    check_aligned(copy.to, 16);
    emulator::shared_at<unsigned char>(to + 15);
    if (valid) {
        check_aligned(from, 16);
        std::memcpy(copy.bytes.data(), from, 16);
    }
    emulator::hopper_thread().copies.push_back(copy);
}
inline void copies_arrive(u32 barrier) {
    emulator::hopper_thread().copies.push_back(
        {nullptr, {}, emulator::shared_at<emulator::MBarrier>(barrier)});
}
inline void wait_for_copies() {
    while (!emulator::hopper_thread().copies.empty()) {
        emulator::copy_something();
        __nanosleep(0);
    }
}
inline void fence_proxy_async() { emulator::hopper_thread().proxy_fenced = true; }

inline void named_barrier(u32 id, u32 threads) {
    emulator::arrive_and_wait(emulator::current->block->barriers[id], threads);
}
template <int REGISTERS>
void take_registers() {}
template <int REGISTERS>
void release_registers() {}

inline void wgmma_fence() { emulator::hopper_thread().fenced = true; }
inline void wgmma_commit() {
    auto &t = emulator::hopper_thread();
    t.groups.push_back(std::move(t.open));
    t.open.clear();
}
template <int GROUPS>
void wgmma_wait() {
    auto &t = emulator::hopper_thread();
    while (t.groups.size() > GROUPS) {
        for (const auto &product : t.groups.front()) emulator::finish(product);
        t.groups.pop_front();
    }
    t.fenced = false;
    emulator::warp_sync();
}

template <int COUNT>
void pin(float (&)[COUNT]) {}
inline void pin(unsigned (&)[4][4]) {}

template <bool DOWN, class T, int COUNT>
void wgmma(T, float (&d)[COUNT], const u32 (&a)[4], u64 b) {
    emulator::Product p = {d, 2 * COUNT, false, DOWN, false, 0, b, a, {a[0], a[1], a[2], a[3]}, {}};
    p.widen = [](uint16_t bits) { return widen(T{bits}); };
    emulator::exchange(p.before, [&](auto read) {
        for (int k = 0; k < 16; k++)
            for (int h = 0; h < 2; h++) {
                auto theirs = read(emulator::lane() / 4 * 4 + k % 8 / 2);
                p.left[h][k] = p.widen(theirs[k / 8 * 2 + h] >> k % 2 * 16);
            }
        return 0;
    });
    emulator::issue(p);
}

template <bool FRESH, class T>
void wgmma(T, float (&d)[32], u64 a, u64 b) {
    emulator::Product p = {d, 64, true, false, FRESH, a, b, nullptr, {}, {}};
    p.widen = [](uint16_t bits) { return widen(T{bits}); };
    emulator::issue(p);
}
