"""What ``accelerate`` looks at before it touches a model: names, types and sizes of its modules,
and whether their forward computes what flowops would."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

#: Relative error (2-norm) that two forwards of the same function may have, and that of 16-bit ones.
TOLERANCE, TOLERANCE_16BIT = 1e-3, 5e-2
#: Numbers of tokens that an attention is tried on.
LENGTHS = (1, 5, 16)

FORWARD = ("x", "y")
BLOCK_REVERSE = (*FORWARD, "guidance", "guide_what", "attn_temp", "annealed_guidance")
MODEL_REVERSE = (*BLOCK_REVERSE, "return_sequence")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class BlockLayout(NamedTuple):
    """What the forward of a block is told beside its weights."""

    reverse: bool
    heads: int
    head_dim: int


class AttentionLayout(NamedTuple):
    """``norm``: the module's own norm comes before qkv."""

    head_dim: int
    norm: bool


def looks_like_model(module: nn.Module) -> bool:
    blocks = getattr(module, "blocks", None)
    return isinstance(blocks, nn.ModuleList) and any(map(looks_like_block, blocks))


def looks_like_block(module: nn.Module) -> bool:
    return isinstance(getattr(module, "attn_blocks", None), nn.ModuleList)


def looks_like_attention(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in ("qkv", "proj"))


# --- structure: the first difference is named ----------------------------------------------------


def check_model(path: str, model: nn.Module) -> None:
    """Raises ValueError unless ``model`` has what sampling reads. Its blocks are checked apart."""
    _check_signature(path, model, "forward", FORWARD)
    _check_signature(path, model, "reverse", MODEL_REVERSE)
    for name in ("img_size", "patch_size"):
        _get(path, model, name, int)
    _expect(callable(getattr(model, "unpatchify", None)), path, "a method unpatchify", "none")
    shape = list(_get(path, model, "var", Tensor).shape)
    for i, block in enumerate(model.blocks):
        where = join(path, f"blocks.{i}")
        _expect(looks_like_block(block), where, "a block with attn_blocks", _name(block))
        tokens = _get(where, block, "pos_embed", Tensor).shape[0]
        size = [tokens, _get(where, block, "proj_in", nn.Linear).in_features]
        _expect(size == shape, where, f"[T, C] = {shape}, the shape of var", size)


