"""NumPy's arrays, and a class of this file that speaks DLPack and is nobody's, in place of tensors.
CuPy's are in tests/gpu/test_interop.py."""

import gc
import inspect
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flowops
from flowops import interop

NAMES = (
    *("affine_update", "affine_inverse", "pad_noise", "se_gram", "se_gram_matmul"),
    *("kernel_coupling", "kernel_coupling_inverse"),
)
by_name = pytest.mark.parametrize("name", NAMES)


def problem(name, dtype=torch.float32):
    """Arguments of ``name`` that may be arrays, by name, and those that may not."""

    def g(*shape):
        return torch.randn(shape).to(dtype)

    lengthscale = torch.tensor(1.3).to(dtype)
    half = "y2" if "inverse" in name else "x2"
    if name.startswith("affine"):
        first = "z" if "inverse" in name else "x"
        return {first: g(2, 5, 3), "params": 0.3 * g(2, 5, 6)}, {"reverse": True}
    if name == "pad_noise":
        scales = {"pad_scale": torch.tensor(1.5), "data_scale": torch.tensor(0.1)}
        return {"x": g(6, 3), **scales, "rng": torch.tensor([42, 7])}, {"pad": 2}
    if name == "se_gram":
        return {"x": g(6, 3), "z": g(4, 3), "lengthscale": lengthscale}, {"kernel": "matern32"}
    if name == "se_gram_matmul":
        return {"x": g(6, 3), "z": g(4, 3), "w": g(4, 2), "lengthscale": lengthscale}, {}
    tensors = {"x1": g(6, 3), half: g(6, 2), "z": g(4, 3), "w": 0.3 * g(4, 4)}
    return {**tensors, "lengthscale": lengthscale.expand(3)}, {}


def numpy_of(tensors):
    return {key: tensor.numpy() for key, tensor in tensors.items()}


def assert_same(actual, expected, kind=np.ndarray):
    """Bit for bit: the op ran on the same memory in the same way."""
    if isinstance(expected, tuple):
        assert isinstance(actual, tuple)
        assert len(actual) == len(expected)
    else:
        actual, expected = (actual,), (expected,)
    for a, e in zip(actual, expected, strict=True):
        assert type(a) is kind
        a = torch.from_dlpack(a)
        assert a.dtype == e.dtype
        assert torch.equal(a, e)


class Shared:
    """A tensor behind nothing but the protocol. What it was asked for is kept in ``asked``."""

    def __init__(self, tensor, device=None):
        self.tensor, self.device, self.asked = tensor, device, []

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        self.asked.append((stream, dl_device, copy))
        return self.tensor.__dlpack__(max_version=max_version)

    def __dlpack_device__(self):
        return self.device or self.tensor.__dlpack_device__()

    def __array_namespace__(self, api_version=None):
        return SimpleNamespace(from_dlpack=from_dlpack)


def from_dlpack(producer):
    """As the protocol has it: takes the producer, not a capsule that it made for somebody else."""
    assert hasattr(producer, "__dlpack__")
    assert hasattr(producer, "__dlpack_device__")
    return Shared(torch.from_dlpack(producer))


# --- arrays in, arrays out ------------------------------------------------------------------------


@by_name
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_numpy_in_numpy_out(name, dtype):
    function = getattr(flowops, name)
    tensors, rest = problem(name, dtype)
    assert_same(function(**numpy_of(tensors), **rest), function(**tensors, **rest))


@by_name
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_any_class_with_the_protocol(name, dtype):
    function = getattr(flowops, name)
    tensors, rest = problem(name, dtype)
    arrays = {key: Shared(tensor) for key, tensor in tensors.items()}
    assert_same(function(**arrays, **rest), function(**tensors, **rest), Shared)
    # No copy is asked for, and on the CPU no stream.
    assert all(set(array.asked) == {(None, None, None)} for array in arrays.values())


