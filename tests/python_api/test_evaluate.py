import dataclasses
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_helpers import run_ranks, run_together
from flowops.api.checkpoint import save_model
from flowops.api.cli import main
from flowops.api.data import Images, scale_pixels
from flowops.api.evaluate import (
    MANY_CLASSES,
    Evaluation,
    _moments,
    _pooled,
    evaluate,
    image_batches,
    noisy_batches,
    print_evaluation,
    share,
)
from flowops.api.parallel import World
from flowops.api.prepare import PrepareConfig, prepare
from flowops.api.store import LatentStore
from flowops.api.tarflow import TarFlow
from flowops.api.train_config import TrainConfig
from flowops.api.trainer import add_noise

CONFIG = TrainConfig(noise_std=0.1)
CPU = torch.device("cpu")


def make_model(num_classes=3, in_channels=1, img_size=8):
    """One that tells images and classes apart."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = TarFlow(in_channels, img_size, 4, 64, 2, 1, num_classes=num_classes)
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape)
    return model


def make_images(n=37, channels=1, size=8, classes=3):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (n, channels, size, size), generator=generator)
    labels = torch.randint(0, classes, (n,), generator=generator) if classes else None
    names = tuple(f"class {k}" for k in range(classes))
    return Images(pixels.to(torch.uint8), labels, names)


def direct(model, data, config=CONFIG):
    """Noisy images in one piece, their bits under the true label, and by class."""
    x = add_noise(scale_pixels(data.pixels), config, torch.tensor([0x5EED, 0]))
    with torch.no_grad():
        bits = model.bits_per_dim(x, data.labels)
        by_class = [
            model.bits_per_dim(x, torch.full_like(data.labels, k)) for k in range(model.num_classes)
        ]
    return x, bits.double(), torch.stack(by_class, 1)


# --- parts ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(1, 9))
def test_shares_take_each_image_once(n, size):
    shares = [share(n, World(rank, size)) for rank in range(size)]
    assert [i for images in shares for i in images] == list(range(n))
    lengths = [len(images) for images in shares]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == math.ceil(n / size)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.floats(-1, 1), max_size=6), min_size=1, max_size=5),
    st.sampled_from([0.0, 1e6]),
)
def test_moments_of_parts_pool_to_those_of_all(parts, far):
    values = [v + far for part in parts for v in part]
    if not values:
        return
    table = torch.stack(
        [torch.stack(_moments(torch.tensor(p, dtype=torch.float64) + far)) for p in parts]
    )
    n, mean, variance = _pooled(table)
    assert n == len(values)
    assert mean == pytest.approx(np.mean(values), rel=1e-12, abs=1e-12)
    expected = np.var(values, ddof=1) if n > 1 else 0
    assert variance == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("noise", ["gaussian", "uniform"])
def test_noise_depends_on_the_number_of_the_image_alone(noise):
    data, config = make_images(), dataclasses.replace(CONFIG, noise=noise)
    whole, _, _ = direct(make_model(), data, config)
    for images, batch_size in ((None, 256), (None, 5), (range(11, 30), 4), (range(36, 37), 9)):
        batches = list(noisy_batches(data, config, CPU, batch_size, images))
        taken = slice(None) if images is None else slice(images.start, images.stop)
        assert torch.equal(torch.cat([x for x, _ in batches]), whole[taken])
        assert torch.equal(torch.cat([y for _, y in batches]), data.labels[taken])
        assert all(len(x) <= batch_size for x, _ in batches)
    assert list(noisy_batches(data, config, CPU, images=range(3, 3))) == []


@pytest.mark.parametrize(("side", "size", "first"), [(9, 8, 0), (12, 8, 2), (11, 8, 1), (8, 8, 0)])
def test_the_centre_of_larger_images_is_taken(side, size, first):
    data = make_images(4, size=side)
    (start, found), = image_batches(data, range(4), 10, size)  # fmt: skip
    square = slice(first, first + size)
    assert start == 0
    assert torch.equal(found.pixels, data.pixels[:, :, square, square])


# --- figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 8, 37, 256])
def test_figures_are_those_of_all_images_at_once(batch_size):
    model, data = make_model(), make_images()
    _, bits, by_class = direct(model, data)
    found = evaluate(model, data, CONFIG, batch_size=batch_size)
    assert found.bits_per_dim == pytest.approx(bits.mean().item(), abs=1e-6)
    assert found.standard_error == pytest.approx(bits.std().item() / math.sqrt(37), rel=1e-4)
    assert found.accuracy == (by_class.argmin(1) == data.labels).double().mean().item()
    assert 0 < found.accuracy < 1
    assert (found.images, found.classified, found.unit) == (37, 37, "bits per dim")
    assert evaluate(model, data, CONFIG, batch_size=batch_size) == found


def test_the_first_images_are_classified():
    model, data = make_model(), make_images()
    _, _, by_class = direct(model, data)
    right = (by_class.argmin(1) == data.labels).double()
    every = evaluate(model, data, CONFIG)
    for n in (1, 10, 37, 99):
        found = evaluate(model, data, CONFIG, n)
        assert found.classified == min(n, 37)
        assert found.accuracy == pytest.approx(right[:n].mean().item(), abs=1e-12)
        assert found.bits_per_dim == every.bits_per_dim
    for nothing in (False, 0):
        found = evaluate(model, data, CONFIG, nothing)
        assert (found.accuracy, found.classified) == (None, 0)
    assert evaluate(model, data, CONFIG, True) == every


def test_what_is_not_classified():
    classes = MANY_CLASSES + 1
    many, data = make_model(classes), make_images(3, classes=classes)
    assert evaluate(many, data, CONFIG).accuracy is None
    assert evaluate(many, data, CONFIG, True).classified == 3
    unlabelled = evaluate(make_model(), make_images(3, classes=0), CONFIG, True)
    assert unlabelled.accuracy is None
    assert evaluate(make_model(0), make_images(3), CONFIG, True).accuracy is None


def test_one_image_has_no_standard_error():
    found = evaluate(make_model(), make_images(1), CONFIG)
    assert (found.images, found.standard_error) == (1, 0.0)


def test_latents_are_taken_as_they_are(tmp_path):
    latents = np.random.default_rng(0).normal(0, 3, (9, 2, 4, 4)).astype(np.float16)
    np.save(tmp_path / "latents.npy", latents)
    model = make_model(0, in_channels=2, img_size=4)
    found = evaluate(model, LatentStore(tmp_path / "latents.npy"), CONFIG, batch_size=4)
    x = add_noise(torch.from_numpy(latents).float(), CONFIG, torch.tensor([0x5EED, 0]))
    with torch.no_grad():
        nats = -model.log_prob(x).double().mean().item()
    assert found.bits_per_dim == pytest.approx(nats / (32 * math.log(2)), abs=1e-5)
    assert found.unit == "bits per latent dim"


def test_bf16_is_near_fp32():
    model, data = make_model(), make_images()
    full, half = (evaluate(model, data, CONFIG, precision=p) for p in ("fp32", "bf16"))
    assert 0 < abs(half.bits_per_dim - full.bits_per_dim) < 0.02


def test_progress_counts_passes():
    seen = []
    evaluate(
        *(make_model(), make_images(10), CONFIG, 5),
        batch_size=4,
        on_batch=lambda done, total: seen.append((done, total)),
    )
    # ten images, then three classes of five images, four pairs at a time in batches of four images
    assert seen == [(k, 25) for k in (4, 8, 10, 14, 18, 22, 25)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": make_images(4, size=7)}, "data: expected images of at least 8 pixels"),
        ({"data": make_images(4, channels=3)}, "data: expected 1 channels, those of the model"),
        ({"data": make_images(4, classes=2)}, "data: expected 3 classes, got 2"),
        ({"data": make_images(0)}, "data: expected at least one image"),
        ({"batch_size": 0}, "batch_size: expected a positive number of images, got 0"),
        ({"classify": -1}, "classify: expected a number of images, at least 0, got -1"),
        ({"precision": "tf32"}, "precision: tf32 needs tensor cores of a CUDA device"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    arguments = {"data": make_images(4), **changes}
    with pytest.raises(ValueError, match=message):
        evaluate(make_model(), config=CONFIG, **arguments)


def test_what_is_printed(capsys):
    from rich.console import Console

    console = Console(width=200)
    print_evaluation(console, Evaluation(1.23456, 0.01, 0.5, 20, 20), "uniform, 1/256")
    print_evaluation(console, Evaluation(-2, 0, 0.25, 20, 8, "bits per latent dim"), "no")
    print_evaluation(console, Evaluation(1, 0, None, 20), "no")
    assert capsys.readouterr().out.splitlines() == [
        "1.2346 ± 0.0100 bits per dim (20 held-out images, uniform, 1/256 noise)",
        "50.0% classified right by Bayes' rule",
        "-2.0000 ± 0.0000 bits per latent dim (20 held-out images, no noise)",
        "25.0% classified right by Bayes' rule (the first 8)",
        "1.0000 ± 0.0000 bits per dim (20 held-out images, no noise)",
    ]


# --- several processes ---------------------------------------------------------------------------


class Broken:
    """Images of which those of the second process can't be read."""

    def __init__(self, data):
        self.data, self.class_names = data, data.class_names

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if index.max() > 20:
            raise OSError("shard-1.npy: ends before image 3; it was cut")
        return self.data[index]


