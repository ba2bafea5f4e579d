"""Checkpoints of a run: written by all processes in the background, complete or absent, read by any
number of processes.

A checkpoint is a directory of safetensors files (each holds parts of tensors, with their offsets)
and ``state.json``. It is written under another name, synced and renamed: what is called
``step-*`` is complete. Nothing in it is a pickle.
"""

import concurrent.futures
import contextlib
import json
import os
import shutil
import warnings
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor

from .checkpoint import sync_directory, write_whole
from .parallel import World

_STATE = "state.json"

# Said from the thread that saves, where a run has one process and means to.
_ALONE = "torch.distributed is disabled, unavailable or uninitialized"


class Checkpoints:
    """The checkpoints of a run in ``directory``, the newest ``keep`` of them.

    Methods are called by all processes alike; ``finish`` raises OSError, naming the checkpoint,
    where a save failed in any of them.
    """

    def __init__(self, directory: Path, world: World, keep: int = 2):
        self.directory, self.world, self.keep = directory, world, keep
        self._pending: tuple[int, concurrent.futures.Future] | None = None

    def begin(self, step: int) -> None:
        """Removes what crashes left behind, and checkpoints newer than ``step``, which the run will
        make again."""
        if self.world.rank == 0:
            for rest in self.directory.glob(".step-*.partial"):
                shutil.rmtree(rest)
            for path in self._complete():
                if _step(path) > step:
                    shutil.rmtree(self._aside(path))
        self.world.barrier()

    def save(self, tensors: dict[str, Tensor], state: dict, step: int) -> None:
        """Copies the tensors and writes them in the background, after the save before this one.

        Args:
            tensors: whole ones, the same in every process, or sharded ones (DTensor).
            state: what else there is to keep, as JSON.
            step: names the checkpoint.
        """
        self.finish()
        partial, error = self._partial(step), None
        if self.world.rank == 0:
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                write_whole(partial / _STATE, json.dumps(state).encode())
            except OSError as caught:
                error = caught
        self.world.agree(error)
        warnings.filterwarnings("ignore", message=_ALONE)
        future = dcp.async_save(
            tensors,
            storage_writer=dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True),
            process_group=self.world.saves,
            no_dist=self.world.size == 1,
        )
        self._pending = step, future

    def poll(self) -> None:
        """Completes the save at work if it is through; does not wait and does not raise."""
        if self._pending is None or self.world.rank:
            return
        step, future = self._pending
        if future.done() and future.exception() is None:
            with contextlib.suppress(OSError):  # `finish` tries again, and raises
                self._publish(step)

    def finish(self) -> None:
        """Waits for the save at work."""
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        error = future.exception()
        if error is not None:
            error = OSError(_reason(error))  # torch's own is no Exception
        elif self.world.rank == 0:
            try:
                self._publish(step)
            except OSError as caught:
                error = caught
        try:
            self.world.agree(error)
        except Exception as caught:
            if self.world.rank == 0:
                shutil.rmtree(self._partial(step), ignore_errors=True)
            raise OSError(
                f"could not write {self._path(step)}, earlier checkpoints are intact: {caught}"
            ) from caught

    def close(self) -> None:
        """Lets the save at work end, where an error has come between; does not raise. The groups of
        processes must not go while a thread uses them."""
        if self._pending is not None:
            step, future = self._pending
            future.exception()
            self.poll()
            if self.world.rank == 0:
                shutil.rmtree(self._partial(step), ignore_errors=True)

    def latest(self) -> Path | None:
        """The newest checkpoint whose files are all there and of the length they were written
        with; a warning names those that are not."""
        for path in reversed(self._complete()):
            missing = _damage(path)
            if missing is None:
                return path
            warnings.warn(f"{path} is passed over: {missing}", stacklevel=2)
        return None

    def load(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Fills ``tensors``, whole or sharded, from the checkpoint at ``path``.

        Raises:
            ValueError: naming the checkpoint and what does not fit.
        """
        warnings.filterwarnings("ignore", message=_ALONE)
        try:
            dcp.load(
                tensors,
                storage_reader=dcp.HuggingFaceStorageReader(str(path)),
                process_group=self.world.control,
                no_dist=self.world.size == 1,
            )
        except dcp.CheckpointException as error:
            raise ValueError(f"{path} does not fit this run: {_reason(error)}") from error

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _partial(self, step: int) -> Path:
        return self.directory / f".step-{step:08d}.partial"

    def _complete(self) -> list[Path]:
        """Oldest first."""
        found = self.directory.glob("step-*")
        return sorted((p for p in found if p.name.removeprefix("step-").isdigit()), key=_step)

    def _publish(self, step: int) -> None:
        partial, path = self._partial(step), self._path(step)
        if not partial.exists():
            return  # `poll` was here
        state = json.loads((partial / _STATE).read_text())
        state["files"] = {
            file.name: file.stat().st_size for file in sorted(partial.glob("*.safetensors"))
        }
        write_whole(partial / _STATE, json.dumps(state).encode())
        os.replace(partial, path)
        sync_directory(self.directory)
        for old in self._complete()[: -self.keep]:
            shutil.rmtree(self._aside(old))

    def _aside(self, path: Path) -> Path:
        """Renames a checkpoint that is to be removed: half removed it must not look complete."""
        aside = self._partial(_step(path))
        os.replace(path, aside)
        return aside


def check_same_data(theirs: dict, ours: dict, path: Path) -> None:
    """Raises ValueError naming what of two fingerprints of data differs."""
    differ = [k for k in ours if theirs.get(k) != ours[k]]
    if differ == ["crc32"]:
        raise ValueError(f"data: {path} was trained on as many images, but other ones")
    if differ:
        values = (f"{k} {theirs.get(k)}, this run has {ours[k]}" for k in differ if k != "crc32")
        raise ValueError(f"data: {path} was trained on other images: {'; '.join(values)}")


def read_state(path: Path) -> dict:
    """What ``Checkpoints.save`` was given as ``state``.

    Raises:
        ValueError: naming the checkpoint that is not one.
    """
    try:
        return json.loads((path / _STATE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a checkpoint of a training run ({error})") from error


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _damage(path: Path) -> str | None:
    try:
        files = read_state(path)["files"]
    except ValueError as error:
        return str(error)
    except KeyError:
        return f"{_STATE} lists no files"
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
    return None


def _reason(error: BaseException) -> str:
    """The first failure in what torch collects from all ranks, in a line."""
    for failure in getattr(error, "failures", {}).values():
        error = failure[0]
        break
    return f"{type(error).__name__}: {error}".splitlines()[0]
