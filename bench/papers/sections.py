"""The parts of the page, one an experiment."""

import math

from . import claims
from .claims import Rows, by, ok, steps_to_reach
from .contenders import FF_REALNVP, HIDDEN, REALNVP, SCALE_CLAMP
from .data import DISTINCT, MOST
from .padding import NOISE, REAL, TEST_PADS
from .verdict import spread


def comparison(result: dict, drawn: set[str]) -> str:
    rows, settings = result["rows"], result["settings"]
    fit = settings["fit"]
    names = [name for (name,) in by(rows, "contender")]
    tests, costs = [], []
    for (name,), group in by(rows, "set").items():
        found = by(group, "contender")
        some = next((row for row in ok(group)), None)
        if some is None:
            continue
        tests.append([name, str(some["features"]), f"{some['train_rows']:,}"])
        costs.append([name])
        means = {c: _mean(found.get((c,), [])) for c in names}
        best = max(means.values())
        for contender in names:
            cell = _likelihood(found.get((contender,), []))
            tests[-1].append(f"**{cell}**" if means[contender] == best else cell)
            costs[-1].append(_cost(found.get((contender,), [])))
        pair = (ok(found.get((c,), [])) for c in (FF_REALNVP, REALNVP))
        steps = steps_to_reach(*pair)
        costs[-1].append(" / ".join(f"{spread(side)[0]:.0f}" for side in zip(*steps, strict=True)))
    lines = [
        "## Kernel flows against networks",
        "",
        "Test log-likelihood in nats a row, standardised units, mean ± standard deviation over "
        f"{settings['seeds']} seeds; the best mean is bold.",
        "",
        *table(["set", "D", "training rows", *names], tests, "lrr" + "r" * len(names)),
        "",
        "Parameters, and CPU time of a training step (median, one thread); last, the steps of "
        f"{FF_REALNVP} / {REALNVP} until the worse one's best validation is reached:",
        "",
        *table(["set", *names, "steps"], costs, "l" + "r" * (len(names) + 1)),
        "",
        *_picture("comparison", drawn, "test log-likelihoods of all contenders"),
        f"- All have {settings['layers']} couplings. Kernel flows: {settings['points']} learned "
        f"points a layer. Networks: hidden layers {HIDDEN}, ReLU.",
        "- RealNVP and Glow are FF-RealNVP and FF-Glow with an MLP in place of each kernel "
        "machine, and nothing else changed: the same ActNorm, permutations, rotations and halves, "
        f"zero weights at the start; log-scales within ±{SCALE_CLAMP:g}.",
        "- How many parameters are saved follows from these sizes: points and rows of a network's "
        "last layer grow with D, its hidden layers do not.",
        "- RealNVP (zuko) is another author's: alternating masks, no ActNorm.",
        f"- Adam, cosine decay, at most {fit['steps']} steps of {fit['batch_size']} rows, "
        f"validation every {fit['eval_every']}, stopped after {fit['patience']} without gain, the "
        f"best parameters kept. The learning rate is, for each contender and set, the best of "
        f"{', '.join(f'{rate:g}' for rate in settings['rates'])} on the validation rows of seed 0, "
        f"or, while the highest was the best, three times that, to {settings['highest_rate']:g}.",
        f"- Runs that were still improving when the steps ran out: {_unfinished(rows)}. There the "
        "result is about equal budgets, not about the end of training.",
        f"- Seeds change split, start and order. Validation and test: a tenth each, at most "
        f"{MOST:,} rows. `NAME-500`: 400 rows to train and 100 to validate on, test rows as in "
        "the full set.",
        f"- Left out are columns with fewer distinct values than {100 * DISTINCT:g} % of the rows "
        "(a likelihood has no bound on them). digits are dequantised, patches overlap.",
    ]
    return "\n".join([*lines, *_missing(rows, "contender")])


def _unfinished(rows: Rows) -> str:
    """By contender, the runs whose best validation is the last one."""
    counts = []
    for (contender,), group in by(ok(rows), "contender").items():
        ended = [row for row in group if row["stopped"] == "steps"]
        late = sum(row["best_step"] == row["curve"][-1][0] for row in ended)
        counts.append(f"{contender} {late} of {len(group)}")
    return ", ".join(counts)


def _mean(rows: Rows) -> float:
    return spread([row["test"] for row in ok(rows)])[0] if ok(rows) else -math.inf


def _likelihood(rows: Rows) -> str:
    if not ok(rows):
        return rows[0]["status"].split(":")[0] if rows else ""
    mean, deviation = spread([row["test"] for row in ok(rows)])
    cut = f", {len(rows) - len(ok(rows))} diverged" if len(ok(rows)) < len(rows) else ""
    return f"{mean:.2f} ± {deviation:.2f}{cut}"


def _cost(rows: Rows) -> str:
    timed = [row for row in ok(rows) if row["step_ms"]]
    return f"{timed[0]['parameters']:,}; {timed[0]['step_ms']:.1f} ms" if timed else ""


def _missing(rows: Rows, key: str) -> list[str]:
    """Rows without a result, and why."""
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            label = f"{row['set']} {row[key]} {row.get('variant', '')}".strip()
            notes.setdefault(row["status"], []).append(f"{label} (seed {row['seed']})")
    return [f"- {status}: {', '.join(labels)}." for status, labels in notes.items()]


