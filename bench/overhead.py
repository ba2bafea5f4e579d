"""What a call costs beyond its kernel: the raw native call, the registered op, the public one."""

from collections.abc import Callable

import torch

import flowops
from flowops import dispatch

from .timing import interleave

SHAPE = (2, 8, 4)  # so small that the kernel itself takes next to nothing
REPEATS = 1000
SECONDS = 2.0


def calls() -> dict[str, Callable[[], object]]:
    """``affine_update`` on a small tensor, without gradients, on three levels."""
    B, T, C = SHAPE
    x, params = torch.randn(B, T, C), 0.3 * torch.randn(B, T, 2 * C)
    z, logdet = torch.empty_like(x), torch.empty(B)
    kernel = dispatch.native().affine_forward
    code = dispatch.NATIVE_DTYPES[torch.float32]
    prepared = (
        *(code, code, B, T, C, True, False, torch.get_num_threads()),
        *(x.data_ptr(), x.stride(0), x.stride(1)),
        *(params.data_ptr(), params.stride(0), params.stride(1)),
        *(z.data_ptr(), logdet.data_ptr()),
    )
    # The tensors are arguments of the lambdas so that they outlive this function.
    return {
        "raw kernel": lambda keep=(x, params, z, logdet): kernel(*prepared),
        "registered op": lambda: torch.ops.flowops.affine_update(x, params, False, "auto"),
        "public function": lambda: flowops.affine_update(x, params),
    }


def main() -> int:
    """Prints microseconds a call and the difference to the raw kernel."""
    if not dispatch.backend_state("cpu")[0]:
        print("overhead: needs the native CPU kernels")
        return 1
    loops = {name: _loop(call) for name, call in calls().items()}
    with torch.no_grad():
        timings = interleave(loops, seconds=SECONDS)
    raw = timings["raw kernel"].median / REPEATS * 1e6
    for name, timing in timings.items():
        us = timing.median / REPEATS * 1e6
        print(f"{name:16s} {us:7.2f} µs a call, {us - raw:6.2f} µs over the raw kernel")
    return 0


def _loop(call: Callable[[], object]) -> Callable[[], None]:
    def loop():
        for _ in range(REPEATS):
            call()

    return loop
