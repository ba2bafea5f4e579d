import dataclasses
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowops.api import TarFlow, load_model
from flowops.api.data import Images, load_images, scale_pixels
from flowops.api.evaluate import evaluate
from flowops.api.parallel import World
from flowops.api.run_checkpoints import Checkpoints
from flowops.api.train import run_training
from flowops.api.train_config import TrainConfig
from flowops.api.trainer import Trainer, add_noise, build_model

TINY = TrainConfig(
    patch_size=4,
    channels=64,
    blocks=2,
    layers=1,
    steps=12,
    batch_size=16,
    warmup=2,
    shift=1,
    checkpoint_every=5,
    log_every=1,
    precision="fp32",
)


@pytest.fixture(scope="module")
def digits():
    return load_images("digits")


def trainer(config, data):
    return Trainer(config, build_model(config, data), data)


def checkpoints(path):
    return Checkpoints(path / "checkpoints", World())


def save(run, path):
    """Writes a checkpoint and returns where it is."""
    all_of_them = checkpoints(path)
    run.save(all_of_them)
    all_of_them.finish()
    return all_of_them.latest()


def load(run, path):
    run.load(checkpoints(path), checkpoints(path).latest())


def spoil(run, factor):
    """Multiplies the images of a step by ``factor(step)``."""
    good = run._noisy

    def noisy(images, step, part):
        x, y = good(images, step, part)
        return x * factor(step), y

    run._noisy = noisy
    return good


def weights(model):
    return {k: t.clone() for k, t in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_learns_and_leaves_its_files(digits, tmp_path):
    config = dataclasses.replace(TINY, steps=60, lr=5e-3)
    train, held_out = digits.split(200)
    run = trainer(config, train)
    before = evaluate(run.model, held_out, config)
    records = []
    model = run_training(run, tmp_path, records.append)
    after = evaluate(model, held_out, config)
    assert after.bits_per_dim < before.bits_per_dim - 0.5
    assert after.images == 200
    assert 0 < after.standard_error < 0.1
    assert len(records) == 60
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in written] == list(range(1, 61))
    assert written[-1]["loss"] == pytest.approx(records[-1]["loss"])
    assert_same(weights(load_model(tmp_path / "model.safetensors")), weights(model))
    assert not list(tmp_path.glob(".*tmp"))


@pytest.mark.parametrize("changes", [{}, {"nvp": False}, {"noise": "uniform"}])
def test_resume_is_exact(digits, tmp_path, changes):
    config = dataclasses.replace(TINY, **changes)
    whole = trainer(config, digits)
    losses = [whole.step()["loss"] for _ in range(12)]
    first = trainer(config, digits)
    for _ in range(5):
        first.step()
    save(first, tmp_path)
    second = trainer(config, digits)
    load(second, tmp_path)
    assert [second.step()["loss"] for _ in range(7)] == losses[5:]
    assert_same(weights(second.model), weights(whole.model))
    assert_same(second.ema, whole.ema)


def test_resume_with_other_settings_is_refused(digits, tmp_path):
    path = save(trainer(TINY, digits), tmp_path)
    with pytest.raises(ValueError, match=r"lr: .*step-0.* was trained with 0.002, this run has"):
        load(trainer(dataclasses.replace(TINY, lr=1e-3), digits), tmp_path)
    load(trainer(dataclasses.replace(TINY, log_every=7, accumulate=2), digits), tmp_path)
    (path / "state.json").write_text("{")
    with pytest.raises(ValueError, match="is not a checkpoint of a training run"):
        trainer(TINY, digits).load(checkpoints(tmp_path), path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d[torch.arange(1700)], "other images: images 1797, this run has 1700"),
        (
            lambda d: Images(d.pixels.repeat(1, 3, 2, 2), d.labels, d.class_names),
            "img_size 8, this run has 16; channels 1, this run has 3",
        ),
        (lambda d: Images(d.pixels, None), "classes 10, this run has 0"),
        (lambda d: d[torch.arange(1796, -1, -1)], "trained on as many images, but other ones"),
        (
            lambda d: Images(d.pixels, (d.labels + 1) % 10, d.class_names),
            "trained on as many images, but other ones",
        ),
    ],
)
def test_resume_on_other_data_is_refused(digits, tmp_path, change, match):
    save(trainer(TINY, digits), tmp_path)
    load(trainer(TINY, Images(digits.pixels.clone(), digits.labels, digits.class_names)), tmp_path)
    with pytest.raises(ValueError, match=rf"data: .*step-00000000 was .*{match}"):
        load(trainer(TINY, change(digits)), tmp_path)