def points(result: dict, drawn: set[str]) -> str:
    rows, settings = result["rows"], result["settings"]
    counts = [count for (count,) in by(rows, "points")]
    body = []
    for (name,), group in by(rows, "set").items():
        found = by(group, "points")
        body.append([name, *(_likelihood(found.get((count,), [])) for count in counts)])
    heading = ["set", *(f"M = {count}" for count in counts)]
    lines = [
        "## How many auxiliary points (not in the paper)",
        "",
        f"Test log-likelihood of FF-RealNVP, learning rate {settings['point_rate']:g}, otherwise "
        "as above. M = 400 are all training rows, learned further; `all` keeps them fixed: the "
        "paper's full-data variant.",
        "",
        *table(heading, body, "l" + "r" * len(counts)),
        "",
        *_picture("points", drawn, "test log-likelihood over the number of points"),
        *_best_points(rows),
    ]
    return "\n".join([*lines, *_missing(rows, "points")])


def _best_points(rows: Rows) -> list[str]:
    """By rule: the fewest points that are not decidedly worse than the best mean."""
    lines = []
    for (name,), group in by(ok(rows), "set").items():
        found = by(group, "points")
        best = max(found.values(), key=_mean)
        for (count,), chosen in found.items():
            difference = claims.compare(best, chosen, "test")
            if chosen is best or difference is None or difference.verdict != "holds":
                lines.append(
                    f"- {name}: best mean with M = {best[0]['points']}; the fewest that are not "
                    f"decidedly worse: {count}."
                )
                break
    return lines


def manifold(result: dict, drawn: set[str]) -> str:
    rows, settings = result["rows"], result["settings"]
    lines = [
        "## PaddingFlow: data on a manifold",
        "",
        _setting(settings),
        "",
        *_samples(rows),
        "",
        *_picture("manifold", drawn, "Chamfer distance over p, likelihood over steps"),
        "How many padding columns, by the median Chamfer distance over seeds:",
        "",
        *_best_pads(rows),
    ]
    return "\n".join([*lines, *_missing(rows, "family")])


def _best_pads(rows: Rows) -> list[str]:
    lines = []
    for (name, family), group in by(ok(rows), "set", "family").items():
        if family == REAL:
            continue
        medians = {
            pad: sorted(row["chamfer"] for row in found)[len(found) // 2]
            for (pad,), found in by(group, "pad").items()
        }
        order = ", ".join(
            f"p = {pad} ({medians[pad]:.3g})" for pad in sorted(medians, key=medians.get)
        )
        lines.append(f"- {name}, {family}, best first: {order}.")
    return lines


def discrete(result: dict, drawn: set[str]) -> str:
    rows = result["rows"]
    lines = [
        "## PaddingFlow: discrete data",
        "",
        f"The same with noise of {NOISE} on the standardised data while training (`noise`), with "
        "padding (`p=1`), with both and neither. lattice: 25 points of the plane. digits16: the 16 "
        "pixels of scikit-learn's digits that vary most, counts from 0 to 16.",
        "",
        *_samples(rows),
    ]
    return "\n".join([*lines, "", *_missing(rows, "family")]).rstrip()


def _setting(settings: dict) -> str:
    fit = settings["fit"]
    train, valid, test = settings["rows"]
    return (
        f"{settings['layers']} layers, {settings['points']} points (FF-Glow) or hidden layers "
        f"{HIDDEN} (Glow), {fit['steps']} steps of {fit['batch_size']} rows, learning rate "
        f"{fit['lr']:g}; {train:,} training, {valid:,} validation, {test:,} test rows and as many "
        f"samples; pads of standard deviation 2; {settings['seeds']} seeds. Chamfer "
        "(mean squared distance to the nearest neighbour, both ways), MMD-L2 "
        "(mean distance of a held-out row to its nearest sample) and "
        "coverage (share of held-out rows that are a sample's nearest) in standardised units; off: "
        f"mean distance of samples to the set that holds all data, in its units. `{REAL}`: real "
        "rows in the place of samples, the best that can be had. log p of test rows: of the plain "
        f"flow exact, otherwise the IWAE bound with {TEST_PADS} pads; on such data it has no "
        "upper bound and ranks nothing. Mean ± standard deviation over seeds; Chamfer as median "
        "(smallest to largest), since a few samples far off decide it."
    )


def _samples(rows: Rows) -> list[str]:
    body = []
    for (name, family, variant), group in by(rows, "set", "family", "variant").items():
        good = ok(group)
        label = [name, family, "" if variant == family else variant]
        if not good:
            body.append([*label, group[0]["status"].split(":")[0], "", "", "", ""])
            continue
        cells = []
        for key in ("mmd_l2", "coverage", "off", "test"):
            if all(key in row for row in good):
                mean, deviation = spread([row[key] for row in good])
                digits = 2 if key == "test" else 3
                cells.append(f"{mean:.{digits}f} ± {deviation:.{digits}f}")
            else:
                cells.append("")
        body.append([*label, _range([row["chamfer"] for row in good]), *cells])
    heading = ["set", "flow", "variant", "Chamfer", "MMD-L2", "coverage", "off", "log p"]
    return table(heading, body, "lllrrrrr")


def _range(values: list[float]) -> str:
    values = sorted(values)
    return f"{values[len(values) // 2]:.3g} ({values[0]:.2g} to {values[-1]:.2g})"


def _picture(name: str, drawn: set[str], text: str) -> list[str]:
    return [f"![{text}](papers-{name}.png)", ""] if name in drawn else []


def table(heading: list[str], lines: list[list[str]], align: str) -> list[str]:
    rule = ["---:" if letter == "r" else "---" for letter in align]
    return [f"| {' | '.join(cells)} |" for cells in [heading, rule, *lines]]
