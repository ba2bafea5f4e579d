"""The commands ``flowops fit``, ``score`` and ``sample`` for tables of numbers."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated


def fit(argv: list[str]) -> None:
    import tyro

    from .density import FlowSpec
    from .fit import FitConfig

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        """Fit a density to the rows of a table: standardise, split, train with early stopping,
        report log-likelihoods, save the model, draw pictures."""

        data: tyro.conf.Positional[Path]
        """.csv, .tsv, .txt, .npy or .parquet; every column wanted holds numbers."""
        spec: Annotated[FlowSpec, tyro.conf.arg(name="")]
        config: Annotated[FitConfig, tyro.conf.arg(name="")]
        columns: tuple[str, ...] = ()
        """Names of the columns to use; none for all."""
        valid: float = 0.1
        """Share of the rows that decide when to stop."""
        test: float = 0.1
        """Share of the rows that are looked at once, at the end."""
        out: Path = Path("runs/fit")
        """Where model.safetensors, report.json, marginals.png and pairs.png go."""
        overwrite: bool = False
        """Replace a model that is there."""

    _fit(tyro.cli(Arguments, prog="flowops fit", args=argv))


def _fit(args) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from .cli import _device
    from .density import Density, gaussian_log_probs
    from .density_plots import plot_marginals, plot_pairs
    from .table import check_variation, read_table, split

    console, model_path = Console(), args.out / "model.safetensors"
    if model_path.exists() and not args.overwrite:
        raise ValueError(f"out: {model_path} exists; take another directory or --overwrite")
    table = read_table(args.data, args.columns or None)
    if len(table) < 2:
        raise ValueError(f"{args.data}: expected at least 2 rows, got {len(table)}")
    for note in check_variation(table):
        console.print(f"note: {note}", highlight=False)
    seed = args.config.seed  # one for the split, the flow and its training
    tables = split(table, args.valid, args.test, seed)
    parts = dict(zip(("train", "valid", "test"), tables, strict=True))
    density = Density.untrained(args.spec, parts["train"], seed, _device())
    parameters = sum(p.numel() for p in density.flow.parameters())
    sizes = ", ".join(f"{len(part):,} {name}" for name, part in parts.items())
    console.print(
        f"{args.data.name}: {sizes} rows of {len(table.columns)} columns; {args.spec.model} with "
        f"{parameters:,} parameters",
        highlight=False,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    offset = density.standardizer.logdet
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=args.config.steps)

        def on_validation(record):
            progress.update(
                task,
                completed=record["step"],
                description=f"valid {record['valid'] - offset:.3f} nats",
            )

        result = density.fit(parts["train"], parts["valid"], args.config, on_validation)
    density.save(model_path)
    scores = {args.spec.model: [density.log_prob(part.values) for part in parts.values()]}
    scores |= dict(gaussian_log_probs(parts["train"], list(parts.values())))
    samples = density.sample(max(len(parts["test"]), 5000), seed)
    plot_marginals(table, samples, args.out / "marginals.png")
    plot_pairs(table, samples, args.out / "pairs.png")
    _report(console, args, density.spec, result, scores, offset)
    for name in ("model.safetensors", "report.json", "marginals.png", "pairs.png"):
        console.print(args.out / name, highlight=False)


def _report(console, args, spec, result, scores, offset: float) -> None:
    """Prints the table of likelihoods and writes it, with the course of training, as JSON."""
    from rich.table import Table as Printed

    from .checkpoint import write_whole
    from .fit import mean_and_error
    from .records import finite

    names = ("train", "valid", "test")
    printed = Printed(title="log-likelihood a row, nats, with its standard error")
    for name in ("", *names):
        printed.add_column(name, justify="right" if name else "left")
    report = {}
    for model, values in scores.items():
        pairs = [mean_and_error(v) for v in values]
        report[model] = {n: {"mean": m, "error": e} for n, (m, e) in zip(names, pairs, strict=True)}
        printed.add_row(model, *(f"{mean:.3f} ± {error:.3f}" for mean, error in pairs))
    console.print(printed)
    console.print(
        f"stopped by {result.stopped}; parameters of step {result.best_step}", highlight=False
    )
    if "Gaussian, full covariance" not in scores:
        console.print("no Gaussian with full covariance: the training rows do not determine one")
    shift = {"train": offset, "valid": offset}
    records = [{k: v - shift.get(k, 0) for k, v in r.items()} for r in result.records]
    about = {
        "data": str(args.data),
        "spec": dataclasses.asdict(spec),
        "config": dataclasses.asdict(args.config),
        "log_likelihood": report,
        "stopped": result.stopped,
        "best_step": result.best_step,
        "records": records,
    }
    write_whole(args.out / "report.json", json.dumps(finite(about), indent=1).encode())


def score(argv: list[str]) -> None:
    import numpy as np
    import tyro

    from .cli import _device
    from .density import Density
    from .fit import mean_and_error
    from .table import Table, read_table, write_table

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        """log p of every row of a table under a model that `flowops fit` saved, in nats."""

        model: tyro.conf.Positional[Path]
        """model.safetensors"""
        data: tyro.conf.Positional[Path]
        """A table with the columns of the model; others are left out."""
        out: Path = Path("scores.csv")
        """.csv, .npy or .parquet with the column log_prob, row by row."""
        num_pads: int = 64
        """Pads a row for padded models: more make the bound tighter."""
        seed: int = 0
        """Of the pads."""

    args = tyro.cli(Arguments, prog="flowops score", args=argv)
    if args.num_pads < 1:
        raise ValueError(f"num_pads: expected a positive number, got {args.num_pads}")
    density = Density.load(args.model, _device())
    if args.data.suffix == ".npy":  # which has no names
        values = read_table(args.data).values
        if values.shape[1] != len(density.columns):
            raise ValueError(
                f"{args.data}: expected {len(density.columns)} columns ("
                f"{', '.join(density.columns)}), got {values.shape[1]}"
            )
    else:
        values = read_table(args.data, density.columns).values
    log_prob = density.log_prob(values, args.num_pads, args.seed)
    write_table(args.out, Table(np.asarray(log_prob)[:, None], ("log_prob",)))
    mean, error = mean_and_error(log_prob)
    print(f"{mean:.4f} ± {error:.4f} nats a row ({len(log_prob):,} rows)")
    print(args.out)


def sample(argv: list[str]) -> None:
    import tyro

    from .cli import _device
    from .density import Density
    from .table import Table, write_table

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        """Draw rows from a model that `flowops fit` saved."""

        model: tyro.conf.Positional[Path]
        """model.safetensors"""
        out: Path = Path("samples.csv")
        """.csv, .npy or .parquet"""
        n: int = 1000
        seed: int = 0

    args = tyro.cli(Arguments, prog="flowops sample", args=argv)
    if args.n < 1:
        raise ValueError(f"n: expected a positive number, got {args.n}")
    density = Density.load(args.model, _device())
    write_table(args.out, Table(density.sample(args.n, args.seed), density.columns))
    print(args.out)
