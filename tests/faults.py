"""Faults, done on purpose to a training run, which has to come out as if nothing had happened.

python tests/faults.py [--kills 20] [--seed 0] [--processes 2]
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from fault_checks import check_complete, check_metrics, check_shown, read_lines, weights_differ

BATCH, NAN_STEP = 16, 7


# --- the program under test ----------------------------------------------------------------------


def program(argv: list[str]) -> int:
    """``flowops`` with a step of some 50 ms; each process appends the checksums of the images it is
    given to ``LOG-RANK``, and step 7 has a NaN in its last image."""
    sys.path.pop(0)  # the tests, where a folder would pass for the package `flowops`
    log, pause, *arguments = argv
    rank, restart = (os.environ.get(name, "0") for name in ("RANK", "TORCHELASTIC_RESTART_COUNT"))
    file = open(f"{log}-{restart}-{rank}", "a", buffering=1)  # noqa: SIM115
    print(json.dumps({"pid": os.getpid()}), file=file)
    from flowops.api.cli import main
    from flowops.api.trainer import Trainer

    good = Trainer._noisy

    def noisy(trainer, images, step, part):
        time.sleep(float(pause))
        sums = [
            zlib.crc32(bytes([label])) ^ zlib.crc32(pixels.numpy())
            for pixels, label in zip(images.pixels, images.labels.tolist(), strict=True)
        ]
        x, y = good(trainer, images, step, part)
        if step + 1 == NAN_STEP and trainer.world.rank == trainer.world.size - 1:
            x[-1] = float("nan")
        print(json.dumps({"step": step + 1, "images": sums}), file=file)
        return x, y

    Trainer._noisy = noisy
    return main(arguments)


# --- one start of it -----------------------------------------------------------------------------


class Run:
    """One start of the training, by torchrun where it has several processes."""

    def __init__(self, lab: "Lab", processes: int, restarts: int = 0, out: Path | None = None):
        lab.starts, lab.run = lab.starts + 1, self
        self.log, self.processes = lab.folder / "logs" / f"{lab.starts:03d}", processes
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
            command += [str(processes), "--max-restarts", str(restarts)]
        command += [__file__, "program", str(self.log), str(lab.pause), "train"]
        command += lab.arguments(out or lab.out)
        parallel = "fsdp" if lab.starts % 4 > 1 else "ddp"
        command += ["--parallel", parallel]
        self.kind = "1 process" if processes == 1 else f"{processes} processes, {parallel}"
        with open(f"{self.log}.txt", "w") as file:
            self.process = subprocess.Popen(
                command,
                cwd=lab.folder,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @property
    def text(self) -> str:
        return Path(f"{self.log}.txt").read_text()

    def lines(self, rank: int = 0, restart: int = 0) -> list[dict]:
        """What a process has written down: its number, then the images of its steps."""
        return read_lines(Path(f"{self.log}-{restart}-{rank}"))

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{what}: in vain; {self.log}.txt ends\n{self.text[-3000:]}")
            time.sleep(0.001)

    def wait_for_steps(self, count: int) -> None:
        self.wait_for(lambda: len(self.lines()) > count, f"{count} steps")

    def pids(self) -> list[int]:
        """Of the ranks, and of torchrun."""
        ranks = [self.lines(rank)[0]["pid"] for rank in range(self.processes)]
        return [*ranks, self.process.pid][: self.processes + (self.processes > 1)]

    def end(self, seconds: float = 300) -> int:
        return self.process.wait(seconds)


# --- where it happens ----------------------------------------------------------------------------


class Lab:
    """A folder with a store, a run that nothing happens to, and one that everything happens to."""

    def __init__(self, folder: Path, kills: int, processes: int, pause: float):
        self.folder, self.processes, self.pause = folder, processes, pause
        self.store, self.calm, self.out = folder / "store", folder / "calm", folder / "out"
        self.steps, self.starts, self.run = 60 + 15 * kills, 0, None
        self.faults = self.recovered = self.pending = self.expected = 0
        (folder / "logs").mkdir()
        self.out.mkdir()
        self.mounted = not os.getuid() and not subprocess.call(
            ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", self.out],
            stderr=subprocess.DEVNULL,
        )

    def arguments(self, out: Path) -> list[str]:
        options = (
            f"--data store --out {out.name} --steps {self.steps} --batch-size {BATCH} --lr 5e-4 "
            "--patch-size 4 --channels 64 --blocks 2 --layers 1 --precision fp32 --flip --resume "
            "--checkpoint-every 5 --log-every 1 --samples 0 --peak-tflops 1"
        )
        return options.split()

    def prepare(self) -> None:
        """A store of 8x8 digits in three shards, as a user makes it."""
        import numpy as np
        from PIL import Image
        from sklearn.datasets import load_digits

        digits = load_digits()
        for i, (image, label) in enumerate(zip(digits.images[:600], digits.target, strict=False)):
            path = self.folder / "images" / str(label) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 15).astype(np.uint8)).save(path)
        options = "--out store --img-size 8 --channels 1 --shard-images 200 --workers 1"
        command = [sys.executable, "-m", "flowops", "data", "prepare", "images", *options.split()]
        subprocess.run(command, cwd=self.folder, check=True, stdout=subprocess.DEVNULL)

    def close(self) -> None:
        if self.run is not None and self.run.process.poll() is None:
            self.run.process.terminate()  # with its ranks
            self.run.process.wait()
        if self.mounted:
            subprocess.call(["umount", self.out])

    # --- what is left after a fault --------------------------------------------------------------

    def checkpoints(self, out: Path | None = None) -> list[Path]:
        return sorted(((out or self.out) / "checkpoints").glob("step-*"))

    def newest(self) -> int:
        """The step of the newest checkpoint, all of which have to be complete."""
        paths = self.checkpoints()
        for path in paths:
            check_complete(path)
        return int(paths[-1].name.removeprefix("step-")) if paths else 0

    def partials(self) -> int:
        return len(list((self.out / "checkpoints").glob(".step-*.partial")))

    def happened(self, text: str, resume: int) -> None:
        """Tells of a fault, after which the next start has to go on from step ``resume``."""
        self.faults, self.pending, self.expected = self.faults + 1, self.pending + 1, resume
        print(f"{self.faults:3d}  {text}", flush=True)

    def goes_on(self, run: Run) -> None:
        """Waits until a run trains; if from the right step, what happened before is recovered."""
        run.wait_for_steps(1)
        step = run.lines()[1]["step"] - 1
        if step == self.expected:
            self.recovered += self.pending
            print(f"       goes on from step {step} with {run.kind}", flush=True)
        else:
            print(f"       WENT ON from step {step}, not {self.expected}, with {run.kind}")
        self.pending = 0


# --- the faults ----------------------------------------------------------------------------------


def kill(lab: Lab, processes: int, generator: random.Random) -> bool:
    """Kills one process or all, at a random moment or in a save; whether it was in a save."""
    run = Run(lab, processes)
    lab.goes_on(run)
    aimed = generator.random() < 0.5
    run.wait_for_steps(2 + generator.randrange(10))
    if aimed:
        run.wait_for(lambda: lab.partials() == 0, "the end of a save")
        run.wait_for(lambda: lab.partials() > 0, "a save")
    time.sleep(generator.random() * (0.03 if aimed else 0.3))
    pids = run.pids()
    rank = generator.randrange(processes + (processes > 1))
    who = f"rank {rank} of {processes}" if rank < processes else f"all {processes}"
    hit, step = lab.partials() > 0, run.lines()[-1]["step"]
    for pid in pids[rank : rank + 1] if rank < processes else pids:
        os.kill(pid, signal.SIGKILL)
    assert run.end() != 0
    wait_until_gone(pids)
    where = "in a save" if hit else "between saves"
    lab.happened(f"kill -9 of {who}, step {step}, {where}", lab.newest())
    return hit


def wait_until_gone(pids: list[int]) -> None:
    end = time.monotonic() + 60
    while any(map(alive, pids)):
        assert time.monotonic() < end, f"still there: {pids}"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def stop(lab: Lab) -> None:
    """SIGTERM to the last rank, as a scheduler that takes a machine away."""
    run = Run(lab, lab.processes)
    lab.goes_on(run)
    run.wait_for_steps(12)
    os.kill(run.pids()[lab.processes - 1], signal.SIGTERM)
    assert run.end() == 0, run.text
    step = run.lines()[-1]["step"]
    assert lab.newest() == step
    lab.happened(f"SIGTERM to rank {lab.processes - 1}, saved at step {step}, status 0", step)


def cut_shard(lab: Lab) -> None:
    """A shard of the store that has lost its end: refused before any training."""
    shard = sorted(lab.store.glob("*.npy"), key=lambda path: path.stat().st_size)[-1]
    whole, step = shard.read_bytes(), lab.newest()
    shard.write_bytes(whole[: len(whole) // 2])
    run = Run(lab, lab.processes)
    assert run.end() == 1
    assert f"{shard.name}: expected {len(whole):,} bytes, got" in run.text, run.text
    assert all(len(run.lines(rank)) == 1 for rank in range(lab.processes))
    shard.write_bytes(whole)
    lab.happened(f"half of {shard.name} is gone: refused by its name; put back", step)


def cut_checkpoint(lab: Lab) -> None:
    """A file of the newest checkpoint that has lost its end: the one before is taken."""
    lab.newest()
    before, path = lab.checkpoints()[-2:]
    file = next(path.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size // 2)
    lab.happened(f"half of {path.name}/{file.name} is gone", int(before.name[5:]))
    run = Run(lab, lab.processes)
    lab.goes_on(run)
    assert f"{path.name} is passed over" in run.text, run.text
    run.wait_for_steps(8)
    for pid in run.pids():
        os.kill(pid, signal.SIGKILL)
    run.end()
    wait_until_gone(run.pids())
    lab.expected = lab.newest()


def fill_disk(lab: Lab) -> None:
    """No room for the next checkpoint: an error that names it, the ones before stay."""
    lab.newest()
    if lab.mounted:
        used = shutil.disk_usage(lab.out).used
        subprocess.check_call(["mount", "-o", f"remount,size={used + 2**19}", lab.out])
    run = Run(lab, lab.processes)
    lab.goes_on(run)
    if not lab.mounted:
        for pid in run.pids():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (2**19, 2**19))
    assert run.end() == 1, run.text
    if lab.mounted:
        subprocess.check_call(["mount", "-o", "remount,size=256m", lab.out])
    said = "No space left on device" if lab.mounted else "File too large"
    assert "could not write" in run.text, run.text
    assert said in run.text, run.text
    kind = "a full disk (tmpfs)" if lab.mounted else "a file that may not grow (RLIMIT_FSIZE)"
    lab.happened(f"{kind}: an error names the file, checkpoints stay", lab.newest())


def lose_rank(lab: Lab) -> None:
    """A rank is lost and torchrun starts all again: the run ends well by itself."""
    run = Run(lab, lab.processes, restarts=1)
    lab.goes_on(run)
    run.wait_for_steps(7)
    os.kill(run.pids()[lab.processes - 1], signal.SIGKILL)
    lab.happened("kill -9 of the last rank under torchrun --max-restarts=1", -1)
    assert run.end(600) == 0, run.text
    step = run.lines(restart=1)[1]["step"] - 1
    print(f"       torchrun itself went on from step {step}, to the end")
    lab.recovered += 1


# --- all of them ----------------------------------------------------------------------------------


def prove(lab: Lab, exact: bool) -> list[str]:
    """Lines that say what holds; AssertionError where something does not."""
    shown = check_shown(lab.folder / "logs", BATCH)
    error = check_metrics(lab.calm, lab.out, lab.steps, NAN_STEP)
    lab.happened(f"NaN in an image of step {NAN_STEP}: the step was refused", lab.steps)
    lab.recovered += 1
    weights = weights_differ(lab.calm / "model.safetensors", lab.out / "model.safetensors")
    if exact:
        assert error == weights == 0, (error, weights)
    else:
        assert error <= 1e-6, error
        assert weights <= 2e-6, weights
    left = [p for p in lab.out.rglob("*") if p.name.startswith(".") or p.name.endswith(".tmp")]
    assert not left, left
    assert lab.newest() == lab.steps
    assert len(lab.checkpoints()) == 2
    return [
        f"metrics.jsonl has steps 1 to {lab.steps}, each once; step {NAN_STEP} alone was refused",
        f"{shown:,} shares of a step were shown, each with the images of the undisturbed run",
        f"losses differ from those of the undisturbed run by at most {error:.1e} nats per dim",
        f"averaged weights of the model differ by at most {weights:.1e}",
        "no temporary file is left, both checkpoints are complete",
    ]


def campaign(folder: Path, kills: int, seed: int, processes: int, pause: float) -> int:
    generator, started = random.Random(seed), time.monotonic()
    lab = Lab(folder, kills, processes, pause)
    try:
        lab.prepare()
        lab.pause = 0
        lab.calm_run = Run(lab, 1, out=lab.calm)
        assert lab.calm_run.end() == 0, lab.calm_run.text
        lab.pause = pause
        in_saves = sum(kill(lab, processes if k % 2 == 0 else 1, generator) for k in range(kills))
        stop(lab)
        cut_shard(lab)
        cut_checkpoint(lab)
        fill_disk(lab)
        if processes > 1:
            lose_rank(lab)
        else:
            run = Run(lab, 1)
            lab.goes_on(run)
            assert run.end(600) == 0, run.text
        for line in prove(lab, exact=processes == 1):
            print(f"     {line}")
        print(f"     {in_saves} of {kills} kills hit a save; {time.monotonic() - started:.0f} s")
    finally:
        lab.close()
    print(f"{lab.faults} faults, {lab.recovered} recovered")
    return lab.faults != lab.recovered


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of processes, at random moments")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed, and when")
    parser.add_argument("--processes", type=int, default=2, help="every second start has one")
    parser.add_argument("--pause", type=float, default=0.04, help="seconds added to a step")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        return campaign(Path(folder), args.kills, args.seed, args.processes, args.pause)


if __name__ == "__main__":
    sys.exit(program(sys.argv[2:]) if sys.argv[1:2] == ["program"] else main())
