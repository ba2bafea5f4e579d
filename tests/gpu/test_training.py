"""A training run on a GPU: nothing waits for the host, and it goes on exactly where it was."""

import dataclasses

import pytest
import torch

pytest.importorskip("safetensors")  # which the other tests of a GPU do without

from flowops.api.data import Images
from flowops.api.parallel import World
from flowops.api.run_checkpoints import Checkpoints
from flowops.api.train import run_training
from flowops.api.train_config import TrainConfig
from flowops.api.trainer import Trainer, build_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CONFIG = TrainConfig(
    patch_size=2,
    channels=128,
    blocks=2,
    layers=2,
    batch_size=16,
    accumulate=2,
    steps=12,
    warmup=2,
    flip=True,
    crop=14,
    precision="bf16",
    log_every=4,
    checkpoint_every=4,
)
by_kind = pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "fp32", "noise": "uniform"},
        {"checkpoint_blocks": "selective"},
        {"compile": True, "checkpoint_blocks": "selective"},
        {"nvp": False},
    ],
    ids=["bf16", "fp32", "selective", "compiled", "shifts"],
)


def data():
    pixels = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)
    return Images(pixels, torch.arange(64) % 4, tuple("abcd"))


def trainer(config, images):
    return Trainer(config, build_model(config, images).cuda(), images)


@by_kind
def test_a_step_waits_for_nothing(changes):
    run = trainer(dataclasses.replace(CONFIG, **changes), data())
    run.step()  # compiles and tunes
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        records = [run.step() for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(bool(torch.isfinite(record["loss"])) for record in records)
    assert not any(bool(record["refused"]) for record in records)


@by_kind
def test_a_resumed_run_goes_on_with_the_same_losses(tmp_path, changes):
    config, images = dataclasses.replace(CONFIG, **changes), data()
    whole = []
    run_training(trainer(config, images), tmp_path, whole.append)
    first = trainer(config, images)
    for _ in range(4):
        first.step()
    checkpoints = Checkpoints(tmp_path / "other", World(device=torch.device("cuda")))
    first.save(checkpoints)
    first.step()  # while it is being written
    checkpoints.finish()
    second = trainer(config, images)
    second.load(checkpoints, checkpoints.latest())
    losses = [second.step()["loss"].item() for _ in range(8)]
    assert losses == pytest.approx([record["loss"] for record in whole[4:]], rel=1e-6, abs=1e-6)


def test_it_learns(tmp_path):
    config = dataclasses.replace(CONFIG, steps=60, lr=2e-3)
    records = []
    run_training(trainer(config, data()), tmp_path, records.append)
    assert records[-1]["loss"] < records[0]["loss"] - 0.1
    assert 0 < records[-1]["mfu"] < 1
