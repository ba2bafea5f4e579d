import json
from functools import partial
from itertools import pairwise

import pytest
import torch

from flowops.api import TarFlow, cli, load_model, patchify, save_model
from flowops.bench import jacobi, models, run, sampling
from flowops.bench.ceilings import Ceilings
from flowops.bench.eager import EagerTarFlow
from flowops.bench.job import OURS, Spec, measure
from flowops.bench.sampling import EXACT, Case, SamplingJob, sampling_work
from flowops.bench.timing import GateError

RATES = Ceilings(product_bf16=1e11, product_fp32=1e11, copy=1e10, exp=1e9)
SMALL = (1, 8, 2, 64, 2, 1)  # 16 tokens of 4


@pytest.fixture(scope="module")
def model():
    return models.make_model("cpu", SMALL, 3)


@pytest.fixture(scope="module")
def noise():
    return torch.randn(3, 16, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(model, tmp_path):
    path = tmp_path / "tiny" / "model.safetensors"
    path.parent.mkdir()
    save_model(model, path)
    return path


def measured(build, only=()):
    rows = measure(Spec("sampling", "job", "small", "fp32", build), RATES, 0.01, "cpu", only)
    return {row.provider: row for row in rows}


# --- the plain program ---------------------------------------------------------------------------


def test_the_eager_baseline_is_the_same_sampler(model, noise):
    eager, y = EagerTarFlow(model), torch.tensor([0, 1, 2])
    torch.testing.assert_close(eager.reverse(noise, y), model.reverse(noise, y))
    torch.testing.assert_close(eager.reverse(noise), model.reverse(noise))
    torch.testing.assert_close(
        eager.reverse(noise, y, 1.5, 0.7), model.reverse(noise, y, 1.5, attn_temp=0.7)
    )
    ours = model.reverse(noise, y, return_sequence=True)
    theirs = eager.reverse(noise, y, return_sequence=True)
    for actual, expected in zip(theirs, ours, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_the_fixed_point_of_a_block_is_its_inverse(guidance):
    model = models.make_model("cpu", SMALL, 3).double()
    noise, y = torch.randn(2, 16, 4, dtype=torch.float64), torch.tensor([0, 2])
    eager = EagerTarFlow(model)
    sequence = eager.reverse(noise, y, guidance, 0.7, return_sequence=True)
    z, between, x = (patchify(images, 2) for images in sequence)
    for index, before, after in ((1, z, between), (0, between, x)):
        with torch.no_grad():
            new = eager.fixed_point(index, after, before, y, guidance, 0.7)
            moved = eager.fixed_point(index, after + 0.1, before, y, guidance, 0.7)
        torch.testing.assert_close(new, after, rtol=0, atol=1e-13)
        assert (moved - after - 0.1).abs().max() > 0.01


# --- gates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("gated", [None, 2])
def test_exact_samplers_pass_either_gate(model, noise, precision, gated):
    y = torch.tensor([0, 1, 2])
    job = SamplingJob(model, noise, y, 1.0, precision=precision, gated=gated)
    allowed = 1e-5 if precision == "fp32" else 0.05
    errors = {name: job.check(name) for name in (OURS, "eager")}
    assert all(0 < error < allowed for error in errors.values())
    if precision == "bf16":  # ours rounds the weights of layers alone, and that is seen
        assert 1e-5 < errors[OURS] < errors["eager"]


@pytest.mark.parametrize("method", ["jacobi", "auto"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_jacobi_passes_the_gate(model, noise, method, precision):
    y = torch.tensor([0, 1, 2])
    job = SamplingJob(model, noise, y, precision=precision, method=method, tol=1e-2, gated=3)
    assert job.check(OURS) < 0.05
    assert job.check("eager") < (1e-5 if precision == "fp32" else 0.05)


@pytest.mark.parametrize("method", ["exact", "jacobi"])
def test_the_equation_catches_what_is_further_off_than_tol(model, noise, method):
    job = SamplingJob(model, noise, method=method, tol=1e-3, gated=3)
    ours = job.providers[OURS]

    def moved(by):
        def reverse(*args, **options):
            result = ours(*args, **options)
            images = result if method == "exact" else result[0]
            images[-1][2, 0, 7, 7] += by
            return result

        return reverse

    job.providers[OURS] = moved(1e-7)
    job.check(OURS)
    job.providers[OURS] = moved(5e-3)
    with pytest.raises(GateError, match="block 0: off its equation by .*, allowed"):
        job.check(OURS)


def test_a_residual_above_tol_fails(model, noise):
    job = SamplingJob(model, noise, method="jacobi", tol=1e-3, gated=3)
    job.providers[OURS] = partial(model.reverse, method="jacobi", tol=1e-1)
    with pytest.raises(GateError, match="residual: .* expected at most tol 0.001"):
        job.check(OURS)


def test_the_images_catch_a_wrong_sampler(model, noise):
    job = SamplingJob(model, noise)
    job.providers[OURS] = lambda *args: model.reverse(*args) + 1e-4
    with pytest.raises(GateError, match="images: error"):
        job.check(OURS)


# --- work ----------------------------------------------------------------------------------------


def test_work_of_sampling():
    with torch.device("meta"):
        model = TarFlow(*models.IMAGENET64)
    # 0.93 TB of weights for a batch and 103 GB of keys and values for an image
    one, many = (sampling_work(model, B, 0.0, "bf16").bytes for B in (1, 65))
    assert one == pytest.approx(1.03e12, rel=0.01)
    assert many - one == pytest.approx(64 * 103e9, rel=0.01)
    assert sampling_work(model, 1, 1.0).flops == 2 * sampling_work(model, 1, 0.0).flops
    tenth = sampling_work(model, 1, 0.0, "bf16", passes=102.3)
    assert tenth.bytes == pytest.approx(one / 10)
    assert tenth.flops == sampling_work(model, 1, 0.0).flops


def test_jacobi_reads_the_weights_once_a_pass(model, noise):
    job = SamplingJob(model, noise, method="jacobi", tol=1e-2, gated=3)
    before = job.work.bytes
    job.check(OURS)
    _, report = model.reverse(noise, method="jacobi", tol=1e-2, return_report=True)
    passes = report.sweeps[0].double().mean().item()
    assert passes < 15
    assert job.work.bytes == pytest.approx(before * passes / 15)


# --- rows ----------------------------------------------------------------------------------------


UPSTREAM = """
import torch
from flowops.api import TarFlow
from flowops.bench.eager import EagerTarFlow

class Model(TarFlow):
    def reverse(self, x, y=None, guidance=0.0, return_sequence=False):
        return EagerTarFlow(self).reverse(x, y, guidance, return_sequence=return_sequence)
"""


@pytest.mark.parametrize("gated", [None, 1])
def test_the_reference_program_is_a_baseline(tmp_path, gated):
    (tmp_path / "transformer_flow.py").write_text(UPSTREAM)
    case = Case("small", SMALL, 3, 2, guidance=1.0, gated=gated)
    rows = measured(partial(sampling.exact_job, "cpu", case, tmp_path))
    assert [row.status for row in rows.values()] == ["ok"] * 3
    assert rows["upstream"].error < 1e-5


def test_what_is_missing_says_so():
    rows = measured(partial(sampling.exact_job, "cpu", Case("small", SMALL, 3, 2)))
    assert rows["upstream"].status == "missing: no --upstream DIR"
    case = Case("small", SMALL, 3, 2, gated=1, eager=False)
    rows = measured(partial(sampling.jacobi_job, "cpu", case, "jacobi"))
    assert rows["eager"].status == "missing: too slow for a whole model: see the rows of one block"
    assert rows[OURS].ok
    assert rows[EXACT].ok


@pytest.mark.parametrize("method", ["jacobi", "auto"])
def test_jacobi_is_held_against_eager_and_exact(saved, method):
    case = Case("small", SMALL, 3, 2, gated=2)
    rows = measured(partial(sampling.jacobi_job, "cpu", case, method, saved))
    assert [(row.provider, row.role) for row in rows.values()] == [
        *((OURS, "ours"), ("eager", "eager"), (EXACT, "other")),
    ]
    assert all(row.ok for row in rows.values())
    assert rows[EXACT].error < 1e-5


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rows_say_whose_weights_they_use(device, saved):
    random = [s for s in sampling.sampling_specs(device) if "tol" in s.job]
    trained = [s for s in sampling.sampling_specs(device, model=saved) if "tol" in s.job]
    assert {s.job for s in random} == {"jacobi, tol 0.001", "auto, tol 0.001"}
    assert all("random weights" in s.shape for s in random)
    layers = f"{SMALL[4]}x{SMALL[5]} layers"
    assert [s.shape for s in trained if ", trained" in s.shape] == [
        *[f"{layers}, trained, B=1"] * 2,
        *[f"{layers}, trained, B=32"] * 2,
    ]


def test_the_command_takes_a_trained_model(saved, tmp_path, capsys):
    args = run.parse(["sampling", "--device", "cpu", "--model", str(saved)])
    jobs = run.specs(args.ops, args.device, upstream=args.upstream, model=args.model)
    assert any(job.shape == f"{SMALL[4]}x{SMALL[5]} layers, trained, B=1" for job in jobs)
    assert cli.main(["bench", "--model", "nowhere/model.safetensors"]) == 1
    assert "no such file: nowhere/model.safetensors" in capsys.readouterr().err
    shifts = tmp_path / "shifts.safetensors"
    save_model(TarFlow(*SMALL, nvp=False), shifts)
    assert cli.main(["bench", "sampling", "--model", str(shifts)]) == 1
    assert "model: expected one with affine steps" in capsys.readouterr().err


# --- flowops bench jacobi ------------------------------------------------------------------------


def test_the_study_of_jacobi(model, noise):
    rows = jacobi.study(model, noise, torch.tensor([0, 1, 2]), 0.01)
    assert [row["tol"] for row in rows] == list(jacobi.TOLS)
    for row in rows:
        assert 0 <= row["median_error"] <= row["largest_error"] <= 20 * row["tol"]
        assert row["largest_residual"] <= row["tol"]
        assert len(row["sweeps"]) == 2
        assert set(row["time_over_exact"]) == {"1", "3"}
    for loose, tight in pairwise(rows):
        assert loose["largest_error"] > tight["largest_error"]
        assert all(a <= b for a, b in zip(loose["sweeps"], tight["sweeps"], strict=True))
    assert rows[-1]["largest_error"] == 0
    assert rows[-1]["sweeps"] == [15, 15]


def test_the_command_writes_results_and_picture(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--device", "cpu", "--images", "2", "--seconds", "0.01"]
    assert run.main(["jacobi", *options, "--model", str(saved)]) == 0
    result = json.loads((tmp_path / "runs/jacobi/jacobi.json").read_text())
    assert result["images"] == 2
    assert result["model"]["channels"] == 64
    assert [row["tol"] for row in result["rows"]] == list(jacobi.TOLS)
    assert (tmp_path / "runs/jacobi/jacobi.png").read_bytes()[:4] == b"\x89PNG"
    assert "largest residual" in capsys.readouterr().out
    # In a checkout they lie where the others do.
    for folder in ("bench", "docs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "bench" / "run.py").touch()
    assert run.main(["jacobi", *options, "--model", str(saved)]) == 0
    assert list((tmp_path / "bench" / "results").glob("*/jacobi.json"))
    assert (tmp_path / "docs" / "jacobi.png").exists()


def test_without_a_model_it_trains_the_same_one_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jacobi, "TRAINING", jacobi.replace(jacobi.TRAINING, channels=64, blocks=1))
    trained = [load_model(jacobi.train(3, "cpu")).blocks[0].proj_out.weight for _ in range(2)]
    # Sums of PyTorch's may depend on where memory begins, and Adam turns the sign of a gradient
    # near zero into a step: not every weight has to be the same, but they are on the whole.
    assert (trained[0] - trained[1]).abs().mean() < 1e-5 < trained[0].abs().mean()


@pytest.mark.parametrize("name", ["steps", "images", "seconds"])
def test_errors_of_the_study_name_the_argument(name, capsys):
    assert cli.main(["bench", "jacobi", f"--{name}", "0"]) == 1
    assert capsys.readouterr().err.startswith(f"flowops: {name}: expected a positive number, got 0")
