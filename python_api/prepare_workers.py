"""Runs jobs in processes, and says on which one a process died."""

import contextlib
import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Protocol

import torch


class Job(Protocol):
    """Something picklable to be called with a function that takes the number of images made."""

    name: str

    def __call__(self, on_images: Callable[[int], None]) -> None: ...


def run_in_processes(jobs: Sequence[Job], workers: int, on_images: Callable[[int], None]) -> None:
    """Runs the jobs, in order, in up to ``workers`` processes. However it ends, they have ended.

    Args:
        jobs: what to run.
        workers: number of processes, at least 1.
        on_images: called here with what the jobs report.

    Raises:
        ChildProcessError: naming the job whose process died.
        OSError, ValueError, ImportError: as a job raised it.
    """
    todo = deque(jobs)
    context = multiprocessing.get_context("spawn")  # the parent has threads
    running: dict[Connection, tuple[multiprocessing.process.BaseProcess, Job]] = {}
    processes = []
    try:
        with _interrupts_ignored():  # by the workers for good: they inherit it
            for _ in range(min(workers, len(jobs))):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                running[ours] = process, todo.popleft()
        for connection, (_, job) in running.items():
            _send(connection, job)
        while running:
            for connection in wait(list(running)):
                process, job = running[connection]
                try:
                    answer = connection.recv()
                except (EOFError, ConnectionResetError):
                    process.join()
                    raise ChildProcessError(
                        f"the worker that made {job.name} {_death(process.exitcode)}; "
                        f"the same command goes on with it"
                    ) from None
                if isinstance(answer, Exception):
                    raise answer
                if answer is not None:
                    on_images(answer)
                elif todo:
                    running[connection] = process, todo.popleft()
                    _send(connection, running[connection][1])
                else:
                    del running[connection]
                    connection.close()
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        for connection in running:
            connection.close()


def _send(connection: Connection, job: Job) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.send(job)  # to a process that died: it is found out when it does not answer


def _work(connection: Connection) -> None:
    """Makes shards until the parent, or its end of the pipe, is gone."""
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            job = connection.recv()
            try:
                job(connection.send)
            except (BrokenPipeError, ConnectionResetError):
                raise
            except (OSError, ValueError, ImportError) as error:
                connection.send(error)
                return
            connection.send(None)


def _death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"ended with status {exitcode}"


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
