"""CuPy's arrays in place of tensors: the same memory, and streams that wait for each other."""

import pytest
import torch

import flowops
from flowops import interop

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

NAMES = (
    *("affine_update", "affine_inverse", "pad_noise", "se_gram", "se_gram_matmul"),
    *("kernel_coupling", "kernel_coupling_inverse"),
)
CYCLES = 200_000_000  # a tenth of a second or so, for which a stream that does not wait is early


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy")


def assert_same(arrays, tensors, cupy):
    """Bit for bit."""
    if not isinstance(tensors, tuple):
        arrays, tensors = (arrays,), (tensors,)
    for array, tensor in zip(arrays, tensors, strict=True):
        assert type(array) is cupy.ndarray
        assert torch.equal(torch.from_dlpack(array), tensor)


def problems():
    def g(*shape):
        return 0.5 * torch.randn(shape, device="cuda")

    x, z, w = g(70, 3), g(40, 3), g(40, 4)
    lengthscale, rng = torch.tensor(1.3, device="cuda"), torch.tensor([42, 7], device="cuda")
    return {
        "affine_update": {"x": g(3, 50, 7), "params": g(3, 50, 14)},
        "affine_inverse": {"z": g(3, 50, 7), "params": g(3, 50, 14)},
        "pad_noise": {"x": x, "pad_scale": lengthscale, "rng": rng, "pad": 2},
        "se_gram": {"x": x, "z": z, "lengthscale": lengthscale},
        "se_gram_matmul": {"x": x, "z": z, "w": w, "lengthscale": 0.7},
        "kernel_coupling": {"x1": x, "x2": g(70, 2), "z": z, "w": w, "lengthscale": lengthscale},
        "kernel_coupling_inverse": {"x1": x, "y2": g(70, 2), "z": z, "w": w, "lengthscale": 0.7},
    }


def to_cupy(arguments, cupy):
    return {
        key: cupy.from_dlpack(value) if isinstance(value, torch.Tensor) else value
        for key, value in arguments.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_cupy_in_cupy_out(name, cupy):
    arguments, function = problems()[name], getattr(flowops, name)
    assert_same(function(**to_cupy(arguments, cupy)), function(**arguments), cupy)


@interop.takes_arrays
def handed_back(x):
    """x itself."""
    if not isinstance(x, torch.Tensor):
        raise TypeError("x: expected a torch.Tensor")
    return x


def test_nothing_is_copied(cupy):
    whole = cupy.arange(8 * 20 * 6, dtype=cupy.float32).reshape(8, 20, 6)
    for x in (whole, whole[1::2, 3:9].transpose(0, 2, 1), whole[1, 2, 3, ...]):
        out = handed_back(x)
        assert type(out) is cupy.ndarray
        assert (out.data.ptr, out.strides) == (x.data.ptr, x.strides)


def test_torch_waits_for_the_stream_of_the_arguments(cupy):
    arguments = problems()["affine_update"]
    expected = flowops.affine_update(**arguments)  # compiles
    late = {key: cupy.zeros(t.shape, cupy.float32) for key, t in arguments.items()}
    torch.cuda.synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
            torch.cuda._sleep(CYCLES)
        for key, tensor in to_cupy(arguments, cupy).items():
            late[key][...] = tensor
        outs = flowops.affine_update(**late)
        assert not stream.done  # the host did not wait
    torch.cuda.synchronize()
    assert_same(outs, expected, cupy)


def test_the_stream_of_the_results_waits_for_torch(cupy):
    arguments = problems()["affine_update"]
    expected = flowops.affine_update(**arguments)  # compiles
    arrays = to_cupy(arguments, cupy)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream, torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
        outs = flowops.affine_update(**arrays)
        copies = tuple(out.copy() for out in outs)
        assert not stream.done
    torch.cuda.synchronize()
    assert_same(copies, expected, cupy)


def test_numpy_beside_cupy_is_refused(cupy):
    arguments = to_cupy(problems()["affine_update"], cupy)
    with pytest.raises(ValueError, match="^params: expected a tensor on cuda:0 like x, got one on"):
        flowops.affine_update(arguments["x"], cupy.asnumpy(arguments["params"]))


def test_a_result_on_the_gpu_is_no_numpy_array(cupy):
    scale = cupy.asnumpy(cupy.ones(()))
    x = torch.ones(6, 3, device="cuda")
    with pytest.raises(TypeError, match=r"^pad_scale: .* can hold the result \(torch.float32 on"):
        flowops.pad_noise(x, 2, pad_scale=scale)
