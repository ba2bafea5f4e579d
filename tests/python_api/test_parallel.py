"""Two processes, joined by gloo on the CPU, beside the one of the test as the truth.

They are started three times for all tests of this file, which look at what they brought back.
"""

import dataclasses
import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_helpers import rank_environment, run_ranks
from flowops.api.checkpoint import load_model, read_tensors, save_tensors
from flowops.api.data import load_images
from flowops.api.parallel import World, _meeting_place, local, whole
from flowops.api.run_checkpoints import Checkpoints
from flowops.api.train import run_training
from flowops.api.train_config import TrainConfig
from flowops.api.trainer import Trainer, build_model

STEPS = 13
TINY = TrainConfig(
    patch_size=4,
    channels=64,
    blocks=2,
    layers=1,
    steps=STEPS,
    batch_size=16,
    warmup=2,
    weight_decay=0.05,
    grad_clip=0.3,
    ema=0.9,
    shift=1,
    flip=True,
    checkpoint_every=5,
    log_every=1,
    precision="fp32",
    peak_tflops=1.0,
)
FSDP = {"parallel": "fsdp"}
HSDP = FSDP | {"shard_ranks": 1}
CURVES = {
    "ddp": {},
    "fsdp": FSDP,
    "hsdp": HSDP,
    "ddp-accumulate": {"accumulate": 2},
    "fsdp-accumulate": FSDP | {"accumulate": 2},
    "fsdp-selective": FSDP | {"checkpoint_blocks": "selective"},
    "ddp-shifts": {"nvp": False},
    "fsdp-shifts": FSDP | {"nvp": False},
    "fsdp-uniform": FSDP | {"noise": "uniform"},
    "fsdp-unclipped": FSDP | {"grad_clip": 0.0},
}
#: what the three parts of a run are trained with; the second by one process
CHAINS = {"ddp-1-ddp": ({}, {}, {}), "fsdp-1-fsdp": (FSDP, FSDP, FSDP)}
PARTS = (0, 4, 9, STEPS)


class Noted:
    """Data that writes down which images were asked for."""

    def __init__(self, data):
        self.data, self.seen = data, []

    def __len__(self):
        return len(self.data)

    def __getattr__(self, name):
        return getattr(self.data, name)

    def __getitem__(self, index):
        self.seen.append(index.tolist())
        return self.data[index]


def trainer(world, **changes):
    config, data = dataclasses.replace(TINY, **changes), load_images("digits")
    made = Trainer(config, build_model(config, data), Noted(data), world)
    made.data.seen.clear()
    return made


def train(run, last=STEPS):
    """Steps up to ``last``: losses, gradient norms, and the images of each micro-batch."""
    records = [run.step() for _ in range(last - run.step_count)]
    return {
        "loss": [record["loss"].item() for record in records],
        "norm": [record["grad_norm"].item() for record in records],
        "seen": run.data.seen,
    }


def all_tensors(run):
    return {name: whole(t).clone() for name, t in run._tensors().items()}


def keep(run, path):
    tensors = all_tensors(run)
    if run.world.rank == 0:
        save_tensors(path, tensors, {})


def caught(function, *arguments):
    """Name and text of what a call raises, None if nothing."""
    try:
        function(*arguments)
    except BaseException as error:
        return [type(error).__name__, str(error)]


def part_of_chain(world, folder, name, number):
    """Trains one part of a run, from the checkpoint of the part before and to one of its own."""
    run = trainer(world, **CHAINS[name][number])
    checkpoints = Checkpoints(Path(folder) / name, world)
    if number:
        run.load(checkpoints, checkpoints.latest())
    told = train(run, PARTS[number + 1])
    run.save(checkpoints)
    checkpoints.finish()
    if number == 2:
        keep(run, Path(folder) / f"{name}.safetensors")
    return told


# --- what the processes do -----------------------------------------------------------------------


