"""``flowops bench``: each op and the model against what else there is, in one run.

Prints a line for every provider and a short table last, and in a checkout keeps the results under
``bench/results/<device>/``. Parsed with argparse, unlike the other commands: machines with a GPU
often have torch and little else.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import zip_longest
from pathlib import Path

import torch

from . import ceilings, prefer, report
from .environment import environment, folder_name, now
from .job import OURS, Row, Spec, measure
from .jobs_attention import attention_specs, patch_attention_specs
from .jobs_gram import coupling_specs, gram_specs
from .jobs_pointwise import affine_specs, noise_specs, padding_specs, threads_specs
from .plot import plot


def _model_specs(name: str) -> Callable[..., Iterator[Spec]]:
    """Imported when asked for: an older flowops may have the ops and not the model."""

    def model_specs(device: str, **options: Path | None) -> Iterator[Spec]:
        module = import_module(f".{name}", __package__)
        return getattr(module, f"{name}_specs")(device, **options)

    return model_specs


OPS: dict[str, Callable[..., Iterator[Spec]]] = {
    "affine": affine_specs,
    "padding": padding_specs,
    "noise": noise_specs,
    "attention": attention_specs,
    "patch_attention": patch_attention_specs,
    "gram": gram_specs,
    "coupling": coupling_specs,
    "tarflow": _model_specs("tarflow"),
    "sampling": _model_specs("sampling"),
    "threads": threads_specs,
}
#: Benchmarks with options of their own.
ALONE = {
    "jacobi": ".jacobi",
    "loading": ".loading",
    "papers": ".papers.run",
    "scaling": ".scaling",
}
SECONDS = {"cpu": 1.0, "cuda": 0.3}
#: The ops that are models, and the files they can be given.
MODELS = {"tarflow": ("upstream",), "sampling": ("upstream", "model")}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="flowops bench",
        description="Time the ops and the model against what else there is, in one run.",
        epilog="docs/benchmarks.md explains the columns and the rules.",
    )
    parser.add_argument(
        "ops",
        nargs="*",
        metavar="op",
        help=f"some of {', '.join(OPS)}; none for all; or overhead, {', '.join(ALONE)} alone",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument(
        "--seconds",
        type=float,
        help="time for each row, 1 on a CPU and 0.3 on a GPU; rows of a model take twice that",
    )
    parser.add_argument(
        "--budget", type=float, help="seconds after which the remaining rows are listed as not run"
    )
    parser.add_argument(
        "--readme", action="store_true", help="write the tables of the stored runs into README.md"
    )
    parser.add_argument(
        "--upstream",
        type=Path,
        metavar="DIR",
        help="a checkout of the reference program, with transformer_flow.py, as a baseline",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FILE",
        help="a model.safetensors whose weights the Jacobi rows of sampling use, not random ones",
    )
    parser.add_argument(
        "--prefer",
        action="store_true",
        help="let auto take the CUDA kernels where this run, on a GPU, found them faster than "
        "Triton's: writes flowops/measured.json",
    )
    parser.add_argument(
        "--against", metavar="GIT_REF", help="build that commit and compare our own times with it"
    )
    args = parser.parse_args(argv)
    unknown = [op for op in args.ops if op not in OPS]
    if unknown and args.ops != ["overhead"]:
        raise ValueError(f"op: expected some of {', '.join(OPS)}, got {unknown[0]!r}")
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected cpu, got cuda, but PyTorch sees no CUDA device")
    if args.prefer and args.device != "cuda":
        raise ValueError("prefer: expected a run on a GPU, got device cpu")
    if args.seconds is None:
        args.seconds = SECONDS[args.device]
    for name in ("seconds", "budget"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    if args.upstream is not None:
        from .upstream import load_upstream

        load_upstream(args.upstream)  # now rather than after minutes
    if args.model is not None:
        from .models import trained_model

        trained_model(args.model, "cpu")
    return args


def specs(ops: list[str], device: str, **options: Path | None) -> list[Spec]:
    """The jobs of ``ops``, none for all, in the order of the tables. ``upstream`` and ``model`` go
    to those that know them."""
    jobs = []
    for op in ops or OPS:
        known = {name: options[name] for name in MODELS.get(op, ()) if name in options}
        jobs += OPS[op](device, **known)
    return jobs


def in_turns(jobs: list[Spec]) -> list[Spec]:
    """First jobs of all ops first, so that a budget cuts off the lesser jobs of every op."""
    ops: dict[str, list[Spec]] = {}
    for job in jobs:
        ops.setdefault(job.op, []).append(job)
    return [job for turn in zip_longest(*ops.values()) for job in turn if job is not None]


def run_all(jobs: list[Spec], rates, args: argparse.Namespace, sha: str, only=()) -> list[Row]:
    """Measures the jobs, in turns, and returns their rows in the order of the jobs."""
    started, rows = time.monotonic(), {}
    for spec in in_turns(jobs):
        if args.budget is not None and time.monotonic() - started > args.budget:
            status = f"{report.NOT_RUN}: the budget of {args.budget:g} s is spent"
            label = (spec.op, spec.job, spec.shape, spec.dtype)
            rows[spec] = [Row(*label, OURS, "ours", status)]
            continue
        print(f"{spec.op} {spec.job}, {spec.shape}, {spec.dtype}", flush=True)
        seconds = args.seconds * (2 if spec.op in MODELS else 1)
        rows[spec] = measure(spec, rates, seconds, args.device, only)
        for row in rows[spec]:
            row.time, row.git = now(), sha
            print(report.details(row), flush=True)
    return [row for spec in jobs for row in rows[spec]]


def results_folder(env: dict) -> Path | None:
    """``bench/results/<device>`` of the checkout that this is run in, or None."""
    root = Path.cwd()
    if not (root / "bench" / "run.py").exists():
        return None
    return root / "bench" / "results" / folder_name(env)


def main(argv: list[str]) -> int:
    """Returns the exit status: 1 where a gate failed or a GPU got slower."""
    if argv and argv[0] in ALONE:
        return import_module(ALONE[argv[0]], __package__).main(argv[1:])
    args = parse(argv)
    if args.ops == ["overhead"]:
        from .overhead import main as overhead

        return overhead()
    if args.against is not None:
        from .against import compare

        return compare(args.against, args.ops, args.device, args.seconds, args.budget)
    return bench(args)


def bench(args: argparse.Namespace) -> int:
    env = environment(args.device)
    print(report.describe(env))
    if os.environ.get("FLOWOPS_BACKEND"):
        print(f"note: FLOWOPS_BACKEND={os.environ.get('FLOWOPS_BACKEND')} decides for every op")
    rates = ceilings.measure(args.device)
    for name, rate in rates.asdict().items():
        print(f"  ceiling, {name}: {rate / 1e9:.4g} G a second")
    sha = env["git"] + ("+" if env["dirty"] else "")
    rows = run_all(
        specs(args.ops, args.device, upstream=args.upstream, model=args.model), rates, args, sha
    )
    folder, slower = results_folder(env), []
    if folder is not None:
        _, stored = report.load(folder)
        slower = report.regressions(stored, rows, args.device)
        merged = report.merge(stored, rows)
        report.store(folder, env, rates.asdict(), merged, rows)
        plot(merged, folder, env["device"], dict.fromkeys(row.op for row in rows))
        print(folder)
        if args.readme:
            report.write_readme(Path("README.md"), folder.parent)
        if args.prefer:
            prefer.write(Path("flowops") / "measured.json", env["device"], rows)
    print("\n" + report.plain(report.summary(rows)))
    failed = [row for row in rows if row.status.startswith("FAILED")]
    for row in failed:
        print(f"{' '.join(row.key)}: {row.status}")
    fails = args.device == "cuda"
    for line in slower:
        print(f"{'REGRESSION' if fails else 'warning'}: {line}")
    return int(bool(failed) or (fails and bool(slower)))
