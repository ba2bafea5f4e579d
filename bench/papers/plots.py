"""Pictures of the stored results, without a window."""

from collections.abc import Sequence
from pathlib import Path

from .claims import Rows, by, ok
from .padding import REAL
from .verdict import spread


def likelihoods(rows: Rows, path: Path) -> None:
    """One panel a set: every contender's test likelihood, a dot for each seed."""
    sets = by(ok(rows), "set")
    figure, axes = _figure(len(sets), 4, 3.4, 2.9)
    contenders = [name for (name,) in by(rows, "contender")]
    for axis, ((name,), group) in zip(axes, sets.items(), strict=False):
        values = [row["test"] for row in group]
        # One run far off would flatten the picture: it becomes a triangle at the lower edge.
        lowest = max(values) - 4 * max(max(values) - _median(values), 1e-3)
        for i, contender in enumerate(contenders):
            tests = [row["test"] for row in group if row["contender"] == contender]
            seen = [test for test in tests if test >= lowest]
            axis.plot([i] * len(seen), seen, "o", color=f"C{i}", alpha=0.6)
            if len(seen) < len(tests):
                axis.plot(i, lowest, "v", color=f"C{i}", ms=8)
            if tests and (mean := spread(tests)[0]) >= lowest:
                axis.plot([i - 0.3, i + 0.3], [mean] * 2, color=f"C{i}", lw=2)
        axis.set_title(
            f"{name}: {group[0]['train_rows']:,} rows, D = {group[0]['features']}", fontsize=9
        )
        axis.set_xticks(range(len(contenders)), contenders, rotation=30, ha="right", fontsize=8)
        axis.set_ylabel("test, nats", fontsize=8)
        axis.grid(axis="y", alpha=0.3)
    figure.suptitle(
        "Test log-likelihood (higher is better): dots are seeds, lines means, triangles far below"
    )
    _save(figure, path)


def points(rows: Rows, path: Path) -> None:
    """Test likelihood over the number of auxiliary points."""
    sets = by(ok(rows), "set")
    figure, axes = _figure(len(sets), 3, 4.6, 3.4)
    for axis, ((name,), group) in zip(axes, sets.items(), strict=False):
        counts = by(group, "points")
        labels = [str(count) for (count,) in counts]
        for part, color in (("test", "C0"), ("valid", "0.6")):
            values = [spread([row[part] for row in found]) for found in counts.values()]
            means, deviations = zip(*values, strict=True)
            label = {"test": "test", "valid": "best validation"}[part]
            axis.errorbar(
                range(len(labels)),
                means,
                deviations,
                color=color,
                marker="o",
                capsize=3,
                label=label,
            )
        axis.set_xticks(range(len(labels)), labels)
        axis.set_title(f"{name}: {group[0]['train_rows']:,} training rows", fontsize=10)
        axis.set_xlabel('auxiliary points M ("all": the training rows, fixed)')
        axis.set_ylabel("nats")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle("FF-RealNVP by number of points: mean and standard deviation over seeds")
    _save(figure, path)


def padding(rows: Rows, path: Path) -> None:
    """Chamfer distance over p, and the validation likelihood during training."""
    sets = by(ok(rows), "set")
    figure, axes = _figure(2 * len(sets), len(sets), 4.3, 3.3)
    for column, ((name,), group) in enumerate(sets.items()):
        upper, lower = axes[column], axes[len(sets) + column]
        families = by([row for row in group if row["family"] != REAL], "family")
        for i, ((family,), found) in enumerate(families.items()):
            pads = by(found, "pad")
            values = [[row["chamfer"] for row in chosen] for chosen in pads.values()]
            positions = list(range(len(pads)))
            upper.plot(positions, [_median(v) for v in values], f"C{i}o-", label=family)
            for position, seeds in zip(positions, values, strict=True):
                upper.plot([position] * len(seeds), seeds, f"C{i}.", alpha=0.5)
            upper.set_xticks(positions, [str(pad) for (pad,) in pads])
            for (pad,), style in zip(pads, ("-", "--", "-.", ":"), strict=False):
                curves = [row["curve"] for row in pads[(pad,)]]
                steps = [step for step, _ in min(curves, key=len)]
                means = [spread([curve[k][1] for curve in curves])[0] for k in range(len(steps))]
                lower.plot(steps, means, f"C{i}{style}", label=f"{family}, p = {pad}", lw=1.3)
        floor = [row["chamfer"] for row in group if row["family"] == REAL]
        upper.axhline(spread(floor)[0], color="black", ls=":", lw=1, label=REAL)
        upper.set(title=name, xlabel="padding columns p", ylabel="Chamfer distance", yscale="log")
        lower.set(title=name, xlabel="step", ylabel="validation, nats")
        upper.legend(fontsize=7)
        for axis in (upper, lower):
            axis.grid(alpha=0.3)
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(
        "Above: samples against held-out rows (lower is better; dots are seeds, lines medians). "
        "Below: validation log-likelihood (a bound for p > 0)",
        fontsize=10,
    )
    _save(figure, path)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _figure(panels: int, columns: int, width: float, height: float):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = max(1, min(columns, panels))
    lines = -(-panels // columns)
    figure, axes = plt.subplots(
        *(lines, columns),
        figsize=(width * columns, height * lines + 0.4),
        layout="constrained",
        squeeze=False,
    )
    axes = axes.ravel()
    for axis in axes[panels:]:
        axis.set_visible(False)
    return figure, axes


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
