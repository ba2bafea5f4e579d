import pytest
import torch

from flowops.bench import ceilings, jobs_attention, jobs_gram, jobs_pointwise, run, timing
from flowops.bench.ceilings import Ceilings, Work
from flowops.bench.job import OURS, Missing, OpJob, Spec, measure

RATES = Ceilings(product_bf16=4e11, product_fp32=1e11, copy=1e10, exp=1e9)


@pytest.fixture
def uncompiled(monkeypatch):
    """Compiled baselines refuse, as they do where there is no compiler."""

    def compiled(function):
        def refuse(*args, **options):
            raise RuntimeError("not compiled in tests")

        return refuse

    for module in (jobs_attention, jobs_gram, jobs_pointwise):
        monkeypatch.setattr(module, "compiled", compiled)


def op_spec(providers, **options):
    x = torch.randn(4, 8)
    options = {"truth": torch.exp, "grads": (torch.randn(4, 8),)} | options
    return Spec(
        *("op", "forward + backward", "4x8", "fp32"),
        lambda: OpJob(Work(bytes=1e6), providers, (x,), **options),
    )


def test_rows_of_a_right_op():
    rows = measure(op_spec({OURS: torch.exp, "eager": torch.exp}), RATES, 0.01, "cpu")
    assert [(row.provider, row.role, row.status) for row in rows] == [
        (OURS, "ours", "ok"),
        ("eager", "eager", "ok"),
    ]
    for row in rows:
        assert 0 < row.p20_us <= row.p50_us <= row.p80_us
        assert row.e2e_us == row.p50_us  # on a CPU the two are the same
        assert row.first_s > 0
        assert row.error < 1e-6
        assert row.floor_us == pytest.approx(100)
        assert row.of_floor == pytest.approx(100 / row.p50_us)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.exp())
        return x.exp()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0] * 1.001


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda x: x.exp() * 1.0001, "output 0: error"),
        (WrongGradient.apply, "gradient 0: error"),
        (lambda x: x.exp() * float("nan"), "output 0: error nan"),
        (lambda x: x.exp()[:2], "output 0: shape|RuntimeError"),
    ],
)
def test_a_wrong_kernel_is_not_timed(wrong, said):
    rows = measure(op_spec({OURS: wrong, "eager": torch.exp}), RATES, 0.01, "cpu")
    ours, eager = rows
    assert ours.status.startswith("FAILED")
    assert any(word in ours.status for word in said.split("|"))
    assert eager.status == "not timed: the gate failed"
    assert ours.p50_us is eager.p50_us is None


def test_a_wrong_baseline_excuses_nothing():
    wrong = lambda x: x.exp() + 1  # noqa: E731
    rows = measure(op_spec({OURS: wrong, "eager": wrong}), RATES, 0.01, "cpu")
    assert "the baseline itself is off" in rows[0].status
    rows = measure(op_spec({OURS: torch.exp, "e": torch.exp, "w": wrong}), RATES, 0.01, "cpu")
    assert rows[2].status.startswith("not timed: off by")
    assert rows[0].ok


def test_missing_and_broken_baselines_are_listed():
    def broken(x):
        raise RuntimeError("no kernel\nfor this")

    providers = {OURS: torch.exp, "eager": torch.exp, "KeOps": Missing("pykeops"), "b": broken}
    status = {row.provider: row.status for row in measure(op_spec(providers), RATES, 0.01, "cpu")}
    assert status["KeOps"] == "missing: pykeops"
    assert status["b"] == "not available: RuntimeError: no kernel"
    assert status[OURS] == status["eager"] == "ok"


def test_a_job_that_cannot_be_built_is_a_failed_row():
    def build():
        raise MemoryError("too large")

    (row,) = measure(Spec("op", "job", "8", "fp32", build), RATES, 0.01, "cpu")
    assert row.status == "FAILED: MemoryError: too large"


