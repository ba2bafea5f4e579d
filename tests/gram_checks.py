"""What the tests of kernel matrices share: ops with their references, inputs and comparisons."""

import torch

from flowops import (
    coupling,
    gram,
    kernel_coupling,
    kernel_coupling_inverse,
    se_gram,
    se_gram_matmul,
)
from helpers import assert_close, poison

#: Name -> public function, reference, and the tensors before lengthscale.
OPS = {
    "se_gram": (se_gram, gram.se_gram_reference, "x z"),
    "se_gram_matmul": (se_gram_matmul, gram.se_gram_matmul_reference, "x z w"),
    "kernel_coupling": (kernel_coupling, coupling.kernel_coupling_reference, "x half z w"),
    "kernel_coupling_inverse": (
        *(kernel_coupling_inverse, coupling.kernel_coupling_inverse_reference),
        "x half z w",
    ),
}


def inputs_of(op, N, M, D, O=2, dtype=torch.float64, vector=False, apart=False):
    """The tensors of ``op`` and a lengthscale of the size of the distances.

    The sums over outputs have terms of one sign (the half that moves is above the shifts, weights
    are positive), and if x and z are ``apart`` so have those over points: their rounding can then
    be judged at the size of the result.
    """
    made = {
        "x": torch.randn(N, D, dtype=torch.float64),
        "z": torch.randn(M, D, dtype=torch.float64),
        "half": torch.rand(N, O, dtype=torch.float64) + 2,
        "w": torch.rand(M, 2 * O, dtype=torch.float64) * 2 / M,
        "lengthscale": (torch.rand(D if vector else (), dtype=torch.float64) + 0.75) * D**0.5,
    }
    if apart:
        made["x"], made["z"] = made["x"].abs(), -made["z"].abs()
    return [made[name].to(dtype) for name in (*OPS[op][2].split(), "lengthscale")]


def as_tuple(out):
    return out if isinstance(out, tuple) else (out,)


def values_and_gradients(function, inputs, weights):
    inputs = [t.detach().requires_grad_() for t in inputs]
    poison(*inputs)
    outs = as_tuple(function(*inputs))
    loss = sum((out * w.to(out.dtype)).sum() for out, w in zip(outs, weights, strict=True))
    poison(*inputs)
    return (*outs, *torch.autograd.grad(loss, inputs))


def weights_of(op, inputs, kernel):
    outs = as_tuple(OPS[op][1](*inputs, kernel))
    return [torch.rand(out.shape, dtype=torch.float64) + 0.1 for out in outs]


def check_against_fp64(op, inputs, kernel, backend, device="cpu"):
    public, reference, _ = OPS[op]
    weights = weights_of(op, inputs, kernel)
    golden = values_and_gradients(
        lambda *t: reference(*t, kernel), [t.double() for t in inputs], weights
    )
    plain = values_and_gradients(lambda *t: reference(*t, kernel), inputs, weights)
    actual = values_and_gradients(
        lambda *t: public(*t, kernel=kernel, backend=backend),
        [t.to(device) for t in inputs],
        [t.to(device) for t in weights],
    )
    for i, (a, p, g) in enumerate(zip(actual, plain, golden, strict=True)):
        a = a.cpu()
        what = f"{op} {kernel} output {i} of {[list(t.shape) for t in inputs]}"
        assert a.dtype == p.dtype, what
        if p.dtype == torch.float64:
            # The golden is no wider here: it rounds as often as what it is compared with.
            error, largest = (a - g).abs().max(), g.abs().max()
            assert error <= 1e-13 + 1e-12 * largest, f"{what}: {error}, largest {largest}"
        else:
            assert_close(a, p, g, what)


def check_far_from_zero(backend, op, kernel, D):
    """On a grid on which 100 is added without rounding, so that both are the same problem."""
    public = OPS[op][0]
    names = OPS[op][2].split()
    inputs = inputs_of(op, 40, 30, D)
    for i, name in enumerate(names):
        if name in ("x", "z"):
            inputs[i] = torch.round(inputs[i] * 2**14) / 2**14
    centred = [t.float() for t in inputs]
    far = [t + 100 if n in ("x", "z") else t for n, t in zip(names, centred, strict=False)]
    far.append(centred[-1])
    assert all(
        torch.equal(a - 100, b)
        for n, a, b in zip(names, far, centred, strict=False)
        if n in ("x", "z")
    )
    weights = weights_of(op, inputs, kernel)
    runs = [
        values_and_gradients(
            lambda *t, name=name: public(*t, kernel=kernel, backend=name), tensors, weights
        )
        for tensors, name in (
            *((far, backend), (centred, backend)),
            ([t.double() for t in centred], "reference"),
        )
    ]
    for i, (actual, plain, golden) in enumerate(zip(*runs, strict=True)):
        assert_close(actual, plain, golden, f"output {i}")
