"""What a training run writes down: ``metrics.jsonl`` and, if installed, tensorboard."""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from .checkpoint import write_whole


def read_records(records: list[dict], offset: float = math.log2(128)) -> list[dict]:
    """Records of ``Trainer.step`` as numbers, in one transfer: the only wait for the device.

    Args:
        offset: of bits per dim: the default is that of images of 256 levels on [-1, 1].
    """
    names = ("loss", "grad_norm", "refused", "stop")
    table = torch.stack(
        [
            torch.cat([torch.stack([r[name].float() for name in names]), r["logdets"].float()])
            for r in records
        ]
    )
    return [
        {
            "step": record["step"],
            "loss": loss,
            # The loss leaves out ln(2 pi) / 2.
            "bits_per_dim": (loss + 0.5 * math.log(2 * math.pi)) / math.log(2) + offset,
            "logdets": logdets,
            "grad_norm": norm,
            "lr": record["lr"],
            "refused": int(refused),
            "stop": bool(stop),
        }
        for record, (loss, norm, refused, stop, *logdets) in zip(
            records, table.tolist(), strict=True
        )
    ]


class MetricsLog:
    """Appends to ``metrics.jsonl`` in ``out``; records of steps after ``step``, which a resumed run
    makes again, are dropped first.

    Raises:
        OSError: naming the file that could not be written.
    """

    def __init__(self, out: Path, step: int, writes: bool = True):
        self._file = self._board = None
        if not writes:  # of several processes one does
            return
        path = out / "metrics.jsonl"
        _keep_records(path, step)
        self._path, self._board = path, _tensorboard(out)
        # Without a buffer, whose rest a full disk would refuse once more when it is closed.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind, *exception) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            try:
                with _naming(self._board.log_dir):
                    self._board.close()
            except OSError:
                if kind is None:  # else the error that is on its way is the one to tell
                    raise

    def write(self, record: dict) -> None:
        if self._file is None:
            return
        line = json.dumps(finite(record)).encode() + b"\n"
        with _naming(self._path):
            while line:
                line = line[self._file.write(line) :]
        if self._board is not None:
            with _naming(self._board.log_dir):
                for name, value in record.items():
                    many = value if isinstance(value, list) else [value]
                    for i, number in enumerate(many):
                        tag = f"{name}/{i}" if isinstance(value, list) else name
                        self._board.add_scalar(tag, number, record["step"])


def finite(value):
    """``value`` for JSON, which has no NaN and no infinity: text in their place."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"could not write {path}: {error.strerror}") from error


def _keep_records(log: Path, step: int) -> None:
    if not log.exists():
        return
    lines = log.read_text().splitlines()
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue  # cut short by a crash
    write_whole(log, "".join(line + "\n" for line in kept).encode())


def _tensorboard(out: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(out / "tensorboard")
