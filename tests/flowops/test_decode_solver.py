"""How ``decode_block`` gets to its result: sweeps, residuals, the choice of ``auto``, threads."""

import math

import pytest
import torch

from flowops import decode_block
from flowops.decode import PROBE_SWEEPS
from helpers import ENGINES, ISAS, assert_close, running
from plain_decoder import random_problem

by_engine = pytest.mark.parametrize("engine", ENGINES)
by_isa = pytest.mark.parametrize("engine", ISAS)
SOLVERS = {
    "exact": {},
    "jacobi": {"method": "jacobi", "tol": 1e-2, "window": 5},
    "auto": {"method": "auto", "tol": 1e-2, "window": 3},
}
#: Of the sweeps that must give the exact result.
WINDOWS = [
    *({"method": "jacobi", "tol": 0, "window": n} for n in (1, 2, 5, 16, 1000)),
    *({"method": "auto", "tol": 0, "window": n} for n in (2, 16, None)),
]


def run_op(problem, backend, *, tol=0.0, window=1, break_even=0.0):
    """The op itself, where ``break_even`` is free to choose."""
    weights = problem.decoder.to(torch.float32).packed(backend=backend)
    z, embed = problem.z.float(), problem.embed.float()
    guide = z.new_empty(0, 2) if problem.guide is None else problem.guide.float()
    return torch.ops.flowops.decode_block(
        *(z, weights.tensors, embed, guide, weights.heads, weights.eps, problem.temperature),
        *(problem.reverse, weights.outputs, weights.panels, tol, window, break_even, backend),
    )


def assert_same(a, b, what=None):
    for left, right in zip(a, b, strict=True):
        assert torch.equal(left, right), what


# --- the same bits -------------------------------------------------------------------------------


@by_isa
@pytest.mark.parametrize("guided", [False, True])
def test_tol_0_is_the_exact_result_by_any_window_and_method(engine, guided):
    problem = random_problem(5, 17, 6, guided=guided, reverse=guided)
    with running(engine) as backend:
        exact = problem.solve(backend)
        for options in WINDOWS:
            out = problem.solve(backend, **options)
            assert torch.equal(out.x, exact.x), options
            assert torch.equal(out.residual, torch.zeros(5)), options


@pytest.mark.parametrize("guided", [False, True])
def test_tol_0_is_the_exact_result_of_the_reference_up_to_rounding(guided):
    problem = random_problem(5, 17, 6, guided=guided, reverse=guided)
    golden = problem.solve("reference", torch.float64).x
    exact = problem.solve("reference").x
    for options in WINDOWS:
        assert_close(problem.solve("reference", **options).x, exact, golden, str(options))
        wide = problem.solve("reference", torch.float64, **options)
        torch.testing.assert_close(wide.x, golden, rtol=1e-11, atol=1e-11)
        assert wide.residual.max() < 1e-12  # a change of 0 freezes a token; no other may


@by_isa
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("B", "heads", "D"), [(1, 3, 16), (4, 2, 32), (7, 1, 64), (33, 2, 16)])
def test_any_number_of_threads_gives_the_same_bits(engine, solver, B, heads, D):
    problem = random_problem(B, 13, 5, heads, D, guided=B == 7)
    with running(engine) as backend:
        expected = problem.solve(backend, **SOLVERS[solver])
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert_same(problem.solve(backend, **SOLVERS[solver]), expected, threads)


@by_isa
@pytest.mark.parametrize("solver", ["exact", "jacobi"])
@pytest.mark.parametrize("guided", [False, True])
def test_an_image_alone_has_the_bits_it_has_in_a_batch(engine, solver, guided):
    """Not so for auto: all images of a batch decide together."""
    problem = random_problem(9, 13, 5, guided=guided)
    with running(engine) as backend:
        whole = problem.solve(backend, **SOLVERS[solver])
        for B in (1, 2, 7):
            part = problem.first(B).solve(backend, **SOLVERS[solver])
            assert torch.equal(part.x, whole.x[:B])
            assert torch.equal(part.residual, whole.residual[:B])


