"""Pictures of a table beside samples of a model: marginals and pairs of columns."""

import io
from pathlib import Path

import numpy as np

from .checkpoint import write_whole
from .table import Table

_COLORS = {"data": "#1f5a99", "samples": "#d2691e"}
_MOST_MARGINALS, _MOST_PAIRS = 24, 5


def plot_marginals(data: Table, samples: np.ndarray, path: str | Path) -> None:
    """A histogram a column, data against samples, over the range of the data; the first
    24 columns."""
    plt = _pyplot()
    columns = data.columns[:_MOST_MARGINALS]
    across = min(4, len(columns))
    down = -(-len(columns) // across)
    figure, axes = plt.subplots(
        down, across, figsize=(3.2 * across, 2.4 * down), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(columns) :]:
        axis.axis("off")
    for k, (name, axis) in enumerate(zip(columns, axes.flat, strict=False)):
        bins = np.linspace(*_range(data.values[:, k]), 51)
        axis.hist(data.values[:, k], bins, density=True, color=_COLORS["data"], alpha=0.55)
        kept = samples[:, k][np.isfinite(samples[:, k])]
        heights, _ = np.histogram(kept, bins)
        heights = heights / max(len(kept), 1) / np.diff(bins)
        axis.stairs(heights, bins, color=_COLORS["samples"], linewidth=1.6)
        axis.set_title(name, fontsize=9)
        axis.set_yticks([])
    _finish(plt, figure, data, path, _MOST_MARGINALS)


def plot_pairs(data: Table, samples: np.ndarray, path: str | Path, rows: int = 2000) -> None:
    """Scatter plots of pairs of the first 5 columns: data below the diagonal, samples above, both
    over the range of the data, at most ``rows`` points each."""
    plt = _pyplot()
    D = min(len(data.columns), _MOST_PAIRS)
    figure, axes = plt.subplots(
        D, D, figsize=(1.9 * D + 1, 1.9 * D + 1), squeeze=False, layout="constrained"
    )
    sources = {"data": data.values[:rows], "samples": samples[:rows]}
    ranges = [_range(data.values[:, k]) for k in range(D)]
    for i in range(D):
        for j in range(D):
            axis = axes[i, j]
            axis.set_xlim(ranges[j])
            axis.tick_params(labelsize=6)
            if i == j:
                for name, values in sources.items():
                    bins = np.linspace(*ranges[j], 41)
                    kept = values[:, j][np.isfinite(values[:, j])]
                    axis.hist(kept, bins, density=True, color=_COLORS[name], alpha=0.5)
                axis.set_yticks([])
            else:
                name = "data" if i > j else "samples"
                values = sources[name]
                axis.scatter(values[:, j], values[:, i], s=2, alpha=0.5, color=_COLORS[name])
                axis.set_ylim(ranges[i])
            if i == D - 1:
                axis.set_xlabel(data.columns[j], fontsize=8)
            if j == 0:
                axis.set_ylabel(data.columns[i], fontsize=8)
    _finish(plt, figure, data, path, _MOST_PAIRS)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _range(values: np.ndarray) -> tuple[float, float]:
    """Where the data are: without the outermost thousandths, which would hide all else."""
    low, high = np.quantile(values, [0.001, 0.999])
    if low == high:
        low, high = values.min(), values.max()
    margin = 0.05 * (high - low)
    return low - margin, high + margin


def _finish(plt, figure, data: Table, path: str | Path, most: int) -> None:
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in _COLORS.values()]
    figure.legend(handles, _COLORS, loc="outside upper right", ncols=2, fontsize=9)
    if len(data.columns) > most:
        figure.suptitle(f"{most} of {len(data.columns)} columns", fontsize=9)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    plt.close(figure)
    write_whole(path, image.getvalue())
