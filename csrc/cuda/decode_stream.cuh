// Weights on their way through a block's shared memory, and products with them.
//
// A block multiplies with the same rows of every matrix in every step. One warp copies them, matrix
// after matrix and step after step, into a ring in shared memory, as far ahead as there is room;
// the other warps take them out. No data is needed for that, so that the copies go on while blocks
// wait for each other.
#pragma once
#include "decode.cuh"

constexpr u32 PIECE = 256;  // slots that are copied at once, about: 4 KB
constexpr int PIECES = 12;  // on their way at a time: 3.35 TB/s for 1.5 us

// The ring, as either side sees it. Positions count slots from the start and may wrap around.
struct Ring {
    Quad *slots;
    u32 size, offset, position;
    u32 swap;            // odd rows have slots of bank conflicts exchanged
    u32 *ready, *taken;  // positions, in shared memory

    DEVICE u32 slot(u32 row, u32 in_tile, u32 i) const {
        u32 at = offset + in_tile + i;
        at = at >= size ? at - size : at;
        return row % 2 ? at ^ swap : at;
    }
    DEVICE void advance(u32 count) {
        position += count;
        offset += count;
        offset = offset >= size ? offset - size : offset;
    }
};

template <class T>
DEVICE Ring ring_of(const DecodeArgs &a) {
    u32 *counters = reinterpret_cast<u32 *>(shared_memory() + a.at_counters);
    // With rows of whole 128 bytes, lanes that read one column of rows in turn would share banks.
    u32 swap = !a.swizzle ? 0 : sizeof(T) == 2 ? 4 : 1;
    return {
        reinterpret_cast<Quad *>(shared_memory()), u32(a.ring), 0, 0, swap, counters, counters + 1};
}

// Rows of a matrix that are copied at once, and that are multiplied at once: whole packets of
// outputs, so that a tile and a piece fit in the ring.
DEVICE u32 piece_rows(u32 slots) { return slots < PIECE ? PIECE / slots : 1; }

template <class T>
DEVICE u32 tile_rows(const DecodeArgs &a, const Matrix<T> &m) {
    u32 fit = u32(a.ring) / m.slots() - piece_rows(m.slots());
    return min(16u, fit) / m.per_packet * m.per_packet;
}

// --- the warp that copies -----------------------------------------------------------------------

struct Feeder {
    Ring ring;
    u64 policy;
    u32 lane, ends[PIECES];

    DEVICE void publish(u32 position) {
        __syncwarp();  // every lane has waited for its copies
        if (lane == 0) show(ring.ready, position);
    }

    DEVICE bool full(u32 slots) const {
        return ring.position + slots - look(ring.taken) > ring.size;
    }

    DEVICE void make_room(u32 slots) {
        // Lanes may not see the same; who waits for room has to show first what is there.
        if (!__any_sync(0xffffffffu, full(slots))) return;
        flush();
        while (full(slots)) rest();
        __syncwarp();
    }

    DEVICE void flush() {
        cp_async_wait<0>();
        publish(ring.position);
#pragma unroll
        for (int i = 0; i < PIECES; i++) ends[i] = ring.position;
    }

    template <class T>
    DEVICE void feed(const Matrix<T> &m) {
        u32 slots = m.slots(), count = m.last - m.first, at_once = piece_rows(slots);
        const Quad *from = reinterpret_cast<const Quad *>(m.weights) + u64(m.first) * slots;
        u32 base = shared_address(ring.slots);
        for (u32 first = 0; first < count; first += at_once) {
            u32 end = min(first + at_once, count);
            make_room((end - first) * slots);
            for (u32 row = first; row < end; row++)
                for (u32 i = lane; i < slots; i += 32)
                    cp_async16_once(base + ring.slot(row, (row - first) * slots, i) * sizeof(Quad),
                                    from + u64(row) * slots + i, policy);
            cp_async_commit();
            ring.advance((end - first) * slots);
#pragma unroll
            for (int i = 0; i + 1 < PIECES; i++) ends[i] = ends[i + 1];
            ends[PIECES - 1] = ring.position;
            cp_async_wait<PIECES - 1>();
            publish(ends[0]);
        }
    }
};

template <class T>
DEVICE void stream_weights(const DecodeArgs &a, u32 block, u32 blocks) {
    Feeder feeder{ring_of<T>(a), evict_first(), threadIdx.x % 32, {}};
    for (u32 place = 0; place + 1 < a.T; place++)
#pragma unroll 1
        for (u32 i = 0; i <= 4 * u32(a.L); i++)
            feeder.feed(matrix_of<T>(a, product_of(i, a.L), i / 4, block, blocks));
    feeder.flush();
}

// --- the warps that multiply --------------------------------------------------------------------

// Activations of all rows of the batch in shared memory, [R, K] of T with padding: the eight lanes
// that read at once see all banks.
template <class T>
struct Rows {
    T *at;
    u32 pitch;
};

template <class T>
DEVICE Rows<T> rows_of(const DecodeArgs &a, u32 K) {
    return {reinterpret_cast<T *>(shared_memory() + a.at_rows), K + u32(64 / sizeof(T))};
}

// 8 elements of a weight row, or zeros.
template <class T>
DEVICE void load8(const Ring &ring, u32 row, u32 in_tile, u32 k, bool real, Quad (&to)[QUADS<T>]) {
#pragma unroll
    for (int i = 0; i < QUADS<T>; i++)
        to[i] = real ? ring.slots[ring.slot(row, in_tile, k * QUADS<T> / 8 + i)] : Quad{};
}

// What a warp adds up: 16 rows of weights, `rows` of them there, in tiles that begin at row `first`
// of the share, by R rows of the batch; sums [16, R].
template <class T>
struct Part {
    Ring ring;
    u32 first, rows, K, R;
    Rows<T> in;
    float *sums;
};

