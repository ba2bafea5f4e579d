"""Distances between samples and held-out rows, by nearest neighbours.

Source: Achlioptas et al., "Learning Representations and Generative Models for 3D Point Clouds"
(arXiv 1707.02392), in the form in which arXiv 2403.08216 uses them for rows of a table.
"""

import torch
from torch import Tensor


def chamfer(samples: Tensor, reference: Tensor) -> float:
    """``mean_s min_r |s - r|^2 + mean_r min_s |s - r|^2``.

    Args:
        samples: ``[S, D]``.
        reference: ``[R, D]``, held-out rows.

    Raises:
        ValueError: naming what is not a matrix of finite rows, or of another width.
    """
    square = _distances(samples, reference).square()
    return (square.amin(1).mean() + square.amin(0).mean()).item()


def mmd_l2(samples: Tensor, reference: Tensor) -> float:
    """Minimum matching distance ``mean_r min_s |s - r|``: not a kernel MMD. Low if every held-out
    row has a sample near; samples that lie far from all rows cost nothing."""
    return _distances(samples, reference).amin(0).mean().item()


def coverage(samples: Tensor, reference: Tensor) -> float:
    """``|{argmin_r |s - r| : s}| / R``: the share of held-out rows that are the nearest one of some
    sample. Equal rows count once. Of a density, even as many true samples as rows reach only about
    0.6."""
    distinct = reference.unique(dim=0)
    nearest = _distances(samples, distinct).argmin(1)
    return nearest.unique().numel() / len(distinct)


def _distances(samples: Tensor, reference: Tensor) -> Tensor:
    for name, rows in (("samples", samples), ("reference", reference)):
        if rows.ndim != 2 or not len(rows) or rows.shape[1] != reference.shape[-1]:
            raise ValueError(
                f"{name}: expected [N >= 1, D] of one width, got {list(samples.shape)} and "
                f"{list(reference.shape)}"
            )
        if not rows.isfinite().all():
            raise ValueError(f"{name}: expected finite rows, got NaN or infinity")
    # Through differences: the matrix product form loses the digits of small distances.
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(samples.double(), reference.double(), compute_mode=mode)