@by_name
def test_every_argument_alone_among_tensors(name):
    function = getattr(flowops, name)
    tensors, rest = problem(name)
    expected = function(**tensors, **rest)
    for key, tensor in tensors.items():
        assert_same(function(**{**tensors, key: tensor.numpy()}, **rest), expected)


def test_positional_arguments_and_numbers():
    tensors, _ = problem("se_gram_matmul")
    x, z, w, _ = (tensor.numpy() for tensor in tensors.values())
    expected = flowops.se_gram_matmul(*list(tensors.values())[:3], 0.7)
    assert_same(flowops.se_gram_matmul(x, z, w, 0.7), expected)
    assert_same(flowops.se_gram_matmul(x, z, w=w, lengthscale=0.7), expected)


def test_the_first_parameter_that_is_an_array_says_what_comes_back():
    x, params = torch.randn(2, 5, 3), torch.randn(2, 5, 6)
    expected = flowops.affine_update(x, params)
    assert_same(flowops.affine_update(x, Shared(params)), expected, Shared)
    assert_same(flowops.affine_update(x.numpy(), Shared(params)), expected, np.ndarray)
    assert_same(flowops.affine_update(params=Shared(params), x=x.numpy()), expected, np.ndarray)


def test_generators_and_seeds_are_drawn_from_once():
    x = torch.randn(6, 3)
    for make in (lambda: torch.Generator().manual_seed(3), lambda: torch.manual_seed(3) and None):
        expected, rng = flowops.pad_noise(x, 2, rng=make()), make()
        assert_same(flowops.pad_noise(x.numpy(), 2, rng=rng), expected)
        scale = np.array(2.0)  # refused later than x is
        assert_same(flowops.pad_noise(x, 2, pad_scale=scale, rng=make()), expected)


# --- memory ---------------------------------------------------------------------------------------


@interop.takes_arrays
def handed_back(x):
    """x itself."""
    if not isinstance(x, torch.Tensor):
        raise TypeError("x: expected a torch.Tensor")
    return x


def test_nothing_is_copied():
    whole = np.random.default_rng(0).standard_normal((8, 20, 6), np.float32)
    strided = whole[1::2, 3:9].transpose(0, 2, 1)
    for x in (whole, strided, whole[1, 2, 3, ...], np.broadcast_to(np.float32(0.5), (3, 4))):
        out = handed_back(x)
        assert type(out) is np.ndarray
        assert out.ctypes.data == x.ctypes.data
        assert out.strides == x.strides
        assert np.array_equal(out, x)
    assert all(out.flags.writeable for out in flowops.affine_update(whole, whole))


def test_results_outlive_everything_else():
    x = np.linspace(-1, 1, 60000, dtype=np.float32).reshape(100, 100, 6)
    shifts = np.full((100, 100, 6), 0.5, np.float32)
    expected = x - 0.5
    expected[:, 0] = x[:, 0]
    z, logdet = flowops.affine_update(x, shifts)
    del x, shifts
    gc.collect()
    poison = [np.full((100, 100, 6), np.nan, np.float32) for _ in range(4)]
    assert np.array_equal(z, expected)
    assert np.array_equal(logdet, np.zeros(100, np.float32))
    assert len(poison) == 4


def test_arguments_are_let_go():
    x = np.ones((2, 5, 3), np.float32)
    before = sys.getrefcount(x)
    z, _ = flowops.affine_update(x, np.zeros_like(x))
    assert sys.getrefcount(x) == before
    assert np.array_equal(z, x)


def test_arrays_may_be_read_only():
    tensors, rest = problem("kernel_coupling")
    arrays = numpy_of(tensors)
    for array in arrays.values():
        array.flags.writeable = False
    kept = {key: array.copy() for key, array in arrays.items()}
    assert_same(flowops.kernel_coupling(**arrays, **rest), flowops.kernel_coupling(**tensors))
    assert all(np.array_equal(arrays[key], kept[key]) for key in kept)


