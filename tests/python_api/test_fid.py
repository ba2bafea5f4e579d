import importlib
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from dist_helpers import run_ranks
from flowops import noise_normal
from flowops.api.cli import main
from flowops.api.data import Images
from flowops.api.fid import (
    WEIGHTS,
    compute_fid,
    find_weights,
    load_inception,
    sample_labels,
    to_pixels,
)
from flowops.api.parallel import World
from flowops.api.store import LatentStore
from flowops.api.tarflow import TarFlow


def works(name):
    """A torchvision for another torch fails to import with a RuntimeError."""
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError):
        return False
    return True


needs_metric = pytest.mark.skipif(
    not works("torchmetrics.image.fid"), reason="torchmetrics does not import here"
)
needs_network = pytest.mark.skipif(
    not works("torch_fidelity"), reason="torch-fidelity does not import here"
)


class Feature(nn.Module):
    """Eight numbers of an image: a fixed mixture of its pixels, then a bend."""

    num_features = 8

    def __init__(self, numbers=3 * 8 * 8):
        super().__init__()
        weights = noise_normal((numbers, 8), rng=torch.tensor([5, 0])) / math.sqrt(numbers)
        self.register_buffer("weights", weights)

    def forward(self, pixels):
        assert pixels.dtype == torch.uint8
        return torch.tanh((pixels.flatten(1).float() / 128 - 1) @ self.weights)


def make_model(num_classes=3, in_channels=1):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = TarFlow(in_channels, 8, 4, 64, 2, 1, num_classes=num_classes)
        for p in model.parameters():
            p += 0.03 * torch.randn(p.shape)
    return model


def make_images(n=41, channels=1, size=8, classes=3):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (n, channels, size, size), generator=generator)
    labels = torch.randint(0, classes, (n,), generator=generator) if classes else None
    return Images(pixels.to(torch.uint8), labels, tuple(f"class {k}" for k in range(classes)))


def distance(real, drawn):
    """Of the Gaussians through two sets of features, in fp64, by symmetric matrices alone."""

    def root(matrix):
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T

    real, drawn = real.double().numpy(), drawn.double().numpy()
    a, b = np.cov(real, rowvar=False), np.cov(drawn, rowvar=False)
    cross = np.linalg.eigvalsh(root(a) @ b @ root(a)).clip(0)
    means = np.square(real.mean(0) - drawn.mean(0)).sum()
    return means + np.trace(a) + np.trace(b) - 2 * np.sqrt(cross).sum()


# --- parts ---------------------------------------------------------------------------------------


def test_pixels_are_the_nearest_levels():
    levels = torch.arange(256)
    assert torch.equal(to_pixels(levels / 127.5 - 1), levels.to(torch.uint8))
    images = torch.tensor([-7.0, -1.0, -0.9961, 1.0, 3.0])
    assert to_pixels(images).tolist() == [0, 0, 0, 255, 255]


def test_labels_have_the_frequencies_of_the_data():
    data = Images(torch.zeros(10, 1, 8, 8), torch.tensor([2, 0, 0, 2, 0, 2, 0, 2, 0, 1]))
    assert sample_labels(data, 10, 3).bincount().tolist() == [5, 1, 4]
    assert sample_labels(data, 40, 3).bincount().tolist() == [20, 4, 16]
    assert sample_labels(data, 4, 3).tolist() == [0, 0, 1, 2]
    assert sample_labels(Images(data.pixels, None), 5, 3).tolist() == [0, 1, 2, 0, 1]
    assert sample_labels(data, 5, 0) is None


# --- the distance --------------------------------------------------------------------------------


@needs_metric
@pytest.mark.parametrize("options", [{}, {"guidance": 1.0, "method": "jacobi", "tol": 0.0}])
def test_distance_of_the_samples_that_the_model_draws(options):
    model, data, feature = make_model(), make_images(size=10), Feature()
    centre = data.pixels[:, :, 1:9, 1:9]
    labels = sample_labels(data, 33, 3)
    drawn = model.sample(33, labels, rng=torch.tensor([4, 0]), denoise_std=0.1, **options)
    expected = distance(
        *(feature(pixels.expand(-1, 3, -1, -1)) for pixels in (centre, to_pixels(drawn)))
    )
    assert expected > 0.1
    for batch_size in (7, 100):
        found = compute_fid(
            *(model, data, 33),
            feature=feature,
            denoise_std=0.1,
            seed=4,
            batch_size=batch_size,
            **options,
        )
        assert found == pytest.approx(expected, rel=1e-4)
    assert compute_fid(model, data, 33, feature=feature) != pytest.approx(expected, rel=1e-2)


