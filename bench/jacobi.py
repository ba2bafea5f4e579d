"""``flowops bench jacobi``: how far Jacobi's images are from the exact ones of a trained model, for
every ``tol``, and what that costs or saves."""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flowops.api import TarFlow
from flowops.api.checkpoint import read_tensors, write_whole
from flowops.api.train_config import TrainConfig

from . import report
from .environment import environment, now
from .models import trained_model
from .run import results_folder
from .timing import interleave

TOLS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 0.0)
OUT = Path("runs/jacobi")
#: The demo's, in fp32 and for a number of steps, so that every machine trains about the same model.
TRAINING = TrainConfig(batch_size=32, lr=4e-3, warmup=100, ema=0.99, precision="fp32")
HEADINGS = [
    "tol",
    "largest error",
    "median",
    "largest residual",
    "sweeps per block",
    "time / exact",
]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="flowops bench jacobi",
        description="Errors, sweeps and times of Jacobi sampling for a trained model, by tol.",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FILE",
        help="a model.safetensors; without it the demo's model is trained first, in fp32",
    )
    parser.add_argument("--steps", type=int, default=1000, help="of that training")
    parser.add_argument("--images", type=int, default=32, help="that are drawn, in one batch")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing, for every tol")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    args = parser.parse_args(argv)
    for name in ("steps", "images", "seconds"):
        if not getattr(args, name) > 0:
            raise ValueError(f"{name}: expected a positive number, got {getattr(args, name)}")
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected cpu, got cuda, but PyTorch sees no CUDA device")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    env = environment(args.device)
    path = train(args.steps, args.device) if args.model is None else args.model
    model = trained_model(path, args.device)
    noise = torch.randn(
        *(args.images, model.num_patches, model.patch_channels),
        generator=torch.Generator().manual_seed(0),
    ).to(args.device)
    rows = study(model, noise, _labels(model, args.images), args.seconds)
    print("\n" + report.plain([_line(row) for row in rows], HEADINGS))
    result = {
        "environment": env,
        "time": now(),
        "model": {**model.config, "train_config": read_tensors(path)[1].get("train_config")},
        "images": args.images,
        "rows": rows,
    }
    folder = results_folder(env)
    picture = Path("docs/jacobi.png")
    if folder is None or not picture.parent.is_dir():
        folder, picture = OUT, OUT / picture.name
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "jacobi.json", (json.dumps(result, indent=1) + "\n").encode())
    print(folder / "jacobi.json")
    plot(result, picture)
    return 0


