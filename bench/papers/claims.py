"""What the papers claim, as comparisons of stored rows."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from .contenders import FF_GLOW, FF_REALNVP, GLOW, REALNVP, ZUKO
from .verdict import Difference, mean_difference, overall, paired, spread, tally, together

FERUMAL, PADDING = "2307.14839", "2403.08216"
OURS = "not in the paper"
#: Training and validation rows up to which a set counts as little data.
FEW = 500

Rows = list[dict]


@dataclass(frozen=True)
class Claim:
    """A sentence and its cases, each a difference that is positive where the sentence is true.

    ``unit`` says what the differences are: ``nats``, ``percent``, ``steps``, or ``factor`` for
    logarithms of a ratio.
    """

    paper: str
    text: str
    unit: str
    cases: tuple[tuple[str, Difference], ...]
    source: str = "the paper's"

    @property
    def verdict(self) -> str:
        return overall([case for _, case in self.cases])

    @property
    def together(self) -> Difference | None:
        """All cases in one; None for a single case."""
        return together([case for _, case in self.cases]) if len(self.cases) > 1 else None

    @property
    def tally(self) -> str:
        return tally([case.verdict for _, case in self.cases])


def ok(rows: Rows) -> Rows:
    return [row for row in rows if row["status"] == "ok"]


def by(rows: Rows, *keys: str) -> dict[tuple, Rows]:
    """Rows grouped, in the order of their first one."""
    groups: dict[tuple, Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def compare(
    better: Rows, worse: Rows, value: Callable[[dict], float] | str, sign: int = 1
) -> Difference | None:
    """``sign (better - worse)`` over the seeds that both have; None if there is none."""
    of = (lambda row: row[value]) if isinstance(value, str) else value
    first, second = ({row["seed"]: of(row) for row in ok(rows)} for rows in (better, worse))
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    pairs = ([sign * side[seed] for seed in seeds] for side in (first, second))
    return paired(*pairs)


# --- kernel flows --------------------------------------------------------------------------------


def ferumal_claims(rows: Rows) -> list[Claim]:
    """Claims about the rows of ``comparison``."""
    groups = by(ok(rows), "set", "contender")
    sets = [name for (name,) in by(ok(rows), "set")]
    full = [name for name in sets if not _few(groups, name)]
    few = [name for name in sets if _few(groups, name)]
    pairs = {
        FF_REALNVP: (FF_REALNVP, (REALNVP, ZUKO)),
        FF_GLOW: (FF_GLOW, (GLOW,)),
    }

    def cases(ours: str, names: Iterable[str], difference: Callable) -> tuple:
        found = []
        for name in names:
            mine, theirs = groups.get((name, ours)), _best(groups, name, pairs[ours][1])
            case = difference(mine, theirs) if mine and theirs else None
            if case is not None:
                found.append((name, case))
        return tuple(found)

    def higher(mine: Rows, theirs: Rows) -> Difference | None:
        return compare(mine, theirs, "test")

    claims = []
    for ours, plain in ((FF_REALNVP, "RealNVP"), (FF_GLOW, "Glow")):
        for names, which in ((full, f"more than {FEW} rows"), (few, f"at most {FEW} rows")):
            text = f"{ours} has a higher test likelihood than {plain}; {which}"
            claims.append(Claim(FERUMAL, text, "nats", cases(ours, names, higher)))
    text = "FF-RealNVP gains more over RealNVP with 500 rows than with all of the same set"
    claims.append(Claim(FERUMAL, text, "nats", _gains(groups, pairs[FF_REALNVP])))
    for ours, plain in ((FF_REALNVP, "RealNVP"), (FF_GLOW, "Glow")):
        text = f"{ours} has fewer parameters than {plain}"
        claims.append(Claim(FERUMAL, text, "percent", cases(ours, sets, _saved)))
    for text, unit, difference in (
        ("FF-RealNVP needs fewer steps to the worse one's best validation", "steps", _sooner),
        ("a training step of FF-RealNVP takes less CPU time", "factor", _faster),
    ):
        found = cases(FF_REALNVP, sets, difference)
        claims.append(Claim(FERUMAL, text, unit, found, OURS))
    return [claim for claim in claims if claim.cases]


def _few(groups: dict, name: str) -> bool:
    rows = next(group for key, group in groups.items() if key[0] == name)
    return rows[0]["train_rows"] <= FEW


def _best(groups: dict, name: str, contenders: Iterable[str]) -> Rows | None:
    """The contender with the highest mean validation likelihood: the one to beat."""
    found = [groups[name, c] for c in contenders if (name, c) in groups]
    return max(found, key=lambda rows: spread([r["valid"] for r in rows])[0], default=None)


def _saved(mine: Rows, theirs: Rows) -> Difference:
    """No spread: the number of parameters does not depend on the seed."""
    return Difference(1 - mine[0]["parameters"] / theirs[0]["parameters"], 0.0, len(mine))


def _faster(mine: Rows, theirs: Rows) -> Difference | None:
    """One seed is timed. On a shared core times of the same step differ by half, so that much
    counts as undecided."""
    times = [next((r["step_ms"] for r in rows if r["step_ms"]), None) for rows in (mine, theirs)]
    return Difference(math.log(times[1] / times[0]), math.log(1.5), 1) if all(times) else None


def _sooner(mine: Rows, theirs: Rows) -> Difference | None:
    pairs = steps_to_reach(mine, theirs)
    if not pairs:
        return None
    difference = paired([-own for own, _ in pairs], [-other for _, other in pairs])
    between_validations = mine[0]["curve"][0][0]
    return replace(difference, half=max(difference.half, between_validations))


def steps_to_reach(mine: Rows, theirs: Rows) -> list[tuple[int, int]]:
    """By seed, the steps of each until the lower of their two best validations is reached."""
    others = {row["seed"]: row for row in theirs}
    pairs = []
    for row in mine:
        if (other := others.get(row["seed"])) is None:
            continue
        target = min(row["valid"], other["valid"])
        first, second = (
            next(step for step, valid in r["curve"] if valid >= target) for r in (row, other)
        )
        pairs.append((first, second))
    return pairs


def _gains(groups: dict, pair: tuple[str, tuple[str, ...]]) -> tuple:
    ours, plain = pair
    found = []
    for name in dict.fromkeys(name for name, _ in groups):
        base = name.removesuffix("-500")
        if base == name or (base, ours) not in groups or (name, ours) not in groups:
            continue
        gains = []
        for which in (name, base):
            theirs = _best(groups, which, plain)
            if theirs is None:
                break
            test = {row["seed"]: row["test"] for row in theirs}
            gains.append(
                {
                    r["seed"]: r["test"] - test[r["seed"]]
                    for r in groups[which, ours]
                    if r["seed"] in test
                }
            )
        if len(gains) == 2 and (seeds := sorted(gains[0].keys() & gains[1].keys())):
            found.append((base, paired(*([gain[s] for s in seeds] for gain in gains))))
    return tuple(found)


# --- padding -------------------------------------------------------------------------------------


def manifold_claims(rows: Rows) -> list[Claim]:
    """Claims about the rows of ``manifold``."""

    def padded(pad: int, value, sign: int) -> tuple:
        return _cases(rows, f"p={pad}", "p=0", value, sign)

    claims = [
        Claim(PADDING, f"on a manifold p = {pad} lowers the Chamfer distance", "factor", cases)
        for pad in (1, 2)
        if (cases := padded(pad, _log("chamfer"), -1))
    ]
    for text, value, sign, unit, source in (
        ("on a manifold p = 1 lowers MMD-L2", _log("mmd_l2"), -1, "factor", "the paper's"),
        ("on a manifold p = 1 raises coverage", "coverage", 1, "percent", "the paper's"),
        ("with p = 1 samples lie closer to the manifold", _log("off"), -1, "factor", OURS),
    ):
        claims.append(Claim(PADDING, text, unit, padded(1, value, sign), source))
    grows = []
    for (name, family), group in by(ok(rows), "set", "family").items():
        plain = [row for row in group if row["variant"] == "p=0"]
        if plain:
            case = mean_difference([_late_growth(row) for row in plain])
            grows.append((f"{name} {family}", case))
    text = "on a manifold the plain flow's likelihood still grows in the second half of training"
    claims.append(Claim(PADDING, text, "nats", tuple(grows), "the paper's premise"))
    text = "and by more than that of the same flow with p = 1"
    cases = _cases(rows, "p=0", "p=1", _late_growth, 1)
    claims.append(Claim(PADDING, text, "nats", cases, "control of the premise"))
    return [claim for claim in claims if claim.cases]


def discrete_claims(rows: Rows) -> list[Claim]:
    """Claims about the rows of ``discrete``."""
    made = []
    for text, better, worse in (
        ("p = 1 lowers the Chamfer distance", "p=1", "plain"),
        ("p = 1 does better (Chamfer) than noise on the data", "p=1", "noise"),
        ("p = 1 and noise do better (Chamfer) than noise alone", "p=1, noise", "noise"),
    ):
        cases = _cases(rows, better, worse, _log("chamfer"), -1)
        made.append(Claim(PADDING, f"on discrete data {text}", "factor", cases))
    text = "on discrete data p = 1 raises coverage"
    cases = _cases(rows, "p=1", "plain", "coverage", 1)
    made.append(Claim(PADDING, text, "percent", cases))
    return [claim for claim in made if claim.cases]


def _cases(rows: Rows, better: str, worse: str, value, sign: int) -> tuple:
    found = []
    for (name, family), group in by(rows, "set", "family").items():
        sides = ([row for row in group if row["variant"] == variant] for variant in (better, worse))
        case = compare(*sides, value, sign)
        if case is not None:
            found.append((f"{name} {family}", case))
    return tuple(found)


def _log(name: str) -> Callable[[dict], float]:
    """Differences of logarithms are ratios, and a single run far off weighs less."""
    return lambda row: math.log(max(row[name], 1e-12))


def _late_growth(row: dict) -> float:
    """Validation likelihood at the last step less that at half of the steps."""
    curve = row["curve"]
    return curve[-1][1] - curve[max(math.ceil(len(curve) / 2), 1) - 1][1]
