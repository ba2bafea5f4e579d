"""The CUDA kernels of K @ w; tests/flowops/test_gram.py has those that they share with Triton's."""

import pytest
import torch

from flowops import (
    cuda_runtime,
    dispatch,
    gram,
    kernel_coupling,
    kernel_coupling_inverse,
    se_gram_matmul,
)
from gram_checks import OPS, as_tuple, check_against_fp64, inputs_of, values_and_gradients
from kernel_checks import DEVICE

usable, state = dispatch.backend_state("cuda")
pytestmark = pytest.mark.skipif(not usable, reason=state)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
by_op = pytest.mark.parametrize("op", [op for op in OPS if op != "se_gram"])
by_kernel = pytest.mark.parametrize("kernel", gram.KERNELS)
#: Distances from differences with few features and with many, and from products.
by_way = pytest.mark.parametrize(("D", "kernel"), [(3, "se"), (9, "matern12"), (20, "matern32")])


def on_device(tensors):
    return [t.to(DEVICE) for t in tensors]


def run(op, inputs, kernel="se", precision="fp32"):
    """Outputs and gradients, all weights of the outputs 1."""
    inputs = on_device(inputs)
    outs = as_tuple(OPS[op][0](*inputs, kernel=kernel, backend="cuda"))
    return values_and_gradients(
        lambda *t: OPS[op][0](*t, kernel=kernel, precision=precision, backend="cuda"),
        inputs,
        [torch.ones_like(out) for out in outs],
    )


def assert_same_bits(runs):
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("op", "N", "M", "D", "O"),
    [
        *[("se_gram_matmul", 1, 1, 1, 1), ("se_gram_matmul", 17, 150, 2, 2)],
        *[("se_gram_matmul", 1000, 10, 8, 4), ("se_gram_matmul", 40, 63, 3, 32)],
        *[("se_gram_matmul", 17, 63, 9, 1), ("se_gram_matmul", 17, 20, 8, 126)],
        *[("se_gram_matmul", 20, 150, 63, 126), ("se_gram_matmul", 33, 256, 15, 30)],
        *[("kernel_coupling", 17, 63, 1, 2), ("kernel_coupling", 100, 150, 8, 16)],
        *[("kernel_coupling", 40, 256, 5, 16), ("kernel_coupling", 1000, 1, 9, 2)],
        *[("kernel_coupling", 50, 150, 31, 62), ("kernel_coupling", 17, 63, 63, 126)],
        *[("kernel_coupling_inverse", 17, 150, 8, 16), ("kernel_coupling_inverse", 1, 63, 31, 62)],
    ],
)
def test_follows_the_reference(op, N, M, D, O):
    dtypes = list(DTYPES.values()) if N * M * (D + O) < 100_000 else [torch.float32]
    for i, dtype in enumerate(dtypes):
        inputs = inputs_of(op, N, M, D, (O + 1) // 2, dtype, vector=i == 1, apart=True)
        if O == 1:
            inputs[2] = inputs[2][:, :1]
        check_against_fp64(op, inputs, gram.KERNELS[(i + D) % 4], "cuda", DEVICE)


@by_kernel
@pytest.mark.parametrize("mean", [0.0, 100.0, 1e6])
def test_a_point_equals_itself_exactly(kernel, mean):
    """K @ identity is K."""
    for D in (1, 3, 8, 9, 40):
        x = (torch.randn(7, D, dtype=torch.float64) + mean).float()
        for lengthscale in (0.3, torch.rand(D) + 0.1):
            K = se_gram_matmul(
                *on_device((x, x.clone(), torch.eye(7))),
                lengthscale if isinstance(lengthscale, float) else lengthscale.to(DEVICE),
                kernel=kernel,
                backend="cuda",
            )
            assert torch.equal(K.diagonal().cpu(), torch.ones(7))
            assert (K <= 1).all()


@by_op
@by_way
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_leave_others_alone(op, D, kernel, bad):
    inputs = inputs_of(op, 40, 20, D, 3, torch.float32)
    expected = run(op, inputs, kernel)
    inputs[0][5, D // 2] = bad
    actual = run(op, inputs, kernel)
    others = torch.arange(40, device=DEVICE) != 5
    rowwise = [i for i, t in enumerate(expected) if t.ndim and t.shape[0] == 40]
    assert len(rowwise) == {"se_gram_matmul": 2, "kernel_coupling": 4}.get(op, 3)
    for i in rowwise:
        # Neighbours in a tile that is done again, from differences, may round otherwise.
        rtol = 1e-5 if D == 20 else 0
        torch.testing.assert_close(actual[i][others], expected[i][others], rtol=rtol, atol=rtol)
    assert actual[0][5].isnan().all() == (bad != bad)


@by_op
@by_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_views_at_any_address(op, D, kernel, dtype):
    inputs = inputs_of(op, 40, 20, D, 3, dtype, vector=True)
    views = []
    for t in inputs:
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), float("nan"), dtype=dtype)
        views.append(wide[..., 1:-2])
        views[-1].copy_(t)
    assert_same_bits([run(op, views, kernel), run(op, inputs, kernel)])


