// A matrix of noise, made by tiles in shared memory and written in vectors of 16 bytes.
//
// The contract draws four columns of a row at a time, a group. Rows whose width is no multiple of
// four begin at any address, so what is drawn together is not what can be written together. A tile
// is a span of the flat matrix, which may begin and end within a row, at a multiple of 16 bytes. A
// block puts the groups that reach into it where they belong, then writes it whole. What a group
// has beyond the tile lands in the margins; the block of the tile next to it draws it again.
#pragma once
#include "philox.cuh"

constexpr int THREADS = 256;
constexpr int MARGIN = 32;  // bytes before and behind a tile, of which a group takes three elements

// The same value or address, in a register: the compiler would work it out anew at every use, of
// which many are under conditions of their own, and would split some vector accesses.
DEVICE u64 settled(u64 value) {
#ifndef FLOWOPS_EMULATE
    asm("" : "+l"(value));
#endif
    return value;
}
template <class T>
DEVICE T *settled_global(T *address) {
#ifndef FLOWOPS_EMULATE
    asm("" : "+l"(address));
    __builtin_assume(__isGlobal(address));
#endif
    return address;
}
template <class T>
DEVICE T *settled_shared(T *address) {
#ifndef FLOWOPS_EMULATE
    u32 narrow = __cvta_generic_to_shared(address);
    asm("" : "+r"(narrow));
    address = static_cast<T *>(__cvta_shared_to_generic(narrow));
#endif
    return address;
}

// A place in rows of `width` elements or groups. Adding places takes no division.
template <class Row>
struct Place {
    Row row;
    u32 column;
};

template <class Row>
DEVICE Place<Row> place(Row index, u32 width) {
    Row row = index / width;
    return {row, static_cast<u32>(index - row * width)};
}

template <class Row>
DEVICE Place<Row> sum(Place<Row> a, Place<Row> b, u32 width) {
    u32 column = a.column + b.column;
    bool carry = column >= width;
    return {a.row + b.row + carry, carry ? column - width : column};
}

struct Tile {
    Place<u64> begin, end;  // of the matrix; the end is the first element that is not in the tile
    u32 count;
};

// Calls fill(tile, shared memory of the tile) for this block's tiles of `length` elements, a
// multiple of 16 bytes, and writes what it leaves there to `out`, which is aligned.
template <class T, class Fill>
DEVICE void for_tiles(T *out, u64 rows, u32 width, u32 length, Fill fill) {
    constexpr u32 V = 16 / sizeof(T);
    T *shared = settled_shared(reinterpret_cast<T *>(shared_memory() + MARGIN));
    u64 total = rows * width, stride = u64(gridDim.x) * length, first = u64(blockIdx.x) * length;
    Place<u64> begin = place(first, width), step = place(stride, width);
    Place<u64> whole = place(u64(length), width);
    for (; first < total; first += stride, begin = sum(begin, step, width)) {
        u32 count = min(u64(length), total - first);
        Place<u64> end = sum(begin, whole, width);
        if (count < length) end = {rows, 0};
        fill(Tile{begin, end, count}, shared);
        __syncthreads();
        T *to = out + first;
        u32 vectors = count / V;
#pragma unroll 1
        for (u32 i = threadIdx.x; i < vectors; i += THREADS)
            store_vec(settled_global(to + i * V), load_vec<T, V>(shared + i * V));
#pragma unroll 1
        for (u32 i = vectors * V + threadIdx.x; i < count; i += THREADS) to[i] = shared[i];
        __syncthreads();
    }
}

// A group of a tile: its row, counted from the tile's first, its number in the row and in the
// matrix, which is the counter that it is drawn from, and where in the tile its columns begin.
struct Group {
    u32 row, group;
    u64 counter;
    int at;
};

// Goes through the groups `first` and on of every row.
struct Groups {
    u32 width, per_row, first, drawn;
    Place<u32> thread, step;

    DEVICE Groups(u32 width, u32 first)
        : width(width),
          per_row((width + 3) / 4),
          first(first),
          drawn(per_row - first),
          thread(place(threadIdx.x, drawn)),
          step(place(u32(THREADS), drawn)) {}

    // Calls use(group) for this thread's share of those that reach into the tile.
    template <class Use>
    DEVICE void of(const Tile &tile, Use use) const {
        u32 begin = max(tile.begin.column / 4, first) - first;
        u32 end = u32(tile.end.row - tile.begin.row) * drawn +
                  (max((tile.end.column + 3) / 4, first) - first);
        u64 counter = settled(tile.begin.row * per_row);
        Place<u32> at = sum({0, begin}, thread, drawn);
        for (u32 i = begin + threadIdx.x; i < end; i += THREADS, at = sum(at, step, drawn)) {
            u32 group = first + at.column;
            int column = at.row * width + 4 * group - tile.begin.column;
            use(Group{at.row, group, counter + (at.row * per_row + group), column});
        }
    }
};

// Puts a group there, or as much of it as the row has left.
template <class T>
DEVICE void store_group(T *to, int columns, const T (&values)[4]) {
    to = settled_shared(to);
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (j < columns) to[j] = values[j];
}