@settings(max_examples=60, deadline=None)
@given(
    order=st.permutations([0, 1, 2]),
    steps=st.tuples(*[st.integers(1, 3)] * 3),
    starts=st.tuples(*[st.integers(0, 2)] * 3),
    wide=st.booleans(),
)
def test_strides(order, steps, starts, wide):
    x = np.random.default_rng(1).standard_normal((9, 9, 9)).transpose(order)
    x = x[tuple(slice(a, None, s) for a, s in zip(starts, steps, strict=True))]
    x = x if wide else x.astype(np.float32)
    params = np.flip(np.concatenate([x, x], axis=2), 1).copy() * 0.1
    expected = flowops.affine_update(torch.tensor(x), torch.tensor(params))
    assert_same(flowops.affine_update(x, params), expected)


class Strided:
    """NumPy's array without its attributes, as in array-api-strict."""

    def __init__(self, array):
        self.array = array
        self.__array_namespace__ = array.__array_namespace__

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("kind", [lambda array: array, Strided], ids=["strides", "no strides"])
def test_negative_strides_are_refused_before_torch_sees_them(kind):
    x, params = np.ones((2, 5, 3), np.float32), np.zeros((2, 5, 3), np.float32)
    assert isinstance(flowops.affine_inverse(kind(x), params), np.ndarray)
    for flipped in (x[::-1], x[:, ::-1], x[..., ::-2]):
        with pytest.raises(ValueError, match="^params: expected an array without negative strides"):
            flowops.affine_inverse(kind(x), kind(flipped))


# --- the protocol ---------------------------------------------------------------------------------


def test_streams_go_through_the_protocol(monkeypatch):
    """The producer is told torch's current stream; the consumer asks the tensor with its own."""
    stream, exported = SimpleNamespace(cuda_stream=1234), []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    x = Shared(torch.randn(2, 5, 3), device=(2, 0))  # says that it is on a CUDA device
    params = Shared(torch.randn(2, 5, 6), device=(2, 0))

    def from_dlpack(producer):
        exported.append(producer)
        return producer.__dlpack__(stream=-1)

    monkeypatch.setattr(
        Shared, "__array_namespace__", lambda self: SimpleNamespace(from_dlpack=from_dlpack)
    )
    capsules = flowops.affine_update(x, params)
    assert x.asked == params.asked == [(1234, None, None)]
    assert [type(tensor) for tensor in exported] == [torch.Tensor] * 2
    z, logdet = (torch.from_dlpack(capsule) for capsule in capsules)
    expected = flowops.affine_update(x.tensor, params.tensor)
    assert torch.equal(z, expected[0])
    assert torch.equal(logdet, expected[1])


def test_a_library_without_the_array_api_is_found_by_its_module(monkeypatch):
    class Old(Shared):
        __array_namespace__ = property()  # as if it were not there

    monkeypatch.setattr(Old, "__module__", "oldarrays.core")
    x = torch.randn(6, 3)
    module = SimpleNamespace(from_dlpack=lambda tensor: Old(torch.from_dlpack(tensor)))
    monkeypatch.setitem(sys.modules, "oldarrays", module)
    rng = torch.tensor([1, 2])
    assert_same(flowops.pad_noise(Old(x), 2, rng=rng), flowops.pad_noise(x, 2, rng=rng), Old)
    for found in (SimpleNamespace(), None):
        monkeypatch.setitem(sys.modules, "oldarrays", found)
        with pytest.raises(TypeError, match=r"^x: expected an array whose library has from_dlpack"):
            flowops.pad_noise(Old(x), 2)


# --- what is refused ------------------------------------------------------------------------------

ONES = np.ones((2, 5, 3), np.float32)


