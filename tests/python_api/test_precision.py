import dataclasses
import types

import pytest
import torch

from flowops import affine_inverse, affine_update
from flowops.api import TarFlow
from flowops.api.data import Images
from flowops.api.parallel import World
from flowops.api.precision import check_precision, matmul_precision
from flowops.api.run_checkpoints import Checkpoints
from flowops.api.train_config import TrainConfig
from flowops.api.trainer import Trainer, build_model


def tiny(**changes):
    config = TrainConfig(
        channels=64, blocks=2, layers=1, steps=4, batch_size=4, warmup=1, precision="fp32"
    )
    config = dataclasses.replace(config, **changes)
    data = Images(torch.arange(512, dtype=torch.uint8).view(8, 1, 8, 8), None)
    return Trainer(config, build_model(config, data), data)


def settings():
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.mkldnn.matmul.fp32_precision,
    )


@pytest.fixture
def _restored():
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("outside", [None, "highest", "high", "medium"])
@pytest.mark.parametrize(
    ("precision", "inside"), [("fp32", "highest"), ("bf16", "highest"), ("tf32", "high")]
)
def test_matmul_precision_is_set_inside_only(outside, precision, inside):
    if outside is not None:
        torch.set_float32_matmul_precision(outside)
    before = settings()
    with matmul_precision(precision):
        assert torch.get_float32_matmul_precision() == inside
    assert settings() == before
    with pytest.raises(KeyError), matmul_precision(precision):
        raise KeyError
    assert settings() == before


@pytest.mark.usefixtures("_restored")
def test_matmul_precision_set_through_one_switch_alone():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with matmul_precision("fp32"):
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


@pytest.mark.usefixtures("_restored")
def test_a_step_runs_both_passes_in_its_precision():
    torch.set_float32_matmul_precision("medium")
    trainer, seen = tiny(), []
    trainer.model.blocks[0].register_forward_hook(
        lambda *_: seen.append(torch.get_float32_matmul_precision())
    )
    trainer.model.blocks[0].pos_embed.register_hook(
        lambda gradient: seen.append(torch.get_float32_matmul_precision())
    )
    trainer.step()
    assert seen == ["highest", "highest"]
    assert torch.get_float32_matmul_precision() == "medium"


def test_tf32_is_refused_where_there_is_none(tmp_path, monkeypatch):
    message = "precision: tf32 needs tensor cores of a CUDA device, the model is on cpu; take fp32"
    with pytest.raises(ValueError, match=message):
        tiny(precision="tf32")
    trainer = tiny()
    trainer.precision = "tf32"  # as a run on a GPU leaves it
    checkpoints = Checkpoints(tmp_path, World())
    trainer.save(checkpoints)
    checkpoints.finish()
    with pytest.raises(ValueError, match=message):
        tiny().load(checkpoints, checkpoints.latest())
    device = types.SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match="tf32 needs compute capability 8.0, Old GPU has less"):
        check_precision("tf32", device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_precision("tf32", device)


def test_autocast_leaves_forward_and_inverse_reciprocal():
    """bf16 is in the parameters alone: what is done with them is exact to fp32."""
    model = TarFlow(2, 8, 2, 64, 2, 1, num_classes=3)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    x, y = torch.randn(4, 16, 8), torch.tensor([0, -1, 2, 1])
    for block in model.blocks:
        with torch.autocast("cpu", torch.bfloat16):
            params = block.params(x, y)
            z, logdet = block(x, y)
            again = affine_inverse(z, params, reverse=block.reverse)
            back_logdet = affine_update(again, params, reverse=block.reverse)[1]
        assert params.dtype == torch.bfloat16
        assert z.dtype == logdet.dtype == again.dtype == back_logdet.dtype == torch.float32
        torch.testing.assert_close(again, x, rtol=1e-6, atol=2e-6)
        exact = -params[:, :-1, :8].double().sum((1, 2))
        for value in (logdet, back_logdet):
            torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-5)
