import itertools

import pytest
import torch
import torch.nn.functional as F

from flowops import affine_inverse, affine_update, cuda_runtime
from flowops.affine import affine_inverse_reference, affine_update_reference
from helpers import ENGINES, ISAS, assert_close, poison, running

CHANNELS = (1, 3, 4, 12, 16, 17, 48, 63, 100)
TOKENS = (1, 2, 17, 100, 1000)
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp64": (torch.float64, torch.float64),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32-bf16": (torch.float32, torch.bfloat16),
}
OPS = {
    "affine_update": (affine_update, affine_update_reference),
    "affine_inverse": (affine_inverse, affine_inverse_reference),
}
FLAGS = tuple(itertools.product((False, True), (1, 2)))

by_op = pytest.mark.parametrize("op", OPS)
by_dtype = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
by_engine = pytest.mark.parametrize("engine", ENGINES)
by_order = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reversed"])


def data(B, T, C, width=2, dtypes=(torch.float32, torch.float32), mean=0.0):
    """x and shifts around ``mean``; log-scales of both signs, with a sum far from 0."""
    x = torch.randn(B, T, C, dtype=torch.float64) + mean
    params = torch.randn(B, T, width * C, dtype=torch.float64) + mean
    params[..., : (width - 1) * C] = 0.5 + 0.4 * (params[..., : (width - 1) * C] - mean)
    return x.to(dtypes[0]), params.to(dtypes[1])


def as_tuple(out):
    return out if isinstance(out, tuple) else (out,)


def values_and_gradients(function, x, params, weights):
    """Outputs of ``function``, then gradients to x and params for these output weights."""
    x, params = x.detach().requires_grad_(), params.detach().requires_grad_()
    poison(x, params, x[:, 0, 0])
    outs = as_tuple(function(x, params))
    loss = sum((out * w.to(out.dtype)).sum() for out, w in zip(outs, weights, strict=True))
    poison(x, params)
    return (*outs, *torch.autograd.grad(loss, (x, params)))


def check_against_fp64(op, x, params, reverse, engines=ENGINES):
    public, reference = OPS[op]
    weights = [torch.randn_like(x)]
    if op == "affine_update":
        weights.append(torch.randn(x.shape[0]))

    def along_reference(x, params):
        return reference(x, params, reverse)

    golden = values_and_gradients(along_reference, x.double(), params.double(), weights)
    plain = values_and_gradients(along_reference, x, params, weights)
    names = [("z", "logdet", "dx", "dparams"), ("x", "dz", "dparams")][op == "affine_inverse"]
    for engine in engines:
        with running(engine) as backend:
            actual = values_and_gradients(
                lambda x, p, backend=backend: public(x, p, reverse=reverse, backend=backend),
                *(x, params, weights),
            )
        for name, a, p, g in zip(names, actual, plain, golden, strict=True):
            what = f"{engine} {name} {list(params.shape)} reverse={reverse}"
            assert a.dtype == p.dtype, what
            assert a.is_contiguous(), what
            if name == "logdet" and g.dtype == a.dtype:
                # The golden is no wider here: it rounds as often as the sum it is compared with.
                terms = params[..., : x.shape[2]].abs().sum((1, 2))
                assert ((a - g).abs() <= 1e-14 * terms).all(), what
            else:
                assert_close(a, p, g, what)


