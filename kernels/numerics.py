"""What the kernels compute with: dtypes, and an exp as accurate as the C library's."""

import torch
import triton
import triton.language as tl

#: torch dtype of an accumulation -> Triton's.
COMPUTE = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def exponential(x):
    """exp(x), any shape. The hardware's exp2 is good to 2 ulp, but ``x log2(e)`` rounds in
    proportion to x: what the product lost is found from halves whose products are exact, and put
    back to first order."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        log2e: tl.constexpr = 1.4426950408889634
        log2e_high: tl.constexpr = 1.4423828125  # 12 bits
        log2e_low: tl.constexpr = 0.00031222839606925845
        high = x * log2e
        x_high = (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)  # 12 bits
        low = (x_high * log2e_high - high) + (x_high * log2e_low + (x - x_high) * log2e)
        power = tl.exp2(high)
        # An infinite or vanished power must not meet the correction: inf * 0 is NaN.
        correct = (high > -126.0) & (high < 128.0)
        return tl.where(correct, power + power * (low * 0.6931471805599453), power)
