"""``flowops bench scaling``: training steps on the devices of this machine, by number of processes,
by how the state is spread over them and by what is kept for the backward pass.

Every cell runs in processes of its own, in several rounds over all cells. ``--docs`` writes the
tables of docs/scaling.md: what was measured, and the plan for large runs (``scaling_plan.py``).
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from flowops.api.checkpoint import write_whole
from flowops.api.data import Images
from flowops.api.flops import measured_peak, training_flops
from flowops.api.parallel import join_world, local
from flowops.api.precision import matmul_precision
from flowops.api.train_config import TrainConfig
from flowops.api.trainer import Trainer, build_model

from .environment import environment, now
from .run import results_folder
from .scaling_docs import measured, write_docs
from .scaling_plan import CHECKPOINTS, STATE, Case, memory
from .timing import percentiles

DEFAULTS = {
    "cpu": {"models": ["4-128-4-2@1x28", "4-256-4-2@1x28"], "batches": [8, 32], "seconds": 2.0},
    "cuda": {"models": ["2-768-8-8@3x64"], "batches": [8, 32], "seconds": 10.0},
}
OUT = Path("runs/scaling")


@dataclass(frozen=True)
class Cell:
    """``model`` is patch-width-blocks-layers@channels x size; ``batch`` is that of a process."""

    model: str
    world: int
    parallel: str
    shard_ranks: int
    checkpoint: bool | str
    batch: int
    precision: str = "fp32"
    compile: bool = False

    @property
    def config(self) -> TrainConfig:
        patch, width, blocks, layers, *_ = _numbers(self.model)
        return TrainConfig(
            *(patch, width, blocks, layers),
            steps=10**9,
            batch_size=self.batch * self.world,
            lr=1e-4,
            precision=self.precision,
            compile=self.compile,
            checkpoint_blocks=self.checkpoint,
            parallel=self.parallel,
            shard_ranks=self.shard_ranks,
        )

    @property
    def copies(self) -> int:
        """Processes that share a copy of the state."""
        return 1 if self.parallel == "ddp" else self.shard_ranks or self.world


def _numbers(model: str) -> list[int]:
    found = re.fullmatch(r"(\d+)-(\d+)-(\d+)-(\d+)@(\d+)x(\d+)", model)
    if found is None:
        raise ValueError(
            f"models: expected patch-width-blocks-layers@channels x size such as "
            f"2-768-8-8@3x64, got {model!r}"
        )
    return [int(number) for number in found.groups()]


def cells(models: list[str], worlds: list[int], batches: list[int], **how) -> Iterator[Cell]:
    """One process; DDP; FSDP2 over all; FSDP2 with a copy for every half of the processes."""
    for model, batch, checkpoint, world in itertools.product(models, batches, CHECKPOINTS, worlds):
        ways = [("ddp", 0)]
        if world > 1:
            ways += [("fsdp", 0), ("fsdp", world // 2)] if world % 2 == 0 else [("fsdp", 0)]
        for parallel, shard_ranks in ways:
            yield Cell(model, world, parallel, shard_ranks, checkpoint, batch, **how)


# --- in the processes of a cell ------------------------------------------------------------------


def measure_cell(cell: Cell, device: str, seconds: float) -> dict[str, object]:
    """What all processes of a cell found: seconds of each step, the largest peak and state of a
    process, the operations a second that all reach together in matrix products."""
    with join_world(device) as world:
        _, _, _, _, channels, size = _numbers(cell.model)
        pixels = torch.randint(0, 256, (cell.batch * world.size, channels, size, size))
        data = Images(pixels.to(torch.uint8), None)
        config = cell.config
        before = _start_peak(device)
        trainer = Trainer(config, build_model(config, data).to(world.device), data, world)
        for _ in range(2):
            trainer.step()
        times, start = [], time.perf_counter()
        while world.first(len(times) < 3 or time.perf_counter() - start < seconds):
            begin = time.perf_counter()
            trainer.step()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        peak = _peak(device) - before
        state = state_bytes(trainer)
        world.barrier()
        with matmul_precision(trainer.precision):
            rate = measured_peak(world.device, trainer.precision)
        found = torch.tensor([[peak, rate, *state.values()]], dtype=torch.float64)
        found = world.gather(found.to(world.device)).cpu()
        case = Case(cell.model, trainer.model, config.batch_size, 0)
        whole = sum(p.numel() for p in trainer.model.parameters())  # of DTensors: all of it
        bf16 = trainer.precision == "bf16"
        return {
            "times": times,
            "peak": found[:, 0].max().item(),
            "rate": found[:, 1].sum().item(),
            "state": dict(zip(state, found[:, 2:].amax(0).tolist(), strict=True)),
            "state_formula": {name: size * whole / cell.copies for name, size in STATE.items()},
            "peak_formula": sum(
                memory(case, cell.copies, cell.batch, cell.checkpoint, bf16=bf16).values()
            ),
            "flops": training_flops(trainer.model),
            "parameters": whole,
        }


def state_bytes(trainer: Trainer) -> dict[str, int]:
    """Bytes of the tensors that this process holds, after a step."""
    parameters = list(trainer.model.parameters())
    moments = (trainer.optimizer.state[p] for p in parameters)
    tensors = {
        "weights": parameters,
        "gradients": [p.grad for p in parameters if p.grad is not None],
        "moments": [s[name] for s in moments for name in ("exp_avg", "exp_avg_sq")],
        "averages": trainer.ema.values(),
    }
    return {name: sum(local(t).nbytes for t in group) for name, group in tensors.items()}


def _start_peak(device: str) -> int:
    """Starts the peak anew; the bytes that are in use."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # Some containers forbid it: the peak is then that of the process's life.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return 1024 * int(line.split()[1])


