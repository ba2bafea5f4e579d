"""What has to hold of a training run after whatever was done to it."""

import json
from pathlib import Path


def check_complete(path: Path) -> None:
    """Raises if a checkpoint is not: each file is opened, each tensor read."""
    from safetensors import safe_open

    files = json.loads((path / "state.json").read_text())["files"]
    assert files.keys() == {p.name for p in path.iterdir()} - {"state.json"}, path
    for name, size in files.items():
        assert (path / name).stat().st_size == size, path / name
        with safe_open(path / name, "np") as file:
            for key in file.keys():  # noqa: SIM118
                file.get_tensor(key)


def check_shown(logs: Path, batch: int) -> int:
    """Compares what processes wrote down (``START-RESTART-RANK``: a number, then the images of each
    step) with the first start, one process undisturbed.

    Returns:
        How many shares of a step they were shown.

    Raises:
        AssertionError: where one was shown other images, or steps were skipped or repeated.
    """
    paths = sorted(logs.glob("*-*-*"))
    truth = {line["step"]: line["images"] for line in read_lines(paths[0])[1:]}
    assert list(truth) == list(range(1, len(truth) + 1))
    shown = 0
    for path in paths[1:]:
        start, _, rank = path.name.split("-")
        share = batch // len(list(logs.glob(f"{start}-0-*")))
        mine = slice(int(rank) * share, (int(rank) + 1) * share)
        lines = read_lines(path)[1:]
        for k, line in enumerate(lines):
            assert line["step"] == lines[0]["step"] + k, (path, line)
            assert line["images"] == truth[line["step"]][mine], (path, line)
        shown += len(lines)
    return shown


def check_metrics(calm: Path, out: Path, steps: int, refused: int) -> float:
    """Compares ``metrics.jsonl`` of two runs of ``steps`` steps, of which ``refused`` was refused.

    Returns:
        The largest difference of a loss, in nats per dimension (losses pass through zero).

    Raises:
        AssertionError: where a step is missing, doubled, or refused and should not be.
    """
    runs = [read_lines(folder / "metrics.jsonl") for folder in (calm, out)]
    for records in runs:
        assert [record["step"] for record in records] == list(range(1, steps + 1))
        assert [r["step"] for r in records if r["refused"]] == [refused]
    pairs = [(float(a["loss"]), float(b["loss"])) for a, b in zip(*runs, strict=True)]
    return max(abs(a - b) for k, (a, b) in enumerate(pairs, 1) if k != refused)


def weights_differ(a: Path, b: Path) -> float:
    """Largest difference, but for the biases of keys, which softmax does not see: their gradient is
    rounding, of which AdamW makes steps of full size."""
    import numpy as np
    from safetensors.numpy import load_file

    worst, (a, b) = 0.0, (load_file(a), load_file(b))
    assert a.keys() == b.keys()
    for name in a:
        difference = np.abs(a[name].astype(np.float64) - b[name])
        if name.endswith("qkv.bias"):
            q, _, v = np.split(difference, 3)
            difference = np.concatenate([q, v])
        worst = max(worst, float(difference.max()))
    return worst


def read_lines(path: Path) -> list[dict]:
    """Of a file of JSON lines, but for a last one that was cut short."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