def test_images_of_the_reference_do_not_meet():
    problem = random_problem(9, 13, 5, guided=True)
    options = {"backend": "reference", "dtype": torch.float64} | SOLVERS["jacobi"]
    whole, part = problem.solve(**options), problem.first(2).solve(**options)
    torch.testing.assert_close(part.x, whole.x[:2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(part.residual, whole.residual[:2], rtol=1e-8, atol=1e-12)


# --- residuals -----------------------------------------------------------------------------------


@by_engine
@pytest.mark.parametrize("kind", [{}, {"nvp": False, "reverse": True}, {"guided": True}], ids=str)
def test_the_residual_is_that_of_the_equation(engine, kind):
    problem = random_problem(6, 17, 5, **kind)
    seen = []
    with running(engine) as backend:
        # What evaluating F in fp32 may be off by: the exact sampler leaves nothing else.
        rounding = 3 * problem.residual(problem.solve(backend).x).max()
        assert rounding < 2e-5
        for tol in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
            for window in (4, 16):
                out = problem.solve(backend, method="jacobi", tol=tol, window=window)
                assert (out.residual <= torch.tensor(tol)).all()
                assert (problem.residual(out.x) - out.residual).abs().max() <= rounding
                assert -(-16 // window) <= out.counts[0] <= 16
                assert out.counts[1] == 0
                seen.append(out.residual.max().item())
    assert seen[0] > seen[-1]
    assert all(r > 0 for r in seen[:6])  # tokens did freeze before they were exact


@by_engine
def test_the_error_is_what_a_fixed_point_with_this_residual_can_have(engine):
    """With ``x = F(x) + r`` and ``x* = F(x*)``, ``x - x* = (1 - J)^-1 r`` to first order."""
    problem = random_problem(1, 9, 2, strength=1.0)
    golden = problem.solve("reference", torch.float64).x
    with running(engine) as backend:
        out = problem.solve(backend, method="jacobi", tol=1e-3, window=8)
    x = out.x.double()
    J = torch.autograd.functional.jacobian(problem.step, x).view(18, 18)
    assert J.triu().abs().max() == 0
    inverse = torch.linalg.inv(torch.eye(18, dtype=torch.float64) - J)
    error = (x - golden).flatten()
    predicted = inverse @ (x - problem.step(x)).flatten()
    assert error.abs().max() > 1e-5  # it is no exact result
    assert (error - predicted).abs().max() < 0.02 * error.abs().max()
    gain = inverse.abs().sum(1).max()
    assert error.abs().max() <= 1.02 * gain * out.residual.item()


@by_engine
@pytest.mark.parametrize("window", [3, 4, 16])
def test_a_tolerance_above_all_changes_keeps_the_noise(engine, window):
    problem = random_problem(3, 14, 4)
    with running(engine) as backend:
        out = problem.solve(backend, method="jacobi", tol=1e9, window=window)
    assert torch.equal(out.x, problem.z.float())
    torch.testing.assert_close(
        out.residual.double(), problem.residual(problem.z), rtol=1e-5, atol=0
    )
    assert out.counts.tolist() == [math.ceil(13 / min(window, 13)), 0]


@by_engine
def test_a_sweep_makes_at_least_one_token_final(engine):
    problem = random_problem(2, 12, 3, strength=2.0)
    with running(engine) as backend:
        out = problem.solve(backend, method="jacobi", tol=0, window=4)
    assert 3 <= out.counts[0] <= 11
    assert out.counts[1] == 0


# --- auto ----------------------------------------------------------------------------------------


@by_engine
@pytest.mark.parametrize("tol", [0.0, 1e-2])
def test_auto_goes_on_with_sweeps_where_they_pay(engine, tol):
    problem = random_problem(4, 25, 5)
    with running(engine) as backend:
        always = run_op(problem, backend, tol=tol, window=4)
        auto = run_op(problem, backend, tol=tol, window=4, break_even=0.01)
    assert_same(auto, always)
    assert auto[2][0] > PROBE_SWEEPS
    assert auto[2][1] == 0


@by_engine
@pytest.mark.parametrize("tol", [0.0, 1e-2])
def test_auto_goes_on_with_single_steps_where_sweeps_do_not_pay(engine, tol):
    problem = random_problem(4, 25, 5)
    with running(engine) as backend:
        exact = run_op(problem, backend)
        auto = run_op(problem, backend, tol=tol, window=4, break_even=1e9)
    wide, single = auto[2].tolist()
    assert wide == PROBE_SWEEPS
    assert 0 < single <= 24 - PROBE_SWEEPS
    assert (auto[1] <= tol).all()
    if tol == 0 and engine != "reference":
        assert torch.equal(auto[0], exact[0])
    rounding = 3 * problem.residual(exact[0]).max()
    assert (problem.residual(auto[0]) - auto[1]).abs().max() <= rounding


@by_isa
def test_auto_decides_by_the_mean_of_all_images_with_any_threads(engine):
    problem = random_problem(5, 49, 5)
    problem.z[:2, 1:] *= 0.01  # which settle sooner
    problem.z[:2, 0] = 0
    decisions = []
    with running(engine) as backend:
        for quarters in range(2, 20):
            options = {"tol": 1e-2, "window": 8, "break_even": quarters / 4}
            alone = run_op(problem, backend, **options)
            assert torch.equal(alone[2], run_op(problem, "reference", **options)[2]), options
            for threads in (2, 3, 5):
                torch.set_num_threads(threads)
                assert_same(run_op(problem, backend, **options), alone, (threads, options))
            torch.set_num_threads(1)
            decisions.append(alone[2][1].item() > 0)
    assert decisions == sorted(decisions)
    assert set(decisions) == {False, True}


@by_engine
def test_auto_where_images_are_done_before_it_decides(engine):
    """Whoever is done early waits for nobody and keeps nobody waiting."""
    problem = random_problem(5, 9, 3)
    problem.z[:2, 1:] = problem.solve("reference", torch.float64).x[:2, 1:]  # no solution of theirs
    with running(engine) as backend:
        for T, window in ((1, 4), (2, 4), (3, 2), (4, 3), (5, 4)):
            short = random_problem(5, T, 3)
            exact = run_op(short, backend)
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                auto = run_op(short, backend, window=window, break_even=1e9)
                torch.testing.assert_close(auto[0], exact[0], rtol=1e-5, atol=1e-5)
                assert auto[2].sum() <= max(T - 1, 0)
        torch.set_num_threads(3)
        easy = run_op(problem, backend, tol=10.0, window=4, break_even=1e9)
        assert easy[2].tolist() == [2, 0]


# --- numbers that are none -----------------------------------------------------------------------


def overflowing_problem():
    """Its solution is of order 1, but F of the noise is infinite for many a later token."""
    problem = random_problem(3, 12, 4)
    problem.z[:, 1:] += 2000
    problem.decoder.b_out[:4] -= 8
    first = problem.z.float()
    assert problem.step(first).isinf().any(2).any(1).all()
    return problem


@by_engine
@pytest.mark.parametrize("window", [3, 11])
def test_tokens_that_overflow_for_a_while_end_exact(engine, window):
    problem = overflowing_problem()
    with running(engine) as backend:
        exact = problem.solve(backend)
        assert exact.x.isfinite().all()
        for method in ("jacobi", "auto"):
            out = problem.solve(backend, method=method, tol=0, window=window)
            if engine == "reference":
                torch.testing.assert_close(out.x, exact.x, rtol=1e-4, atol=1e-4)
                assert (out.residual <= 0).all()
            else:
                assert torch.equal(out.x, exact.x)
        loose = problem.solve(backend, method="jacobi", tol=1e-3, window=window)
        rounding = 3 * problem.residual(exact.x).max()
        assert (problem.residual(loose.x) <= 1e-3 + rounding).all()


@by_engine
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [*SOLVERS.values(), *WINDOWS[1:4:2]], ids=str)
def test_nan_and_infinity_end_and_stay_in_their_image(engine, value, options):
    """Checked above this op; here it must end, and say nothing finite that depends on them."""
    problem = random_problem(5, 13, 4)
    with running(engine) as backend:
        clean = problem.solve(backend, **options)
        problem.z[2, 6, 1] = value
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = problem.solve(backend, **options)
            assert not out.x[2, 6].isfinite().all()
            assert out.x[2, 7:].isnan().all()
            if options.get("method") == "auto":  # all images decide together
                continue
            rounding = 1e-5 if engine == "reference" else 0
            for kept in ([2], slice(6)), ([0, 1, 3, 4], slice(None)):
                torch.testing.assert_close(
                    *(out.x[kept], clean.x[kept]), rtol=rounding, atol=rounding
                )


@by_engine
def test_a_change_that_is_nan_in_one_channel_freezes_nothing(engine):
    """``exp(a) = inf`` and ``z = 0`` in the first channel alone: NaN, whatever the others do."""
    problem = random_problem(2, 9, 5)
    problem.decoder.w_out.zero_()
    problem.decoder.b_out.zero_()[0] = 1000.0
    problem.z[..., 0] = 0
    with running(engine) as backend:
        for options in ({}, *WINDOWS):
            out = problem.solve(backend, **options)
            assert out.x[:, 1:, 0].isnan().all(), options
            assert not out.residual.isnan().any()


@by_engine
def test_one_token_is_the_noise(engine):
    problem = random_problem(3, 1, 4)
    with running(engine) as backend:
        for options in ({}, *WINDOWS):
            out = problem.solve(backend, **options)
            assert torch.equal(out.x, problem.z.float())
            assert torch.equal(out.residual, torch.zeros(3))
            assert out.counts.tolist() == [0, 0]


@by_engine
def test_a_window_of_one_is_the_exact_sampler(engine):
    problem = random_problem(2, 7, 3)
    with running(engine) as backend:
        exact = problem.solve(backend)
        one = problem.solve(backend, method="jacobi", tol=1e9, window=1)
        two_tokens = random_problem(2, 2, 3).solve(backend, method="jacobi", tol=1e9, window=9)
    assert_same(one, exact)
    assert exact.counts.tolist() == [0, 6]
    assert two_tokens.counts.tolist() == [0, 1]


def test_defaults_are_the_exact_sampler():
    problem = random_problem(2, 7, 3)
    weights = problem.decoder.to(torch.float32).packed()
    z, embed = problem.z.float(), problem.embed.float()
    plain = decode_block(z, weights, embed)
    assert_same(plain, decode_block(z, weights, embed, method="exact", tol=1.0, window=4))
