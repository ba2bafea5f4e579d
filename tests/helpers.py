"""What several test files share: the tolerance rule, engines and the cases of every op."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch

import flowops
from flowops import affine, attention, coupling, dispatch, gram, padding, patch_attention

#: Instruction sets of the native kernels here, and all that an op can be tested on.
ISAS = dispatch.native().isas() if dispatch.backend_state("cpu")[0] else []
ENGINES = ["reference", *ISAS]


def assert_close(actual, reference, golden, what: str = "", dtype=None) -> None:
    """The tolerance rule: with the fp64 reference as golden, a kernel may err by twice the error of
    the reference in the test's dtype, plus two units of its rounding at the golden's magnitude.
    ``dtype`` is the test's where the output itself is stored wider."""
    assert actual.shape == golden.shape, (what, actual.shape, golden.shape)
    golden = golden.double()
    scale = golden.abs().max().item() if golden.numel() else 0.0
    error = (actual.double() - golden).abs().max().item()
    allowed = 2 * (reference.double() - golden).abs().max().item()
    allowed += 2 * torch.finfo(dtype or reference.dtype).eps * scale
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"


@contextlib.contextmanager
def running(engine):
    """Yields the backend of ``engine``; the native kernels are those of that instruction set."""
    if engine == "reference":
        yield "reference"
        return
    native = dispatch.native()
    before = native.isa()
    native.set_isa(engine)
    try:
        yield "cpu"
    finally:
        native.set_isa(before)


def poison(*tensors: torch.Tensor) -> None:
    """Leaves freed memory of these sizes full of NaN, for the outputs that come next."""
    for tensor in tensors:
        torch.full_like(tensor, float("nan"), memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Case:
    """One way to call an op: ``public`` and ``reference`` take ``tensors(dtype)`` and differ only
    in the road they take; all tensors get gradients."""

    name: str
    public: Callable
    reference: Callable
    shapes: tuple[tuple[int, ...], ...]
    positive: frozenset[int] = field(default_factory=frozenset)
    offset: float = 0.0

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        made = []
        for i, shape in enumerate(self.shapes):
            t = torch.randn(shape, generator=generator, dtype=torch.float64)
            t = t.abs() + 0.5 if i in self.positive else 0.5 * t + self.offset
            made.append(t.to(dtype).requires_grad_())
        return tuple(made)


def through(case: Case, backend: str, tensors) -> Callable:
    """The op of a case on a backend; skips where that says why it can't take these tensors, or has
    no kernel."""

    def call(*tensors):
        return case.public(*tensors, backend=backend)

    try:
        with torch.no_grad():
            call(*tensors)
    except RuntimeError as error:
        if f"backend '{backend}' can't run" not in str(error):
            raise
        pytest.skip(str(error))
    return call


#: One for each type of device, made before any test: a copy to a GPU would wait for it.
RNG = {
    device: torch.tensor([42, 7], device=device)
    for device in ["cpu", *["cuda"] * torch.cuda.is_available()]
}


def cases() -> Iterator[Case]:
    def affine_case(name, public, reference, reverse, width):
        return Case(
            f"{name}-{'reversed' if reverse else 'forward'}-{width}C",
            lambda x, p, backend="auto": public(x, p, reverse=reverse, backend=backend),
            lambda x, p: reference(x, p, reverse),
            ((3, 5, 7), (3, 5, 7 * width)),
        )

    for reverse in (False, True):
        for width in (1, 2):
            yield affine_case(
                "affine_update",
                flowops.affine_update,
                affine.affine_update_reference,
                reverse,
                width,
            )
            yield affine_case(
                "affine_inverse",
                flowops.affine_inverse,
                affine.affine_inverse_reference,
                reverse,
                width,
            )
    for T, S in ((5, 5), (2, 7), (1, 4)):
        yield Case(
            f"causal_attention-{T}of{S}",
            lambda q, k, v, backend="auto": flowops.causal_attention(q, k, v, backend=backend),
            lambda q, k, v: attention.causal_attention_reference(q, k, v, q.shape[3] ** -0.5)[0],
            ((2, T, 2, 8), (2, S, 2, 8), (2, S, 2, 8)),
        )
    yield Case(
        "causal_patch_attention",
        lambda *t, backend="auto": flowops.causal_patch_attention(
            *t, reverse=True, scale=0.3, backend=backend
        ),
        lambda *t: patch_attention.causal_patch_attention_reference(*t, True, 0.3),
        (*[(2, 4, 2, 8)] * 3, (6, 16), (6,), (2, 4, 3)),
    )
    for kernel in gram.KERNELS:
        for lengthscale in ((), (3,)):
            tag = f"{kernel}-{'scalar' if not lengthscale else 'vector'}"
            sizes = {"x": (5, 3), "z": (4, 3), "half": (5, 2), "w": (4, 4)}

            def gram_case(name, public, reference, keys, tag, kernel, lengthscale, sizes=sizes):
                return Case(
                    f"{name}-{tag}",
                    lambda *t, backend="auto": public(*t, kernel=kernel, backend=backend),
                    lambda *t: reference(*t, kernel),
                    (*(sizes[k] for k in keys), lengthscale),
                    positive=frozenset({len(keys)}),
                )

            for name, keys in (
                ("se_gram", "x z"),
                ("se_gram_matmul", "x z w"),
                ("kernel_coupling", "x half z w"),
                ("kernel_coupling_inverse", "x half z w"),
            ):
                yield gram_case(
                    name,
                    getattr(flowops, name),
                    getattr(coupling if "coupling" in name else gram, f"{name}_reference"),
                    keys.split(),
                    tag,
                    kernel,
                    lengthscale,
                )
    yield Case(
        "pad_noise",
        lambda x, a, b, backend="auto": flowops.pad_noise(
            x, 2, pad_scale=a, data_scale=b, rng=RNG[x.device.type], backend=backend
        ),
        lambda x, a, b: padding.pad_noise_reference(x, RNG[x.device.type], 2, a, b),
        ((5, 3), (), ()),
        positive=frozenset({1, 2}),
    )


CASES = list(cases())