@by_order
@pytest.mark.parametrize("width", [1, 2])
def test_reference_is_the_formula(reverse, width):
    B, T, C = 2, 5, 3
    x, params = data(B, T, C, width, (torch.float64, torch.float64))
    order = range(T - 1, -1, -1) if reverse else range(T)
    z, inverse, logdet = torch.empty_like(x), torch.empty_like(x), torch.zeros(B).double()
    a = b = torch.zeros(B, C, dtype=torch.float64)
    for position, i in enumerate(order):
        z[:, i] = (x[:, i] - b) * torch.exp(-a)
        inverse[:, i] = x[:, i] * torch.exp(a) + b
        logdet -= a.sum(1)
        if width == 2:
            a = params[:, position, :C]
        b = params[:, position, -C:]
    got_z, got_logdet = affine_update_reference(x, params, reverse)
    for got, expected in (
        (got_z, z),
        (got_logdet, logdet),
        (affine_inverse_reference(x, params, reverse), inverse),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


@by_dtype
@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize("C", CHANNELS)
def test_values_and_gradients_follow_the_fp64_reference(C, T, dtypes):
    for op, (reverse, width) in itertools.product(OPS, FLAGS):
        check_against_fp64(op, *data(1 if T == 1000 else 2, T, C, width, dtypes), reverse)


@by_order
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("C", CHANNELS)
def test_logdet_of_equal_log_scales(C, dtype, reverse):
    """Roundings of equal terms add up instead of averaging out."""
    for T, value in itertools.product(TOKENS, (0.1, -0.7)):
        x, params = torch.zeros(2, T, C, dtype=dtype), torch.zeros(2, T, 2 * C, dtype=dtype)
        params[..., :C] = value
        golden = affine_update_reference(x.double(), params.double(), reverse)[1]
        plain = affine_update_reference(x, params, reverse)[1]
        for engine in ENGINES:
            with running(engine) as backend:
                logdet = affine_update(x, params, reverse=reverse, backend=backend)[1]
            assert_close(logdet, plain, golden, f"{engine} logdet {list(params.shape)}")


@by_op
def test_more_channels_than_a_chunk_holds(op):
    for reverse, width in FLAGS:
        check_against_fp64(op, *data(2, 3, 9001, width), reverse)


def unfolded(x):
    """x as torch's unfold hands patches over: channels before tokens in memory."""
    B, T, C = x.shape
    images = x.transpose(1, 2).reshape(B, C, T, 1)
    return F.unfold(images.double(), 1).to(x.dtype).transpose(1, 2)


def every_other(x):
    return torch.stack([x, torch.full_like(x, float("nan"))], dim=-1).flatten(-2)[..., ::2]


def sliced(x):
    B, T, C = x.shape
    packed = torch.full((B + 1, T + 3, C + 5), float("nan"), dtype=x.dtype)
    packed[1:, 2:-1, 4:-1] = x
    return packed[1:, 2:-1, 4:-1]


def one_for_all(x):
    return x[:1].expand_as(x)


@by_op
@by_dtype
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("layout", [unfolded, sliced, every_other, one_for_all])
def test_strided_views_and_data_far_from_zero(op, dtypes, mean, layout):
    for (T, C), (reverse, width) in itertools.product([(17, 12), (100, 7)], FLAGS):
        x, params = data(2, T, C, width, dtypes, mean)
        odd_x, odd_params = layout(x), layout(params)
        assert not odd_x.is_contiguous()
        assert not odd_params.is_contiguous()
        if layout is not one_for_all:
            assert torch.equal(odd_x, x)
        check_against_fp64(op, odd_x, odd_params, reverse)


@by_engine
@by_op
def test_gradients_that_arrive_expanded_or_strided(engine, op):
    public, reference = OPS[op]
    x, params = (t.requires_grad_() for t in data(2, 17, 5, 2, DTYPES["fp64"]))
    weight = every_other(torch.randn_like(x))
    with running(engine) as backend:
        for weigh in (lambda z: z.sum(), lambda z: (z.unbind(2)[1]).sum(), lambda z: z @ z.mT):
            actual, expected = (
                torch.autograd.grad(sum(weigh(o).sum() for o in as_tuple(out)[:1]), (x, params))
                for out in (public(x, params, backend=backend), reference(x, params))
            )
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
        out = as_tuple(public(x, params, backend=backend))[0]
        actual = torch.autograd.grad(out, (x, params), weight)
        expected = torch.autograd.grad(as_tuple(reference(x, params))[0], (x, params), weight)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
        if op == "affine_update":
            logdet = public(x, params, backend=backend)[1]
            actual = torch.autograd.grad(logdet, (x, params), torch.ones(1).double().expand(2))
            assert torch.equal(actual[0], torch.zeros_like(x))
            assert torch.equal(actual[1][:, :-1, :5], torch.full((2, 16, 5), -1.0).double())
            assert torch.equal(actual[1][..., 5:], torch.zeros_like(x))


EXTREMES = {
    torch.float32: (80, -80, 88.5, -88.5, 100, -100, 103.5, 200, -200, 1e30, -1e30),
    torch.float64: (80, -80, 200, -200, 709.5, -709.5, 740, 744.9, 800, -800, 1e300, -1e300),
    torch.bfloat16: (80, -80, 88, -88, 100, -100, 200, -200, 1e30, -1e30),
}


@by_engine
@pytest.mark.parametrize("dtype", EXTREMES)
def test_extreme_log_scales_behave_like_exp(engine, dtype):
    odd = (float("inf"), -float("inf"), float("nan"), 0.0)
    a = torch.tensor([*EXTREMES[dtype], *odd], dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    smallest = torch.finfo(wide).smallest_normal * torch.finfo(wide).eps
    a = torch.cat([a.roll(i) for i in range(9)])
    C = a.numel()
    params = torch.zeros(1, 2, 2 * C, dtype=dtype)
    params[0, 0, :C] = a
    ones = torch.ones(1, 2, C, dtype=dtype, requires_grad=True)
    with running(engine) as backend:
        z = affine_update(ones, params, backend=backend)[0]
        x = affine_inverse(ones, params, backend=backend)
        dx = torch.autograd.grad(z.sum(), ones)[0]
        dz = torch.autograd.grad(x.sum(), ones)[0]
    for what, got, log in (("z", z, -a), ("dx", dx, -a), ("x", x, a), ("dz", dz, a)):
        expected = torch.exp(log.to(wide)).to(dtype)
        assert torch.equal(got[0, 0], torch.ones_like(a)), what
        got = got[0, 1].detach()
        assert torch.equal(got.isnan(), expected.isnan()), what
        assert torch.equal(got.isinf(), expected.isinf()), what
        assert torch.equal(got == 0, expected == 0), what
        rtol = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(got, expected, rtol=rtol, atol=2 * smallest, equal_nan=True)


@by_engine
def test_extreme_log_scales_in_the_log_determinant_and_its_gradients(engine):
    for value in (80.0, -200.0, float("inf"), -float("inf"), float("nan")):
        x = torch.full((1, 2, 1), 3.0)
        params = torch.tensor([[[value, 1.0], [0.0, 0.0]]], requires_grad=True)
        with running(engine) as backend:
            z, logdet = affine_update(x, params, backend=backend)
            (grad,) = torch.autograd.grad(z.sum() + logdet.sum(), params)
        expected = torch.tensor([-value])
        torch.testing.assert_close(logdet.detach(), expected, rtol=0, atol=0, equal_nan=True)
        scale = torch.exp(torch.tensor(-value))
        torch.testing.assert_close(
            grad[0, 0], torch.stack([-2 * scale - 1, -scale]), equal_nan=True
        )
        assert torch.equal(grad[0, 1], torch.zeros(2))


@by_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exp_is_accurate_over_its_whole_range(engine, dtype):
    end = 87.0 if dtype == torch.float32 else 708.0
    a = torch.linspace(-end, end, 20011, dtype=dtype)
    params = torch.zeros(1, 2, 2 * a.numel(), dtype=dtype)
    params[0, 0, : a.numel()] = a
    with running(engine) as backend:
        got = affine_inverse(torch.ones(1, 2, a.numel(), dtype=dtype), params, backend=backend)
    relative = got[0, 1].double() / torch.exp(a.double()) - 1
    assert relative.abs().max() < 2 * torch.finfo(dtype).eps


@by_engine
@by_order
@pytest.mark.parametrize("width", [1, 2])
def test_logdet_is_that_of_the_jacobian(engine, reverse, width):
    T, C = 4, 3
    x, params = data(2, T, C, width, DTYPES["fp64"])
    with running(engine) as backend:
        logdet = affine_update(x, params, reverse=reverse, backend=backend)[1]
        for b in range(2):

            def update(flat, b=b, backend=backend):
                out = affine_update(
                    flat.view(1, T, C), params[b : b + 1], reverse=reverse, backend=backend
                )
                return out[0].flatten()

            jacobian = torch.autograd.functional.jacobian(update, x[b].flatten())
            expected = torch.linalg.slogdet(jacobian).logabsdet
            assert abs(expected - logdet[b]) < 1e-10
            if width == 2:
                assert abs(expected) > 0.1


@by_engine
@by_op
@by_dtype
def test_reverse_is_flipping(engine, op, dtypes):
    public = OPS[op][0]
    for T, C, width in ((1, 3, 2), (17, 12, 2), (100, 63, 2), (17, 12, 1)):
        x, params = data(2, T, C, width, dtypes)
        with running(engine) as backend:
            actual = as_tuple(public(x, params, reverse=True, backend=backend))
            flipped = as_tuple(public(x.flip(1), params, backend=backend))
        assert torch.equal(actual[0], flipped[0].flip(1))
        if op == "affine_update":
            eps = torch.finfo(actual[1].dtype).eps
            a = params[:, :-1, :C] if width == 2 else params[:, :0]
            bound = 4 * eps * a.double().abs().sum((1, 2))
            assert ((actual[1] - flipped[1]).abs() <= bound).all()


@pytest.mark.parametrize("isa", ISAS)
@by_op
@by_dtype
def test_thread_count_does_not_change_a_bit(isa, op, dtypes):
    public = OPS[op][0]
    for B, T, C, reverse in ((1, 1000, 100, False), (3, 257, 63, True), (64, 17, 48, False)):
        x, params = data(B, T, C, 2, dtypes)
        weights = [torch.randn_like(x), torch.randn(B)][: 2 - (op == "affine_inverse")]
        results = []
        with running(isa) as backend:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                assert torch.get_num_threads() == threads
                results.append(
                    values_and_gradients(
                        lambda x, p, reverse=reverse, backend=backend: public(
                            x, p, reverse=reverse, backend=backend
                        ),
                        *(x, params, weights),
                    )
                )
        for one, two in zip(*results, strict=True):
            assert torch.equal(one, two)


@by_engine
@by_order
@by_dtype
@pytest.mark.parametrize("width", [1, 2])
def test_inverse_undoes_update(engine, reverse, dtypes, width):
    x, params = data(2, 100, 17, width, dtypes, mean=3.0)
    with running(engine) as backend:
        z, _ = affine_update(x, params, reverse=reverse, backend=backend)
        back = affine_inverse(z, params, reverse=reverse, backend=backend)
    b = torch.cat([torch.zeros(2, 1, 17), params[:, :-1, -17:]], dim=1).double()
    if reverse:
        b = b.flip(1)
    eps = torch.finfo(dtypes[0]).eps
    bound = eps * (4 * (x.double() - b).abs() + x.double().abs())
    assert ((back.double() - x.double()).abs() <= bound).all()
    assert not torch.equal(z, x)


@by_engine
@by_op
@by_order
@by_dtype
@pytest.mark.parametrize("width", [1, 2])
def test_the_row_no_token_reads(engine, op, reverse, dtypes, width):
    """It may hold anything, and its gradient is exactly 0; the first token passes through."""
    public = OPS[op][0]
    x, params = data(2, 17, 5, width, dtypes)
    params[:, -1] = float("nan")
    weights = [torch.randn_like(x), torch.randn(2)][: 2 - (op == "affine_inverse")]
    with running(engine) as backend:
        *outs, grad_x, grad_params = values_and_gradients(
            lambda x, p: public(x, p, reverse=reverse, backend=backend), x, params, weights
        )
    assert all(out.isfinite().all() for out in (*outs, grad_x, grad_params))
    assert torch.equal(grad_params[:, -1], torch.zeros_like(params[:, -1]))
    assert grad_params[:, :-1].count_nonzero() > 0.9 * grad_params[:, :-1].numel()
    first = -1 if reverse else 0
    assert torch.equal(outs[0][:, first], x[:, first])
    assert torch.equal(grad_x[:, first], weights[0][:, first])


@by_engine
def test_one_token_passes_through(engine):
    x, params = data(3, 1, 7)
    params.requires_grad_()
    with running(engine) as backend:
        for reverse in (False, True):
            z, logdet = affine_update(x, params, reverse=reverse, backend=backend)
            assert torch.equal(z, x)
            assert torch.equal(logdet, torch.zeros(3))
            (grad,) = torch.autograd.grad(z.sum() + logdet.sum(), params)
            assert torch.equal(grad, torch.zeros_like(params))


@pytest.mark.skipif(not ISAS, reason="there are no native kernels here")
@by_op
@by_order
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float16, torch.float16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
    ],
)
def test_storage_without_a_native_kernel_goes_to_the_reference(op, reverse, dtypes):
    public, reference = OPS[op]
    x, params = data(2, 17, 12, 2, dtypes)
    outs = as_tuple(public(x, params, reverse=reverse))
    for out, expected in zip(outs, as_tuple(reference(x, params, reverse)), strict=True):
        assert out.dtype == expected.dtype
        assert torch.equal(out, expected)
    check_against_fp64(op, x, params, reverse, engines=["reference"])
    match = rf"backend 'cpu' can't run {op}: .*(torch\.float|torch\.bfloat)"
    with pytest.raises(RuntimeError, match=match):
        public(x, params, reverse=reverse, backend="cpu")


