"""Noise contract v1 on the GPU: Philox words, uniforms and normals, bit-equal with the CPU.

The normals are equal because every operation rounds once: nothing here may be fused
(``fuse=False`` at every launch), the square root is the IEEE one, and the polynomials are those of
``flowops/noise.py``.
"""

import torch
import triton
import triton.language as tl
from triton.language.random import philox

from .launch import TABLE, Launch, launch, row, start

TABLE["noise_fwd"] = {"default": [row(4, BLOCK=512)]}

KINDS = ("words", "uniform", "normal")


@triton.jit
def philox_words(rng_ptr, group):
    """The four words of 64-bit counters ``group``. [BLOCK] each, uint32"""
    seed, offset = tl.load(rng_ptr), tl.load(rng_ptr + 1)
    low, high = group.to(tl.uint32), (group >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    offset_low, offset_high = zero + offset.to(tl.uint32), zero + (offset >> 32).to(tl.uint32)
    return philox(seed, low, high, offset_low, offset_high)


@triton.jit
def uniform(word):
    """((w >> 8) + 1) 2^-24, in (0, 1]. [BLOCK]"""
    return ((word >> 8) + 1).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def box_muller(word0, word1):
    """Two standard normals of two words. [BLOCK] each"""
    bits = ((word0 >> 8) + 1).to(tl.int32).to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # of the power of two nearest from below to sqrt(2) u
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    k = (exponent - 24).to(tl.float32)
    p = f * -0.07634492963552475 + 0.12761574983596802
    p = p * f + -0.13160182535648346
    p = p * f + 0.14201758801937103
    p = p * f + -0.16623356938362122
    p = p * f + 0.20001226663589478
    p = p * f + -0.2500081956386566
    p = p * f + 0.3333333134651184
    ff = f * f
    tail = (ff * f) * p + k * -2.12194440e-4
    log_u = k * 0.693359375 + (f + (tail - ff * 0.5))
    radius = tl.sqrt_rn(log_u * -2.0)

    turn = (word1 >> 8).to(tl.int32)
    quarter = (turn + 0x200000) >> 22
    t = (turn - (quarter << 22)).to(tl.float32) * 5.9604644775390625e-08
    tt = t * t
    sine = tt * -75.39346313476562 + 81.59235382080078
    sine = sine * tt + -41.34165954589844
    sine = (sine * tt + 6.2831854820251465) * t
    cosine = tt * 59.22919845581055 + -85.4432373046875
    cosine = cosine * tt + 64.93932342529297
    cosine = cosine * tt + -19.739208221435547
    cosine = cosine * tt + 1.0
    swap = (quarter & 1) != 0
    sine, cosine = tl.where(swap, cosine, sine), tl.where(swap, sine, cosine)
    cosine = tl.where(((quarter + 1) & 2) != 0, -cosine, cosine)
    sine = tl.where((quarter & 2) != 0, -sine, sine)
    return radius * cosine, radius * sine


@triton.jit
def normals(rng_ptr, group):
    """The normals of four columns a group. [BLOCK, 4]"""
    w0, w1, w2, w3 = philox_words(rng_ptr, group)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return columns(n0, n1, n2, n3)


@triton.jit
def columns(c0, c1, c2, c3):
    """Four columns side by side. [BLOCK, 4]"""
    # join puts its arguments last: [BLOCK, 2, 2] with the halves' index before the pairs'.
    return tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), [c0.shape[0], 4])


# A program that draws its share of every batch brings another first_group each time: its type is
# fixed, and nothing else about it is compiled in.
@triton.jit(do_not_specialize=["first_group"])
def noise_fwd_kernel(
    rng_ptr, out_ptr, rows, width, groups_per_row, first_group: tl.int64,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    row = group // groups_per_row
    col = (group % groups_per_row)[:, None] * 4 + tl.arange(0, 4)[None, :]  # [BLOCK, 4]
    if KIND == 2:
        values = normals(rng_ptr, first_group + group)
    else:
        w0, w1, w2, w3 = philox_words(rng_ptr, first_group + group)
        words = columns(w0, w1, w2, w3)
        values = uniform(words) if KIND == 1 else words.to(tl.int64)
    mask = (row < rows)[:, None] & (col < width)
    tl.store(out_ptr + row[:, None] * width + col, values, mask=mask)


def noise_fwd(rng: torch.Tensor, rows: int, width: int, kind: str, first_row: int) -> torch.Tensor:
    """``[rows, width]``: int64 words, or fp32 values. rng is contiguous."""
    dtype = torch.int64 if kind == "words" else torch.float32
    groups_per_row = triton.cdiv(width, 4)

    def attempt(choice: Launch):
        out = rng.new_empty((rows, width), dtype=dtype)
        programs = triton.cdiv(rows * groups_per_row, choice["BLOCK"])
        args = (rng, out, rows, width, groups_per_row, first_row * groups_per_row)
        start(noise_fwd_kernel, choice, programs, args, fuse=False, KIND=KINDS.index(kind))
        return out

    return launch("noise_fwd", rng.device, {}, attempt)
