"""The tables of docs/scaling.md: what ``flowops bench scaling`` measured, and the plan."""

import json
import math
import re
from pathlib import Path

from flowops.api.checkpoint import write_whole

from . import report
from .scaling_plan import (
    CHECKPOINTS,
    H100,
    PARALLEL,
    STATE,
    activation_bytes,
    cases,
    images_to_hide,
    memory,
    plan,
)

WORLDS = (8, 32, 128, 256)
#: Load of a CPU, by its cores, above which times are those of other programs.
BUSY = 1.5
DISKS = (1e9, 5e9)
NAMES = {"ddp": "DDP", "fsdp": "FSDP2", "hsdp": "HSDP"}
KEPT = {False: "no", "selective": "selective", True: "yes"}


def write_docs(results: Path, docs: Path) -> None:
    """Puts the tables between the markers of ``scaling.md`` in ``docs``; draws ``scaling.png``.

    Raises:
        ValueError: naming the page and the markers that it lacks.
    """
    stored = [json.loads(p.read_text()) for p in sorted(results.glob("*/scaling.json"))]
    page = docs / "scaling.md"
    text = page.read_text()
    blocks = {
        "measured": "\n".join(measured(found) for found in stored) or "Nothing yet.\n",
        "assumptions": assumptions(),
        "models": models(),
        "state": state(),
        "plan": steps(),
        "tokens": tokens(),
        "batch": batches(),
        "fits": fits(),
    }
    for name, table in blocks.items():
        begin, end = f"<!-- scaling:{name}:begin -->\n", f"<!-- scaling:{name}:end -->"
        found = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if not found.search(text):
            raise ValueError(f"{page}: the markers {begin.strip()} and {end} are gone")
        text = found.sub(lambda _, whole=begin + table + end: whole, text)
    write_whole(page, text.encode())
    print(page)
    if stored:
        plot(stored, docs / "scaling.png")


def _table(headings: str, lines: list[list]) -> str:
    names = headings.split("; ")
    rows = [names, ["---:" if i else "---" for i in range(len(names))], *lines]
    return "\n".join(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows) + "\n"


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g}"


def _pair(values: list[float], scale: float = 1.0) -> str:
    return " / ".join(f"{scale * value:,.0f}" if scale * value >= 100 else f"{scale * value:.3g}"
                      for value in values)  # fmt: skip


# --- measured ------------------------------------------------------------------------------------


def way(row: dict) -> str:
    if row["world"] == 1:
        return "one process"
    return NAMES[row["parallel"]] + (f", {row['shard_ranks']} a copy" if row["shard_ranks"] else "")


def timed(row: dict, kind: str) -> bool:
    """Whether the machine was free enough for the times of a row to mean anything."""
    return "error" not in row and (kind == "cuda" or row["load"] <= BUSY * row["cores"])


def measured(result: dict) -> str:
    """Where and how, and a line for every cell; times only of a machine that was free."""
    lines = []
    for row in result["rows"]:
        label = [row["model"], row["precision"] + (", compiled" if row["compile"] else "")]
        label += [row["world"], way(row), KEPT[row["checkpoint"]], row["batch"]]
        if "error" in row:
            lines.append([*label, row["error"], *[""] * 7])
            continue
        ms = [1e3 * row["seconds"][name] for name in ("median", "p20", "p80")]
        times = [
            f"{ms[0]:.0f} ({ms[1]:.0f} to {ms[2]:.0f})",
            f"{row['images_per_second']:.3g}",
            f"{row['against_one']:.2f}" if row["against_one"] else "",
            f"{100 * row['mfu']:.0f} %",
        ]
        if not timed(row, result["environment"]["kind"]):
            times = [f"busy: load {row['load']:.0f} on {row['cores']} cores", "", "", ""]
        lines.append(
            [
                *(*label, *times),
                f"{sum(row['state'].values()) / 1e6:.1f}",
                f"{sum(row['state_formula'].values()) / 1e6:.1f}",
                f"{row['peak'] / 1e6:.0f}",
                f"{row['peak_formula'] / 1e6:.0f}",
            ]
        )
    env, dates = result["environment"], sorted({row["time"][:10] for row in result["rows"]})
    loads = [row["load"] for row in result["rows"] if "load" in row]
    how = f"{report.describe(env)}; load of the machine {min(loads, default=0):.0f} to "
    how += f"{max(loads, default=0):.0f}; {', '.join(dates)}, "
    how += f"commit {env['git']}{'+' if env['dirty'] else ''}:\n\n"
    headings = "model; arithmetic; processes; spread; checkpoints; images each"
    headings += "; ms a step (p20 to p80); images/s; against one process; MFU"
    headings += "; state MB; formula; peak MB; formula"
    return how + _table(headings, lines)