def first_start(world, folder):
    told = {"parts": {name: part_of_chain(world, folder, name, 0) for name in CHAINS}}
    for name, changes in CURVES.items():
        run = trainer(world, **changes)
        told[name] = train(run)
        keep(run, Path(folder) / f"{name}.safetensors")
    for name, changes in (("ddp-bf16", {}), ("fsdp-bf16", FSDP)):
        run = trainer(world, precision="bf16", **changes)
        with NotedCollectives() as noted:
            told[name] = train(run)
        told[name]["dtypes"] = {kind: sorted(dtypes) for kind, dtypes in noted.dtypes.items()}
    told["records"] = records_and_truth(world)
    told["sharded"] = sharded_memory(world)
    return told


class NotedCollectives(TorchDispatchMode):
    """Keeps the dtypes that go into gathering weights and adding up gradients."""

    def __init__(self):
        super().__init__()
        self.dtypes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name.startswith("c10d::"):
            kind = next(
                (k for k in ("allgather", "reduce_scatter", "allreduce") if k in name), name
            )
            tensors = [
                t for t in tree_leaves(args) if isinstance(t, torch.Tensor) and t.numel() > 64
            ]
            self.dtypes.setdefault(kind, set()).update(str(t.dtype) for t in tensors)
        return function(*args, **(kwargs or {}))


def records_and_truth(world):
    """A record, and the same from the loss of each process and the model's own log-determinant."""
    run = trainer(world)
    for _ in range(3):
        run.step()
    x, y = run.batch(3)
    with torch.no_grad():
        z, _, logdet = run.model(x, y)
        mine = torch.stack([run.model.loss(z, logdet), logdet.mean()])
    losses, logdets = world.gather(mine[None]).unbind(1)
    record = run.step()
    return {
        "loss": record["loss"].item(),
        "losses": losses.tolist(),
        "logdets": record["logdets"].tolist(),
        "logdet": logdets.mean().item(),
    }


def sharded_memory(world):
    """Numbers held here of weights, averages and moments, and of all there are."""
    run = trainer(world, **FSDP)
    run.step()
    tensors = run._tensors().values()
    return [sum(local(t).numel() for t in tensors), sum(t.numel() for t in tensors)]


def second_start(world, folder):
    folder = Path(folder)
    told = {"parts": {name: part_of_chain(world, folder, name, 2) for name in CHAINS}}
    told["switched"] = switch_of_kind(world, folder / "switched")
    for name, changes in (("ddp", {}), ("fsdp", FSDP), ("fsdp-shifts", FSDP | {"nvp": False})):
        told[f"nan-{name}"] = one_bad_batch(world, **changes)
    told["ten"] = ten_bad_batches(world, folder / "ten")
    told["full"] = full_disk(world, folder / "full", **FSDP)
    for name, changes in (("ddp", {}), ("fsdp", FSDP)):
        told[f"signal-{name}"] = signal_to_one(world, folder / f"signal-{name}", **changes)
    file = folder / "fsdp-1-fsdp.safetensors"  # of the chains above
    told["no-directory"] = caught(trainer(world).save, Checkpoints(file / "no", world))
    for name, changes in (
        ("batch", {"batch_size": 15}),
        ("accumulate", {"batch_size": 21, "accumulate": 3}),
        ("shards", FSDP | {"shard_ranks": 3}),
    ):
        told[name] = caught(lambda changes=changes: trainer(world, **changes))
    told["agree"] = [
        caught(world.agree, None),
        caught(world.agree, OSError("no room") if world.rank == 1 else None),
    ]
    told["first"] = world.first({"rank": world.rank})
    told["gather"] = world.gather(torch.full((2, 1), float(world.rank))).flatten().tolist()
    return told


def switch_of_kind(world, folder):
    """DDP, FSDP2 and DDP again in the same two processes."""
    told = []
    for number, changes in enumerate(({}, FSDP, {})):
        run, checkpoints = trainer(world, **changes), Checkpoints(folder, world)
        if number:
            run.load(checkpoints, checkpoints.latest())
        told += train(run, PARTS[number + 1])["loss"]
        run.save(checkpoints)
        checkpoints.finish()
    return told


def spoil(run, first, last):
    """NaN in the images of rank 1 in the steps from ``first`` to before ``last``."""
    good = run._noisy

    def noisy(images, step, part):
        x, y = good(images, step, part)
        bad = run.world.rank == 1 and first <= step < last
        return x * float("nan") if bad else x, y

    run._noisy = noisy