@needs_metric
def test_distance_without_classes_in_colour():
    model, data, feature, seen = make_model(0, 3), make_images(channels=3), Feature(), []
    found = compute_fid(
        *(model, data, 20),
        feature=feature,
        batch_size=16,
        on_batch=lambda done, total: seen.append((done, total)),
    )
    drawn = to_pixels(model.sample(20, rng=torch.tensor([0, 0])))
    assert found == pytest.approx(distance(feature(data.pixels), feature(drawn)), rel=1e-4)
    assert seen == [(k, 61) for k in (16, 32, 41, 57, 61)]


def in_each_rank(world):
    model, feature = make_model(), Feature()
    return [
        compute_fid(model, make_images(n), drawn, world=world, feature=feature, batch_size=8)
        for n, drawn in ((41, 33), (2, 3))
    ]


@needs_metric
def test_processes_find_what_one_finds():
    alone = in_each_rank(World())
    first, second = run_ranks(2, in_each_rank, timeout=300)
    assert first == second
    assert first == pytest.approx(alone, rel=1e-5)


@needs_metric
def test_what_does_not_fit_is_named(tmp_path):
    np.save(tmp_path / "latents.npy", np.zeros((4, 1, 8, 8), np.float32))
    for model, data, n, message in (
        (make_model(), make_images(), 1, "n: FID needs at least two images, got 1"),
        (make_model(), make_images(1), 9, "data: FID needs at least two images, got 1"),
        (make_model(0, 2), make_images(9, 2), 9, "data: FID needs grey or RGB images of 256 level"),
        (make_model(0), LatentStore(tmp_path / "latents.npy"), 9, "levels, got latents"),
        (make_model(), make_images(9, size=7), 9, "data: expected images of at least 8 pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            compute_fid(model, data, n, feature=Feature())


# --- the network ---------------------------------------------------------------------------------


def test_weights_are_never_downloaded(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cached = tmp_path / "checkpoints" / WEIGHTS
    with pytest.raises(FileNotFoundError, match=f"put https://.*{WEIGHTS} at {cached}, or name"):
        find_weights()
    with pytest.raises(FileNotFoundError, match="fid_weights: no such file: /nowhere/weights.pth"):
        find_weights("/nowhere/weights.pth")
    cached.parent.mkdir()
    cached.touch()
    assert find_weights() == cached


def test_missing_packages_are_named_before_any_work(monkeypatch, capsys, tmp_path):
    import dataclasses

    from flowops.api.checkpoint import save_model
    from flowops.api.train_config import TrainConfig

    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    model = tmp_path / "model.safetensors"
    save_model(make_model(), model, train_config=dataclasses.asdict(TrainConfig()))
    assert main(["eval", str(model), "--data", "/nowhere", "--fid", "10"]) == 1
    shown = capsys.readouterr().err
    assert "FID needs torchmetrics and torch-fidelity, pip install 'flowops[fid]'" in shown


@needs_network
def test_network_loads_from_disk_without_running_code(monkeypatch, tmp_path):
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    def refused(*arguments, **options):
        raise AssertionError("nothing is to be downloaded")

    class Untrained(fidelity.FeatureExtractorInceptionV3):
        def load_state_dict(self, tensors):
            pass

    monkeypatch.setattr(fidelity, "load_state_dict_from_url", lambda *a, **k: None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Untrained("any", ["2048"])
    monkeypatch.setattr(fidelity, "load_state_dict_from_url", refused)
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    pixels = make_images(2, 3, 16).pixels
    inception = load_inception(path)
    assert inception(pixels).shape == (2, inception.num_features)
    assert torch.equal(inception(pixels), network(pixels)[0])

    tensors = network.state_dict()
    del tensors["fc.bias"]
    torch.save(tensors, path)
    with pytest.raises(ValueError, match=r"weights.pth: not the weights of FID.*Missing.*fc\.bias"):
        load_inception(path)


@needs_network
def test_code_in_a_pickle_is_not_run(tmp_path):
    path, ran = tmp_path / "weights.pth", tmp_path / "ran"

    class Code:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    torch.save({"weights": Code()}, path)
    with pytest.raises(ValueError, match="weights.pth: truncated, or more than a table of tensors"):
        load_inception(path)
    assert not ran.exists()
