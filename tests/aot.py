"""Compiles the Triton kernels to machine code with no GPU: ``python tests/aot.py FAMILY``.

Every launcher is called on tensors without data, so that all rows of the launch table are chosen,
and Triton's own road from a launch to a binary is followed up to the launch itself. Prints one JSON
object: for each kernel, dtype and launch what the assembler says of it.
``python tests/aot.py --record`` writes all families' to tests/kernels/resources.json.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from flowops.decode_weights import PackedBlock
from flowops.kernels import (
    affine,
    attention,
    decode,
    gram,
    gram_backward,
    launch,
    padding,
    patch_attention,
)
from flowops.kernels.attention_backward import causal_attention_bwd
from flowops.kernels.noise import noise_fwd

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: Matrix instructions, as the assembly spells them.
MATRIX = {
    "mma.sync": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05.mma": r"\btcgen05\.mma",
    "mfma": r"\bv_mfma",
}
#: Numbers that Triton would tell apart: 1, multiples of 16, and what 32 bits don't hold.
FIRST_ROWS = (0, 1, 16, 17, 2**40, 2**40 + 1)
FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16


class NoDriver:
    """Stands in for the driver of a GPU that is not there."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target


def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(family: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Launchers with tensors, under the name of what they are called on."""
    precision = "ieee" if TARGETS[family].backend == "hip" else "tf32x3"
    for dtype, (B, T, C) in (
        *((FP32, (64, 49, 16)), (FP32, (16, 1024, 12)), (FP32, (16, 256, 192))),
        *((BF16, (16, 1024, 12)), (FP64, (16, 1024, 12))),
    ):
        x, logdet, compute = empty(B, T, C), empty(B), wide(dtype)
        params = empty(B, T, 2 * C, dtype=dtype)
        for inverse in (False, True):
            name = f"{short(dtype)} {T}x{C} {'inverse' if inverse else 'update'}"
            yield name, partial(affine.affine_fwd, x, params, False, inverse, compute)
            yield name, partial(affine.affine_bwd, x, logdet, x, params, True, inverse, compute)
    rng, scale = empty(2, dtype=torch.int64), torch.tensor(2.0)
    for kind in ("words", "uniform", "normal"):
        yield kind, partial(noise_fwd, rng, 65536, 64, kind, 0)
    for first_row in FIRST_ROWS:
        yield "normal ranges", partial(noise_fwd, rng, 65536, 4, "normal", first_row)
    for dtype, width in ((FP32, 62), (FP32, 63), (BF16, 62), (FP64, 62)):
        x = empty(65536, 63, dtype=dtype)[:, :width]
        yield (
            f"{short(dtype)} {width}+2",
            partial(padding.pad_noise_fwd, x, rng, 2, scale, scale, wide(dtype)),
        )
    yield from attention_calls(precision)
    yield from gram_calls("ieee" if precision == "ieee" else "fp32")
    yield from decode_calls(precision)
    if family == "sm80":  # what may go wrong there goes wrong before there is a target
        yield from smallest_calls()


def smallest_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every size and stride 1: Triton makes such arguments constants, which are no tensors."""
    one, rng, scale = empty(1), empty(2, dtype=torch.int64), torch.tensor(2.0)
    precision = "tf32x3"
    for dtype in (FP32, BF16):
        name, kind = f"{short(dtype)} ones", wide(dtype)
        x, params = empty(1, 1, 1, dtype=dtype), empty(1, 1, 2, dtype=dtype)
        yield name, partial(affine.affine_fwd, x, params, True, False, kind)
        yield name, partial(affine.affine_bwd, x, one, x, params, False, False, kind)
        yield name, partial(padding.pad_noise_fwd, x[0], rng, 1, scale, scale, kind)
        q, lse = empty(1, 1, 1, 16, dtype=dtype), empty(1, 1, 1)
        weight, bias = empty(2, 16, dtype=dtype), empty(2, dtype=dtype)
        yield name, partial(attention.causal_attention_fwd, q, q, q, 0.25, precision)
        yield name, partial(causal_attention_bwd, q, q, q, q, q, lse, 0.25, precision)
        if dtype == BF16:
            fused = (q, q, q, weight, bias, x, True, 0.25, precision)
            yield name, partial(patch_attention.causal_patch_attention_fwd, *fused)
            backward = (x, one, q, weight, bias, x, q, True, precision)
            yield name, partial(patch_attention.causal_patch_attention_bwd_params, *backward)
        config = (empty(), "matern32", "fp32", kind)
        point = x[0]
        yield name, partial(gram.gram_matmul_fwd, point, point, point, *config)
        yield name, partial(gram_backward.gram_matmul_bwd, point, point, point, point, *config)
        yield name, partial(gram_backward.gram_bwd, point, point, point, *config)
    yield "ones", partial(noise_fwd, rng, 1, 1, "normal", 0)


def attention_calls(precision: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Short and long sequences, then what wider heads and wider dtypes choose."""
    for dtype, D, T, channels in (
        *((BF16, 64, T, ()) for T in (32, 64, 128)),
        *((BF16, 64, 256, (12,)), (BF16, 64, 1024, (12, 48)), (BF16, 128, 1024, (48,))),
        *((BF16, 128, 128, ()), (BF16, 32, 1024, ()), (FP32, 32, 1024, ())),
        *((FP32, 64, 1024, ()), (FP32, 128, 1024, ()), (FP64, 64, 1024, ())),
        (FP64, 128, 1024, ()),
    ):
        H = 768 // D
        q, k, v = empty(16, T, 3, H, D, dtype=dtype).unbind(2)
        o, lse = empty(16, T, H, D, dtype=dtype), empty(16, H, T, dtype=wide(dtype))
        name, options = f"{short(dtype)} T={T} D={D}", (0.125, precision)
        yield name, partial(attention.causal_attention_fwd, q, k, v, *options)
        yield name, partial(causal_attention_bwd, o, q, k, v, o, lse, *options)
        for C in channels:
            x, logdet = empty(16, T, C), empty(16)
            weight, bias = empty(2 * C, H * D, dtype=dtype), empty(2 * C, dtype=dtype)
            yield (
                f"{name} C={C}",
                partial(
                    *(patch_attention.causal_patch_attention_fwd, q, k, v, weight, bias, x, False),
                    *options,
                ),
            )
            yield (
                f"{name} C={C}",
                partial(
                    *(patch_attention.causal_patch_attention_bwd_params, x, logdet, q, weight),
                    *(bias, x, o, False, precision),
                ),
            )


def gram_calls(precision: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Few features, whose distances are differences, and more, whose distances are products."""
    for dtype, M, D, kernel in (
        *((FP32, 150, 8, "se"), (FP32, 150, 32, "se"), (FP32, 512, 63, "matern52")),
        *((BF16, 150, 8, "se"), (FP64, 150, 8, "se"), (FP32, 150, 32, "matern12")),
    ):
        N, E = 65536, D
        x, half, logdet = empty(N, D, dtype=dtype), empty(N, E, dtype=dtype), empty(N)
        z, w, length = empty(M, D, dtype=dtype), empty(M, 2 * E, dtype=dtype), empty()
        grad = empty(N, 2 * E, dtype=dtype)
        name = f"{short(dtype)} M={M} D={D} {kernel}"
        config = (length, kernel, precision, wide(dtype))
        yield name, partial(gram.gram_fwd, x, z, *config)
        yield f"{name} matmul", partial(gram.gram_matmul_fwd, x, z, w, *config)
        yield f"{name} matmul", partial(gram_backward.gram_matmul_bwd, grad, x, z, w, *config)
        if D > 32 or dtype == FP64:
            continue
        yield f"{name} coupling", partial(gram.coupling_fwd, x, half, z, w, *config)
        yield (
            f"{name} coupling backward",
            partial(gram_backward.coupling_bwd, half, logdet, x, half, z, w, *config),
        )
        if kernel != "se":
            continue
        yield name, partial(gram_backward.gram_bwd, empty(N, M, dtype=dtype), x, z, *config)
        yield f"{name} inverse", partial(gram.coupling_inverse_fwd, x, half, z, w, *config)
        yield (
            f"{name} inverse backward",
            partial(gram_backward.coupling_inverse_bwd, half, x, half, z, w, *config),
        )


def decode_calls(precision: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """One layer, in single steps and in windows; rows R over B images, guided where R = 2B."""
    for dtype, W, D, C, B, R, n in (
        *((BF16, 768, 64, 12, 1, 1, 1), (BF16, 768, 64, 12, 64, 128, 1)),
        *((BF16, 768, 64, 12, 64, 128, 64), (BF16, 768, 64, 12, 16, 16, 64)),
        *((BF16, 128, 64, 4, 16, 16, 1), (FP32, 128, 64, 192, 1, 2, 1)),
        *((FP32, 128, 64, 48, 8, 16, 1), (FP32, 128, 128, 4, 1, 1, 64)),
        (FP32, 768, 64, 12, 64, 64, 64),
    ):
        T, E = (1024 if W == 768 else 49), 4 * W
        shapes = ((W, C), (T, W), (1, 2, W), (1, 3 * W, W), (1, 3 * W), (1, W, W), (1, W))
        shapes += ((1, 2, W), (1, E, W), (1, E), (1, W, E), (1, W), (2 * C, W), (2 * C,))
        stored = (3, 5, 8, 10, 12)
        weights = PackedBlock(
            *(empty(*s, dtype=dtype if i in stored else FP32) for i, s in enumerate(shapes))
        )
        sizes = decode.sizes_of(empty(B, T, C), weights, empty(R, W), W // D, n)
        work = decode.Workspace(sizes, torch.device("meta"))
        settings = decode.Settings(1e-5, 1.5, 1e-3, precision)
        name = f"{short(dtype)} W={W} D={D} C={C} R={R} n={sizes.window}"
        yield name, partial(decode.sweep, work, weights, settings, sizes.window)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def wide(dtype: torch.dtype) -> torch.dtype:
    return FP64 if dtype == FP64 else FP32


def resources(kernel, target: GPUTarget) -> dict:
    """Registers, stack and shared memory a program, and which matrix instructions it has."""
    assembly = kernel.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    found = {"shared": kernel.metadata.shared}
    found["matrix"] = sorted(name for name, form in MATRIX.items() if re.search(form, assembly))
    if target.backend == "cuda":
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [tool, "--dump-resource-usage", file.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        found["registers"] = int(re.search(r"REG:(\d+)", usage)[1])
        found["stack"] = int(re.search(r"STACK:(\d+)", usage)[1])
    else:
        found["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
        found["stack"] = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)[1])
    return found


def compile_all(family: str) -> dict[str, dict]:
    """``compiled``: what ``resources`` says of every launch that ``calls`` make, for ``family``;
    ``binaries``: how many each came to; ``unused``: rows of the table that none of them chose."""
    target = TARGETS[family]
    triton.runtime.driver.set_active(NoDriver(target))
    launch.family_of = lambda device: family
    run, choose, compiled, used, current = JITFunction.run, launch.choose, {}, set(), ""
    binaries = defaultdict(set)

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        tiles = {k: v for k, v in options.items() if k.startswith("BLOCK")}
        tiles |= {"warps": options["num_warps"], "stages": options["num_stages"]}
        tiles |= {k: v for k, v in options.items() if k in ("INPUT", "OUTPUT")}
        label = " ".join(f"{k}={v}" for k, v in tiles.items())
        name = f"{self.fn.__name__} [{current}] {label}"
        compiled[name] = resources(kernel, target)
        binaries[name].add(kernel.hash)

    def remember(kernel, family, sizes):
        choice = choose(kernel, family, sizes)
        used.add((kernel, choice))
        return choice

    JITFunction.run, launch.choose = compile_only, remember
    for current, call in calls(family):  # noqa: B007
        call()
    own = {
        (kernel, choice)
        for kernel, rows in launch.TABLE.items()
        for _, choice in [*rows.get(family, []), *(rows["default"] if family == "sm80" else [])]
    }
    return {
        "compiled": compiled,
        "binaries": {name: len(hashes) for name, hashes in binaries.items()},
        "unused": sorted(f"{k} {c}" for k, c in own - used),
    }


def main(argument: str) -> None:
    if argument != "--record":
        print(json.dumps(compile_all(argument), indent=1))
        return
    record = {"triton": triton.__version__}
    for family in TARGETS:
        result = subprocess.run(
            [sys.executable, __file__, family], stdout=subprocess.PIPE, text=True, check=True
        )
        record[family] = json.loads(result.stdout)["compiled"]
    path = Path(__file__).parent / "kernels" / "resources.json"
    lines = json.dumps(record, indent=1)
    path.write_text(re.sub(r"\n {3,}|\n {2}(?=\})", " ", lines) + "\n")  # a launch a line


if __name__ == "__main__":
    main(sys.argv[1])
