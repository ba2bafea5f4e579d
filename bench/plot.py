"""A picture of every op: time against shape, a line for each provider, the floor dashed."""

from collections.abc import Iterable
from pathlib import Path

from .job import OURS, Row


def plot(rows: list[Row], folder: Path, device: str, ops: Iterable[str]) -> None:
    """Writes ``<op>.png`` for each of ``ops`` that has timed rows."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    for op in ops:
        panels: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            if row.op == op and row.ok:
                panels.setdefault((row.job, row.dtype), []).append(row)
        if not panels:
            continue
        columns = len(panels) if len(panels) <= 4 else 3
        lines = -(-len(panels) // columns)
        figure, axes = plt.subplots(
            *(lines, columns),
            figsize=(1.5 + 5.5 * columns, 4.5 * lines),
            layout="constrained",
            squeeze=False,
        )
        colors: dict[str, str] = {}
        used = axes.flat[: len(panels)]
        for panel, ((job, dtype), group) in zip(used, panels.items(), strict=True):
            _panel(panel, group, colors)
            panel.set_title(f"{job}, {dtype}")
        for panel in axes.flat[len(panels) :]:
            panel.remove()
        figure.suptitle(f"{op} on {device}")
        labels = {}  # of all panels, each once
        for panel in used:
            labels |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
        figure.legend(labels.values(), labels, loc="outside lower center", ncols=4, fontsize=8)
        figure.savefig(folder / f"{op}.png", dpi=110)
        plt.close(figure)


def _panel(axes, rows: list[Row], palette: dict[str, str]) -> None:
    """``palette`` keeps a baseline's colour from panel to panel."""
    floors = {row.shape: row.floor_us for row in rows}
    shapes = sorted(floors, key=lambda shape: floors[shape] or 0)
    providers = list(dict.fromkeys(row.provider for row in rows))
    times = {(row.provider, row.shape): row.p50_us for row in rows}
    if len(shapes) == 1:
        values = [times[provider, shapes[0]] / 1e3 for provider in providers]
        colors = ["C0" if name.startswith(OURS) else "0.65" for name in providers]
        axes.barh(providers, values, color=colors)
        axes.invert_yaxis()
        axes.set_xlabel(f"ms, {shapes[0]}")
        if floors[shapes[0]]:
            axes.axvline(floors[shapes[0]] / 1e3, color="black", ls="--", lw=1, label="floor")
        return
    positions = range(len(shapes))
    for provider in providers:
        values = [times.get((provider, shape), float("nan")) / 1e3 for shape in shapes]
        ours = provider.startswith(OURS)
        axes.plot(
            *(positions, values),
            color="C0" if ours else palette.setdefault(provider, f"C{1 + len(palette)}"),
            marker="o",
            lw=2.2 if ours else 1.2,
            label=provider,
        )
    if all(floors.values()):
        axes.plot(positions, [floors[s] / 1e3 for s in shapes], "k--", lw=1, label="floor")
    axes.set_xticks(positions, shapes, rotation=20, ha="right", fontsize=8)
    axes.set_yscale("log")
    axes.set_ylabel("ms")
    axes.grid(alpha=0.3)