# --- the command ---------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="flowops bench scaling",
        description="Training steps by processes, parallel mode and checkpoints.",
    )
    parser.add_argument(
        "--docs", action="store_true", help="measure nothing, write the tables of docs/scaling.md"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument(
        "--models", nargs="+", metavar="P-W-B-L@CxS", help="patch, width, blocks, layers, image"
    )
    parser.add_argument("--worlds", nargs="+", type=int, help="processes; 1, 2, 4, ... to all")
    parser.add_argument("--batches", nargs="+", type=int, help="images a process")
    parser.add_argument("--seconds", type=float, help="of steps, a cell and round")
    parser.add_argument("--rounds", type=int, default=2, help="over all cells")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), help="bf16 on a GPU")
    parser.add_argument(
        "--compile", action="store_true", help="put the blocks through the compiler"
    )
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected cpu, got cuda, but PyTorch sees no CUDA device")
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.precision = args.precision or ("bf16" if args.device == "cuda" else "fp32")
    devices = torch.cuda.device_count() if args.device == "cuda" else _cores()
    if args.worlds is None:
        args.worlds = [2**i for i in range(devices.bit_length()) if 2**i <= devices]
    for name in ("worlds", "batches", "rounds", "seconds"):
        value = getattr(args, name)
        if any(not number > 0 for number in (value if isinstance(value, list) else [value])):
            raise ValueError(f"{name}: expected positive numbers, got {value}")
    if max(args.worlds) > devices:
        raise ValueError(f"worlds: expected at most {devices} processes here, got {args.worlds}")
    for model in args.models:
        _numbers(model)
    return args


def main(argv: list[str]) -> int:
    """Returns the exit status: 1 where a cell failed."""
    args = parse(argv)
    if args.docs:
        write_docs(Path("bench/results"), Path("docs"))
        return 0
    env = environment(args.device)
    how = {"precision": args.precision, "compile": args.compile}
    grid = list(cells(args.models, args.worlds, args.batches, **how))
    runs: dict[Cell, list[dict]] = {cell: [] for cell in grid}
    for turn in range(args.rounds):
        for cell in grid:
            found = run_cell(cell, args.device, args.seconds)
            runs[cell].append(found)
            told = found.get("error") or f"{1e3 * statistics.median(found['times']):.1f} ms a step"
            print(f"round {turn + 1}: {tuple(asdict(cell).values())} {told}", flush=True)
        rows = [row(cell, runs, args.device) for cell in grid]
        _store(rows, env)
    return int(any("error" in row for row in rows))


