"""The rows that all contenders of an experiment get."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowops.api.sets import TOYS, load_set, load_toy
from flowops.api.table import Standardizer, Table, split
from flowops.api.uci import load_uci

#: Distinct values a column needs, as a share of the rows, to be taken as continuous.
DISTINCT = 0.1
#: Rows of validation and of test at most: enough for a standard error of some hundredths of a nat.
MOST = 1000


@dataclass(frozen=True, eq=False)
class Parts:
    """Float32 rows ``[N, D]`` with the training rows' mean 0 and standard deviation 1."""

    train: Tensor
    valid: Tensor
    test: Tensor
    standardizer: Standardizer | None = None


def density_parts(name: str, seed: int, data: Path | None = None) -> Parts:
    """Rows of a set for density estimation.

    Args:
        name: a set or toy; ``NAME-N`` for N rows to train (4 in 5) and validate on, with the test
            rows of the full set. ``uci-NAME`` is read below ``data``.
        seed: of the split, and of the choice of N rows.
    """
    base, _, few = name.partition("-") if not name.startswith("uci-") else (name, "", "")
    if base.startswith("uci-"):
        found = load_uci(base.removeprefix("uci-"), data)
        parts = [torch.from_numpy(part) for part in (found.train, found.valid, found.test)]
        # The published split is fixed: the seed chooses the rows of validation and test.
        generator = torch.Generator().manual_seed(seed)
        return Parts(parts[0], *(_some(part, MOST, generator) for part in parts[1:]))
    train, valid, test = split(_table(base), seed=seed)
    if few:
        train, valid = train[: int(few) * 4 // 5], valid[: int(few) // 5]
    return _standardised(train, valid[:MOST], test[:MOST])


def sample_parts(name: str, seed: int, rows: tuple[int, int, int]) -> Parts:
    """Independent rows of a toy, or a split of ``digits16``, for the comparison of samples.

    Args:
        name: a toy, or ``digits16``: the 16 pixels of scikit-learn's digits that vary most, as
            counts from 0 to 16.
        seed: of the rows, or of the split.
        rows: numbers of training, validation and test rows, at most.
    """
    if name == "digits16":
        table = load_set("digits")
        counts = np.floor(17 * table.values)
        kept = np.sort(np.argsort(-counts.var(axis=0), kind="stable")[:16])
        table = Table(counts[:, kept], tuple(table.columns[k] for k in kept))
        parts = split(table, 0.1, 0.2, seed=seed)
    else:
        parts = (load_toy(name, count, 3 * seed + i) for i, count in enumerate(rows))
    return _standardised(*(part[:most] for part, most in zip(parts, rows, strict=True)))


def _table(name: str) -> Table:
    if name in TOYS:
        return load_toy(name, 10_000)
    table = load_set(name, n=20_000) if name == "patches" else load_set(name)
    # On columns of few values a likelihood has no upper bound, and measures nothing.
    distinct = [len(np.unique(column)) for column in table.values.T]
    kept = [k for k, count in enumerate(distinct) if count > DISTINCT * len(table)]
    return Table(table.values[:, kept], tuple(table.columns[k] for k in kept))


def _standardised(train: Table, valid: Table, test: Table) -> Parts:
    standardizer = Standardizer.fit(train)
    rows = [
        torch.from_numpy(standardizer.forward(part.values)).float() for part in (train, valid, test)
    ]
    return Parts(*rows, standardizer)


def _some(rows: Tensor, most: int, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)[:most]]
