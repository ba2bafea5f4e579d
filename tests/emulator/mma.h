// The emulator's words for csrc/cuda/mma.cuh. Products are summed in double and rounded once;
// tensor cores round, or cut off, more often.
#pragma once

inline unsigned to_tf32(float x) {
    unsigned bits = as_bits(x);
    return x - x == 0 ? (bits + 0x1000) & ~0x1fffu : bits;
}

inline void mma_tf32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    struct Operands {
        unsigned a[4], b[2];
    } mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    unsigned g = emulator::lane() / 4, t = emulator::lane() % 4;
    emulator::exchange(mine, [&](auto read) {
        double rows[2][8], columns[2][8];
        auto value = [](unsigned bits) { return as_float(bits & ~0x1fffu); };
        for (unsigned k = 0; k < 4; k++) {
            Operands row = read(4 * g + k);
            for (int i = 0; i < 2; i++) {
                Operands column = read(4 * (2 * t + i) + k);
                rows[i][k] = value(row.a[i]), rows[i][k + 4] = value(row.a[i + 2]);
                columns[i][k] = value(column.b[0]), columns[i][k + 4] = value(column.b[1]);
            }
        }
        for (int i = 0; i < 4; i++) {
            double sum = c[i];
            for (int k = 0; k < 8; k++) sum += rows[i / 2][k] * columns[i % 2][k];
            c[i] = sum;
        }
        return 0;
    });
}
