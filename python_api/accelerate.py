"""Models written elsewhere, run by flowops: modules that it knows change their class to a subclass
with another forward. The modules themselves, their names, weights and buffers stay.

    block      of a TarFlow in the published names: affine_update, causal_attention, fast reverse
    model      of such blocks: fast reverse
    attention  qkv, proj and a number of heads: causal_attention
"""

import copyreg
import functools

import torch
from torch import Tensor, nn

from flowops import affine_update

from . import accelerate_checks as checks
from .decode import Guidance, Solver, invert_block
from .tarflow import TarFlow
from .transformer import Attention, TarFlowBlock, block_params, self_attention

_LAYOUT = "_flowops_layout"


def accelerate(model: nn.Module, *, verify: bool = True) -> nn.Module:
    """Lets flowops compute every TarFlow and every plain causal attention inside ``model``.

    A TarFlow is one in the attribute names of its reference program: ``blocks`` with
    ``attn_blocks`` inside. An attention has two ``nn.Linear``, ``qkv`` (rows of Q, K, V) and
    ``proj``, and ``num_heads``, ``heads`` or ``head_dim``; a ``norm`` may come first. Both train
    as before. Nothing happens to what is accelerated already, or is flowops' own.

    Args:
        model: such a module or one that contains them.
        verify: run each block and attention on a random input, as it was and accelerated, and
            refuse those that differ. Left out for weights on meta and sharded ones (DTensors).
            Without it nothing tells a causal attention from any other.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: naming the module and its first difference from what was expected; or if there
            is nothing to accelerate. The model is then as it was.

    Source: Zhai et al., "Normalizing Flows are Capable Generative Models" (arXiv 2412.06329).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    swapped = []
    try:
        for path, module, kind, layouts in _targets(model):
            swapped.append(module)
            _swap(path, module, kind, layouts, verify)
    except Exception:
        for module in swapped:
            _put_back(module)
        raise
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes ``accelerate``: every module has its class again. Returns ``model`` itself.

    Raises:
        ValueError: naming a module whose class was changed once more since (by ``fully_shard``).
    """
    modules = [(path, m) for path, m in model.named_modules() if isinstance(m, _Accelerated)]
    for path, module in modules:
        if "original" not in vars(type(module)):
            raise ValueError(
                f"{path or 'model'}: expected the class that accelerate gave it, got "
                f"{type(module).__name__}"
            )
    for _, module in modules:
        _put_back(module)
    return model


def _targets(model: nn.Module) -> list[tuple]:
    """``(path, module, class, layouts)`` of what is to be accelerated, checked."""
    targets, inside, known = [], set(), False
    for path, module in model.named_modules():
        if module in inside:
            continue
        if isinstance(module, (TarFlow, TarFlowBlock, Attention, _Accelerated)):
            known = True
            whole = not isinstance(module, _AcceleratedModel)
        elif checks.looks_like_model(module):
            checks.check_model(path, module)
            targets.append((path, module, _AcceleratedModel, [()]))
            whole = False  # its blocks are targets themselves
        elif checks.looks_like_block(module):
            layout = checks.block_layout(path, module)
            targets.append((path, module, _AcceleratedBlock, [layout]))
            whole = True
        elif checks.looks_like_attention(module):
            layouts = checks.attention_layouts(path, module)
            targets.append((path, module, _AcceleratedAttention, layouts))
            whole = True
        else:
            whole = False
        if whole:
            inside.update(module.modules())
    if not targets and not known:
        raise ValueError(
            "model: expected a TarFlow (blocks with attn_blocks) or an attention (Linear layers "
            f"qkv and proj), got {type(model).__name__} without any"
        )
    return targets


def _swap(path: str, module: nn.Module, kind: type, layouts: list, verify: bool) -> None:
    trial = None
    if verify and kind is not _AcceleratedModel and checks.can_run(module):
        trial = checks.Trial(path, module, kind.trial_inputs(module))
    module.__class__ = _subclass(kind, type(module))
    differences = []
    for layout in layouts:
        setattr(module, _LAYOUT, layout)
        differences.append(trial.difference() if trial else None)
        if differences[-1] is None:
            return
    raise ValueError(f"{path or 'model'}: expected {kind.expected}, but {differences[0]}")


def _put_back(module: nn.Module) -> None:
    if isinstance(module, _Accelerated):
        module.__class__ = type(module).original
        vars(module).pop(_LAYOUT, None)


@functools.cache
def _subclass(kind: type, original: type) -> type:
    attributes = {"original": original, "kind": kind, "__module__": original.__module__}
    return type(f"Accelerated{original.__name__}", (kind, original), attributes)


def _blank(kind: type, original: type) -> nn.Module:
    cls = _subclass(kind, original)
    return cls.__new__(cls)


class _Accelerated:
    """A subclass of this one, ``kind``, and the class that a module had, ``original``, make the
    class that it is given."""

    kind: type
    original: type

    def __reduce_ex__(self, protocol):
        # The swapped class has no name to import it by: copies and pickles make it anew.
        make, arguments, *state = super().__reduce_ex__(max(protocol, 2))
        if make is copyreg.__newobj__ and arguments == (_subclass(self.kind, self.original),):
            make, arguments = _blank, (self.kind, self.original)
        return make, arguments, *state


class _AcceleratedBlock(_Accelerated):
    expected = "the arithmetic of a TarFlow block"
    trial_inputs = staticmethod(checks.block_inputs)

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        layout = self._flowops_layout
        params = block_params(self, x, y, reverse=layout.reverse, head_dim=layout.head_dim)
        z, logdet = affine_update(x, params, reverse=layout.reverse)
        return z, logdet / x[0].numel()

    @torch.no_grad()
    def reverse(
        self,
        x: Tensor,
        y: Tensor | None = None,
        guidance: float = 0,
        guide_what: str = "ab",
        attn_temp: float = 1.0,
        annealed_guidance: bool = False,
        *,
        method: str = "exact",
        tol: float = 1e-3,
        window: int | None = None,
    ) -> Tensor:
        plan = Guidance(guidance, guide_what, attn_temp, annealed_guidance)
        solver = Solver(method, tol, window)
        layout = self._flowops_layout
        return invert_block(self, x, y, plan, solver, reverse=layout.reverse, heads=layout.heads)[0]


class _AcceleratedModel(_Accelerated):
    def reverse(
        self,
        x: Tensor,
        y: Tensor | None = None,
        guidance: float = 0,
        guide_what: str = "ab",
        attn_temp: float = 1.0,
        annealed_guidance: bool = False,
        return_sequence: bool = False,
        *,
        method: str = "exact",
        tol: float = 1e-3,
        window: int | None = None,
    ) -> Tensor | list[Tensor]:
        guide = (guidance, guide_what, attn_temp, annealed_guidance)
        images = [self.unpatchify(x)] if return_sequence else None
        x = x * self.var.sqrt()
        for block in reversed(self.blocks):
            x = block.reverse(x, y, *guide, method=method, tol=tol, window=window)
            if return_sequence:
                images.append(self.unpatchify(x))
        return images if return_sequence else self.unpatchify(x)


class _AcceleratedAttention(_Accelerated):
    expected = "plain causal self-attention"
    trial_inputs = staticmethod(checks.attention_inputs)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if args or kwargs or x.ndim != 3:
            return super().forward(x, *args, **kwargs)
        layout = self._flowops_layout
        return self_attention(self, self.norm(x) if layout.norm else x, layout.head_dim)