// A warp's share of the K terms, 32 at a time, by up to ROWS rows of the batch. Lane 4 g + t has
// weight rows g and g + 8 and terms 8 t.. of the 32.
template <int ROWS>
DEVICE void multiply(const Part<bf16> &p) {
    constexpr int TILES = ROWS / 8;
    u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, slots = p.K / 8;
    float sum[TILES][2][4] = {};  // two chains of products
    for (u32 k = threadIdx.x / 32 * 32 + 8 * t; k - 8 * t < p.K; k += 32 * WARPS) {
        Quad low[1], high[1];
        bool real = k < p.K;
        load8<bf16>(p.ring, p.first + g, g * slots, k, real && g < p.rows, low);
        load8<bf16>(p.ring, p.first + g + 8, (g + 8) * slots, k, real && g + 8 < p.rows, high);
        const u32(&l)[4] = low[0].word, (&h)[4] = high[0].word;
#pragma unroll
        for (int j = 0; j < TILES; j++) {
            u32 r = 8 * j + g;
            const Quad *from = reinterpret_cast<const Quad *>(p.in.at + r * p.in.pitch + k);
            Quad x = real && r < p.R ? *from : Quad{};
            // Which term is which does not matter, if it is the same on both sides.
            u32 near[4] = {l[0], h[0], l[1], h[1]}, far[4] = {l[2], h[2], l[3], h[3]};
            mma<bf16>(sum[j][0], near, x.word[0], x.word[1]);
            mma<bf16>(sum[j][1], far, x.word[2], x.word[3]);
        }
    }
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 row = g + i / 2 * 8, r = 8 * j + 2 * t + i % 2;
            if (r < p.R) p.sums[row * p.R + r] = sum[j][0][i] + sum[j][1][i];
        }
}

// For rows of the batch from `start` on.
template <int ROWS>
DEVICE void multiply(const Part<float> &p, u32 start) {
    u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, slots = p.K / 4;
    float sum[2][ROWS] = {};
    for (u32 k = threadIdx.x / 32 * 32 + 8 * t; k < p.K; k += 32 * WARPS) {
        float w[2][8];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            Quad q[2];
            u32 row = g + 8 * half;
            load8<float>(p.ring, p.first + row, row * slots, k, row < p.rows, q);
            widen8(q, w[half]);
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (start + r >= p.R) break;
            const Quad *x = reinterpret_cast<const Quad *>(p.in.at + (start + r) * p.in.pitch + k);
            Quad both[2] = {x[0], x[1]};
            float values[8];
            widen8(both, values);
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int i = 0; i < 8; i++) sum[half][r] += w[half][i] * values[i];
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float whole = sum[half][r];
            whole += __shfl_xor_sync(0xffffffffu, whole, 1);
            whole += __shfl_xor_sync(0xffffffffu, whole, 2);
            if (t == 0 && start + r < p.R) p.sums[(g + 8 * half) * p.R + start + r] = whole;
        }
}

DEVICE void multiply_rows(const Part<bf16> &p) { p.R <= 8 ? multiply<8>(p) : multiply<16>(p); }
DEVICE void multiply_rows(const Part<float> &p) {
    if (p.R == 1) return multiply<1>(p, 0);
    if (p.R == 2) return multiply<2>(p, 0);
    for (u32 start = 0; start < p.R; start += 4) multiply<4>(p, start);
}

// Outputs of a product that this thread finishes: one row of each tile, for one row of the batch.
struct Output {
    u32 tile, row, r;

    DEVICE Output(u32 tile) : tile(tile) {
        u32 item = threadIdx.x / 32 * LANES + threadIdx.x % 32;
        row = item % tile;
        r = threadIdx.x % 32 < LANES ? item / tile : ~0u;
    }
    DEVICE bool inside(u32 rows, u32 R) const { return row < rows && r < R; }
};

// Bias of this thread's output in the tile at `first`.
template <class T>
DEVICE float bias_of(const Matrix<T> &m, u32 first, const Output &output, u32 R) {
    return output.inside(m.last - first, R) ? __ldg(m.bias + first + output.row) : 0.0f;
}

// finish(n, r, sum, inside) for this block's outputs n; all lanes of a warp that has any come to
// it. `bias`: of the first tile, asked for before the inputs were waited for.
template <class T, class Finish>
DEVICE void multiply_all(const DecodeArgs &a, Ring &ring, u32 &turn, const Matrix<T> &m,
                         const Output &output, float bias, Finish finish) {
    u32 R = a.R, warp = threadIdx.x / 32, tile = output.tile;
    u32 busy = min((m.K + 31) / 32, u32(WARPS));
    for (u32 first = m.first; first < m.last; first += tile, turn ^= 1) {
        u32 rows = min(tile, m.last - first);
        if (first > m.first) bias = bias_of(m, first, output, R);
        float *partial =
            reinterpret_cast<float *>(shared_memory() + a.at_partial) + turn * WARPS * 16 * R;
        while (int(look(ring.ready) - (ring.position + rows * m.slots())) < 0) rest();
        __syncwarp();
        if (warp < busy)
            multiply_rows(Part<T>{ring, first - m.first, rows, m.K, R, rows_of<T>(a, m.K),
                                  partial + warp * 16 * R});
        meet<WORKERS>();
        ring.advance(rows * m.slots());
        if (threadIdx.x == 0) show(ring.taken, ring.position);
        if (warp * LANES >= tile * R) continue;
        bool inside = output.inside(rows, R);
        float sum = bias;
        if (inside)
            for (u32 i = 0; i < busy; i++) sum += partial[(i * 16 + output.row) * R + output.r];
        finish(first + output.row, output.r, sum, inside);
    }
}