def train(steps: int, device: str) -> Path:
    """Trains the demo's model on 4,500 MNIST digits; returns the path of its weights."""
    from flowops.api.data import load_images
    from flowops.api.train import run_training
    from flowops.api.trainer import Trainer, build_model

    data, _ = load_images("mnist").split(500)
    config = replace(TRAINING, steps=steps, warmup=min(TRAINING.warmup, max(1, steps // 5)))
    OUT.mkdir(parents=True, exist_ok=True)

    def on_step(record: dict) -> None:
        if record["step"] % 100 == 0 or record["step"] == steps:
            print(f"step {record['step']}: {record['bits_per_dim']:.3f} bits/dim", flush=True)

    run_training(Trainer(config, build_model(config, data).to(device), data), OUT, on_step)
    return OUT / "model.safetensors"


@torch.no_grad()
def study(model: TarFlow, noise: Tensor, y: Tensor | None, seconds: float) -> list[dict]:
    """A row for every tol: over images, the largest and the median of ``max |x - x_exact|``; the
    largest residual; the batch's sweeps for each block, in the order of sampling; and the time over
    that of the exact sampler, for one image and for the batch."""
    exact, rows = model.reverse(noise, y), []
    for tol in TOLS:
        x, solved = model.reverse(noise, y, method="jacobi", tol=tol, return_report=True)
        errors = (x - exact).abs().flatten(1).amax(1).double()
        rows.append(
            {
                "tol": tol,
                "largest_error": errors.max().item(),
                "median_error": errors.quantile(0.5).item(),
                "largest_residual": solved.residual.max().item(),
                "sweeps": solved.sweeps[0].flip(0).tolist(),
                "time_over_exact": {},
            }
        )
    for B in sorted({1, len(noise)}):
        calls = _calls(model, noise[:B], None if y is None else y[:B])
        timings = interleave(calls, seconds * len(calls), warmup=1)
        for row in rows:
            ratio = timings[row["tol"]].median / timings["exact"].median
            row["time_over_exact"][str(B)] = ratio
    return rows


def _calls(model: TarFlow, noise: Tensor, y: Tensor | None) -> dict[str | float, Callable]:
    def call(**options) -> None:
        model.reverse(noise, y, **options)
        if noise.device.type == "cuda":
            torch.cuda.synchronize()

    return {"exact": call} | {tol: partial(call, method="jacobi", tol=tol) for tol in TOLS}


def _labels(model: TarFlow, n: int) -> Tensor | None:
    return (
        torch.arange(n, device=model.var.device) % model.num_classes if model.num_classes else None
    )


def _line(row: dict) -> list[str]:
    times = (f"{ratio:.2f} (B={B})" for B, ratio in row["time_over_exact"].items())
    numbers = (row[key] for key in ("largest_error", "median_error", "largest_residual"))
    sweeps = " ".join(str(count) for count in row["sweeps"])
    return [f"{row['tol']:g}", *(f"{number:.1e}" for number in numbers), sweeps, ", ".join(times)]


def plot(result: dict, path: Path) -> None:
    """Errors and residuals against tol; sweeps of each block; time over that of exact."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = result["rows"]
    figure, (errors, sweeps, times) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    positive = [row for row in rows if row["tol"] > 0]
    tols = [row["tol"] for row in positive]
    for key, label, style in (
        ("largest_error", "largest |x - x of exact| of all images", "C0o-"),
        ("median_error", "largest of an image, median over images", "C1o-"),
        ("largest_residual", "largest residual of any block", "C2x"),
    ):
        errors.loglog(tols, [row[key] for row in positive], style, label=label)
    errors.loglog(tols, tols, "k--", lw=1, label="error = tol")
    errors.invert_xaxis()
    at_zero = max((row["largest_error"] for row in rows if row["tol"] == 0), default=0.0)
    errors.set(xlabel="tol", ylabel="pixels span [-1, 1]")
    errors.set_title(f"error of the images (tol 0: {at_zero:.1g})")
    labels = [f"{row['tol']:g}" for row in rows]
    for k, counts in enumerate(zip(*(row["sweeps"] for row in rows), strict=True)):
        block = len(rows[0]["sweeps"]) - 1 - k
        sweeps.plot(labels, counts, marker="o", label=f"block {block}")
    T = (result["model"]["img_size"] // result["model"]["patch_size"]) ** 2
    sweeps.axhline(T - 1, color="black", ls="--", lw=1, label="steps of the exact sampler")
    sweeps.set(xlabel="tol", title=f"sweeps of a block, batch of {result['images']}")
    sweeps.set_ylim(bottom=0)
    for B in rows[0]["time_over_exact"]:
        values = [row["time_over_exact"][B] for row in rows]
        times.plot(labels, values, marker="o", label=f"B={B}")
    times.axhline(1, color="black", ls="--", lw=1, label="exact")
    times.set(xlabel="tol", title="time over that of the exact sampler", yscale="log")
    for axes in (errors, sweeps, times):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(_title(result))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(path)


def _title(result: dict) -> str:
    model, env = result["model"], result["environment"]
    size = f"{model['num_blocks']}x{model['layers_per_block']} layers of width {model['channels']}"
    trained = model["train_config"]
    steps = f" after {trained['steps']} training steps" if trained else ""
    where = env["device"] + ("" if env["kind"] == "cuda" else f", threads: {env['threads']}")
    return f"Jacobi sampling in fp32, TarFlow of {size}{steps}, {result['images']} images\n{where}"
