// The emulator's words for csrc/cuda/mma16.cuh.
//
// A copy by cp.async is made when it is begun or when it is waited for, by the draw of a coin: so
// both a wait that is missing and a copy that begins while its target is still read show.
#pragma once

#include <deque>

namespace emulator {

struct Copy {
    u32 to;
    const void *from;
    bool real;
    void make() const {
        unsigned char *shared = current->block->shared;
        if (to + 16 > current->block->shared_bytes) return fail("a copy behind the shared memory");
        if (real)
            std::memcpy(shared + to, from, 16);
        else
            std::memset(shared + to, 0, 16);
    }
};

// Groups of copies of every thread, the oldest first; the last one is still open.
inline std::map<Fiber *, std::deque<std::vector<Copy>>> copies;
inline std::minstd_rand coin;

template <bool TRANSPOSED>
void load_matrices(u32 (&to)[4], u32 row) {
    exchange(row, [&](auto read) {
        for (unsigned i = 0; i < 4; i++) {
            unsigned short halves[2];
            for (unsigned j = 0; j < 2; j++) {
                unsigned r = lane() / 4, c = 2 * (lane() % 4) + j;
                u32 at = read(8 * i + (TRANSPOSED ? c : r));
                if (at % 16) fail("a misaligned row of ldmatrix");
                if (at + 16 > current->block->shared_bytes)
                    fail("ldmatrix behind the shared memory");
                std::memcpy(&halves[j], current->block->shared + at + 2 * (TRANSPOSED ? r : c), 2);
            }
            to[i] = halves[0] | u32(halves[1]) << 16;
        }
        return 0;
    });
}

}  // namespace emulator

inline u32 shared_address(const void *at) {
    return static_cast<const unsigned char *>(at) - emulator::current->block->shared;
}

inline void cp_async16(u32 to, const void *from, bool real) {
    using namespace emulator;
    if (to % 16) fail("a misaligned copy to shared memory");
    if (real) check_aligned(from, 16);
    Copy copy{to, from, real};
    if (coin() % 2) return copy.make();
    auto &groups = copies[current];
    if (groups.empty()) groups.emplace_back();
    groups.back().push_back(copy);
}
inline void cp_async_commit() {
    auto &groups = emulator::copies[emulator::current];
    if (groups.empty()) groups.emplace_back();
    groups.emplace_back();
}
template <int PENDING>
void cp_async_wait() {
    auto &groups = emulator::copies[emulator::current];
    for (; groups.size() > PENDING + 1; groups.pop_front())
        for (const auto &copy : groups.front()) copy.make();
}

inline void ldmatrix(u32 (&to)[4], u32 row) { emulator::load_matrices<false>(to, row); }
inline void ldmatrix_transposed(u32 (&to)[4], u32 row) { emulator::load_matrices<true>(to, row); }

template <class T>
float half_of(u32 word, unsigned half) {
    T x;
    x.bits = word >> 16 * half;
    return widen(x);
}

template <class T>
void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    struct Words {
        u32 a[4], b[2];
    };
    Words mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
    emulator::exchange(mine, [&](auto read) {
        unsigned g = emulator::lane() / 4, t = emulator::lane() % 4;
        for (unsigned k = 0; k < 16; k++) {
            unsigned from = k % 8 / 2, upper = k / 8, half = k % 2;
            Words row = read(4 * g + from);
            for (unsigned j = 0; j < 2; j++) {
                float b = half_of<T>(read(4 * (2 * t + j) + from).b[upper], half);
                c[j] += half_of<T>(row.a[2 * upper], half) * b;
                c[j + 2] += half_of<T>(row.a[2 * upper + 1], half) * b;
            }
        }
        return 0;
    });
}

template <class T>
u32 pack(float low, float high) {
    return narrow<T>(low).bits | u32(narrow<T>(high).bits) << 16;
}
inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal_approx(float x) { return 1 / x; }