@by_op
@by_way
def test_deterministic(op, D, kernel):
    inputs = inputs_of(op, 100, 40, D, 3, torch.float32)
    assert_same_bits([run(op, inputs, kernel) for _ in range(2)])


@pytest.mark.skipif(not cuda_runtime.emulating(), reason="a GPU orders threads as it likes")
@by_op
@by_way
def test_any_order_of_threads_and_number_of_processors(monkeypatch, op, D, kernel):
    inputs = inputs_of(op, 200, 70, D, 3, torch.float32)
    if D == 20:
        inputs[-4 if op == "se_gram_matmul" else 0][::3] += 100  # tiles that lose digits
    runs = []
    for seed, processors in ((0, 2), (2, 1), (3, 7)):
        monkeypatch.setattr(cuda_runtime, "emulator_seed", seed)
        monkeypatch.setattr(cuda_runtime, "_EMULATED_PROCESSORS", processors)
        runs.append(run(op, inputs, kernel))
    assert_same_bits(runs)


@by_way
def test_chunks_add_up(monkeypatch, D, kernel):
    """However many rows a partial sum has, several tiles of them or a part of one."""
    from flowops.cuda import gram as launchers

    inputs = inputs_of("se_gram_matmul", 150, 40, D, 3, torch.float32, vector=D == 9, apart=True)
    for rows in (32, 96, 1024):
        monkeypatch.setattr(launchers, "_chunk_rows", lambda N, warps, rows=rows: rows)
        check_against_fp64("se_gram_matmul", inputs, kernel, "cuda", DEVICE)


@pytest.mark.parametrize("D", [3, 20])
def test_tf32_rounds_points_but_not_their_equality(D):
    inputs = inputs_of("se_gram_matmul", 50, 30, D, 3, torch.float32, apart=True)
    plain, rounded = (run("se_gram_matmul", inputs, precision=p) for p in ("fp32", "tf32"))
    assert torch.equal(plain[0], rounded[0]) == (D <= gram_launchers().FEW_FEATURES)
    for a, e in zip(rounded, plain, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-2 * e.abs().max().item())
    x = inputs[0].to(DEVICE)
    K = se_gram_matmul(x, x, torch.eye(50, device=DEVICE), 1.5, precision="tf32", backend="cuda")
    assert torch.equal(K.diagonal().cpu(), torch.ones(50))


def gram_launchers():
    from flowops.cuda import gram

    return gram


@pytest.mark.parametrize(
    ("N", "M", "D", "O", "dtype", "match"),
    [
        (4, 5, 3, 2, torch.float64, "no storage in torch.float64"),
        (4, 257, 3, 2, torch.float32, "up to 256 points, not 257"),
        (4, 256, 300, 2, torch.float32, "256 points of 300 features and 4 outputs need .* bytes"),
    ],
)
def test_what_is_refused(N, M, D, O, dtype, match):
    x1, x2, z, w, lengthscale = on_device(inputs_of("kernel_coupling", N, M, D, O, dtype))
    for op in (kernel_coupling, kernel_coupling_inverse):
        with pytest.raises(RuntimeError, match=match):
            op(x1, x2, z, w, lengthscale, backend="cuda")
    with pytest.raises(RuntimeError, match=match):
        se_gram_matmul(x1, z, w, lengthscale, backend="cuda")


@pytest.mark.parametrize(
    ("M", "D", "O", "match"),
    [
        (10, 65, 2, "gradients of 65 features and 2 outputs: there are kernels to 64 and 128"),
        (200, 40, 2, "gradients of 40 features and 2 outputs are for 192 points, not 200"),
    ],
)
def test_gradients_that_are_refused(M, D, O, match):
    x, z, w, lengthscale = on_device(inputs_of("se_gram_matmul", 4, M, D, O // 2, torch.float32))
    out = se_gram_matmul(x.requires_grad_(), z, w, lengthscale, backend="cuda")
    with pytest.raises(RuntimeError, match=match):
        out.sum().backward()