def test_checkpointed_blocks_train_to_the_same_bits(digits, tmp_path):
    """Also from the middle of a run that did without."""
    kinds = (False, True, "selective")
    runs = [trainer(dataclasses.replace(TINY, checkpoint_blocks=c), digits) for c in kinds]
    for run in runs:
        assert run.model.checkpoint_blocks == run.config.checkpoint_blocks
        for _ in range(2):
            run.step()
    assert_same(weights(runs[0].model), weights(runs[1].model))
    assert_same(weights(runs[0].model), weights(runs[2].model))
    save(runs[0], tmp_path)
    load(runs[1], tmp_path)
    assert runs[0].step()["loss"] == runs[1].step()["loss"]


class NoReads(TorchDispatchMode):
    """Raises where a GPU would have to be waited for."""

    READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "_unique2")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in self.READS, function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes", [{}, {"nvp": False}, {"noise": "uniform"}, {"checkpoint_blocks": True}]
)
def test_a_step_reads_nothing_back(digits, monkeypatch, changes):
    run = trainer(dataclasses.replace(TINY, **changes), digits)
    monkeypatch.setattr(TarFlow, "_check_labels", lambda *_: None)  # looks at labels on a CPU only
    with NoReads():
        for _ in range(3):
            record = run.step()
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            record["loss"].item()
    assert run.step_count == 3


def test_records_are_read_together(digits, tmp_path):
    config = dataclasses.replace(TINY, log_every=5, checkpoint_every=100)
    run, calls = trainer(config, digits), []
    run_training(run, tmp_path, lambda record: calls.append((run.step_count, record["step"])))
    assert [step for _, step in calls] == list(range(1, 13))
    assert sorted({count for count, _ in calls}) == [5, 10, 12]
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in written] == [5, 10, 12]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_step_and_saves(digits, tmp_path, number):
    run = trainer(TINY, digits)
    calm = trainer(TINY, digits)
    for _ in range(4):
        calm.step()

    def on_gradient(gradient):
        if run.step_count == 3:
            signal.raise_signal(number)

    run.model.blocks[0].pos_embed.register_hook(on_gradient)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as caught:
        run_training(run, tmp_path)
    if number == signal.SIGTERM:
        assert caught.value.code == 0
    resumed = trainer(TINY, digits)
    load(resumed, tmp_path)
    assert resumed.step_count == 4
    assert_same(weights(resumed.model), weights(calm.model))
    assert signal.getsignal(number) is before


def test_a_bad_step_is_refused_and_ten_stop_the_run(digits, tmp_path):
    run = trainer(dataclasses.replace(TINY, steps=40), digits)
    run.step()
    before = weights(run.model)
    run.model.blocks[0].proj_in.weight.data[0, 0] = float("nan")
    record = run.step()
    assert record["refused"] == 1
    after = weights(run.model)
    after["blocks.0.proj_in.weight"][0, 0] = before["blocks.0.proj_in.weight"][0, 0]
    assert_same(before, after)
    assert all(bool(t.isfinite().all()) for t in run.ema.values())
    with pytest.raises(FloatingPointError, match="ten steps in a row"):
        run_training(run, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["loss"] == "nan" for line in lines)


@pytest.mark.parametrize("nvp", [True, False])
def test_a_refused_step_leaves_optimizer_and_averages_alone(digits, nvp):
    run = trainer(dataclasses.replace(TINY, nvp=nvp), digits)
    run.step()
    names = ("model", "ema")
    before = {name: {k: t.clone() for k, t in state(run, name).items()} for name in names}
    moments = [{k: t.clone() for k, t in s.items()} for s in run.optimizer.state.values()]
    good = spoil(run, lambda step: float("nan"))
    assert run.step()["refused"]
    for name in names:
        assert_same(before[name], state(run, name))
    for old, new in zip(moments, run.optimizer.state.values(), strict=True):
        assert_same(old, new)
    run._noisy = good
    assert not run.step()["refused"]
    assert not torch.equal(run.ema["blocks.0.pos_embed"], before["ema"]["blocks.0.pos_embed"])


def state(run, name):
    return run.model.state_dict() if name == "model" else run.ema


def test_ten_refused_steps_between_two_readings_stop_the_run(digits, tmp_path):
    config = dataclasses.replace(TINY, steps=40, log_every=16, checkpoint_every=16)
    run = trainer(config, digits)
    spoil(run, lambda step: float("nan") if step >= 3 else 1)
    with pytest.raises(FloatingPointError, match="step 13: ten steps in a row"):
        run_training(run, tmp_path)
    assert checkpoints(tmp_path).latest() is None
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(4, 14))


