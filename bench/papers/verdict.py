"""What a claim comes to: paired differences over seeds, and a rule."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

HOLDS, FAILS, UNDECIDED, PARTLY = "holds", "does not hold", "undecided", "holds in part"

#: Student's t, 97.5 %, by the number of values: of three, twice the standard error is too little.
T_QUANTILE = {
    2: 12.71,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
    11: 2.228,
    12: 2.201,
    13: 2.179,
    14: 2.160,
    15: 2.145,
    16: 2.131,
}


@dataclass(frozen=True)
class Difference:
    """Mean of differences, half of its 95 % interval (NaN for a single one), how many."""

    mean: float
    half: float
    count: int

    @property
    def verdict(self) -> str:
        """``holds`` if the interval lies above 0, ``does not hold`` if below, else undecided."""
        if not math.isfinite(self.mean) or not math.isfinite(self.half):
            return UNDECIDED
        if self.mean > self.half:
            return HOLDS
        return FAILS if self.mean < -self.half else UNDECIDED


def paired(better: Sequence[float], worse: Sequence[float]) -> Difference:
    """``better - worse``, seed by seed, positive where the claim says so.

    Args:
        better, worse: a number for each seed, in the same order.

    Raises:
        ValueError: lengths that differ, or none.
    """
    if len(better) != len(worse) or not better:
        raise ValueError(
            f"better, worse: expected a number for each seed, got {len(better)} and {len(worse)}"
        )
    return mean_difference([b - w for b, w in zip(better, worse, strict=True)])


def mean_difference(differences: Sequence[float]) -> Difference:
    """Their mean and its interval by Student's t."""
    n, (mean, deviation) = len(differences), spread(differences)
    half = T_QUANTILE.get(n, 2.131) * deviation / math.sqrt(n) if n > 1 else math.nan
    return Difference(mean, half, n)


def together(cases: Sequence[Difference]) -> Difference:
    """Mean over the means of several cases. Half of the interval is the larger one of what their
    spread gives and what their own intervals give: few cases can agree by accident."""
    mean = mean_difference([case.mean for case in cases])
    halves = [case.half for case in cases]
    if not all(math.isfinite(half) for half in (mean.half, *halves)):
        return replace(mean, half=math.nan)
    return replace(mean, half=max(mean.half, math.hypot(*halves) / len(cases)))


def overall(cases: Sequence[Difference]) -> str:
    """One word for several cases: ``holds in part`` if decided ones disagree; ``holds`` (``does not
    hold``) if more than half, or all ``together``, say so; else undecided."""
    verdicts = [case.verdict for case in cases]
    holds, fails = verdicts.count(HOLDS), verdicts.count(FAILS)
    if holds and fails:
        return PARTLY
    for count, word in ((holds, HOLDS), (fails, FAILS)):
        if 2 * count > len(cases):
            return word
    return together(cases).verdict if len(cases) > 1 else UNDECIDED


def tally(verdicts: Sequence[str]) -> str:
    """``5 of 8 for it, 1 against, 2 undecided``."""
    holds, fails, n = verdicts.count(HOLDS), verdicts.count(FAILS), len(verdicts)
    return f"{holds} of {n} for it, {fails} against, {n - holds - fails} undecided"


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds (0 for one)."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
