import dataclasses
import json

import pytest

from flowops.api.flops import training_flops
from flowops.api.tarflow import TarFlow
from flowops.api.train_config import (
    PRESETS,
    TrainConfig,
    config_from,
    learning_rate,
    load_config,
)

TINY = TrainConfig()


def test_learning_rate_warms_up_and_decays():
    config = dataclasses.replace(TINY, steps=100, warmup=10, lr=1e-2)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[0] == pytest.approx(1e-6)
    assert rates[10] == pytest.approx(1e-2)
    assert rates[100] == pytest.approx(1e-6)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"batch_size": 0}, "batch_size: expected a positive number, got 0"),
        ({"lr": -1.0}, "lr: expected a positive number"),
        ({"lr": float("nan")}, "lr: expected a positive number"),
        ({"noise_std": -0.1}, "noise_std: expected at least 0"),
        ({"drop_label": 1.0}, "drop_label: expected from 0 to below 1"),
        ({"ema": 1.5}, "ema: expected from 0 to below 1"),
    ],
)
def test_bad_settings(changes, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(TINY, **changes)


def test_presets_are_the_published_runs():
    """Steps by epochs and images; operations by the counts of weights and causal pairs."""
    for name, (images, batch, epochs, sizes, tera) in {
        "imagenet64-bpd": (1_281_167, 256, 100, (2, 768, 8, 8), 3.15),
        "imagenet64-uncond": (1_281_167, 256, 200, (2, 768, 8, 8), 3.15),
        "imagenet64-cond": (1_281_167, 256, 200, (2, 768, 8, 8), 3.15),
        "imagenet128-cond": (1_281_167, 768, 320, (4, 1024, 8, 8), 5.44),
        "afhq256": (14_630, 256, 4000, (8, 768, 8, 8), 3.17),
    }.items():
        config = PRESETS[name]
        assert (config.steps, config.warmup) == (epochs * (images // batch), images // batch)
        assert (config.patch_size, config.channels, config.blocks, config.layers) == sizes
        side = {"imagenet128-cond": 128, "afhq256": 256}.get(name, 64)
        p, width, blocks, layers = sizes
        import torch

        with torch.device("meta"):
            model = TarFlow(3, side, p, width, blocks, layers)
        assert training_flops(model) / 1e12 == pytest.approx(tera, rel=0.01)
    assert PRESETS["imagenet64-bpd"].noise == "uniform"
    assert PRESETS["imagenet64-bpd"].precision == "fp32"
    assert not PRESETS["imagenet64-uncond"].conditional


def test_a_file_of_settings(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(PRESETS["imagenet128-cond"])))
    assert load_config(str(path)) == PRESETS["imagenet128-cond"]
    assert load_config("mnist") is PRESETS["mnist"]
    path.write_text(json.dumps({"lr": 1, "checkpoint_blocks": "selective"}))
    assert load_config(str(path)) == TrainConfig(lr=1, checkpoint_blocks="selective")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"speed": 9}, "there is no setting 'speed'"),
        ({"lr": "fast"}, "lr: expected float, got 'fast'"),
        ({"steps": 1.5}, "steps: expected int, got 1.5"),
        ({"nvp": 1}, "nvp: expected bool, got 1"),
        ({"noise": "salt"}, "noise: expected one of gaussian, uniform, got 'salt'"),
        ({"steps": 0}, "steps: expected a positive number, got 0"),
        ([1], "expected a table of settings"),
    ],
)
def test_bad_files_of_settings(tmp_path, settings, match):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"config: .*config.json.*{match}"):
        load_config(str(path))


def test_what_is_no_config(tmp_path):
    with pytest.raises(
        ValueError, match="expected one of mnist, imagenet64-bpd, .* got 'imagenet'"
    ):
        load_config("imagenet")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_config(str(tmp_path / "config.json"))
    assert config_from({}, "here") == TrainConfig()