def one_bad_batch(world, **changes):
    run = trainer(world, **changes)
    spoil(run, 2, 3)
    refused = [bool(run.step()["refused"]) for _ in range(2)]
    before = all_tensors(run)
    refused.append(bool(run.step()["refused"]))
    after = all_tensors(run)
    refused.append(bool(run.step()["refused"]))
    return {
        "refused": refused,
        "count": run.step_count,
        "differ": [name for name in before if not torch.equal(before[name], after[name])],
        "moved": not torch.equal(
            after["model.blocks.0.proj_in.weight"], whole(run.model.blocks[0].proj_in.weight)
        ),
    }


def ten_bad_batches(world, folder, **changes):
    folder.mkdir(exist_ok=True)
    run = trainer(world, steps=40, log_every=8, checkpoint_every=4, **changes)
    spoil(run, 2, 40)
    error = caught(run_training, run, folder)
    return [*error, run.step_count]


def signal_to_one(world, folder, **changes):
    """SIGTERM to rank 1 in the middle of its third step, then the rest of the run."""
    folder.mkdir(exist_ok=True)
    changes |= {"log_every": 5, "checkpoint_every": 100}
    run = trainer(world, **changes)
    good = run._noisy

    def noisy(images, step, part):
        if world.rank == 1 and step == 2:
            signal.raise_signal(signal.SIGTERM)
        return good(images, step, part)

    run._noisy = noisy
    error, left = caught(run_training, run, folder), sorted(p.name for p in folder.rglob("*step-*"))
    world.barrier()  # before the run that goes on changes what is there
    run, checkpoints = trainer(world, **changes), Checkpoints(folder / "checkpoints", world)
    run.load(checkpoints, checkpoints.latest())
    step = run.step_count
    run_training(run, folder)
    if world.rank == 0:
        keep_alone(folder)
    return [*error, left, step]


def keep_alone(folder):
    """The averaged weights of a finished run, by the names of its other weights."""
    model = load_model(folder / "model.safetensors").state_dict()
    save_tensors(folder.with_suffix(".safetensors"), {f"ema.{k}": t for k, t in model.items()}, {})


