"""What the tests of the GPU kernels share.

Without a GPU the Triton kernels run in Triton's interpreter and the CUDA kernels in the emulator of
tests/emulator, on CPU tensors; with one, the same tests run on it.
"""

import pytest
import torch

from flowops import dispatch
from helpers import assert_close, poison

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

#: The backends that can run here; ``parametrize("backend", BACKENDS)``.
BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            not dispatch.backend_state(name)[0], reason=str(dispatch.backend_state(name)[1])
        ),
    )
    for name in ("triton", "cuda")
]

#: What both are tested in. The interpreter computes bfloat16 wrongly; the emulator does not.
DTYPES = [torch.float32, torch.float64, torch.float16, *[torch.bfloat16] * ON_GPU]

#: The interpreter takes some 20 ms a launch, a GPU a second to compile one that is new.
EXAMPLES = 25 if ON_GPU else 12


def as_tuple(out):
    return out if isinstance(out, tuple) else (out,)


def values_and_gradients(function, inputs, weights):
    """Outputs of ``function`` and the gradients to all inputs for these weights of the outputs.
    Freed memory is full of NaN whenever the function or its backward allocates."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    poison(*inputs)
    outs = as_tuple(function(*inputs))
    loss = sum((o * w.to(o)).sum() for o, w in zip(outs, weights, strict=True))
    poison(*inputs, *outs)
    grads = torch.autograd.grad(loss, inputs)
    for grad, tensor in zip(grads, inputs, strict=True):
        assert (grad.dtype, grad.shape) == (tensor.dtype, tensor.shape)
    return [*outs, *grads]


def follows_reference(public, reference, inputs, what, *, together=None, inner=None):
    """The tolerance rule for outputs and gradients. ``public`` and ``reference`` take the inputs.

    Args:
        together: a slice of the gradients whose rounding is judged at the magnitude of all of them,
            where they are differences of terms as large as those of the largest.
        inner: index of outputs -> dtype in which they are rounded inside, if that is narrower.
    """
    count = len(as_tuple(reference(*inputs)))
    weights = [torch.randn_like(o) for o in as_tuple(reference(*inputs))]
    actual = values_and_gradients(public, [t.to(DEVICE) for t in inputs], weights)
    plain = values_and_gradients(reference, inputs, weights)
    golden = values_and_gradients(reference, [t.double() for t in inputs], weights)
    runs = [_joined(values, count, together) for values in (actual, plain, golden)]
    for i, (a, p, g) in enumerate(zip(*runs, strict=True)):
        label = f"{what}: {'output' if i < count else 'gradient'} {i}"
        assert a.dtype == p.dtype, label
        a = a.cpu()
        if p.dtype == torch.float64:
            # The golden is no wider here: it rounds as often as what it is compared with.
            error, largest = (a - g).abs().max().item(), g.abs().max().item()
            assert error <= 1e-13 + 1e-12 * largest, f"{label}: {error}, largest {largest}"
        else:
            assert_close(a, p, g, label, (inner or {}).get(i))


def _joined(values, count, together):
    outs, grads = values[:count], values[count:]
    if together is not None:
        kept = [g for i, g in enumerate(grads) if g is not None and i not in together]
        grads = [torch.cat([grads[i].flatten() for i in together]), *kept]
    return [*outs, *grads]


def twice_the_same(function, inputs):
    """Two runs give the same bits, gradients included."""
    weights = [torch.ones_like(o) for o in as_tuple(function(*inputs))]
    first, second = (values_and_gradients(function, inputs, weights) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
