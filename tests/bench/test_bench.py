import json

import pytest
import torch

from flowops.api import TarFlow
from flowops.bench import demo, run, tarflow, timing
from flowops.bench.eager import EagerTarFlow


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
    noise, labels = torch.randn(3, 16, 4), torch.tensor([0, 1, 2])
    torch.testing.assert_close(eager.reverse(noise, labels), model.reverse(noise, labels))
    torch.testing.assert_close(
        eager.reverse(noise, labels, 1.5, 0.7), model.reverse(noise, labels, 1.5, attn_temp=0.7)
    )


def test_comparisons_gate_and_leave_the_model_alone(model):
    before = {k: t.clone() for k, t in model.state_dict().items()}
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    for precision in ("fp32", "bf16"):
        result = tarflow.compare_training(model, x, y, precision, seconds=0.05)
        assert result.speedup > 0
        assert result.error < 1e-4
    result = tarflow.compare_sampling(model, torch.randn(2, 16, 4), y[:2], 1.0, seconds=0.05)
    assert result.speedup == result.eager.median / result.ours.median
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_the_gate_stops_a_wrong_kernel():
    golden = torch.randn(100, dtype=torch.float64)
    baseline = golden.float()
    assert timing.gate("op", baseline, baseline, golden, torch.float32) < 1e-6
    with pytest.raises(AssertionError, match="op: error .* not timed"):
        timing.gate("op", baseline + 1e-4, baseline, golden, torch.float32)
    with pytest.raises(AssertionError, match="not timed"):
        timing.gate("op", baseline * float("nan"), baseline, golden, torch.float32)


def test_interleave_times_all_calls_equally_often():
    calls = []
    timings = timing.interleave(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0.01
    )
    assert calls.count("a") == calls.count("b") >= 7
    assert calls[:4] == ["a", "b", "a", "b"]
    assert timings["a"].p20 <= timings["a"].median <= timings["a"].p80


@pytest.mark.parametrize("name", ["padding", "noise", "threads"])
def test_op_benches_yield_rows(name):
    rows = list(run.BENCHES[name](0.01))
    assert rows
    assert all(row.ours_ms > 0 and row.speedup > 0 for row in rows)


def test_results_and_readme_block(tmp_path):
    timings = timing.Timing(0.9e-3, 1e-3, 1.1e-3), timing.Timing(2e-3, 3e-3, 4e-3)
    rows = [run.row("op", "job", "8x8", "fp32", "eager", *timings, 1e-7)]
    env = timing.environment()
    assert env["torch"] == torch.__version__
    for _ in range(2):
        run.write_results(rows, env, tmp_path)
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 3
    assert json.loads((tmp_path / "last.json").read_text())["rows"][0]["speedup"] == 3.0
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    run.write_readme(readme, tmp_path)
    text = readme.read_text()
    assert "| op | job | 8x8, fp32 | eager | 1 ms | 3 ms | 3.00x |" in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="markers .* are gone"):
        run.write_readme(readme, tmp_path)


def test_unknown_bench():
    with pytest.raises(ValueError, match="only: expected some of affine, .* got 'fast'"):
        run.main(["--only", "fast"])


def test_demo_runs_and_measures_itself(tmp_path):
    metrics = demo.run(demo.DemoConfig(out=tmp_path, minutes=0.02, per_digit=4))
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