def test_floor_is_the_slowest_of_three():
    assert Work(bytes=1e10, flops=1e10, exps=1e8).floor(RATES) == 1.0
    assert Work(flops=4e11).floor(RATES) == 4.0
    assert Work(flops=4e11, product="bf16").floor(RATES) == 1.0
    work = Work(bytes=1e9, flops=1e9, exps=5e9)
    assert (work.floor(RATES), work.bound(RATES)) == (5.0, "exps")


def test_work_of_attention():
    work = jobs_attention.attention_work(2, 16, 3, 64, "fp32", backward=False)
    assert work.flops == 4 * 2 * 3 * 64 * 16 * 17 / 2
    assert work.exps == 2 * 3 * 16 * 17 / 2
    assert work.bytes == 4 * 2 * 16 * 3 * 64 * 4
    both = jobs_attention.attention_work(2, 16, 3, 64, "fp32", backward=True)
    assert both.flops == 3.5 * work.flops
    assert both.exps == 2 * work.exps


def test_work_of_gram_is_six_d_a_pair():
    N, M, D = 100, 10, 8
    work = jobs_gram.gram_work(N, M, D, 2 * D)
    assert work.flops == 6 * D * N * M
    assert work.exps == N * M
    assert work.bytes == 4 * (N * D + M * D + M * 2 * D + N * 2 * D)
    both = jobs_gram.gram_work(N, M, D, 2 * D, backward=True)
    assert both.flops == (2 * D + 4 * D + 2 * D + 8 * D + 4 * D) * N * M
    coupling = jobs_gram.gram_work(N, M, D, 2 * D, E=D)
    assert coupling.exps == N * M + N * D


def test_ceilings_are_measured():
    rates = ceilings.measure("cpu", scale=0.05, seconds=0.01)
    assert all(rate > 1e6 for rate in rates.asdict().values())


def test_interleave_times_all_calls_equally_often():
    calls = []
    timings = timing.interleave(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0.01
    )
    assert calls.count("a") == calls.count("b") >= 7
    assert calls[:4] == ["a", "b", "a", "b"]
    assert timings["a"].p20 <= timings["a"].median <= timings["a"].p80


def test_the_gate_stops_a_wrong_kernel():
    golden = torch.randn(100, dtype=torch.float64)
    baseline = golden.float()
    assert timing.gate("op", baseline, baseline, golden, torch.float32) < 1e-6
    with pytest.raises(AssertionError, match="op: error .* not timed"):
        timing.gate("op", baseline + 1e-4, baseline, golden, torch.float32)
    with pytest.raises(AssertionError, match="not timed"):
        timing.gate("op", baseline * float("nan"), baseline, golden, torch.float32)


@pytest.mark.parametrize("op", ["affine", "padding", "noise", "attention", "threads"])
def test_the_jobs_of_an_op_pass_their_gate(op, uncompiled):
    spec = min(run.specs([op], "cpu"), key=lambda spec: len(spec.shape))
    rows = measure(spec, RATES, 0.01, "cpu")
    assert rows[0].ok, rows[0].status
    assert rows[1].ok, rows[1].status
    assert {row.provider for row in rows} == set(spec.build().providers)


@pytest.mark.parametrize("op", ["patch_attention", "gram", "coupling"])
@pytest.mark.parametrize("backward", [False, True])
def test_small_jobs_pass_their_gate(op, backward, uncompiled):
    if op == "patch_attention":
        build = lambda: jobs_attention.patch_attention_job(  # noqa: E731
            "cpu", 2, 9, 2, 8, 3, "fp32", backward
        )
        only = (OURS, "SDPA, linear, affine")
    else:
        build = lambda: jobs_gram.gram_job(op, "cpu", 50, 7, 3, backward)  # noqa: E731
        only = (OURS, "cdist, exp, mm", "addmm, exp, mm", "KeOps", "GPyTorch")
    rows = measure(Spec(op, "job", "small", "fp32", build), RATES, 0.01, "cpu", only)
    assert [row.provider for row in rows] == list(only)
    for row in rows:
        assert row.ok or row.status in ("missing: pykeops", "missing: gpytorch"), row.status