def in_each_rank(world):
    model, found = make_model(), {}
    for n in (37, 1):
        for classify in (True, 5):
            result = evaluate(model, make_images(n), CONFIG, classify, world=world, batch_size=8)
            found[f"{n} {classify}"] = dataclasses.asdict(result)
    try:
        evaluate(model, Broken(make_images()), CONFIG, world=world)
    except (OSError, RuntimeError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    return found


def test_processes_find_what_one_finds():
    alone = in_each_rank(World())
    first, second = run_ranks(2, in_each_rank, timeout=300)
    errors = [found.pop("error") for found in (alone, first, second)]
    assert first == second
    assert first.keys() == alone.keys()
    for key, found in first.items():
        expected = alone[key]
        for name in ("bits_per_dim", "standard_error"):
            assert found[name] == pytest.approx(expected[name], abs=1e-6)
        for name in ("accuracy", "images", "classified", "unit"):
            assert found[name] == expected[name]
    told = "OSError: shard-1.npy: ends before image 3; it was cut"
    assert errors == [told, f"RuntimeError: rank 1 failed: {told}", told]


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    names = tuple(str(k) for k in range(3))
    config = dataclasses.asdict(CONFIG)
    save_model(make_model(3, 3), path, train_config=config, class_names=names)
    return str(path)


@pytest.fixture(scope="module")
def store_path(tmp_path_factory):
    """Images of 10 pixels a side."""
    folder, data = tmp_path_factory.mktemp("store"), make_images(21, 3, 10)
    np.savez(
        folder / "images.npz",
        data=data.pixels.reshape(21, -1).numpy(),
        labels=data.labels.numpy() + 1,
    )
    prepare(str(folder / "images.npz"), folder / "store", PrepareConfig(img_size=10))
    return str(folder / "store")


def test_eval_takes_all_of_a_store(model_path, store_path, capsys):
    assert main(["eval", model_path, "--data", store_path]) == 0
    shown = capsys.readouterr().out
    found = evaluate(make_model(3, 3), make_images(21, 3, 10), CONFIG)
    assert shown.splitlines() == [
        f"{found.bits_per_dim:.4f} ± {found.standard_error:.4f} bits per dim (21 held-out images, "
        f"gaussian, std 0.1 noise)",
        f"{found.accuracy:.1%} classified right by Bayes' rule",
    ]


def test_eval_over_processes_prints_once(model_path, store_path, capsys):
    options = ["eval", model_path, "--data", store_path, "--classify", "4", "--batch-size", "3"]
    assert main(options) == 0
    shown = capsys.readouterr().out
    assert "Bayes' rule (the first 4)" in shown
    assert run_together([[sys.executable, "-m", "flowops", *options]] * 2, 300) == [shown, ""]


def test_eval_of_data_in_memory(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    names = tuple("abcdefghij")
    save_model(make_model(10), path, train_config=dataclasses.asdict(CONFIG), class_names=names)
    command = ["eval", str(path), "--data", "digits", "--classify", "0"]
    assert main([*command, "--held-out", "0"]) == 0
    shown = capsys.readouterr().out
    assert "the classes of the data have other names than those of the model" in shown
    assert "(1797 held-out images" in shown
    assert "Bayes" not in shown


def test_eval_refuses_in_a_line(model_path, store_path, tmp_path, capsys):
    save_model(make_model(), tmp_path / "bare.safetensors")
    for arguments, message in (
        ([str(tmp_path / "bare.safetensors")], "holds no training configuration, so its noise is"),
        ([model_path, "--fid", "-1"], "fid: expected a number of samples, at least 0, got -1"),
        ([model_path, "--data", "digits"], "data: expected 3 channels, those of the model, got 1"),
    ):
        assert main(["eval", *arguments]) == 1
        shown = capsys.readouterr()
        assert message in shown.err
        assert len(shown.err.splitlines()) == 1