def test_one_refused_step_does_not_stop_the_run(digits):
    run = trainer(TINY, digits)
    spoil(run, lambda step: float("inf") if step == 1 else 1)
    assert [run.step()["refused"] for _ in range(4)] == [0, 1, 0, 0]
    assert all(bool(t.isfinite().all()) for t in run.model.state_dict().values())


def test_batches_are_a_function_of_seed_and_step(digits):
    run, again = trainer(TINY, digits), trainer(TINY, digits)
    for step in (0, 3, 500):
        for a, b in zip(run.batch(step), again.batch(step), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(run.batch(0)[0], run.batch(1)[0])
    other = trainer(dataclasses.replace(TINY, seed=1), digits)
    assert not torch.equal(run.batch(0)[0], other.batch(0)[0])


def test_an_epoch_shows_every_image_once():
    pixels = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 1, 4, 4).contiguous()
    config = dataclasses.replace(TINY, batch_size=8, noise_std=0.0, shift=0)
    run = trainer(config, Images(pixels, None))
    for epoch in range(2):
        seen = torch.cat([run.batch(5 * epoch + k)[0][:, 0, 0, 0] for k in range(5)])
        assert torch.equal(seen.sort().values, scale_pixels(pixels)[:, 0, 0, 0])


def test_labels_are_dropped_at_the_asked_rate(digits):
    run = trainer(dataclasses.replace(TINY, batch_size=1000, drop_label=0.3), digits)
    dropped = (run.batch(0)[1] == -1).float().mean().item()
    assert abs(dropped - 0.3) < 0.05
    run = trainer(dataclasses.replace(TINY, drop_label=0.0), digits)
    assert (run.batch(0)[1] >= 0).all()


def test_evaluation_draws_the_same_noise_each_time(digits):
    run = trainer(TINY, digits)
    part = digits[torch.arange(300)]
    assert evaluate(run.model, part, TINY) == evaluate(run.model, part, TINY)
    x = scale_pixels(part.pixels)
    noisy = add_noise(x, TINY, torch.tensor([1, 1]))
    assert abs((noisy - x).std().item() - TINY.noise_std) < 0.005


def command(out, *extra):
    arguments = ["--data", "digits", "--patch-size", "4", "--channels", "64", "--blocks", "2"]
    arguments += ["--layers", "1", "--steps", "40", "--batch-size", "16", "--precision", "fp32"]
    arguments += ["--checkpoint-every", "1", "--out", str(out), "--held-out", "20"]
    return [sys.executable, "-m", "flowops", "train", *arguments, *extra]


def test_killed_at_any_moment_it_goes_on_to_the_same_model(tmp_path):
    subprocess.run(command(tmp_path / "calm"), check=True, capture_output=True)
    out = tmp_path / "killed"
    generator = torch.Generator().manual_seed(7)

    def steps():
        return set((out / "checkpoints").glob("step-*"))

    for _ in range(3):
        before = steps()
        with subprocess.Popen(command(out, "--resume"), stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and not steps() - before:
                time.sleep(0.01)
            time.sleep(0.1 * torch.rand(1, generator=generator).item())
            process.send_signal(signal.SIGKILL)
    subprocess.run(command(out, "--resume"), check=True, capture_output=True)
    same = [load_model(tmp_path / name / "model.safetensors") for name in ("calm", "killed")]
    assert_same(*(weights(model) for model in same))
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [10, 20, 30, 40]
    assert len(steps()) == 2
    assert not list((out / "checkpoints").glob(".*"))


def test_settings_that_do_not_fit_the_data(digits):
    with pytest.raises(ValueError, match="batch_size: expected at most the 1797 training images"):
        trainer(dataclasses.replace(TINY, batch_size=5000), digits)
    with pytest.raises(ValueError, match="crop: expected at most the images' 8 pixels, got 9"):
        trainer(dataclasses.replace(TINY, crop=9), digits)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of 3 .*, got 16"):
        Trainer(dataclasses.replace(TINY), build_model(TINY, digits), digits, World(size=3))
    with pytest.raises(ValueError, match="shift: expected less than the image"):
        trainer(dataclasses.replace(TINY, shift=8), digits)
    with pytest.raises(ValueError, match="patch_size: expected a divisor"):
        build_model(dataclasses.replace(TINY, patch_size=3), digits)
    with pytest.raises(ValueError, match="held_out: expected from 1 to 1796"):
        digits.split(1797)
