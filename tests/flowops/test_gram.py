import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowops import (
    cuda_runtime,
    dispatch,
    gram,
    kernel_coupling,
    kernel_coupling_inverse,
    se_gram,
    se_gram_matmul,
)
from gram_checks import (
    OPS,
    as_tuple,
    check_against_fp64,
    check_far_from_zero,
    inputs_of,
    values_and_gradients,
    weights_of,
)
from helpers import ISAS, running

#: What can run on tensors of the CPU; the interpreter of Triton takes part where little is computed
#: and has tests of its own for the rest.
BACKENDS = [
    b
    for b in ("reference", "cpu", "triton")
    if all(dispatch.can_run(op, b)[0] for op in dispatch.ops() if "gram" in op or "coupling" in op)
    and (b != "triton" or dispatch.interpreting())
]
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_quick_backend = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
interpreted = pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton's interpreter")
by_gpu_backend = pytest.mark.parametrize(
    "backend",
    [
        pytest.param("triton", marks=interpreted),
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not cuda_runtime.emulating(), reason="no emulator")
        ),
    ],
)
by_kernel = pytest.mark.parametrize("kernel", gram.KERNELS)
by_op = pytest.mark.parametrize("op", OPS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def skip_unless_stored(backend, dtype):
    x = torch.ones(1, 1, dtype=dtype)
    usable, reason = dispatch.can_run("se_gram", backend, x, x, x[0], "se", "fp32")
    if not usable:
        pytest.skip(reason)


def skip_without_kernel(backend, op, inputs, kernel="se"):
    for name, args in ((op, inputs), (f"{op}_backward", [inputs[0], *inputs])):
        usable, reason = dispatch.can_run(name, backend, *args, kernel, "fp32")
        if not usable:
            pytest.skip(reason)


def profile_of(distance, kernel):
    """k of a scaled distance: Rasmussen and Williams, equations 4.9 and 4.14 to 4.17."""
    if kernel == "se":
        return math.exp(-(distance**2) / 2)
    if kernel == "matern12":
        return math.exp(-distance)
    if kernel == "matern32":
        return (1 + math.sqrt(3) * distance) * math.exp(-math.sqrt(3) * distance)
    root = math.sqrt(5) * distance
    return (1 + root + root**2 / 3) * math.exp(-root)


def gram_by_hand(x, z, lengthscale, kernel):
    if not isinstance(lengthscale, torch.Tensor):
        lengthscale = torch.tensor(lengthscale, dtype=torch.float64)
    lengthscale = lengthscale.double().expand(x.shape[1])
    return torch.tensor(
        [
            [
                profile_of(
                    math.sqrt(
                        sum(
                            ((a - b) / l) ** 2
                            for a, b, l in zip(row, point, lengthscale.tolist(), strict=True)
                        )
                    ),
                    kernel,
                )
                for point in z.tolist()
            ]
            for row in x.tolist()
        ],
        dtype=torch.float64,
    )


@by_backend
@by_kernel
def test_gram_is_the_formula(backend, kernel):
    x, z = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    for lengthscale in (0.7, torch.tensor(1.3), torch.tensor([0.5, 1.0, 2.5])):
        K = se_gram(x, z, lengthscale, kernel=kernel, backend=backend)
        expected = gram_by_hand(x, z, lengthscale, kernel)
        torch.testing.assert_close(K, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("se", 0.1353352832366127),
        ("matern12", 0.1353352832366127),
        ("matern32", 0.1397313501923147),
        ("matern52", 0.1386602191385286),
    ],
)
def test_known_values_at_distance_two(kernel, expected):
    """exp(-2), exp(-2), (1 + 2 sqrt 3) exp(-2 sqrt 3), (1 + 2 sqrt 5 + 20/3) exp(-2 sqrt 5)."""
    x, z = torch.tensor([[6.0, 1.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
    assert se_gram(x, z, 3.0, kernel=kernel).item() == pytest.approx(expected, rel=1e-14)


@by_backend
@by_kernel
def test_matmul_and_coupling_are_what_they_say(backend, kernel):
    x1, x2, z, w, lengthscale = inputs_of("kernel_coupling", 6, 5, 3)
    K = gram_by_hand(x1, z, lengthscale, kernel)
    options = {"kernel": kernel, "backend": backend}
    close = {"rtol": 1e-13, "atol": 1e-13}
    torch.testing.assert_close(se_gram_matmul(x1, z, w, lengthscale, **options), K @ w, **close)
    s, t = (K @ w)[:, :2], (K @ w)[:, 2:]
    y2, logdet = kernel_coupling(x1, x2, z, w, lengthscale, **options)
    torch.testing.assert_close(y2, torch.exp(s) * x2 + t, **close)
    torch.testing.assert_close(logdet, s.sum(1), **close)
    inverse = kernel_coupling_inverse(x1, x2, z, w, lengthscale, **options)
    torch.testing.assert_close(inverse, (x2 - t) * torch.exp(-s), **close)


@by_backend
@by_kernel
@by_dtype
@pytest.mark.parametrize("mean", [0.0, 1.0, 100.0, 1e6])
def test_a_point_equals_itself_exactly(backend, kernel, dtype, mean):
    skip_unless_stored(backend, dtype)
    for D in (1, 3, 8, 9, 64) if backend != "triton" else (3, 20):
        x = (torch.randn(7, D, dtype=torch.float64) + mean).to(dtype)
        lengthscale = (torch.rand(D, dtype=torch.float64) + 0.1).to(dtype)
        for l in (0.3, lengthscale):
            K = se_gram(x, x.clone(), l, kernel=kernel, backend=backend)
            assert torch.equal(K.diagonal(), torch.ones(7, dtype=dtype))
            assert (K <= 1).all()


@by_quick_backend
@by_op
@by_kernel
@by_dtype
def test_values_and_gradients_follow_the_fp64_reference(backend, op, kernel, dtype):
    for (N, M, D), vector in itertools.product(
        [(1, 63, 1), (63, 1, 3), (17, 63, 2), (100, 10, 8), (33, 150, 20)], (False, True)
    ):
        for apart in (True, False) if dtype == torch.float64 else (True,):
            inputs = inputs_of(op, N, M, D, 3, dtype, vector, apart)
            check_against_fp64(op, inputs, kernel, backend)


@by_quick_backend
@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
def test_gradients_summed_over_many_rows(backend, vector):
    inputs = inputs_of("se_gram_matmul", 4000, 100, 3, 2, torch.float32, vector, apart=True)
    check_against_fp64("se_gram_matmul", inputs, "se", backend)


@by_quick_backend
@settings(max_examples=80, deadline=None)
@given(
    op=st.sampled_from(list(OPS)),
    kernel=st.sampled_from(gram.KERNELS),
    N=st.integers(1, 20),
    M=st.integers(1, 20),
    D=st.integers(1, 24),
    O=st.integers(1, 6),
    vector=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(backend, op, kernel, N, M, D, O, vector, seed):
    torch.manual_seed(seed)
    check_against_fp64(
        op, inputs_of(op, N, M, D, O, torch.float64, vector), kernel, backend=backend
    )


@by_quick_backend
@by_op
@by_kernel
@pytest.mark.parametrize("D", [1, 3, 8, 9, 40])
def test_data_far_from_zero_are_as_accurate_as_centred_data(backend, op, kernel, D):
    check_far_from_zero(backend, op, kernel, D)


@by_backend
@by_op
@by_kernel
def test_strided_views(backend, op, kernel):
    public = OPS[op][0]
    inputs = inputs_of(op, 9, 7, 4, vector=True)
    weights = weights_of(op, inputs, kernel)

    def run(tensors):
        return values_and_gradients(
            lambda *t: public(*t, kernel=kernel, backend=backend), tensors, weights
        )

    expected = run(inputs)
    nan = float("nan")
    every_other = [
        torch.stack([t, torch.full_like(t, nan)], dim=-1).flatten(-2)[..., ::2] for t in inputs
    ]
    transposed = [t.mT.contiguous().mT if t.ndim == 2 else t for t in inputs]
    for views in (every_other, transposed):
        assert not any(t.is_contiguous() for t in views[:-1])
        for actual, e in zip(run(views), expected, strict=True):
            torch.testing.assert_close(actual, e, rtol=1e-13, atol=1e-13)


@by_op
@by_kernel
@pytest.mark.parametrize("limit", [1, 100, 3 * 7 * 4])
def test_row_blocks_give_the_same_results(monkeypatch, op, kernel, limit):
    public = OPS[op][0]
    N, M, D = 10, 7, 4
    inputs = inputs_of(op, N, M, D, vector=True)
    weights = weights_of(op, inputs, kernel)
    sizes = []
    distance = gram._squared_distance

    def counting(x, z, lengthscale):
        sizes.append(x.shape[0] * z.shape[0] * z.shape[1])
        return distance(x, z, lengthscale)

    def run():
        sizes.clear()
        out = values_and_gradients(
            lambda *t: public(*t, kernel=kernel, backend="reference"), inputs, weights
        )
        return out, max(sizes)

    monkeypatch.setattr(gram, "_squared_distance", counting)
    whole, largest = run()
    assert largest == N * M * D
    monkeypatch.setattr(gram, "_DIFFERENCES_AT_ONCE", limit)
    blocks, largest = run()
    assert largest <= max(limit, M * D)
    for actual, expected in zip(blocks, whole, strict=True):
        assert actual.is_contiguous()
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@by_backend
@by_kernel
@by_dtype
def test_inverse_undoes_coupling(backend, kernel, dtype):
    skip_unless_stored(backend, dtype)
    x1, x2, z, w, lengthscale = inputs_of("kernel_coupling", 50, 17, 3, 4, dtype)
    options = {"kernel": kernel, "backend": backend}
    y2, _ = kernel_coupling(x1, x2, z, w, lengthscale, **options)
    back = kernel_coupling_inverse(x1, y2, z, w, lengthscale, **options)
    st = se_gram_matmul(*(t.double() for t in (x1, z, w, lengthscale)), kernel=kernel)
    s, t = st.chunk(2, dim=1)
    # y2 is rounded once, then divided by exp(s); s and t carry the rounding of a sum over M.
    bound = torch.finfo(dtype).eps * (
        4 * x2.double().abs() + (y2.double().abs() + 4 * t.abs() + 1) * torch.exp(-s)
    )
    assert ((back.double() - x2.double()).abs() <= bound).all()
    assert (y2 - x2).abs().max() > 0.1


@by_quick_backend
@by_kernel
@pytest.mark.parametrize("D", [1, 3, 9])
def test_logdet_is_that_of_the_jacobian(backend, kernel, D):
    """Of the whole map (x1, x2) -> (x1, y2), in which y2 depends on both."""
    N, E = 3, 4
    x1, x2, z, w, lengthscale = inputs_of("kernel_coupling", N, 6, D, E, vector=True)
    options = {"kernel": kernel, "backend": backend}
    _, logdet = kernel_coupling(x1, x2, z, w, lengthscale, **options)
    for n in range(N):

        def couple(both):
            kept, moved = both[None, :D], both[None, D:]
            return torch.cat(
                [kept, kernel_coupling(kept, moved, z, w, lengthscale, **options)[0]], 1
            )[0]

        jacobian = torch.autograd.functional.jacobian(couple, torch.cat([x1[n], x2[n]]))
        assert jacobian[D:, :D].abs().max() > 1e-3
        expected = torch.linalg.slogdet(jacobian).logabsdet
        assert abs(expected) > 1e-3
        assert abs(expected - logdet[n]) < 1e-10


@by_backend
@by_op
@by_kernel
def test_gradient_of_a_scalar_lengthscale_is_the_sum_of_a_vectors(backend, op, kernel):
    public = OPS[op][0]
    *tensors, scalar = inputs_of(op, 8, 6, 5)
    weights = weights_of(op, [*tensors, scalar], kernel)
    gradients, lengthscales = [], (scalar, scalar.expand(5).clone())
    for lengthscale in lengthscales:
        lengthscale.requires_grad_()
        outs = as_tuple(public(*tensors, lengthscale, kernel=kernel, backend=backend))
        loss = sum((out * w).sum() for out, w in zip(outs, weights, strict=True))
        gradients.append(torch.autograd.grad(loss, lengthscale)[0])
    assert gradients[0].shape == ()
    assert gradients[1].shape == (5,)
    assert gradients[0].abs() > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1].sum(), rtol=1e-12, atol=1e-12)
    step = 1e-5
    with torch.no_grad():
        ends = [
            sum(
                (out * w).sum()
                for out, w in zip(
                    as_tuple(public(*tensors, scalar + d, kernel=kernel, backend=backend)),
                    weights,
                    strict=True,
                )
            )
            for d in (step, -step)
        ]
    torch.testing.assert_close(gradients[0], (ends[0] - ends[1]) / (2 * step), rtol=1e-7, atol=1e-7)


@by_backend
def test_a_number_is_a_scalar_lengthscale(backend):
    x, z, _ = inputs_of("se_gram", 5, 4, 3)
    for number in (2, 2.0):
        K = se_gram(x, z, number, backend=backend)
        assert torch.equal(K, se_gram(x, z, torch.tensor(2.0).double(), backend=backend))
    narrow = torch.bfloat16 if backend != "triton" else torch.float16
    K = se_gram(x.to(narrow), z.to(narrow), 1.3, backend=backend)
    wide = torch.tensor(1.3, dtype=torch.float64)
    golden = se_gram(x.to(narrow).double(), z.to(narrow).double(), wide, backend=backend)
    assert torch.equal(K, golden.to(narrow))


#: d^2 k / d(x - z)^2 at 0 for lengthscale 1; Matern 1/2 has a kink, where 0 is taken.
CURVATURE = {"se": -1.0, "matern12": 0.0, "matern32": -3.0, "matern52": -5 / 3}


@by_backend
@by_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_coincident_points_have_finite_derivatives(backend, kernel, dtype, mean):
    lengthscale = torch.tensor([0.5, 2.0, 1.0], dtype=dtype, requires_grad=True)
    x = (torch.randn(1, 3) + mean).to(dtype).requires_grad_()
    z = x.detach().clone().requires_grad_()
    K = se_gram(x, z, lengthscale, kernel=kernel, backend=backend)
    assert K.item() == 1
    own = torch.autograd.grad(K.sum(), (x, z, lengthscale), retain_graph=True)
    grads = torch.autograd.grad(K.sum(), (x, z, lengthscale), create_graph=True)
    for grad in (*own, *grads):
        assert torch.equal(grad, torch.zeros_like(grad))
    curvature = CURVATURE[kernel] / lengthscale.detach().square()
    for i in range(3):
        second = torch.autograd.grad(grads[0][0, i], (x, z, lengthscale), retain_graph=True)
        expected = torch.zeros(1, 3, dtype=dtype)
        expected[0, i] = curvature[i]
        torch.testing.assert_close(second[0], expected)
        torch.testing.assert_close(second[1], -expected)
        assert torch.equal(second[2], torch.zeros(3, dtype=dtype))


@by_backend
@by_op
@by_kernel
def test_coincident_points_among_others(backend, op, kernel):
    inputs = inputs_of(op, 6, 5, 3, 2, torch.float32)
    names = OPS[op][2].split()
    points = inputs[names.index("z")]
    inputs[names.index("x")][:4] = points[:4]
    leaves = [t.requires_grad_() for t in inputs]
    outs = as_tuple(OPS[op][0](*leaves, kernel=kernel, backend=backend))
    grads = torch.autograd.grad(sum(o.square().sum() for o in outs), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
    assert all(t.isfinite().all() for t in (*outs, *grads, *second))
    assert all(t.abs().max() > 0 for t in (*grads, *second))


@by_backend
@by_kernel
@pytest.mark.parametrize("D", [1, 9])
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_points_far_apart_and_lengthscales_at_the_ends(backend, kernel, D):
    x, z = torch.tensor([[0.0], [1e30]]).expand(2, D), torch.tensor([[0.0], [-1e30]]).expand(2, D)
    for lengthscale in (1e-3, 1.0, 1e3):
        leaf = torch.tensor(lengthscale, requires_grad=True)
        K = se_gram(x.clone().requires_grad_(), z, leaf, kernel=kernel, backend=backend)
        assert torch.equal(K.detach(), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))


#: Tiles are at most 64 rows and 32 points. 130 features or outputs are too wide for Triton's
#: kernels, and for gradients in CUDA.
GPU_SHAPES = {
    "se_gram": [(1, 1, 1, 1), (17, 300, 3, 1), (100, 63, 9, 1), (33, 17, 40, 1), (5, 9, 130, 1)],
    "se_gram_matmul": [(1, 1, 1, 1), (150, 17, 3, 5), (63, 150, 8, 1), (17, 65, 31, 40),
                       (9, 5, 130, 3), (9, 5, 3, 70)],
    "kernel_coupling": [(1, 1, 1, 1), (300, 17, 3, 1), (63, 100, 9, 16), (17, 33, 40, 40),
                        (9, 5, 130, 3), (5, 9, 3, 70)],
    "kernel_coupling_inverse": [(17, 100, 8, 5), (63, 17, 31, 3)],
}  # fmt: skip


@by_gpu_backend
@pytest.mark.parametrize(
    ("op", "N", "M", "D", "O"),
    [(op, *shape) for op, shapes in GPU_SHAPES.items() for shape in shapes],
)
def test_gpu_kernels_follow_the_fp64_reference(backend, op, N, M, D, O):
    skip_without_kernel(backend, op, inputs_of(op, N, M, D, O, torch.float32))
    kernels = gram.KERNELS if N * M * D < 10_000 else ("se", "matern52")
    for kernel, vector in zip(kernels, (False, True, True, False), strict=False):
        inputs = inputs_of(op, N, M, D, O, torch.float32, vector, apart=True)
        check_against_fp64(op, inputs, kernel, backend)
    inputs = inputs_of(op, N, M, D, O, torch.float16, True, apart=True)
    check_against_fp64(op, inputs, "se", backend)


@interpreted
@by_op
@settings(max_examples=4, deadline=None)
@given(
    kernel=st.sampled_from(gram.KERNELS),
    N=st.integers(1, 70),
    M=st.integers(1, 70),
    D=st.integers(1, 12),
    O=st.integers(1, 6),
    vector=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_triton_in_double(op, kernel, N, M, D, O, vector, seed):
    torch.manual_seed(seed)
    inputs = inputs_of(op, N, M, D, O, torch.float64, vector)
    check_against_fp64(op, inputs, kernel, "triton")


@by_gpu_backend
@by_op
@pytest.mark.parametrize(("D", "kernel"), [(3, "matern12"), (3, "se"), (20, "se")])
def test_gpu_kernels_on_data_far_from_zero(backend, op, D, kernel):
    skip_without_kernel(backend, op, inputs_of(op, 40, 30, D, dtype=torch.float32))
    check_far_from_zero(backend, op, kernel, D)


@by_gpu_backend
@pytest.mark.parametrize("op", ["se_gram", "se_gram_matmul"])
@pytest.mark.parametrize("kernel", ["se", "matern32"])
@pytest.mark.parametrize("D", [5, 20])
def test_clusters_far_apart_on_gpu_kernels(backend, op, kernel, D):
    """Norms are large beside the distances within a cluster, wherever the centre is."""
    inputs = inputs_of(op, 70, 40, D, dtype=torch.float32, apart=True)
    skip_without_kernel(backend, op, inputs)
    towards = torch.randn(D)
    for points in inputs[:2]:
        points *= 0.3
        points[::2] += 60 * towards
    check_against_fp64(op, inputs, kernel, backend)


@interpreted
@pytest.mark.parametrize(("D", "O", "vector"), [(3, 2, True), (9, 5, False), (130, 1, True)])
def test_any_number_of_programs_on_triton(monkeypatch, D, O, vector):
    """Partials over strips of rows and groups of points, or blocks of rows, add up to the same."""
    from flowops.kernels import gram_backward

    for op in ("se_gram", "se_gram_matmul"):
        N, M = (70, 100) if D < 100 else (20, 9)
        inputs = inputs_of(op, N, M, D, O, torch.float32, vector, apart=True)
        for programs in (1, 3):
            monkeypatch.setattr(gram_backward, "_PROGRAMS", programs)
            monkeypatch.setattr(gram_backward, "_AT_ONCE", programs * 50)
            check_against_fp64(op, inputs, "se", "triton")


@interpreted
@pytest.mark.parametrize("D", [3, 20])
def test_tf32_rounds_points_but_not_their_equality_on_triton(D):
    x, z, w, lengthscale = inputs_of("se_gram_matmul", 30, 20, D, dtype=torch.float32)
    plain = {"backend": "triton"}
    options = {"precision": "tf32", **plain}
    assert torch.equal(se_gram(x, x, lengthscale, **options).diagonal(), torch.ones(30))
    K, expected = se_gram(x, z, lengthscale, **options), se_gram(x, z, lengthscale, **plain)
    assert torch.equal(K, expected) == (D <= 8)
    torch.testing.assert_close(K, expected, rtol=0, atol=2e-3)
    leaves = [t.requires_grad_() for t in (x, z, w, lengthscale)]
    for a, e in zip(
        torch.autograd.grad(se_gram_matmul(*leaves, **options).sum(), leaves),
        torch.autograd.grad(se_gram_matmul(*leaves, **plain).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-2 * e.abs().max().item())


@by_gpu_backend
@by_op
def test_mixed_dtypes_on_gpu_kernels(backend, op):
    inputs = inputs_of(op, 20, 10, 9, 3, torch.float32, apart=True)
    inputs[-2] = inputs[-2].half()
    skip_without_kernel(backend, op, inputs)
    check_against_fp64(op, inputs, "se", backend)


def test_tf32_is_accepted_and_changes_nothing_on_the_cpu():
    x, z, lengthscale = inputs_of("se_gram", 5, 4, 3, dtype=torch.float32)
    assert torch.equal(se_gram(x, z, lengthscale, precision="tf32"), se_gram(x, z, lengthscale))


def ones(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(*shape, dtype=dtype, device=device)


GOOD = {
    "x": ones(5, 3),
    "x1": ones(5, 3),
    "x2": ones(5, 2),
    "y2": ones(5, 2),
    "z": ones(4, 3),
    "w": ones(4, 4),
    "lengthscale": ones(()),
}
ARGUMENTS = {
    "se_gram": ("x", "z", "lengthscale"),
    "se_gram_matmul": ("x", "z", "w", "lengthscale"),
    "kernel_coupling": ("x1", "x2", "z", "w", "lengthscale"),
    "kernel_coupling_inverse": ("x1", "y2", "z", "w", "lengthscale"),
}
META = ones(4, 3, device="meta")
BAD_OF_ALL = [
    ({"z": None}, TypeError, "z: expected a torch.Tensor, got NoneType"),
    ({"z": ones(4, 3).int()}, TypeError, "z: expected a floating dtype, got torch.int32"),
    ({"z": ones(3)}, ValueError, r"z: expected a non-empty \[rows, D\], got \[3\]"),
    ({"z": ones(0, 3)}, ValueError, r"z: expected a non-empty \[rows, D\], got \[0, 3\]"),
    ({"z": ones(4, 2)}, ValueError, r"z: expected \[M, 3\] like {x}, got \[4, 2\]"),
    ({"z": META}, ValueError, "z: expected a tensor on cpu like {x}, got one on meta"),
    ({"lengthscale": 0.0}, ValueError, r"lengthscale: expected positive values, got 0.0"),
    ({"lengthscale": -1}, ValueError, r"lengthscale: expected positive values, got -1.0"),
    ({"lengthscale": float("nan")}, ValueError, "lengthscale: expected positive values, got nan"),
    (
        *({"lengthscale": torch.tensor([1.0, 0.0, 1.0])}, ValueError),
        r"lengthscale: expected positive values, got \[1.0, 0.0, 1.0\]",
    ),
    ({"lengthscale": ones(2)}, ValueError, r"lengthscale: expected a scalar or \[3\], got \[2\]"),
    ({"lengthscale": ones(1)}, ValueError, r"lengthscale: expected a scalar or \[3\], got \[1\]"),
    ({"lengthscale": ones(1, 3)}, ValueError, r"lengthscale: expected a scalar or \[3\], got"),
    ({"lengthscale": ones(()).int()}, TypeError, "lengthscale: expected a floating dtype"),
    ({"lengthscale": None}, (TypeError, ValueError), "lengthscale: expected"),
    ({"lengthscale": "1"}, (TypeError, ValueError), "lengthscale: expected"),
    ({"kernel": "rbf"}, ValueError, r"kernel: expected one of \('se', .* got 'rbf'"),
    ({"kernel": None}, ValueError, r"kernel: expected one of \('se', .* got None"),
    ({"precision": "bf16"}, ValueError, r"precision: expected one of \('fp32', .* got 'bf16'"),
    ({"backend": "gpu"}, ValueError, "backend: expected 'auto' or one of .* got 'gpu'"),
    (
        *({"backend": "cuda", "z": ones(4, 3).double()}, RuntimeError),
        "backend 'cuda' can't run {op}: ",
    ),
    ({"{x}": [[1.0]]}, TypeError, "{x}: expected a torch.Tensor, got list"),
    ({"{x}": ones(5, 3).long()}, TypeError, "{x}: expected a floating dtype, got torch.int64"),
    ({"{x}": ones(5, 3, 1)}, ValueError, r"{x}: expected a non-empty \[rows, D\], got"),
    ({"{x}": ones(0, 3)}, ValueError, r"{x}: expected a non-empty \[rows, D\], got \[0, 3\]"),
    ({"{x}": ones(5, 0)}, ValueError, r"{x}: expected a non-empty \[rows, D\], got \[5, 0\]"),
]
BAD_OF_SOME = [
    ({"w": None}, TypeError, "w: expected a torch.Tensor, got NoneType"),
    ({"w": ones(4, 4).int()}, TypeError, "w: expected a floating dtype"),
    ({"w": ones(4)}, ValueError, r"w: expected \[4, .*\] for z of \[4, 3\], got \[4\]"),
    ({"w": ones(3, 4)}, ValueError, r"w: expected \[4, .*\] for z of \[4, 3\], got \[3, 4\]"),
    ({"w": ones(4, 0)}, ValueError, r"w: expected \[4, .*\] for z of \[4, 3\], got \[4, 0\]"),
    ({"{x2}": None}, TypeError, "{x2}: expected a torch.Tensor, got NoneType"),
    ({"{x2}": ones(5, 2).int()}, TypeError, "{x2}: expected a floating dtype"),
    ({"{x2}": ones(5)}, ValueError, r"{x2}: expected \[5, E\], got \[5\]"),
    ({"{x2}": ones(4, 2)}, ValueError, r"{x2}: expected \[5, E\], got \[4, 2\]"),
    ({"{x2}": ones(5, 0)}, ValueError, r"{x2}: expected \[5, E\], got \[5, 0\]"),
    ({"{x2}": ones(5, 3)}, ValueError, r"w: expected \[4, 6\] for z of \[4, 3\], got \[4, 4\]"),
]
BAD_CASES = [
    pytest.param(op, change, error, match, id=f"{op}-{i}")
    for op, names in ARGUMENTS.items()
    for i, (change, error, match) in enumerate(BAD_OF_ALL + BAD_OF_SOME)
    if (name := next(iter(change)).strip("{}")) not in ("w", "x2")
    or (name == "w" and "w" in names)
    or (name == "x2" and len(names) == 5)
]


@pytest.mark.parametrize(("op", "change", "error", "match"), BAD_CASES)
def test_bad_inputs_are_named(op, change, error, match):
    names = ARGUMENTS[op]
    filled = {"op": op, "x": names[0], "x2": names[1]}

    def fill(text):
        for key, value in filled.items():
            text = text.replace("{" + key + "}", value)
        return text

    arguments = {name: GOOD[name] for name in names}
    arguments.update({fill(name): value for name, value in change.items()})
    with pytest.raises(error, match="^" + fill(match)):
        OPS[op][0](**arguments)


@pytest.mark.parametrize("op", ["kernel_coupling", "kernel_coupling_inverse"])
def test_weights_must_fit_the_half_that_moves(op):
    arguments = {name: GOOD[name] for name in ARGUMENTS[op]}
    with pytest.raises(ValueError, match=r"^w: expected \[4, 4\] for z of \[4, 3\], got \[4, 2\]"):
        OPS[op][0](**{**arguments, "w": ones(4, 2)})


# --- the native kernels ---------------------------------------------------------------------------

native = pytest.mark.skipif("cpu" not in BACKENDS, reason="flowops._C was not built")


@native
@by_op
@by_kernel
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_every_instruction_set(isa, op, kernel, dtype):
    # A strip and part of one; whole and cut groups of points, outputs, features; two blocks.
    for N, M, D, O in ((33, 17, 9, 3), (65, 300, 3, 5), (3, 257, 1, 1)):
        with running(isa):
            inputs = inputs_of(op, N, M, D, O, dtype, vector=D == 9, apart=True)
            check_against_fp64(op, inputs, kernel, "cpu")


@native
@by_op
@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
def test_native_results_do_not_depend_on_threads(op, vector):
    inputs = inputs_of(op, 3000, 40, 5, 4, torch.float32, vector)
    weights = weights_of(op, inputs, "se")
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(values_and_gradients(lambda *t: OPS[op][0](*t), inputs, weights))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@native
@by_op
def test_native_kernels_read_rows_in_place(op):
    inputs = inputs_of(op, 50, 20, 5, 4, torch.float32)
    expected = as_tuple(OPS[op][0](*inputs))
    wide = [
        torch.full((t.shape[0], 2 * t.shape[1] + 3), math.nan) if t.ndim == 2 else t for t in inputs
    ]
    views = [
        w[:, 1 : 1 + t.shape[1]] if t.ndim == 2 else t for w, t in zip(wide, inputs, strict=True)
    ]
    for view, tensor in zip(views, inputs, strict=True):
        view.copy_(tensor)
    transposed = [t.T.contiguous().T if t.ndim == 2 else t for t in inputs]
    for other in (views, transposed):
        actual = as_tuple(OPS[op][0](*other))
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@native
@by_kernel
def test_exponentials_over_their_whole_range(kernel):
    distances = torch.cat([torch.logspace(-6, 6, 3000), torch.linspace(0, 110, 3000)])
    z = torch.zeros(1, 1)
    for lengthscale in (0.3, 1.0, 7.3):
        x = (distances * lengthscale).unsqueeze(1)
        K = se_gram(x, z, lengthscale, kernel=kernel, backend="cpu").double()
        golden = se_gram(x.double(), z.double(), torch.tensor(lengthscale).double(), kernel=kernel)
        # e^-t is 0 where it leaves the normal range; Matern kernels multiply it by up to 3,000.
        normal = golden > 1e-34
        # A distance off by half a unit of its rounding moves -log k by as much times its slope.
        sharpness = 2 * (golden.log().abs() + 2)
        relative = ((K - golden) / golden).abs()[normal]
        assert (relative <= sharpness[normal] * torch.finfo(torch.float32).eps).all()
        assert (K[~normal] <= 1.1e-34).all()
