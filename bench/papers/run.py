"""``flowops bench papers``: what two papers claim, on data that need no download.

Results are written after every data set, and the page is made from what is on disk alone.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

from flowops.api.checkpoint import write_whole

from ..environment import environment
from . import ferumal, padding

EXPERIMENTS: dict[str, tuple[Callable, object, object]] = {
    "manifold": (padding.run_manifold, padding.Settings(), padding.QUICK),
    "comparison": (ferumal.run_comparison, ferumal.Settings(), ferumal.QUICK),
    "discrete": (padding.run_discrete, padding.Settings(), padding.QUICK),
    "points": (ferumal.run_points, ferumal.Settings(), ferumal.QUICK),
}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="flowops bench papers",
        description="Test claims of the papers on kernel flows and on PaddingFlow.",
        epilog="docs/papers.md is made of the results.",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: a minute, no result")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of UCI sets, compared as well"
    )
    parser.add_argument(
        "--only",
        choices=tuple(EXPERIMENTS),
        metavar="NAME",
        help=f"one of {', '.join(EXPERIMENTS)}",
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds, for all experiments alike")
    parser.add_argument("--page", action="store_true", help="make the page of stored results alone")
    parser.add_argument(
        "--out", type=Path, help="folder of bench/results/papers and docs; a checkout by default"
    )
    args = parser.parse_args(argv)
    if args.data is not None and not args.data.is_dir():
        raise ValueError(f"data: expected a folder, got {args.data}")
    if args.seeds is not None and args.seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {args.seeds}")
    if args.out is None:
        args.out = Path("runs/papers-quick") if args.quick else Path.cwd()
        if not args.quick and not (args.out / "bench" / "papers" / "run.py").exists():
            raise ValueError("out: outside a checkout, say where results and page should go")
    return args


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    args = parse(argv)
    results, docs = args.out / "bench" / "results" / "papers", args.out / "docs"
    if not args.page:
        for name in [args.only] if args.only else EXPERIMENTS:
            run_one(name, args.quick, args.seeds, args.data, results)
    from .page import write_page

    write_page(results, docs)
    print(f"wrote {docs / 'papers.md'}")
    return 0


def run_one(name: str, quick: bool, seeds: int | None, data: Path | None, results: Path) -> None:
    """Runs an experiment and writes ``<name>.json``, anew after every data set."""
    run, full, small = EXPERIMENTS[name]
    settings = small if quick else full
    if seeds is not None:
        settings = dataclasses.replace(settings, seeds=seeds)
    started, env = time.process_time(), environment("cpu")
    results.mkdir(parents=True, exist_ok=True)

    def keep(rows: list[dict], complete: bool = False) -> None:
        record = {
            "experiment": name,
            "quick": quick,
            "complete": complete,
            "cpu_seconds": round(time.process_time() - started, 1),
            "environment": env,
            "settings": dataclasses.asdict(settings),
            "rows": rows,
        }
        text = json.dumps(_finite(record), indent=None, separators=(",", ":"))
        write_whole(results / f"{name}.json", text.replace('{"set"', '\n{"set"').encode() + b"\n")

    print(name, flush=True)
    keep(run(settings, data, keep), complete=True)


def _finite(value):
    """JSON has no infinity and no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    return value