def ones(*shape, dtype=torch.float32):
    return torch.ones(*shape, dtype=dtype)


@by_op
@pytest.mark.parametrize(
    ("x", "params", "error", "message"),
    [
        ([[[1.0]]], ones(1, 1, 2), TypeError, "{x}: expected a torch.Tensor, got list"),
        (ones(1, 1, 1), None, TypeError, "params: expected a torch.Tensor, got NoneType"),
        (ones(2, 3, 4).int(), ones(2, 3, 8), TypeError, "{x}: expected a floating dtype"),
        (ones(2, 3, 4), ones(2, 3, 8).long(), TypeError, "params: expected a floating dtype"),
        (ones(2, 3, 4), ones(2, 3, 8).bool(), TypeError, "params: expected a floating dtype"),
        (ones(2, 3, 4).cfloat(), ones(2, 3, 8), TypeError, "{x}: expected a floating dtype"),
        (ones(3, 4), ones(3, 8), ValueError, r"{x}: expected a non-empty \[B, T, C\]"),
        (ones(1, 2, 3, 4), ones(2, 3, 8), ValueError, r"{x}: expected a non-empty \[B, T, C\]"),
        (ones(0, 3, 4), ones(0, 3, 8), ValueError, r"{x}: expected a non-empty .* got \[0, 3, 4\]"),
        (ones(2, 0, 4), ones(2, 0, 8), ValueError, r"{x}: expected a non-empty .* got \[2, 0, 4\]"),
        (ones(2, 3, 0), ones(2, 3, 0), ValueError, r"{x}: expected a non-empty .* got \[2, 3, 0\]"),
        (ones(2, 3, 4), ones(3, 8), ValueError, r"params: expected \[2, 3, 8\] or \[2, 3, 4\]"),
        (ones(2, 3, 4), ones(2, 3, 7), ValueError, r"params: expected .* got \[2, 3, 7\]"),
        (ones(2, 3, 4), ones(2, 3, 12), ValueError, r"params: expected .* got \[2, 3, 12\]"),
        (ones(2, 3, 4), ones(2, 4, 8), ValueError, r"params: expected .* got \[2, 4, 8\]"),
        (ones(2, 3, 4), ones(1, 3, 8), ValueError, r"params: expected .* got \[1, 3, 8\]"),
        (
            *(ones(2, 3, 4), torch.ones(2, 3, 8, device="meta")),
            *(ValueError, "params: expected a tensor on cpu like {x}, got one on meta"),
        ),
    ],
)
def test_bad_inputs_are_named(op, x, params, error, message):
    name = "x" if op == "affine_update" else "z"
    with pytest.raises(error, match="^" + message.replace("{x}", name)):
        OPS[op][0](x, params)


@by_op
@pytest.mark.parametrize("backend", ["gpu", "CPU", "", None])
def test_unknown_backend(op, backend):
    with pytest.raises(ValueError, match=f"backend: expected 'auto' or one of .* got {backend!r}"):
        OPS[op][0](*data(1, 2, 3), backend=backend)


@by_op
def test_cuda_says_why_it_cannot_run_on_cpu_tensors(op, monkeypatch):
    monkeypatch.delenv(cuda_runtime.EMULATOR, raising=False)
    with pytest.raises(RuntimeError, match=f"backend 'cuda' can't run {op}: its tensors are on"):
        OPS[op][0](*data(1, 2, 3), backend="cuda")
