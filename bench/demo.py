"""The main job: a class-conditional TarFlow learns 5,000 real digits and measures itself."""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from flowops import dispatch
from flowops.api.checkpoint import write_whole
from flowops.api.curves import plot_curve
from flowops.api.data import load_images, save_grid
from flowops.api.evaluate import evaluate, noisy_batches
from flowops.api.train import run_training
from flowops.api.train_config import TrainConfig, noise_name
from flowops.api.trainer import Trainer, build_model

from .tarflow import compare_sampling, compare_training

DIGITS = 10


@dataclass(frozen=True)
class DemoConfig:
    """Train a TarFlow on MNIST digits, draw samples, measure."""

    out: Path = Path("runs/demo")
    """Where the results go."""
    minutes: float = 2.7
    """Training time to aim for; the number of steps follows from the speed measured first."""
    max_steps: int = 2500
    per_digit: int = 10
    """Sampled images of each digit."""
    guidance: float = 2.0
    """Strength of guidance towards the digit."""
    seed: int = 0

    def __post_init__(self):
        for name in ("minutes", "max_steps", "per_digit"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")


def run(config: DemoConfig) -> dict:
    """Runs the demo; returns what ``metrics.json`` holds."""
    console = Console()
    out = config.out
    out.mkdir(parents=True, exist_ok=True)
    train_config = TrainConfig(batch_size=32, lr=4e-3, warmup=100, ema=0.99, seed=config.seed)
    train, held_out = load_images("mnist").split(500)
    model = build_model(train_config, train)
    for backend in ("cpu", "triton"):
        usable, state = dispatch.backend_state(backend)
        console.print(
            f"backend {backend}: {'' if usable else 'not used: '}{state}", highlight=False
        )

    with console.status("measuring before training"):
        before = evaluate(model, held_out, train_config, classify=False)
        trainer = Trainer(train_config, model, train)
        x, y = trainer.batch(0)
        speed = compare_training(model, x, y, trainer.settle_precision())
    steps = max(1, min(config.max_steps, int(60 * config.minutes / speed.ours.p20)))
    train_config = replace(
        train_config,
        steps=steps,
        precision=trainer.precision,
        warmup=min(train_config.warmup, steps // 5),
    )
    trainer = Trainer(train_config, model, train)

    losses, started = [], time.perf_counter()
    with Progress(
        TextColumn("training in {task.fields[precision]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[bits]:.3f} bits/dim"),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        task = progress.add_task(
            "", total=steps, precision=train_config.precision, bits=before.bits_per_dim
        )

        def on_step(record):
            losses.append(record["bits_per_dim"])
            progress.update(task, completed=record["step"], bits=record["bits_per_dim"])

        model = run_training(trainer, out, on_step)
    train_seconds = time.perf_counter() - started

    labels = torch.arange(DIGITS).repeat_interleave(config.per_digit)
    with console.status("evaluating and sampling"):
        after = evaluate(model, held_out, train_config)
        started = time.perf_counter()
        samples = model.sample(
            len(labels),
            labels,
            guidance=config.guidance,
            denoise_std=train_config.noise_std,
            rng=torch.tensor([config.seed, 0]),
        )
        sample_seconds = time.perf_counter() - started
        noisy, true = next(noisy_batches(held_out, train_config, model.var.device, 32))
        with torch.no_grad():
            round_trip = (model.reverse(model(noisy, true)[0], true) - noisy).abs().max().item()

    metrics = {
        "bits_per_dim_start": before.bits_per_dim,
        "bits_per_dim": after.bits_per_dim,
        "bits_per_dim_standard_error": after.standard_error,
        "noise": noise_name(train_config),
        "held_out_images": after.images,
        "classifier_accuracy": after.accuracy,
        "round_trip_error": round_trip,
        "images_per_second_train": len(losses) * train_config.batch_size / train_seconds,
        "images_per_second_sample": len(labels) / sample_seconds,
        "speedup_train": speed.speedup,
        "precision": train_config.precision,
        "train_seconds": train_seconds,
        "train_config": asdict(train_config),
    }
    save_grid(samples, out / "samples.png", config.per_digit)
    plot_curve(
        *(range(1, len(losses) + 1), losses, out / "loss.png"),
        "TarFlow on 4,500 MNIST digits",
        after.bits_per_dim,
    )
    with console.status("comparing sampling"):
        noise = torch.randn(32, model.num_patches, model.patch_channels)
        sampling = compare_sampling(model, noise, torch.arange(32) % DIGITS, config.guidance)
    metrics["speedup_sample"] = sampling.speedup
    write_whole(out / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    console.print(_table(metrics))
    for name in ("samples.png", "loss.png", "model.safetensors", "metrics.json"):
        console.print(out / name, highlight=False)
    return metrics


def _table(metrics: dict) -> Table:
    table = Table(title="flowops demo: TarFlow on MNIST")
    table.add_column("measure")
    table.add_column("value", justify="right")
    rows = {
        f"held-out bits per dim, untrained ({metrics['noise']} noise)": "bits_per_dim_start",
        "held-out bits per dim, trained": "bits_per_dim",
        "classification by Bayes' rule, held out": "classifier_accuracy",
        "largest |reverse(forward(x)) - x|": "round_trip_error",
        f"images a second, training ({metrics['precision']})": "images_per_second_train",
        "images a second, sampling (guided, denoised)": "images_per_second_sample",
        "training step against plain eager PyTorch": "speedup_train",
        "sampling against plain eager PyTorch": "speedup_sample",
    }
    formats = {
        "classifier_accuracy": "{:.1%}",
        "round_trip_error": "{:.1e}",
        "speedup_train": "{:.2f}x",
        "speedup_sample": "{:.2f}x",
        "images_per_second_train": "{:.0f}",
        "images_per_second_sample": "{:.0f}",
    }
    for label, key in rows.items():
        table.add_row(label, formats.get(key, "{:.3f}").format(metrics[key]))
    return table