def plot(results: list[dict], path: Path) -> None:
    """Measured peaks against the formula, and images/s over those of one process; the part of the
    computing rate that the plan keeps as GPUs are added."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (peaks, ratios, kept) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    rows = [
        r | {"timed": timed(r, result["environment"]["kind"])}
        for result in results
        for r in result["rows"]
        if "error" not in r
    ]
    for number, name in enumerate(dict.fromkeys(way(r) for r in rows)):
        group = [r for r in rows if way(r) == name]
        x, y = ([r[key] / 1e6 for r in group] for key in ("peak_formula", "peak"))
        peaks.loglog(x, y, "o", color=f"C{number}", label=name)
        group = [r for r in group if r["world"] > 1 and r["against_one"] and r["timed"]]
        if group:
            labels = [f"{r['model']}\n{r['world']} x {r['batch']}" for r in group]
            ratios.plot(labels, [r["against_one"] for r in group], "o", color=f"C{number}")
    ends = peaks.get_xlim()
    peaks.plot(ends, ends, "k--", lw=1, label="formula")
    peaks.set(xlabel="formula, MB", ylabel="measured, MB", title="peak memory of a process")
    ratios.axhline(1, color="black", ls="--", lw=1)
    ratios.tick_params(axis="x", labelsize=7)
    ratios.set(title="images/s over those of one process", ylim=(0, None))
    if not any(r["timed"] for r in rows):
        ratios.text(0.5, 0.5, "none: the machine was busy", transform=ratios.transAxes, ha="center")
    table = plan(worlds=WORLDS)
    for number, model in enumerate(dict.fromkeys(r["model"] for r in table)):
        for parallel, style in zip(PARALLEL, ("o-", "s--", "^:"), strict=True):
            line = [r for r in table if (r["model"], r["parallel"]) == (model, parallel)]
            line = [r for r in line if r["fits"]]
            x, y = [r["world"] for r in line], [r["kept_rate"][0] for r in line]
            label = f"{model}, {NAMES[parallel]}"
            if line:
                kept.semilogx(x, y, style, base=2, color=f"C{number}", label=label)
    kept.set(xlabel="GPUs", ylim=(0, 1.05))
    kept.set_title(f"plan: part of the computing rate kept (low rate, {H100.mfu[0]:.0%})")
    for axes in (peaks, ratios, kept):
        axes.grid(alpha=0.3)
    peaks.legend(fontsize=8)
    kept.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(path)


# --- the plan ------------------------------------------------------------------------------------


def assumptions() -> str:
    a = H100
    lines = [
        ["bf16 product rate of a GPU", f"{a.peak / 1e12:g} TFLOP/s"],
        ["parts of it that a step reaches", " / ".join(f"{100 * m:g} %" for m in a.mfu)],
        ["memory that a run may fill", f"{_gb(a.memory)} GB of 80"],
        ["GPUs in a machine", a.node],
        ["NVLink, a GPU and direction", f"{_gb(a.nvlink)} GB/s"],
        ["network, a GPU and direction", f"{_gb(a.network)} GB/s ({8 * a.network / 1e9:g} Gb/s)"],
        ["a hop inside a machine / across", f"{1e6 * a.hop_node:g} / {1e6 * a.hop_network:g} µs"],
        ["gradients in a call of DDP", f"{a.bucket / 2**20:g} MiB"],
    ]
    return _table("assumption; value", lines)


def models() -> str:
    lines = []
    for case in cases():
        saved = [activation_bytes(case.model, checkpoint) for checkpoint in CHECKPOINTS]
        checkpoint = 16 * case.parameters
        lines.append(
            [
                case.name,
                f"{case.parameters / 1e6:,.0f} M",
                case.model.num_patches,
                case.model.patch_channels,
                f"{case.flops / 1e12:.2f}",
                *(_gb(size) for size in saved),
                f"{case.image_bytes / 1e3:.1f}",
                _gb(checkpoint),
                " / ".join(f"{checkpoint / rate:.3g}" for rate in DISKS),
            ]
        )
    headings = "model; parameters; tokens; channels; TFLOP an image, trained; GB an image kept"
    headings += "; selective; blocks; kB an image stored; GB a checkpoint"
    disks = " / ".join(f"{rate / 1e9:g}" for rate in DISKS)
    return _table(f"{headings}; seconds to write it at {disks} GB/s", lines)


def state() -> str:
    lines = []
    for case in cases():
        parts = [size * case.parameters for size in STATE.values()]
        total = sum(parts)
        shards = [total / n for n in (1, H100.node, *(n for n in WORLDS if n > H100.node))]
        lines.append([case.name, *map(_gb, parts), *map(_gb, shards)])
    names = [f"{name} ({size} B)" for name, size in STATE.items()]
    spread = ["DDP", "FSDP2 on 8, or HSDP", *(f"FSDP2 on {n}" for n in WORLDS if n > H100.node)]
    return _table("; ".join(["GB a GPU", *names, *spread]), lines)


def steps() -> str:
    lines = []
    for r in plan(worlds=WORLDS):
        label = [r["model"], r["world"], NAMES[r["parallel"]], r["batch"]]
        split = f"{r['batch'] // r['accumulate']} x {r['accumulate']}, {KEPT[r['checkpoint']]}"
        sizes = " + ".join(_gb(r[key]) for key in ("state", "passing", "activations"))
        if not r["fits"]:
            lines.append([*label, split, f"{sizes}: does not fit", *[""] * 7])
            continue
        lines.append(
            [
                *(*label, split, sizes, _gb(r["sent"]), f"{1e3 * r['traffic']:.3g}"),
                *(_pair(r["computing"], 1e3), _pair(r["seconds"], 1e3)),
                " / ".join(f"{100 * kept:.0f} %" for kept in r["kept_rate"]),
                *(_pair(r["images_per_second"]), _pair(r["store"], 1e-6)),
            ]
        )
    headings = "model; GPUs; spread; images a GPU; micro-batch x number, checkpoints"
    headings += "; GB a GPU: state + passing + activations; GB sent; traffic ms; computing ms"
    return _table(f"{headings}; step ms; rate kept; images/s; MB/s of a machine's store", lines)


def tokens() -> str:
    """From how many tokens on the bytes alone hide behind the computing of a GPU."""
    a = H100
    wide = min(a.nvlink, a.network * a.node)
    lines = []
    for what, moved, done in (
        ("DDP: gradients, behind the backward pass", 8, 4),
        ("FSDP2: weights, behind the forward pass", 2, 2),
        ("FSDP2: weights and gradients, behind the backward pass", 6, 4),
        ("HSDP: gradients across machines, behind the backward pass", 8, 4),
    ):
        across = [moved / done * m * a.peak / wide for m in a.mfu]
        inside = [moved / done * m * a.peak / a.nvlink for m in a.mfu]
        lines.append(
            [
                *(what, moved, done),
                "-" if what.startswith("HSDP") else _pair(inside),
                _pair(across),
            ]
        )
    headings = "traffic; bytes a parameter; operations a parameter and token"
    return _table(f"{headings}; tokens a GPU, one machine; across machines", lines)


def batches() -> str:
    lines = []
    for case in cases():
        for world in (H100.node, 32, WORLDS[-1]):
            for parallel in PARALLEL if world > H100.node else PARALLEL[:2]:
                images = [images_to_hide(case, parallel, world, m) for m in H100.mfu]
                factors = [n * world / case.batch for n in images]
                lines.append(
                    [
                        *(case.name, world, NAMES[parallel], _pair(images)),
                        _pair([n * world for n in images]),
                        case.batch,
                        " / ".join(f"{f:.3g}" for f in factors),
                        " / ".join(f"{math.sqrt(f):.3g}" for f in factors),
                    ]
                )
    headings = "model; GPUs; spread; images a GPU; global batch; published; times that; its root"
    return _table(headings, lines)


def fits() -> str:
    """What lasts and passes, and how many images then fit a GPU, by checkpoints."""
    lines = []
    for case in cases():
        for name, shard in (("DDP", 1), ("FSDP2 or HSDP on 8", H100.node), ("FSDP2 on 256", 256)):
            need = memory(case, shard, 0)
            room = H100.memory - need["state"] - need["passing"]
            most = [int(room // activation_bytes(case.model, kept)) for kept in CHECKPOINTS]
            images = [str(max(0, n)) for n in most]
            lines.append([case.name, name, _gb(need["state"]), _gb(need["passing"]), *images])
    headings = "model; spread; state GB; passing GB; images that fit a GPU, nothing recomputed"
    return _table(f"{headings}; selective; blocks", lines)
