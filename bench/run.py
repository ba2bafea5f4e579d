"""``flowops bench``: each op and the model against plain PyTorch, in one run.

Prints a table, and in a checkout appends to ``bench/results/<device>/`` (CSV of all runs, JSON of
the last); ``--readme`` then writes the table into README.md.
"""

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

import flowops
from flowops.affine import affine_update_reference
from flowops.api import TarFlow
from flowops.noise import noise_reference
from flowops.padding import pad_noise_reference

from .tarflow import compare_sampling, compare_training
from .timing import Timing, environment, gate, interleave

README_BLOCK = re.compile(r"(<!-- bench:begin -->\n).*?(<!-- bench:end -->)", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """One job on one shape: medians in milliseconds with their 20th and 80th percentiles."""

    op: str
    job: str
    shape: str
    dtype: str
    baseline: str
    ours_ms: float
    ours_p20_ms: float
    ours_p80_ms: float
    baseline_ms: float
    speedup: float
    error: float


def row(op, job, shape, dtype, baseline, ours, theirs, error) -> Row:
    return Row(
        *(op, job, shape, dtype, baseline),
        *(1e3 * ours.median, 1e3 * ours.p20, 1e3 * ours.p80, 1e3 * theirs.median),
        *(theirs.median / ours.median, error),
    )


# --- affine --------------------------------------------------------------------------------------


def eager_affine(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    params = torch.cat([torch.zeros_like(params[:, :1]), params[:, :-1]], dim=1)
    a, b = params.chunk(2, dim=-1)
    return (x - b) * torch.exp(-a), -a.sum(dim=(1, 2))


def bench_affine(seconds: float) -> Iterator[Row]:
    for B, T, C in ((64, 49, 16), (16, 1024, 12), (32, 256, 48), (64, 1024, 48)):
        x = torch.randn(B, T, C, requires_grad=True)
        params = (0.3 * torch.randn(B, T, 2 * C)).requires_grad_()
        grads = torch.randn(B, T, C), torch.randn(B)

        def step(function: Callable, x=x, params=params, grads=grads):
            return torch.autograd.grad(function(x, params), (x, params), grads)

        with torch.no_grad():
            golden = affine_update_reference(x.double(), params.double())
            outs = [f(x, params) for f in (flowops.affine_update, eager_affine)]
        error = max(
            gate("affine_update", ours, eager, truth, torch.float32)
            for ours, eager, truth in zip(*outs, golden, strict=True)
        )
        double = [t.detach().double().requires_grad_() for t in (x, params)]
        golden = torch.autograd.grad(eager_affine(*double), double, [g.double() for g in grads])
        for ours, eager, truth in zip(
            step(flowops.affine_update), step(eager_affine), golden, strict=True
        ):
            error = max(error, gate("affine_update backward", ours, eager, truth, torch.float32))
        calls = {
            "ours": lambda step=step: step(flowops.affine_update),
            "eager": lambda step=step: step(eager_affine),
        }
        compiled = _compiled(eager_affine, x, params)
        if compiled is not None:
            calls["torch.compile"] = lambda step=step, compiled=compiled: step(compiled)
        timings = interleave(calls, seconds)
        for name in list(calls)[1:]:
            yield row(
                *("affine_update", "forward + backward", f"{B}x{T}x{C}", "fp32", name),
                *(timings["ours"], timings[name], error),
            )


# --- padding -------------------------------------------------------------------------------------


def bench_pad_noise(seconds: float) -> Iterator[Row]:
    rng = torch.tensor([1, 0])
    pad_scale = torch.tensor(2.0)
    for N, D, pad in ((65536, 63, 2), (65536, 8, 1)):
        x = torch.randn(N, D)
        for data_scale in (0.01, 0.0):

            def eager(x=x, pad=pad, data_scale=data_scale):
                data = x + data_scale * torch.randn_like(x) if data_scale else x
                return torch.cat([data, 2.0 * torch.randn(x.shape[0], pad)], dim=1)

            def ours(x=x, pad=pad, data_scale=data_scale):
                return flowops.pad_noise(x, pad, data_scale=data_scale, rng=rng)

            scale = torch.tensor(data_scale, dtype=torch.float64)
            golden = pad_noise_reference(x.double(), rng, pad, pad_scale, scale)
            plain = pad_noise_reference(x, rng, pad, pad_scale, scale)
            error = gate("pad_noise", ours(), plain, golden, torch.float32)
            timings = interleave({"ours": ours, "eager": eager}, seconds)
            job = "noise on data and padding" if data_scale else "noise on padding alone"
            yield row(
                *("pad_noise", job, f"{N}x{D}+{pad}", "fp32", "eager"),
                *(timings["ours"], timings["eager"], error),
            )


def bench_noise(seconds: float) -> Iterator[Row]:
    rng, (N, W) = torch.tensor([1, 0]), (65536, 64)
    ours = flowops.noise_normal((N, W), rng=rng)
    plain = noise_reference(rng, N, W, "normal")
    error = gate("noise_normal", ours, plain, plain.double(), torch.float32)
    timings = interleave(
        {
            "ours": lambda: flowops.noise_normal((N, W), rng=rng),
            "torch.randn": lambda: torch.randn(N, W),
        },
        seconds,
    )
    yield row(
        *("noise_normal", "forward", f"{N}x{W}", "fp32", "torch.randn"),
        *(timings["ours"], timings["torch.randn"], error),
    )


# --- TarFlow -------------------------------------------------------------------------------------


def demo_model(layers: int) -> TarFlow:
    """A TarFlow of the demo's width whose blocks are not the identity."""
    torch.manual_seed(0)
    model = TarFlow(1, 28, 4, 128, 4, layers, num_classes=10)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def bench_tarflow(seconds: float) -> Iterator[Row]:
    model = demo_model(layers=2)
    x, y = torch.randn(64, 1, 28, 28), torch.randint(10, (64,))
    for precision in ("fp32", "bf16"):
        result = compare_training(model, x, y, precision, 4 * seconds)
        yield row(
            *("TarFlow", "training step", "demo, B=64", precision, "eager"),
            *(result.ours, result.eager, result.error),
        )
    for layers, B, guidance in ((2, 32, 0.0), (2, 100, 1.0), (4, 1, 0.0), (4, 32, 0.0)):
        model = demo_model(layers)
        noise = torch.randn(B, model.num_patches, model.patch_channels)
        labels = torch.arange(B) % 10
        result = compare_sampling(model, noise, labels, guidance, 4 * seconds)
        job = "exact sampling, guided" if guidance else "exact sampling"
        yield row(
            *("TarFlow", job, f"4x{layers} layers, B={B}", "fp32", "eager"),
            *(result.ours, result.eager, result.error),
        )


# --- threads -------------------------------------------------------------------------------------


def bench_threads(seconds: float) -> Iterator[Row]:
    """Loops that alternate a torch product with an affine step, against both loops alone, summed:
    once with flowops' affine step and once with torch's own operators. Equal ratios mean that our
    threads and torch's do not fight; what both lose to 1.0 is the caches'."""
    a = torch.randn(256, 256)
    x, params = torch.randn(16, 64, 48), 0.3 * torch.randn(16, 64, 96)

    def loop(*calls: Callable) -> Callable:
        def run():
            for _ in range(20):
                for call in calls:
                    call()

        return run

    def product():
        torch.mm(a, a)

    steps = {
        "affine_update": lambda: flowops.affine_update(x, params),
        "eager affine": lambda: eager_affine(x, params),
    }
    alone = {"mm": loop(product)} | {name: loop(step) for name, step in steps.items()}
    mixed = {f"mm, {name}": loop(product, step) for name, step in steps.items()}
    timings = interleave(alone | mixed, 4 * seconds)
    for name in steps:
        parts = timings["mm"], timings[name]
        summed = Timing(*(sum(getattr(t, q) for t in parts) for q in ("p20", "median", "p80")))
        yield row(
            *("threads", f"torch.mm and {name} in turns, 20x", "256x256; 16x64x48", "fp32"),
            *("each alone, summed", timings[f"mm, {name}"], summed, 0.0),
        )


BENCHES: dict[str, Callable[[float], Iterator[Row]]] = {
    "affine": bench_affine,
    "padding": bench_pad_noise,
    "noise": bench_noise,
    "tarflow": bench_tarflow,
    "threads": bench_threads,
}


def _compiled(function: Callable, *args) -> Callable | None:
    """``torch.compile`` of a baseline, or None where it can't compile (no C++ compiler)."""
    compiled = torch.compile(function)
    try:
        compiled(*args)
    except Exception as error:
        print(f"torch.compile: not available here ({type(error).__name__})", file=sys.stderr)
        return None
    return compiled


# --- output --------------------------------------------------------------------------------------


def markdown(rows: list[Row], env: dict) -> str:
    lines = [
        "| op | job | shape | against | ours | theirs | ratio |",
        "| --- | --- | --- | --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r.op} | {r.job} | {r.shape}, {r.dtype} | {r.baseline} | {_time(r.ours_ms)} | "
        f"{_time(r.baseline_ms)} | {r.speedup:.2f}x |"
        for r in rows
    ]
    where = f"{env['device']}, torch {env['torch']}, {env['isa']}"
    return "\n".join([*lines, "", f"Medians of one interleaved run; {where}."]) + "\n"


def _time(ms: float) -> str:
    return f"{ms:.3g} ms" if ms < 1000 else f"{ms / 1000:.3g} s"


def write_results(rows: list[Row], env: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {**env, "time": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    (folder / "last.json").write_text(
        json.dumps({"environment": record, "rows": [asdict(r) for r in rows]}, indent=1) + "\n"
    )
    table = folder / "all.csv"
    fresh = not table.exists()
    with open(table, "a", newline="") as file:
        writer = csv.DictWriter(file, [*record, *asdict(rows[0])])
        if fresh:
            writer.writeheader()
        writer.writerows({**record, **asdict(r)} for r in rows)


def write_readme(path: Path, folder: Path) -> None:
    """Puts the table of the last run between the markers in the README."""
    last = json.loads((folder / "last.json").read_text())
    table = markdown([Row(**r) for r in last["rows"]], last["environment"])
    text = path.read_text()
    if not README_BLOCK.search(text):
        raise ValueError(
            f"{path}: the markers <!-- bench:begin --> and <!-- bench:end --> are gone"
        )
    path.write_text(README_BLOCK.sub(lambda match: match[1] + table + match[2], text))


def results_folder(env: dict) -> Path | None:
    """``bench/results/<device>`` of the checkout that this is run in, or None."""
    root = Path.cwd()
    if not (root / "bench" / "run.py").exists():
        return None
    return root / "bench" / "results" / re.sub(r"[^a-z0-9]+", "-", env["device"].lower()).strip("-")


@dataclass(frozen=True)
class Arguments:
    """Time the ops and the model against plain PyTorch, in one run."""

    only: tuple[str, ...] = ()
    """Some of affine, padding, noise, tarflow, threads; nothing for all."""
    seconds: float = 3.0
    """Time for each row; a model's rows take four times that."""
    readme: bool = False
    """Write the table of the stored run into README.md."""


def main(argv: list[str]) -> None:
    import tyro
    from rich.console import Console
    from rich.table import Table

    args = tyro.cli(Arguments, prog="flowops bench", args=argv)
    unknown = set(args.only) - set(BENCHES)
    if unknown:
        raise ValueError(f"only: expected some of {', '.join(BENCHES)}, got {min(unknown)!r}")
    env = environment()
    console = Console(width=150)
    rows = []
    for name in args.only or BENCHES:
        with console.status(f"timing {name}"):
            rows += BENCHES[name](args.seconds)
    table = Table(title=f"flowops bench on {env['device']}")
    for heading in ("op", "job", "shape", "against"):
        table.add_column(heading)
    for heading in ("ours", "theirs", "ratio", "error"):
        table.add_column(heading, justify="right")
    for r in rows:
        table.add_row(
            *(r.op, r.job, f"{r.shape}, {r.dtype}", r.baseline),
            *(_time(r.ours_ms), _time(r.baseline_ms), f"{r.speedup:.2f}x", f"{r.error:.0e}"),
        )
    console.print(table)
    folder = results_folder(env)
    if folder is not None and not args.only:
        write_results(rows, env, folder)
        console.print(folder, highlight=False)
        if args.readme:
            write_readme(Path("README.md"), folder)


if __name__ == "__main__":
    main(sys.argv[1:])
