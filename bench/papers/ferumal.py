"""Kernel flows against flows with networks, and how many auxiliary points they need.

Source: English, Kirchler and Lippert, "Kernelised Normalising Flows" (arXiv 2307.14839).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from flowops.api.fit import FitConfig, fit_flow, mean_log_prob
from flowops.api.uci import UCI

from .contenders import CONTENDERS, FF_REALNVP, build
from .data import density_parts

SETS = (
    *("moons-500", "diabetes", "breast_cancer", "patches-500"),
    *("digits-500", "moons", "patches", "digits"),
)
POINT_SETS = ("moons-500", "patches-500")
POINTS = (10, 25, 50, 150, 400, "all")
FIT = FitConfig(steps=240, batch_size=128, eval_every=20, patience=3)


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiments; the default is the full run."""

    sets: tuple[str, ...] = SETS
    seeds: int = 3
    layers: int = 5
    points: int = 100
    #: All are tried on the validation rows of seed 0, and while the highest one is the best three
    #: times that one, up to a limit. The contender keeps the best for all seeds.
    rates: tuple[float, ...] = (2e-3, 1e-2)
    highest_rate: float = 0.1
    fit: FitConfig = FIT
    point_sets: tuple[str, ...] = POINT_SETS
    point_counts: tuple[int | str, ...] = POINTS
    point_rate: float = 5e-3


QUICK = Settings(
    sets=("moons-500", "diabetes"),
    seeds=2,
    layers=2,
    points=20,
    rates=(1e-2,),
    highest_rate=1e-2,
    fit=FitConfig(steps=20, batch_size=128, eval_every=10, patience=5),
    point_sets=("moons-500",),
    point_counts=(10, "all"),
)

Rows = list[dict]
Keep = Callable[[Rows], None]


def run_comparison(settings: Settings, data: Path | None, keep: Keep) -> Rows:
    """Every contender on every set: a row for each seed. ``keep`` is called after every set."""
    rows: Rows = []
    sets = [*settings.sets, *(f"uci-{name}" for name in _below(data))]
    for name in sets:
        for contender in CONTENDERS:
            rows += _contend(name, contender, settings, data)
        keep(rows)
    return rows


def _contend(name: str, contender: str, settings: Settings, data: Path | None) -> Rows:
    tried: Rows = []
    rates = [*settings.rates]
    while rates:
        config = replace(settings.fit, lr=rates.pop(0))
        tried.append(one_fit(name, contender, 0, config, settings, data=data))
        best = max(tried, key=lambda row: row.get("valid", -math.inf))
        if not rates and best is tried[-1] and 3 * config.lr <= settings.highest_rate:
            rates.append(3 * config.lr)
    if best["status"] != "ok":
        return [best]
    best["rates"] = {str(row["lr"]): row.get("valid") for row in tried}
    config = replace(settings.fit, lr=best["lr"])
    others = range(1, settings.seeds)
    return [best, *(one_fit(name, contender, s, config, settings, data=data) for s in others)]


def run_points(settings: Settings, data: Path | None, keep: Keep) -> Rows:
    """FF-RealNVP with other numbers of auxiliary points."""
    rows: Rows = []
    config = replace(settings.fit, lr=settings.point_rate)
    for name in settings.point_sets:
        for points in settings.point_counts:
            for seed in range(settings.seeds):
                rows.append(one_fit(name, FF_REALNVP, seed, config, settings, points))
        keep(rows)
    return rows


def one_fit(
    name: str,
    contender: str,
    seed: int,
    config: FitConfig,
    settings: Settings,
    points: int | str | None = None,
    data: Path | None = None,
) -> dict:
    """Trains a contender and measures it on the test rows: a row of the results."""
    points = settings.points if points is None else points
    row = {"set": name, "contender": contender, "points": points, "seed": seed, "lr": config.lr}
    parts = density_parts(name, seed, data)
    features = parts.train.shape[1]
    try:
        flow = build(contender, features, settings.layers, points, seed)
    except ImportError as error:
        return row | {"status": f"missing: {error.name or error}"}
    try:
        result = fit_flow(flow, parts.train, parts.valid, replace(config, seed=seed))
    except FloatingPointError as error:
        return row | {"status": f"diverged: {error}"}
    test, error = mean_log_prob(flow, parts.test)
    row |= {
        "status": "ok" if math.isfinite(test) else "diverged: infinite on the test rows",
        "features": features,
        "train_rows": len(parts.train),
        "test_rows": len(parts.test),
        "test": test,
        "test_error": error,
        "valid": result.best_valid,
        "best_step": result.best_step,
        "stopped": result.stopped,
        "parameters": sum(p.numel() for p in flow.parameters()),
        "step_ms": step_ms(flow, parts.train[: config.batch_size], config.lr) if not seed else None,
        "curve": [[r["step"], r["valid"]] for r in result.records],
    }
    print(
        f"  {name} {contender} points {points} seed {seed} lr {config.lr:g}: test {test:.3f}, best "
        f"of {result.records[-1]['step']} steps {result.best_step}",
        flush=True,
    )
    return row


def step_ms(flow: nn.Module, rows: Tensor, lr: float, count: int = 10) -> float:
    """Median CPU time of a training step in milliseconds: the process's own, so that other
    processes on the core do not count."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=lr)
    times = []
    for _ in range(count):
        started = time.process_time()
        optimizer.zero_grad(set_to_none=True)
        (-flow.log_prob(rows).mean()).backward()
        optimizer.step()
        times.append(time.process_time() - started)
    return 1e3 * sorted(times[2:])[len(times[2:]) // 2]


def _below(data: Path | None) -> list[str]:
    """The UCI sets whose folder is there."""
    if data is None:
        return []
    if not data.is_dir():
        raise ValueError(f"data: expected a folder, got {data}")
    folders = {path.name.lower() for path in data.iterdir() if path.is_dir()}
    return [name for name in UCI if name in folders]