def _store(rows: list[dict], env: dict) -> None:
    """Rows of cells that were not run stay as they are."""
    folder = results_folder(env) or OUT
    folder.mkdir(parents=True, exist_ok=True)
    path, names = folder / "scaling.json", [field.name for field in fields(Cell)]
    stored = json.loads(path.read_text())["rows"] if path.exists() else []
    fresh = [[row[name] for name in names] for row in rows]
    rows = [row for row in stored if [row[name] for name in names] not in fresh] + rows
    result = {"environment": env, "rows": rows}
    write_whole(path, (json.dumps(result, indent=1) + "\n").encode())
    print(measured(result))
    print(path)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def run_cell(cell: Cell, device: str, seconds: float) -> dict[str, object]:
    """``measure_cell`` in fresh processes, or ``error``."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cell.world}"]
    threads = str(max(1, _cores() // cell.world))
    done = subprocess.run(
        [
            *(sys.executable, *(launch if cell.world > 1 else []), "-m", "flowops.bench.scaling"),
            json.dumps([asdict(cell), device, seconds]),
        ],
        # Threads that spin while they wait take the cores of other programs, and of each other.
        env={"OMP_WAIT_POLICY": "passive", **os.environ, "OMP_NUM_THREADS": threads},
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1]) | {"load": os.getloadavg()[0]}
    errors = re.findall(r"^(?:\[rank\d+\]: )?(\S*(?:Error|Exception): .*)", done.stderr, re.M)
    return {"error": errors[0] if errors else f"exit status {done.returncode}"}


def product_rate(runs: dict[Cell, list[dict]], world: int, device: str) -> float:
    """Operations a second that ``world`` processes have for matrix products: the best that any cell
    of the run saw, for what a machine can do is not less because it was busy at another moment.
    Processes share a CPU; GPUs they have each."""
    each = device == "cuda"
    rates = [
        run["rate"] / (cell.world if each else 1)
        for cell, found in runs.items()
        for run in found
        if "error" not in run
    ]
    return max(rates) * (world if each else 1)


def row(cell: Cell, runs: dict[Cell, list[dict]], device: str) -> dict[str, object]:
    """The rounds of a cell as one row. ``against_one`` is the median over rounds of images a second
    over those of one process in the same round, with the same batch a process; ``load`` is that of
    whichever of the two had more."""
    found, alone = runs[cell], [c for c in runs if _partner(c) == _partner(cell) and c.world == 1]
    label = asdict(cell) | {"rounds": len(found), "time": now(), "cores": _cores()}
    for run in found:
        if "error" in run:
            return label | {"error": run["error"]}
    rates = [cell.batch * cell.world / statistics.median(run["times"]) for run in found]
    timing = percentiles([seconds for run in found for seconds in run["times"]])
    first, ratio, load = found[0], None, 0.0
    if alone and not any("error" in run for run in runs[alone[0]]):
        ones = [cell.batch / statistics.median(run["times"]) for run in runs[alone[0]]]
        ratio = statistics.median(many / one for many, one in zip(rates, ones, strict=True))
        load = statistics.median(run["load"] for run in runs[alone[0]])
    peak_rate = product_rate(runs, cell.world, device)
    return label | {
        "steps": sum(len(run["times"]) for run in found),
        "seconds": asdict(timing),
        "images_per_second": cell.batch * cell.world / timing.median,
        "against_one": ratio,
        "mfu": statistics.median(rates) * first["flops"] / peak_rate,
        "product_rate": peak_rate,
        "load": max(load, statistics.median(run["load"] for run in found)),
        "peak": statistics.median(run["peak"] for run in found),
        **{key: first[key] for key in ("peak_formula", "state", "state_formula", "parameters")},
    }


def _partner(cell: Cell) -> tuple:
    return cell.model, cell.checkpoint, cell.batch


if __name__ == "__main__":
    _cell, *_options = json.loads(sys.argv[1])
    _found = measure_cell(Cell(**_cell), *_options)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(_found), flush=True)
