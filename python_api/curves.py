"""The learning curve of a run as a picture."""

import io
from collections.abc import Sequence
from pathlib import Path

import torch

from .checkpoint import write_whole


def plot_curve(
    steps: Sequence[int],
    bits: Sequence[float],
    path: Path,
    title: str,
    held_out: float | None = None,
    unit: str = "bits per dim",
) -> None:
    """Writes a PNG: the training batches, a running mean, and the held-out value at the end.

    Args:
        steps, bits: of the records; those that are not finite are left out.
        path: of the PNG.
        title: over the picture.
        held_out: a dashed line, if given.
        unit: of bits.

    Raises:
        OSError: naming the file that could not be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps, values = torch.tensor(steps), torch.tensor(bits, dtype=torch.float64)
    finite = values.isfinite()
    steps, values = steps[finite], values[finite]
    width = max(1, len(values) // 50)
    smooth = values.unfold(0, width, 1).mean(1) if len(values) else values
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, values, lw=0.6, alpha=0.4, label="training batch")
    axes.plot(steps[width - 1 :], smooth, lw=1.8, label=f"mean of {width} records")
    shown = smooth.tolist()
    if held_out is not None:
        axes.axhline(held_out, color="black", ls="--", lw=1, label=f"held out: {held_out:.3f}")
        shown.append(held_out)
    if shown:
        axes.set_ylim(min(shown) - 0.1, max(shown) + 0.1)
    axes.set(xlabel="step", ylabel=unit, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    plt.close(figure)
    write_whole(path, data.getvalue())
