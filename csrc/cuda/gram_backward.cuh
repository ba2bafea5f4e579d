// Gradients of K @ w in one pass over the rows; K is computed again, in registers only.
//
// A block takes a chunk of rows, 32 at a time; how many chunks there are follows from the sizes
// alone. Its warps divide the points: each keeps the sums for dz and dw of its own points in
// registers from the first row to the last. Those leave as one vector a chunk, [dz, dw, squares],
// and gram_reduce adds the vectors in their order, in double.
#pragma once
#include "gram.cuh"

struct GramBackward {
    Gram gram;
    Matrix grad, grad_x;
    void *partial;  // [chunks][M D + M O + squares], float
    i64 chunk_rows;
};

constexpr u32 ROWS = 32;

// The sums over pairs of dL/dS (x - z)^2 / lengthscale^2: one for each feature where the
// lengthscale has, their sum otherwise.
DEVICE i64 squares_of(const Gram &gram) { return gram.lengthscale.stride ? gram.D : 1; }
DEVICE i64 partial_size(const Gram &gram) { return gram.M * (gram.D + gram.O) + squares_of(gram); }

// A block's columns of sums by warp, [warps][ld], as the squares of its partial; in double, since
// all are of one size and often of one sign.
DEVICE void finish_squares(const Gram &gram, float *to, float *by_warp, u32 ld, u32 columns) {
    __syncthreads();
    for (u32 d = threadIdx.x; d < columns; d += blockDim.x) {
        double sum = 0;
        for (u32 warp = 0; warp < blockDim.x / WARP; warp++) sum += by_warp[warp * ld + d];
        if (gram.lengthscale.stride)
            to[d] = sum;
        else
            by_warp[d] = sum;
    }
    if (gram.lengthscale.stride) return;
    __syncthreads();
    if (threadIdx.x > 0) return;
    double sum = 0;
    for (u32 d = 0; d < columns; d++) sum += by_warp[d];
    to[0] = sum;
}
