// The emulator's words for csrc/cuda/grid.cuh.
#pragma once

#define __noinline__

inline Quad load_packet(const Quad *at) {
    check_aligned(at, sizeof(Quad));
    return *at;
}
inline void store_packet(Quad *at, const Quad &q) {
    check_aligned(at, sizeof(Quad));
    *at = q;
}
inline void rest() { __nanosleep(20); }
inline void fence_grid() {}
inline Quad load_l2(const Quad *at) { return load_packet(at); }
inline void prefetch_l2(const void *) {}

template <int THREADS>
void meet() {
    emulator::arrive_and_wait(emulator::current->block->barriers[1], THREADS);
}
inline u32 look(const u32 *at) { return *at; }
inline void show(u32 *at, u32 x) { *at = x; }

inline void cp_async16_once(u32 to, const void *from, u64) { cp_async16(to, from, true); }
inline u64 evict_first() { return 0; }
