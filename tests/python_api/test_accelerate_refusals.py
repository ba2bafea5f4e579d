"""What ``accelerate`` refuses: TarFlows of another structure, and those of another arithmetic."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flowops.api.accelerate import accelerate, restore
from plain_tarflow import Block, Model, small


def set_at(path, value):
    *parents, name = path.split(".")

    def change(model):
        owner = model.get_submodule(".".join(parents))
        setattr(owner, name, value)

    return change


def delete(path):
    *parents, name = path.split(".")

    def change(model):
        delattr(model.get_submodule(".".join(parents)), name)

    return change


class Rolled(nn.Module):
    def forward(self, x, dim=1, inverse=False):
        return x.roll(1, dim)


class OtherReverse(Block):
    def reverse(self, x, y=None, steps=3):
        return x


LAYER = "blocks.0.attn_blocks.1"
DIFFERENCES = [
    (delete("var"), "var: expected Tensor, got no such attribute"),
    (set_at("var", torch.ones(16, 3)), r"blocks.0: expected \[T, C\] = \[16, 3\].*got \[16, 2\]"),
    (set_at("img_size", None), "img_size: expected int, got NoneType"),
    (
        set_at("blocks.1", nn.Linear(2, 2)),
        "blocks.1: expected a block with attn_blocks, got",
    ),
    (delete("blocks.0.pos_embed"), "blocks.0.pos_embed: expected Tensor, got no such attribute"),
    (set_at("blocks.0.proj_in", nn.Linear(2, 8)), "blocks.0.proj_in: expected 2 -> 16, got 2 -> 8"),
    (set_at("blocks.0.proj_out", nn.Linear(16, 6)), "proj_out: expected 16 -> 2 or 16 -> 4, got"),
    (set_at("blocks.0.proj_out", nn.Linear(16, 4, bias=False)), "proj_out: expected a bias, got"),
    (set_at("blocks.0.permutation", Rolled()), "permutation: expected tokens as they come or rev"),
    (
        set_at("blocks.0.extra", nn.Dropout()),
        "blocks.0.extra: expected no such module, got Drop",
    ),
    (set_at("blocks.0.gate", nn.Parameter(torch.ones(3))), "blocks.0.gate: expected no such param"),
    (set_at("blocks.0.attn_blocks", nn.ModuleList()), "attn_blocks: expected at least one layer"),
    (
        set_at("blocks.0.class_embed", nn.Parameter(torch.ones(3, 16))),
        r"blocks.0.class_embed: expected \[classes, 1, 16\], got \[3, 16\]",
    ),
    (set_at(f"{LAYER}.attention.num_heads", 3), "attention.num_heads: expected a divisor of 16"),
    (
        set_at(f"{LAYER}.attention.num_heads", 4),
        r"attn_blocks.1: expected .*\(2, 64, 1e-05\) as",
    ),
    (set_at(f"{LAYER}.attention.drop", nn.Dropout()), f"{LAYER}.attention.drop: expected no such"),
    (set_at(f"{LAYER}.attention.norm", nn.RMSNorm(16)), "norm: expected LayerNorm, got RMSNorm"),
    (
        set_at(f"{LAYER}.mlp.norm", nn.LayerNorm(16, eps=1e-6)),
        f"{LAYER}.mlp.norm: expected eps 1e-05 as in attention.norm, got 1e-06",
    ),
    (
        set_at(f"{LAYER}.mlp.main.1", nn.SiLU()),
        "main: expected Linear, GELU, Linear, got Linear",
    ),
    (
        set_at(f"{LAYER}.mlp.main.1", nn.GELU("tanh")),
        "main: expected exact GELU, got approximate",
    ),
    (
        lambda model: model.get_submodule(LAYER).mlp.register_forward_hook(lambda *a: None),
        f"{LAYER}.mlp: expected no hooks, .* got .'_forward_hooks'.",
    ),
    (
        set_at("blocks.0.forward", lambda x, y=None: x),
        "blocks.0: expected the forward of its",
    ),
    (
        set_at("blocks.0.__class__", OtherReverse),
        r"blocks.0.reverse: expected the arguments \('x', 'y', 'guidance', .*'steps'\)",
    ),
]


@pytest.mark.parametrize(("change", "match"), DIFFERENCES)
def test_the_first_difference_in_structure_is_named(change, match):
    model = small(dtype=torch.float32)
    change(model)
    for verify in (True, False):
        with pytest.raises(ValueError, match=match):
            accelerate(model, verify=verify)
    assert not any("Accelerated" in type(module).__name__ for module in model.modules())


class Bounded(Block):
    def scales_and_shifts(self, x, y, temperature=1.0):
        a, b = super().scales_and_shifts(x, y, temperature)
        return a.tanh(), b


class Twice(Block):
    def forward(self, x, y=None):
        z, logdet = super().forward(x, y)
        return z, logdet * 2


class NoMask(Block):
    def scales_and_shifts(self, x, y, temperature=1.0):
        self.attn_mask.fill_(1)
        return super().scales_and_shifts(x, y, temperature)


class Dropping(Block):
    def scales_and_shifts(self, x, y, temperature=1.0):
        a, b = super().scales_and_shifts(x, y, temperature)
        return a, F.dropout(b, 0.1, self.training)


class Single(Block):
    def forward(self, x, y=None):
        return super().forward(x, y)[0]


class Broken(Block):
    def forward(self, x, y=None):
        raise RuntimeError("not today\nreally")


@pytest.mark.parametrize(
    ("cls", "match"),
    [
        (Bounded, r"in evaluation mode it differs by \d.\de-\d\d of its norm"),
        (Twice, "in evaluation mode it differs by 5.0e-01 of its norm, more than 0.001"),
        (NoMask, "in evaluation mode it differs by"),
        (Dropping, "in training mode it differs by"),
        (Single, r"it returns \[2, 16, 2\], not \[2, 16, 2\], \[2\]"),
        (Broken, r"expected a forward that takes \[2, 16, 2\], .* got RuntimeError: not today$"),
    ],
)
def test_other_arithmetic_under_the_same_names_is_refused(cls, match):
    """In an untrained model, whose proj_out is zero: its blocks do nothing yet."""
    model = Model(2, 4, 1, 16, 2, 1, num_classes=3)
    model.blocks[1].__class__ = cls
    modes = model.train(False).blocks[0].train()
    with pytest.raises(ValueError, match=f"^blocks.1: .*{match}"):
        accelerate(model)
    assert [type(m) for m in (model, *model.blocks)] == [Model, Block, cls]
    assert modes.training
    assert not model.blocks[1].training
    assert not hasattr(model.blocks[0], "_flowops_layout")
    accelerate(model, verify=False)
    assert type(restore(model).blocks[1]) is cls


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Conv2d(1, 1, 1))])
def test_nothing_to_accelerate(model):
    with pytest.raises(ValueError, match="model: expected a TarFlow .* or an attention"):
        accelerate(model)


def test_not_a_module():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got list"):
        accelerate([])