def full_disk(world, folder, **changes):
    """A disk that is full for rank 1 alone at the second checkpoint."""
    run, checkpoints = trainer(world, **changes), Checkpoints(folder, world)
    run.step()
    run.save(checkpoints)
    checkpoints.finish()
    run.step()
    good = dcp.HuggingFaceStorageWriter.write_data

    def write_data(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if world.rank == 1:
        dcp.HuggingFaceStorageWriter.write_data = write_data
    try:
        run.save(checkpoints)
        error = caught(checkpoints.finish)
    finally:
        dcp.HuggingFaceStorageWriter.write_data = good
    world.barrier()
    left = sorted(path.name for path in folder.iterdir())
    run = trainer(world, **changes)
    run.load(checkpoints, checkpoints.latest())
    return [*error, left, run.step_count]


# --- the starts ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def first(folder):
    return run_ranks(2, first_start, str(folder))


@pytest.fixture(scope="module")
def chains(folder, first):
    """The parts that one process trains."""
    return {name: part_of_chain(World(), folder, name, 1) for name in CHAINS}


@pytest.fixture(scope="module")
def second(folder, chains):
    return run_ranks(2, second_start, str(folder))


@pytest.fixture(scope="module")
def alone():
    """What one process makes of a configuration, and the state it leaves."""
    done = {}

    def run(**changes):
        changes = {k: v for k, v in changes.items() if k not in ("parallel", "shard_ranks")}
        key = json.dumps(changes)
        if key not in done:
            made = trainer(World(), **changes)
            done[key] = train(made), all_tensors(made)
        return done[key]

    return run


def assert_same_curve(told, truth):
    """fp32 sums of the same numbers in another order."""
    assert len(told["loss"]) == len(truth["loss"])
    for name in ("loss", "norm"):
        assert told[name] == pytest.approx(truth[name], rel=1e-6, abs=1e-6)


def assert_same_weights(path, truth, only=""):
    """Rounding differs, which AdamW turns into steps of up to the learning rate for gradients that
    are nothing but rounding: those of the biases of keys, which softmax does not see."""
    tensors, _ = read_tensors(path)
    compared = {name: t for name, t in truth.items() if name.startswith(only)}
    assert tensors.keys() == compared.keys()
    for name, t in tensors.items():
        expected = compared[name]
        if "qkv.bias" in name and t.dim():
            (q, _, v), (q2, _, v2) = t.chunk(3), expected.chunk(3)
            t, expected = torch.cat([q, v]), torch.cat([q2, v2])
        torch.testing.assert_close(t, expected, rtol=1e-5, atol=3e-6, msg=lambda m, n=name: n + m)


def in_order(ranks, accumulate=1):
    """The images of each step, of all processes, in the order of the batch."""
    parts = list(zip(*(rank["seen"] for rank in ranks), strict=True))
    return [
        [image for part in parts[i : i + accumulate] for share in part for image in share]
        for i in range(0, len(parts), accumulate)
    ]


@pytest.mark.parametrize("name", CURVES)
def test_two_processes_train_as_one(first, alone, folder, name):
    accumulate = CURVES[name].get("accumulate", 1)
    same = ("accumulate", "checkpoint_blocks")  # by which one process gets no other numbers
    changes = {k: v for k, v in CURVES[name].items() if k not in same}
    truth, state = alone(**changes)
    if "unclipped" not in name:
        assert max(truth["norm"]) > TINY.grad_clip
    assert_same_curve(first[0][name], truth)
    assert first[1][name]["loss"] == first[0][name]["loss"]
    assert_same_weights(folder / f"{name}.safetensors", state)
    ranks = [rank[name] for rank in first]
    assert in_order(ranks, accumulate) == truth["seen"]


def test_accumulation_in_one_process(alone):
    assert_same_curve(alone(accumulate=2)[0], alone()[0])


@pytest.mark.parametrize("name", CHAINS)
def test_goes_on_with_another_number_of_processes(first, chains, second, alone, folder, name):
    truth, state = alone()
    before, after = ([rank["parts"][name] for rank in start] for start in (first, second))
    alone_part = chains[name]
    for key in ("loss", "norm"):
        told = before[0][key] + alone_part[key] + after[0][key]
        assert told == pytest.approx(truth[key], rel=1e-6, abs=1e-6)
    assert in_order(before) + alone_part["seen"] + in_order(after) == truth["seen"]
    assert_same_weights(folder / f"{name}.safetensors", state)


def test_goes_on_as_ddp_and_as_fsdp(second, alone):
    assert second[0]["switched"] == pytest.approx(alone()[0]["loss"], rel=1e-6, abs=1e-6)


def test_fsdp_in_bf16(first, alone):
    """Weights are gathered in bf16; gradients are added up in fp32, as those of DDP are."""
    ddp, fsdp = (first[0][f"{name}-bf16"] for name in ("ddp", "fsdp"))
    assert fsdp["dtypes"]["reduce_scatter"] == ["torch.float32"]
    assert "torch.bfloat16" in fsdp["dtypes"]["allgather"]
    assert ddp["dtypes"]["allreduce"] == ["torch.float32"]
    exact = alone()[0]["loss"]
    for told in (ddp, fsdp):
        assert told["loss"] == pytest.approx(exact, abs=4e-3)
        assert told["loss"] != exact
    assert fsdp["loss"] == pytest.approx(ddp["loss"], abs=2e-3)


def test_fsdp_holds_its_part_alone(first):
    for rank in first:
        held, all_ = rank["sharded"]
        assert held < 0.52 * all_


def test_records_are_means_over_the_processes(first):
    told = first[0]["records"]
    assert told["losses"][0] != told["losses"][1]
    assert told["loss"] == pytest.approx(sum(told["losses"]) / 2, rel=1e-6)
    assert len(told["logdets"]) == TINY.blocks
    assert sum(told["logdets"]) == pytest.approx(told["logdet"], rel=1e-5)
    assert first[1]["records"] == told


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp-shifts"])
def test_a_bad_batch_of_one_is_refused_by_all(second, name):
    for rank in second:
        told = rank[f"nan-{name}"]
        assert told["refused"] == [False, False, True, False]
        assert told["differ"] == []
        assert told["moved"]
        assert told["count"] == 4


def test_ten_bad_batches_stop_all(second, folder):
    for rank in second:
        kind, text, step = rank["ten"]
        assert kind == "FloatingPointError"
        assert "step 12: ten steps in a row" in text
        assert step == 12
    lines = (folder / "ten" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(3, 13))


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_signal_to_one_stops_all_with_a_checkpoint(second, alone, folder, name):
    for rank in second:
        kind, status, left, step = rank[f"signal-{name}"]
        assert (kind, status) == ("SystemExit", "0")
        assert left == ["step-00000005"]
        assert step == 5
    state = {k: t for k, t in alone()[1].items() if k.startswith("ema.")}
    assert_same_weights(folder / f"signal-{name}.safetensors", state)
    lines = (folder / f"signal-{name}" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10, 13]  # by one process, once


def test_a_disk_that_is_full_for_one(second):
    for rank in second:
        kind, text, left, step = rank["full"]
        assert kind == "OSError"
        assert "step-00000002, earlier checkpoints are intact" in text
        assert "No space left on device" in text
        assert left == ["step-00000001"]
        assert step == 1


def test_errors_reach_all(second):
    for number, rank in enumerate(second):
        assert rank["no-directory"][0] == ("RuntimeError" if number else "NotADirectoryError")
        assert "batch_size: expected a multiple of 2 (2 processes" in rank["batch"][1]
        assert "a multiple of 6 (2 processes, 3 micro-batches), got 21" in rank["accumulate"][1]
        assert "shard_ranks: expected a divisor of the 2 processes, got 3" in rank["shards"][1]
        assert rank["agree"][0] is None
        told = ["OSError", "no room"], ["RuntimeError", "rank 1 failed: OSError: no room"]
        assert rank["agree"][1] == told[1 - number]
        assert rank["first"] == {"rank": 0}
        assert rank["gather"] == [0, 0, 1, 1]


def test_processes_that_torchrun_starts_again_do_not_meet_the_dead(monkeypatch):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in rank_environment(0, 2, server.port).items():
        monkeypatch.setenv(name, value)
    first, rank, size = _meeting_place()
    assert (rank, size) == (0, 2)
    first.set("address", "of the first start")
    assert first.check(["address"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not _meeting_place()[0].check(["address"])
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.warns(UserWarning, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        _meeting_place()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    monkeypatch.setenv("RANK", "1")
    assert _meeting_place()[0].check(["address"]) is False


def test_one_process_is_a_world():
    world, x = World(), torch.ones(2)
    assert world.mean_(x) is x
    assert world.gather(x) is x
    assert world.first("it") == "it"
    world.barrier()
    world.agree(None)
    with pytest.raises(OSError, match="no room"):
        world.agree(OSError("no room"))
    with pytest.raises(ValueError, match="shard_ranks: expected a divisor of the 1 processes"):
        trainer(world, parallel="fsdp", shard_ranks=2)


# --- torchrun ------------------------------------------------------------------------------------


def torchrun(out):
    arguments = ["--data", "digits", "--patch-size", "4", "--channels", "64", "--blocks", "2"]
    arguments += ["--layers", "1", "--steps", "100000", "--batch-size", "16", "--precision", "fp32"]
    arguments += ["--checkpoint-every", "100000", "--log-every", "5", "--held-out", "20"]
    arguments += ["--peak-tflops", "1", "--samples", "0", "--out", str(out)]
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return [*program, "2", "-m", "flowops", "train", *arguments]


def test_torchrun_that_is_stopped_leaves_a_checkpoint(tmp_path):
    """Though its own status tells of the signal. One to a rank, status 0: tests/faults.py."""
    metrics, log = tmp_path / "run" / "metrics.jsonl", tmp_path / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            torchrun(tmp_path / "run"), stdout=file, stderr=subprocess.STDOUT
        )
    try:
        end = time.monotonic() + 300
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        process.terminate()
        assert process.wait(300) == 1, log.read_text()
    finally:
        process.kill()
        process.wait()
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    checkpoints = Checkpoints(path.parent, World())
    assert checkpoints.latest() == path
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert int(path.name.removeprefix("step-")) == steps[-1]
    assert steps == list(range(5, steps[-1] + 1, 5))
