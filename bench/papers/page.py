"""``docs/papers.md`` and its pictures, made of the stored results alone."""

import json
import math
from pathlib import Path

from flowops.api.checkpoint import write_whole

from . import claims, plots, sections
from .claims import Claim, ok
from .verdict import Difference

NAMES = ("comparison", "points", "manifold", "discrete")
PAPERS = {
    claims.FERUMAL: "Kernelised Normalising Flows",
    claims.PADDING: "PaddingFlow",
}


def write_page(results: Path, docs: Path) -> None:
    """Writes the page, and a picture for each experiment that has results.

    Args:
        results: the folder of ``<experiment>.json``.
        docs: where ``papers.md`` and ``papers-*.png`` go.

    Raises:
        FileNotFoundError: no results at all.
    """
    paths = {name: results / f"{name}.json" for name in NAMES}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    if not found:
        raise FileNotFoundError(f"{results}: no results; run flowops bench papers first")
    docs.mkdir(parents=True, exist_ok=True)
    drawn = _draw(found, docs)
    parts = [_head(found), _verdicts(found)]
    for name, section in (
        ("comparison", sections.comparison),
        ("points", sections.points),
        ("manifold", sections.manifold),
        ("discrete", sections.discrete),
    ):
        if name in found:
            parts.append(section(found[name], drawn))
    text = "\n\n".join([*parts, PUBLISHED]) + "\n"
    write_whole(docs / "papers.md", text.encode())


def _draw(found: dict[str, dict], docs: Path) -> set[str]:
    """Names of the pictures that were drawn; none without matplotlib."""
    drawn = set()
    pictures = {
        "comparison": plots.likelihoods,
        "points": plots.points,
        "manifold": plots.padding,
    }
    for name, plot in pictures.items():
        if name in found and ok(found[name]["rows"]):
            try:
                plot(found[name]["rows"], docs / f"papers-{name}.png")
            except ModuleNotFoundError:
                print("no pictures: matplotlib is not installed")
                break
            drawn.add(name)
    return drawn


# --- the top of the page -------------------------------------------------------------------------


def _head(found: dict[str, dict]) -> str:
    env = next(iter(found.values()))["environment"]
    seconds = sum(result["cpu_seconds"] for result in found.values())
    lines = [
        "# What the papers claim, tested here",
        "",
        "Made by `flowops bench papers` of `bench/results/papers/*.json`; the verdicts too come "
        "from a rule in code. `--data DIR` also compares the UCI sets below `DIR`.",
        "",
        f"{env['device']}, {env['threads']} thread(s), torch {env['torch']}, commit {env['git']}"
        f"{'+' if env['dirty'] else ''}, {seconds / 60:.0f} minutes of CPU time.",
    ]
    if any(result["quick"] for result in found.values()):
        lines += ["", "**A quick run: sizes too small for any conclusion.**"]
    unfinished = [name for name, result in found.items() if not result["complete"]]
    absent = [name for name in NAMES if name not in found]
    if unfinished:
        lines += ["", f"Not finished, sets are missing: {', '.join(unfinished)}."]
    if absent:
        lines += ["", f"Not run: {', '.join(absent)}."]
    # Results that did not come out of one run say so themselves.
    for name, result in found.items():
        if "note" in result:
            lines += ["", f"Note on {name}: {result['note']}"]
    return "\n".join(lines)


def _verdicts(found: dict[str, dict]) -> str:
    made: list[Claim] = []
    for name, make in (
        ("comparison", claims.ferumal_claims),
        ("manifold", claims.manifold_claims),
        ("discrete", claims.discrete_claims),
    ):
        if name in found:
            made += make(found[name]["rows"])
    lines = ["## Claims and verdicts", ""]
    heading = ["claim", "verdict here", "cases", "all cases", "each (positive: for the claim)"]
    for paper, title in PAPERS.items():
        table = [
            [
                *(claim.text + _note(claim), f"**{claim.verdict}**", claim.tally),
                *(_together(claim), _numbers(claim)),
            ]
            for claim in made
            if claim.paper == paper
        ]
        if table:
            lines += [f"{title} (arXiv {paper}):", "", *sections.table(heading, table, "lllll"), ""]
    return "\n".join([*lines, RULE])


def _note(claim: Claim) -> str:
    return "" if claim.source == "the paper's" else f" ({claim.source})"


def _together(claim: Claim) -> str:
    return "" if claim.together is None else _difference(claim.together, claim.unit)


def _numbers(claim: Claim) -> str:
    return "; ".join(f"{label} {_difference(d, claim.unit)}" for label, d in claim.cases)


def _difference(difference: Difference, unit: str) -> str:
    mean, half = difference.mean, difference.half
    if unit == "factor":
        if not math.isfinite(half):
            return f"{math.exp(mean):.3g}x"
        return f"{math.exp(mean):.3g}x ({math.exp(mean - half):.2g} to {math.exp(mean + half):.3g})"
    if unit == "percent":
        mean, half = 100 * mean, 100 * half
    digits = {"nats": 2, "percent": 1, "steps": 0}[unit]
    text = f"{mean:+.{digits}f}"
    text = f"{text} ± {half:.{digits}f}" if math.isfinite(half) and half else text
    return f"{text} %" if unit == "percent" else text


RULE = f"""The rule. A case is one data set (and family of flows); its difference is the mean over
seeds of paired differences (same split, same seed), ± half of its 95 % interval by Student's t,
for three seeds 4.3 standard errors and for five 2.8. A case is for the claim if the interval lies
above 0, against it if below 0, else undecided; `x` is a ratio with its interval. "All cases" is the
mean of the cases, its interval the larger one of what their spread and their own intervals give.
With cases on both sides a claim holds in part; else it holds (or does not) if more than half of its
cases, or all together, say so; otherwise it is undecided. So few seeds can only show large
differences: "undecided" does not mean "equal", and of twenty cases about one is decided by chance.
Parameters are counted and have no interval; step times are of one seed on a shared core, where less
than a factor of 1.5 decides nothing; steps are known to one validation and no better.

Sets of at most {claims.FEW} training rows count as little data. Of the two that can stand for
RealNVP the one with the better validation is the one to beat."""

PUBLISHED = """## What the papers report

Recovered at second hand, not reproduced here:

- Kernelised Normalising Flows, test log-likelihood in nats: Power 0.24 (RealNVP 0.17), Gas 9.55
  (8.33) for FF-RealNVP; Power 0.35 (Glow 0.17), Gas 10.75 (8.15) for FF-Glow; up to 93 % fewer
  parameters. With 500 rows: Gas 0.22 against -7.50 of FFJORD, BSDS300 121.22 against 100.32. No
  timing, no ablation of M, and with few rows no contender of the same architecture: what is above
  is ours.
- PaddingFlow: BSDS300, Chamfer distance 0.495 against 0.579 of FFJORD. Its flows are FFJORD; the
  ones here are coupling flows, so what does not hold here may hold there.

Padding columns also make a flow wider, and thereby more flexible in the data's own columns
(augmented flows). No experiment here tells that apart from the mismatch of dimensions."""
