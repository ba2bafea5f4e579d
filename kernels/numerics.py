"""What the kernels compute with: dtypes, and an exp as accurate as the C library's."""

import torch
import triton
import triton.language as tl

#: torch dtype of an accumulation -> Triton's.
COMPUTE = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def exponential(x):
    """exp(x). The hardware's exp2 is good to 2 ulp, but ``x log2(e)`` rounds in proportion to x;
    what that product lost is put back to first order. [same shape as x]"""
    if x.dtype == tl.float64:
        return tl.exp(x)
    log2e: tl.constexpr = 1.4426950408889634
    high = x * log2e
    low = tl.fma(x, tl.full(x.shape, log2e, tl.float32), -high)
    low += x * 1.92596298909109e-08  # log2(e) less its own rounding to fp32
    power = tl.exp2(high)
    # An infinite or vanished power must not meet the correction: inf * 0 is NaN.
    return tl.where(
        (high > -126.0) & (high < 128.0), power + power * (low * 0.6931471805599453), power
    )