def block_layout(path: str, block: nn.Module) -> BlockLayout:
    """The layout of a TarFlow block, or ValueError."""
    _check_signature(path, block, "forward", FORWARD)
    _check_signature(path, block, "reverse", BLOCK_REVERSE)
    pos_embed = _get(path, block, "pos_embed", Tensor)
    _expect(pos_embed.ndim == 2, join(path, "pos_embed"), "[T, W]", list(pos_embed.shape))
    T, W = pos_embed.shape
    C = _get(path, block, "proj_in", nn.Linear).in_features
    _check_linear(path, block, "proj_in", C, W)
    _check_linear(path, block, "proj_out", W, C, 2 * C)
    classes = _get(path, block, "class_embed", (Tensor, type(None)))
    if classes is not None:
        shape = list(classes.shape)
        _expect(shape[1:] == [1, W], join(path, "class_embed"), f"[classes, 1, {W}]", shape)
    _check_nothing_else(
        path, block, "proj_in attn_blocks proj_out permutation", "pos_embed class_embed"
    )
    sizes = [
        _layer_sizes(join(path, f"attn_blocks.{i}"), layer, W)
        for i, layer in enumerate(block.attn_blocks)
    ]
    _expect(len(sizes) > 0, join(path, "attn_blocks"), "at least one layer", "none")
    for i, these in enumerate(sizes):
        expected = f"(heads, hidden width, eps) = {sizes[0]} as in the first layer"
        _expect(these == sizes[0], join(path, f"attn_blocks.{i}"), expected, these)
    return BlockLayout(_reads_backwards(path, block, T), sizes[0][0], W // sizes[0][0])


def _layer_sizes(path: str, layer: nn.Module, W: int) -> tuple[int, int, float]:
    """Heads, hidden width of the perceptron and eps of the norms."""
    attention, mlp = (_get(path, layer, name, nn.Module) for name in ("attention", "mlp"))
    _check_nothing_else(path, layer, "attention mlp")
    where = join(path, "attention")
    _check_linear(where, attention, "qkv", W, 3 * W)
    _check_linear(where, attention, "proj", W, W)
    eps = _norm_eps(where, attention, W)
    heads = _get(where, attention, "num_heads", int)
    _expect(heads > 0 and W % heads == 0, join(where, "num_heads"), f"a divisor of {W}", heads)
    _check_nothing_else(where, attention, "norm qkv proj")
    where = join(path, "mlp")
    main = _get(where, mlp, "main", nn.Sequential)
    _check_nothing_else(where, mlp, "norm main")
    mlp_eps = _norm_eps(where, mlp, W)
    _expect(mlp_eps == eps, join(where, "norm"), f"eps {eps} as in attention.norm", mlp_eps)
    where = join(where, "main")
    kinds = [_name(part) for part in main]
    _expect(kinds == ["Linear", "GELU", "Linear"], where, "Linear, GELU, Linear", ", ".join(kinds))
    approximate = main[1].approximate
    _expect(approximate == "none", where, "exact GELU", f"approximate={approximate!r}")
    hidden = main[0].out_features
    _check_linear(where, main, "0", W, hidden)
    _check_linear(where, main, "2", hidden, W)
    return heads, hidden, eps


def _reads_backwards(path: str, block: nn.Module, T: int) -> bool:
    device = "cpu" if block.pos_embed.is_meta else block.pos_embed.device
    order = torch.arange(T, device=device)
    permuted = block.permutation(order.view(1, T, 1)).flatten()
    forwards, backwards = torch.equal(permuted, order), torch.equal(permuted, order.flip(0))
    where = join(path, "permutation")
    _expect(forwards or backwards, where, "tokens as they come or reversed", "another order")
    return not forwards


def attention_layouts(path: str, module: nn.Module) -> list[AttentionLayout]:
    """What the module may be, the likelier first, or ValueError."""
    inner, rows = module.proj.in_features, module.qkv.out_features
    _expect(rows == 3 * inner, join(path, "qkv"), f"{3 * inner} rows, Q, K and V", rows)
    sizes = {n: getattr(module, n, None) for n in ("num_heads", "heads", "head_dim")}
    name = next((n for n, size in sizes.items() if isinstance(size, int)), None)
    _expect(name, path, "num_heads, heads or head_dim as an integer", "none of them")
    size = sizes[name]
    _expect(size > 0 and inner % size == 0, join(path, name), f"a divisor of {inner}", size)
    _check_forward_is_of_class(path, module)
    has_norm = isinstance(getattr(module, "norm", None), nn.Module)
    head_dim = size if name == "head_dim" else inner // size
    return [AttentionLayout(head_dim, norm) for norm in ((True, False) if has_norm else (False,))]


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _expect(holds: Any, path: str, expected: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"{path or 'model'}: expected {expected}, got {got}")


def _name(thing: Any) -> str:
    return type(thing).__name__


def _get(path: str, module: nn.Module, name: str, kind: type | tuple[type, ...]) -> Any:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    expected = " or ".join(k.__name__ for k in kinds)
    _expect(hasattr(module, name), join(path, name), expected, "no such attribute")
    value = getattr(module, name)
    _expect(isinstance(value, kinds), join(path, name), expected, _name(value))
    return value


def _check_linear(path: str, owner: nn.Module, name: str, inputs: int, *outputs: int) -> None:
    linear, where = _get(path, owner, name, nn.Linear), join(path, name)
    # The sampler reads the weights themselves: adapters around them would be left out.
    _expect(type(linear) is nn.Linear, where, "a plain Linear", _name(linear))
    got = (linear.in_features, linear.out_features)
    sizes = " or ".join(f"{inputs} -> {n}" for n in outputs)
    _expect(got[0] == inputs and got[1] in outputs, where, sizes, f"{got[0]} -> {got[1]}")
    _expect(linear.bias is not None, where, "a bias", "none")


def _norm_eps(path: str, owner: nn.Module, W: int) -> float:
    norm, where = _get(path, owner, "norm", nn.LayerNorm), join(path, "norm")
    _expect(norm.normalized_shape == (W,), where, f"LayerNorm({W})", norm)
    affine = norm.weight is not None and norm.bias is not None
    _expect(affine, where, "weight and bias", "a norm without them")
    _check_no_hooks(where, norm)
    return norm.eps


def _check_nothing_else(path: str, module: nn.Module, children: str, parameters: str = "") -> None:
    """What isn't known would be left out without a word."""
    for name, child in module.named_children():
        _expect(name in children.split(), join(path, name), "no such module", _name(child))
    for name, parameter in module.named_parameters(recurse=False):
        known = name in parameters.split()
        _expect(known, join(path, name), "no such parameter", list(parameter.shape))
    _check_forward_is_of_class(path, module)
    if "attn_blocks" not in children:  # a block's own hooks run as before
        _check_no_hooks(path, module)


def _check_no_hooks(path: str, module: nn.Module) -> None:
    hooked = [name for name in HOOKS if getattr(module, name)]
    _expect(not hooked, path, "no hooks, as its forward will not be called", hooked)


def _check_forward_is_of_class(path: str, module: nn.Module) -> None:
    _expect(
        "forward" not in vars(module), path, "the forward of its class", "one set on the module"
    )


def _check_signature(path: str, module: nn.Module, name: str, expected: tuple[str, ...]) -> None:
    method = getattr(type(module), name, None)
    _expect(callable(method), join(path, name), "a method", _name(method))
    got = tuple(inspect.signature(method).parameters)[1:]
    _expect(got == expected, join(path, name), f"the arguments {expected}", got)


# --- arithmetic: on random weights and inputs, before and after ----------------------------------


def can_run(module: nn.Module) -> bool:
    """Whether all weights have values here: none is on meta or sharded (a DTensor)."""
    return not any(p.is_meta or hasattr(p, "placements") for p in module.parameters())


def block_inputs(block: nn.Module) -> list[tuple[Tensor | None, ...]]:
    """One batch of two: the second image has no label."""
    shape = (2, block.pos_embed.shape[0], block.proj_in.in_features)
    y = None
    if block.class_embed is not None:
        y = torch.tensor([len(block.class_embed) - 1, -1], device=block.pos_embed.device)
    return [(_random(shape, block.pos_embed, 1.0, torch.Generator().manual_seed(0)), y)]


def attention_inputs(module: nn.Module) -> list[tuple[Tensor | None, ...]]:
    generator, W = torch.Generator().manual_seed(0), module.qkv.in_features
    return [(_random((2, T, W), module.qkv.weight, 1.0, generator),) for T in LENGTHS]


def _random(shape: tuple[int, ...], like: Tensor, std: float, generator: torch.Generator) -> Tensor:
    return (std * torch.randn(shape, generator=generator)).to(like.device, like.dtype)


class Trial:
    """A module's forward on random weights and inputs, in evaluation and in training mode.

    Matrices are random, for those that start at zero would hide what comes before them; norms and
    biases are the module's own. The module, its mode and torch's generators stay as they were.

    Raises:
        ValueError: if the forward itself fails.
    """

    def __init__(self, path: str, module: nn.Module, inputs: list[tuple[Tensor | None, ...]]):
        self.path, self.module, self.inputs = path, module, inputs
        generator = torch.Generator().manual_seed(1)
        self.weights = {
            name: _random(p.shape, p, 0.5 * p.shape[-1] ** -0.5, generator)
            for name, p in module.named_parameters()
            if p.ndim > 1
        }
        try:
            self.before = self._run()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(
                f"{path or 'model'}: expected a forward that takes {self._sizes(inputs[0])}, got "
                f"{reason}"
            ) from error

    def difference(self) -> str | None:
        """How the forward now differs from what it was, or None."""
        modes = [mode for mode in ("evaluation", "training") for _ in self.inputs]
        rounds = zip(modes, self.inputs * 2, self.before, self._run(), strict=True)
        for mode, inputs, before, after in rounds:
            where = f"on random {self._sizes(inputs)} in {mode} mode"
            if self._sizes(before) != self._sizes(after):
                return f"{where} it returns {self._sizes(before)}, not {self._sizes(after)}"
            for b, a in zip(before, after, strict=True):
                tolerance = TOLERANCE if torch.finfo(b.dtype).eps < 1e-4 else TOLERANCE_16BIT
                b, a = b.cpu().double(), a.cpu().double()
                error = ((a - b).norm() / (b.norm() if b.any() else 1)).item()
                if not error <= tolerance:
                    return f"{where} it differs by {error:.1e} of its norm, more than {tolerance}"
        return None

    @torch.no_grad()
    def _run(self) -> list[tuple[Tensor, ...]]:
        modes = [(module, module.training) for module in self.module.modules()]
        device = self.inputs[0][0].device
        outputs = []
        try:
            with (
                torch.random.fork_rng([] if device.type == "cpu" else [device]),
                torch.autocast(device.type, enabled=False),
            ):
                for training in (False, True):
                    self.module.train(training)
                    for args in self.inputs:
                        out = functional_call(self.module, self.weights, args)
                        outputs.append(out if isinstance(out, tuple) else (out,))
        finally:
            for module, training in modes:
                module.training = training
        return outputs

    @staticmethod
    def _sizes(values: tuple) -> str:
        sizes = [list(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in values]
        return ", ".join(map(str, sizes))