@pytest.mark.parametrize(
    ("x", "params", "error", "match"),
    [
        ([[[1.0]]], ONES, TypeError, "x: expected a torch.Tensor, got list"),
        (ONES, 1.0, TypeError, "params: expected a torch.Tensor, got float"),
        (ONES.astype(int), ONES, TypeError, "x: expected a floating dtype, got torch.int64"),
        (ONES, ONES[:1], ValueError, r"params: expected \[2, 5, 6\] or .* got \[1, 5, 3\]"),
        (ONES[0], ONES, ValueError, r"x: expected a non-empty \[B, T, C\], got \[5, 3\]"),
        (ONES, ONES.astype(object), TypeError, "params: expected an array that torch can share"),
        (ONES.astype(">f4"), ONES, TypeError, "x: .* share, got numpy.ndarray: DLPack only"),
        (ONES, ONES.astype(complex), TypeError, "params: expected a floating dtype, got .*complex"),
    ],
)
def test_bad_arrays_are_named(x, params, error, match):
    with pytest.raises(error, match="^" + match):
        flowops.affine_update(x, params)


def test_results_that_the_kind_cannot_hold():
    x = torch.randn(6, 3, dtype=torch.bfloat16)
    with pytest.raises(
        TypeError, match=r"^pad_scale: .* hold the result \(torch.bfloat16 on cpu\)"
    ):
        flowops.pad_noise(x, 2, pad_scale=np.array(1.0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to take it from")
def test_arrays_on_a_device_that_torch_has_not():
    x = Shared(torch.randn(6, 3), device=(2, 0))
    with pytest.raises(
        TypeError, match=r"^x: expected an array that torch can share, got .*Shared"
    ):
        flowops.pad_noise(x, 2)


def test_arrays_carry_no_gradients():
    scale, x = torch.tensor(1.5, requires_grad=True), np.ones((6, 3), np.float32)
    rng = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="^pad_scale: expected a tensor that requires no gradient"):
        flowops.pad_noise(x, 2, pad_scale=scale, rng=rng)
    expected = flowops.pad_noise(torch.tensor(x), 2, pad_scale=1.5, rng=rng)
    assert_same(flowops.pad_noise(x, 2, pad_scale=scale.detach(), rng=rng), expected)
    with torch.no_grad():
        assert_same(flowops.pad_noise(x, 2, pad_scale=scale, rng=rng), expected)


class Anything:
    """Has every attribute, its type has none: as the proxies of tracers."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def test_the_protocol_is_looked_for_on_the_type():
    with pytest.raises(TypeError, match="^x: expected a torch.Tensor, got Anything"):
        flowops.pad_noise(Anything(), 2)


# --- tensors alone --------------------------------------------------------------------------------


@by_name
def test_tensors_alone_take_the_short_way(name, monkeypatch):
    def never(*args):
        raise AssertionError("looked for arrays")

    monkeypatch.setattr(interop, "_is_array", never)
    tensors, rest = problem(name)
    out = getattr(flowops, name)(**tensors, **rest)
    assert type(out[0] if isinstance(out, tuple) else out) is torch.Tensor


def test_refusals_of_tensors_are_as_without_the_decorator():
    for x in (torch.ones(2, 5, 3), None, "x", 1.0):
        raised = []
        for function in (flowops.affine_update, flowops.affine_update.__wrapped__):
            with pytest.raises((TypeError, ValueError)) as caught:
                function(x, torch.ones(1))
            raised.append(caught.value)
        assert [type(error) for error in raised] == [type(raised[0])] * 2
        assert str(raised[0]) == str(raised[1])
        assert raised[0].__context__ is None


@by_name
def test_it_is_the_function_that_it_was(name):
    function = getattr(flowops, name)
    assert function.__name__ == name
    assert function.__doc__ is function.__wrapped__.__doc__
    assert inspect.signature(function) == inspect.signature(function.__wrapped__)
    assert pickle.loads(pickle.dumps(function)) is function


def test_traced_code_takes_tensors_alone():
    compiled = torch.compile(flowops.affine_update, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 3)
    assert all(type(out) is torch.Tensor for out in compiled(x, x))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="expected a torch.Tensor"):
        compiled(x.numpy(), x.numpy())
    torch.compiler.reset()
