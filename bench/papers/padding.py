"""Samples of flows with and without padding columns, on manifolds and on discrete data.

Source: Meng et al., "PaddingFlow" (arXiv 2403.08216).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from flowops.api.fit import FitConfig, fit_flow, mean_log_prob

from .contenders import FF_GLOW, GLOW, build
from .data import Parts, sample_parts
from .ferumal import Keep, Rows
from .metrics import chamfer, coverage, mmd_l2

MANIFOLDS = ("circle", "sines", "sphere")
DISCRETE = ("lattice", "digits16")
REAL = "training rows"
NOISE = 0.01
#: Pads of a row in the likelihood of test rows.
TEST_PADS = 8
FIT = FitConfig(steps=200, batch_size=128, lr=1e-2, eval_every=40, patience=100, num_pads=4)


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiments; the default is the full run."""

    manifolds: tuple[str, ...] = MANIFOLDS
    discrete: tuple[str, ...] = DISCRETE
    families: tuple[str, ...] = (FF_GLOW, GLOW)
    pads: tuple[int, ...] = (0, 1, 2, 4)
    seeds: int = 5
    layers: int = 4
    points: int = 50
    rows: tuple[int, int, int] = (2000, 250, 1000)
    fit: FitConfig = FIT


QUICK = Settings(
    manifolds=("circle",),
    discrete=("lattice",),
    families=(GLOW,),
    pads=(0, 1),
    seeds=2,
    layers=2,
    points=10,
    rows=(300, 100, 200),
    fit=FitConfig(steps=20, batch_size=128, eval_every=10, patience=100, num_pads=4),
)


def run_manifold(settings: Settings, data: Path | None, keep: Keep) -> Rows:
    """p = 0, 1, 2, 4 on data that lie on a curve or a surface. ``keep`` after every set."""
    variants = [(f"p={pad}", pad, 0.0) for pad in settings.pads]
    return _run(settings.manifolds, variants, settings, keep)


def run_discrete(settings: Settings, data: Path | None, keep: Keep) -> Rows:
    """Padding, noise on the data, and both, on data with few values."""
    variants = [
        ("plain", 0, 0.0),
        ("noise", 0, NOISE),
        ("p=1", 1, 0.0),
        ("p=1, noise", 1, NOISE),
    ]
    return _run(settings.discrete, variants, settings, keep)


def _run(sets, variants: list[tuple[str, int, float]], settings: Settings, keep: Keep) -> Rows:
    rows: Rows = []
    for name in sets:
        for seed in range(settings.seeds):
            parts = sample_parts(name, seed, settings.rows)
            rows.append({"set": name, "family": REAL, "variant": REAL, "seed": seed})
            # As many as the flows draw: coverage depends on their number.
            rows[-1] |= _measure(name, parts.train[: len(parts.test)], parts) | {"status": "ok"}
            for family in settings.families:
                for variant, pad, noise in variants:
                    label = {"set": name, "family": family, "variant": variant, "seed": seed}
                    rows.append(label | _one(name, parts, family, pad, noise, seed, settings))
                    print(
                        f"  {name} {family} {variant} seed {seed}: {_short(rows[-1])}", flush=True
                    )
        keep(rows)
    return rows


def _one(name, parts: Parts, family, pad, noise, seed, settings: Settings) -> dict:
    features = parts.train.shape[1]
    shape = (features, settings.layers, settings.points, seed)
    flow = build(family, *shape, pad=pad, data_scale=noise)
    try:
        result = fit_flow(flow, parts.train, parts.valid, replace(settings.fit, seed=seed))
    except FloatingPointError as error:
        return {"status": f"diverged: {error}"}
    torch.manual_seed(seed)
    samples = flow.sample(len(parts.test))
    finite = samples.isfinite().all(1)
    row = {
        "pad": pad,
        "data_scale": noise,
        "stopped": result.stopped,
        "best_step": result.best_step,
        "finite": finite.double().mean().item(),
        "test": mean_log_prob(flow, parts.test, TEST_PADS)[0],
        "curve": [[r["step"], r["valid"]] for r in result.records],
    }
    if not finite.all():
        return row | {"status": f"{int((~finite).sum())} samples are not finite"}
    return row | _measure(name, samples, parts) | {"status": "ok"}


def _measure(name: str, samples: torch.Tensor, parts: Parts) -> dict[str, float]:
    """Chamfer, MMD-L2 and coverage in standardised units; the mean distance of a sample to the
    support in units of the data."""
    original = parts.standardizer.inverse(samples.double().numpy())
    return {
        "chamfer": chamfer(samples, parts.test),
        "mmd_l2": mmd_l2(samples, parts.test),
        "coverage": coverage(samples, parts.test),
        "off": float(SUPPORT[name](original).mean()),
    }


def _off_sphere(rows: np.ndarray) -> np.ndarray:
    return np.abs(np.linalg.norm(rows, axis=1) - 1)


def _off_sines(rows: np.ndarray) -> np.ndarray:
    """To the nearest of 2,000 points of ``y = +-1.5 sin x``, less than 0.003 apart."""
    x = np.linspace(-np.pi, np.pi, 2000)
    best = np.full(len(rows), np.inf)
    for sign in (-1.5, 1.5):
        apart = np.hypot(rows[:, :1] - x, rows[:, 1:] - sign * np.sin(x))
        best = np.minimum(best, apart.min(axis=1))
    return best


def _off_integers(low: int, high: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda rows: np.linalg.norm(rows - np.clip(np.rint(rows), low, high), axis=1)


#: Distance of rows to the set that holds all data.
SUPPORT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "circle": _off_sphere,
    "sphere": _off_sphere,
    "sines": _off_sines,
    "lattice": _off_integers(-2, 2),
    "digits16": _off_integers(0, 16),
}


def _short(row: dict) -> str:
    if row["status"] != "ok":
        return row["status"]
    return f"Chamfer {row['chamfer']:.4f}, coverage {row['coverage']:.3f}, off {row['off']:.4f}"
