"""Functions of tests run in several processes at once, as ``torchrun`` would start them."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist


def run_ranks(size: int, function: Callable, *arguments, timeout: float = 300) -> list:
    """Calls ``function(world, *arguments)`` in ``size`` new processes joined by gloo on the CPU.

    A process takes some four seconds to start: check much in one call.

    Args:
        size: processes.
        function: of a file's top level, which the processes import anew. ``world`` is a
            ``flowops.api.parallel.World``.
        arguments: numbers, text, lists and tables of them (they travel as JSON), paths as text.
        timeout: seconds, after which all are killed.

    Returns:
        What each returned (through JSON), by rank.

    Raises:
        AssertionError: where one did not end well or in time, with what all of them wrote. The
            others are given ten seconds to find out.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / f"rank-{rank}.json" for rank in range(size)]
        call = [function.__code__.co_filename, function.__name__, json.dumps(arguments)]
        commands = [[sys.executable, __file__, str(path), *call] for path in results]
        run_together(commands, timeout)
        return [json.loads(path.read_text()) for path in results]


def run_together(commands: Sequence[Sequence[str]], timeout: float = 300) -> list[str]:
    """Runs commands as the ranks of one world.

    Returns:
        The standard output of each.

    Raises:
        AssertionError: as for ``run_ranks``.
    """
    # This process holds the store where they meet: no port is guessed.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        files = [open(Path(folder) / f"{i}", "w+") for i in range(2 * len(commands))]  # noqa: SIM115
        processes = [
            subprocess.Popen(
                command,
                env=os.environ | rank_environment(rank, len(commands), store.port),
                stdout=files[2 * rank],
                stderr=files[2 * rank + 1],
            )
            for rank, command in enumerate(commands)
        ]
        try:
            ended = _wait(processes, timeout)
        finally:
            for process in processes:
                process.send_signal(signal.SIGABRT)  # of which Python tells where it is
                process.wait()
            texts = [_text(file) for file in files]
    if not ended or any(process.returncode for process in processes):
        raise AssertionError(
            "\n".join(
                f"--- rank {rank}: status {process.returncode}\n{out}{err}"
                for rank, (process, out, err) in enumerate(
                    zip(processes, texts[::2], texts[1::2], strict=True)
                )
            )
        )
    return texts[::2]


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun sets for a rank, given the port of a store in a process that outlives it."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
    }


def _wait(processes: Sequence[subprocess.Popen], timeout: float) -> bool:
    """Whether all have ended by themselves."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        statuses = [process.poll() for process in processes]
        if None not in statuses:
            return True
        if any(statuses):
            end = min(end, time.monotonic() + 10)
        time.sleep(0.02)
    return False


def _text(file) -> str:
    with file:
        file.seek(0)
        return file.read()


def _rank(result: str, file: str, name: str, arguments: str) -> None:
    tests = sys.path.pop(0)  # where a folder would pass for the package `flowops`
    from flowops.api.parallel import join_world

    sys.path.insert(0, tests)
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with join_world("cpu") as world:
        value = getattr(module, name)(world, *json.loads(arguments))
    Path(result).write_text(json.dumps(value))


if __name__ == "__main__":
    _rank(*sys.argv[1:])
