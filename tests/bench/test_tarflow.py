import json
from functools import partial

import pytest
import torch

from flowops.api import TarFlow
from flowops.bench import demo, tarflow
from flowops.bench.ceilings import Ceilings
from flowops.bench.eager import EagerTarFlow
from flowops.bench.job import OURS, Spec, measure
from flowops.bench.upstream import load_upstream, upstream_model

RATES = Ceilings(product_bf16=1e11, product_fp32=1e11, copy=1e10, exp=1e9)


@pytest.fixture(scope="module")
def model():
    model = TarFlow(1, 8, 2, 64, 2, 1, num_classes=3)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def test_the_eager_baseline_is_the_same_model(model):
    x, y = torch.randn(3, 1, 8, 8), torch.tensor([0, -1, 2])
    eager = EagerTarFlow(model)
    for actual, expected in zip(eager.forward(x, y), model(x, y), strict=True):
        torch.testing.assert_close(actual, expected)


def test_comparisons_gate_and_leave_the_model_alone(model):
    before = {k: t.clone() for k, t in model.state_dict().items()}
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    for precision in ("fp32", "bf16"):
        result = tarflow.compare_training(model, x, y, precision, seconds=0.05)
        assert result.speedup > 0
        assert result.error < (1e-4 if precision == "fp32" else 0.05)
    result = tarflow.compare_sampling(model, torch.randn(2, 16, 4), y[:2], 1.0, seconds=0.05)
    assert result.speedup == result.eager.median / result.ours.median
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def measured(build, only=()):
    rows = measure(Spec("tarflow", "job", "small", "fp32", build), RATES, 0.01, "cpu", only)
    return {row.provider: row for row in rows}


SMALL = (1, 8, 2, 64, 2, 1)


def test_a_training_step_is_gated_with_its_gradients(model):
    x = torch.randn(4, 1, 8, 8)
    job = tarflow.TrainingJob(model, x, None, gated=2)
    assert job.check(OURS) < 1e-5
    forward = model.forward

    def wrong(x, y=None):  # the loss is right and its gradient is not
        z, outputs, logdets = forward(x, y)
        return z + 1e-3 * (z - z.detach()), outputs, logdets

    job.providers[OURS] = (wrong, model.loss, True)
    with pytest.raises(AssertionError, match="gradients: error"):
        job.check(OURS)


def test_steps_leave_the_weights_alone(model):
    before = {k: t.clone() for k, t in model.state_dict().items()}
    job = tarflow.TrainingJob(model, torch.randn(2, 1, 8, 8), None)
    for name in job.providers:
        job.call(name)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def test_the_ladder_is_the_same_model(model, uncompiled):
    x = torch.randn(3, 1, 8, 8)
    expected = EagerTarFlow(model).forward(x)
    actual = EagerTarFlow(model, causal=True, fused_affine=True).forward(x)
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[2], expected[2])
    job = tarflow.ladder_job("cpu", SMALL, 3, 2, None, "fp32")
    assert list(job.providers)[1:] == [
        *("eager", "+ causal flash attention", "+ fused affine and log-det"),
        *("+ compiled blocks", "+ bf16"),
    ]


def test_work_of_the_model():
    with torch.device("meta"):
        model = TarFlow(*tarflow.IMAGENET64)
    assert tarflow.training_work(model, 1, "bf16").flops == pytest.approx(3.15e12, rel=0.01)


UPSTREAM = """
import torch
from flowops.api import TarFlow
from flowops.bench.eager import EagerTarFlow

class Model(TarFlow):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("attn_mask", torch.ones(1))
    def forward(self, x, y=None):
        return EagerTarFlow(self).forward(x, y)
    def get_loss(self, z, logdets):
        return 0.5 * z.pow(2).mean() - logdets.mean()
"""


def test_the_reference_program_is_a_baseline(tmp_path, uncompiled):
    (tmp_path / "transformer_flow.py").write_text(UPSTREAM)
    only = (OURS, "eager", "upstream")
    build = partial(tarflow.training_job, "cpu", SMALL, 3, 4, None, "fp32", tmp_path)
    assert list(build().providers)[-2:] == ["upstream", "upstream, compiled blocks"]
    rows = measured(build, only)
    assert [rows[name].status for name in only] == ["ok"] * 3
    assert rows["upstream"].error < 1e-4


def test_the_reference_program_shares_the_weights(tmp_path, model):
    (tmp_path / "transformer_flow.py").write_text(UPSTREAM)
    other = upstream_model(load_upstream(tmp_path), model)
    ours = dict(model.named_parameters())
    assert all(p is ours[name] for name, p in other.named_parameters())


def test_a_wrong_upstream_is_a_clear_error(tmp_path, model):
    with pytest.raises(ValueError, match="upstream: expected a folder with transformer_flow.py"):
        load_upstream(tmp_path)
    path = tmp_path / "transformer_flow.py"
    path.write_text("class Other: pass")
    with pytest.raises(ValueError, match="upstream: .* has no class Model"):
        load_upstream(tmp_path)
    path.write_text(
        "import torch\nclass Model(torch.nn.Linear):\n"
        "    def __init__(self, **config): super().__init__(2, 2)"
    )
    with pytest.raises(ValueError, match="upstream: Model has other weights .* such as weight"):
        upstream_model(load_upstream(tmp_path), model)


def test_demo_runs_and_measures_itself(tmp_path, monkeypatch):
    for name in ("compare_training", "compare_sampling"):
        monkeypatch.setattr(demo, name, partial(getattr(demo, name), seconds=0.1))
    metrics = demo.run(demo.DemoConfig(out=tmp_path, minutes=5, max_steps=40, per_digit=4))
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["bits_per_dim"] == metrics["bits_per_dim"] < written["bits_per_dim_start"]
    for name in (
        *("classifier_accuracy", "round_trip_error", "images_per_second_train"),
        *("images_per_second_sample", "speedup_train", "speedup_sample"),
    ):
        assert isinstance(written[name], float), name
    assert written["noise"] == "gaussian, std 0.1"
    assert written["round_trip_error"] < 1e-3
    for name in ("samples.png", "loss.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "model.safetensors").exists()
