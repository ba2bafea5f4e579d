"""TarFlow: a stack of causal Transformers on image patches, trained by maximum likelihood.

Source: Zhai et al., "Normalizing Flows are Capable Generative Models" (arXiv 2412.06329).
Attribute names, initialisation and returned values are those of its reference program, so that its
checkpoints load unchanged.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flowops import noise_normal, noise_uniform
from flowops.noise import Rng

from .decode import forget_weights
from .patches import patchify, unpatchify
from .sampling import Sampling
from .starflow import STARFLOW, BlockParts, check_parts
from .transformer import TarFlowBlock


def gaussian_noise(x: Tensor, std: float, rng: Rng = None, first_row: int = 0) -> Tensor:
    """``x + std * eps``, one row of the noise contract an image, from ``first_row`` on."""
    shape = (x.shape[0], x[0].numel())
    eps = noise_normal(shape, rng=rng, device=x.device, dtype=x.dtype, first_row=first_row)
    return x + std * eps.view_as(x)


def uniform_dequantize(x: Tensor, rng: Rng = None, first_row: int = 0) -> Tensor:
    """8-bit images in [-1, 1] to ``2 (k + u) / 256 - 1``, ``k = (x + 1) 255 / 2``, u uniform, one
    row of the noise contract an image, from ``first_row`` on."""
    shape = (x.shape[0], x[0].numel())
    u = noise_uniform(shape, rng=rng, device=x.device, dtype=x.dtype, first_row=first_row)
    return ((x + 1) * (255 / 2) + u.view_as(x)) / 128 - 1


def _try_compiler(device: torch.device, options: dict) -> None:
    """Compiles a line, so that a missing compiler is named before the work starts."""
    compiled = torch.compile(lambda x: F.gelu(x) + 1, **options)
    try:
        compiled(torch.ones(16, device=device))
    except Exception as error:
        cause = getattr(error, "inner_exception", error)
        reason = f"{type(cause).__name__}: {cause}".strip().splitlines()[0]
        raise RuntimeError(f"torch.compile does not work here for {device}: {reason}") from error


class TarFlow(Sampling, nn.Module):
    """A TarFlow on square images.

    Args:
        in_channels: colour channels c of the image.
        img_size: height and width of the image in pixels.
        patch_size: side of a patch, a divisor of img_size.
        channels: width of the Transformer, a multiple of head_dim; or one width a block, the first
            of the block that reads the image.
        num_blocks: autoregressive blocks; every second one reads the tokens in reverse.
        layers_per_block: Transformer layers in each, or one number a block.
        nvp: affine steps; False: shifts alone (volume preserving), with a learned prior variance.
        num_classes: 0 for an unconditional model.
        head_dim: width of an attention head.
        expansion: hidden width of the perceptrons, in multiples of channels.
        shift, scale, soft_clip, norm, final_norm, positions: of what the blocks are made, as in
            ``BlockParts``.
        reverse_first: the blocks that read in reverse are the first, third, ..., not the second,
            fourth, ...
        checkpoint_blocks: True: keep only what passes between the blocks for the backward pass,
            which computes each block again; "selective": also what ``flowops.SAC_SAVE_OPS`` return,
            which are then not computed again. An attribute of the same name, free to change; no
            part of the saved model.

    Raises:
        ValueError: naming the argument that is off.

    Source: arXiv 2412.06329.
    """

    PRIOR_RATE = 0.1

    def __init__(
        self,
        in_channels: int,
        img_size: int,
        patch_size: int,
        channels: int | Sequence[int],
        num_blocks: int,
        layers_per_block: int | Sequence[int],
        nvp: bool = True,
        num_classes: int = 0,
        *,
        head_dim: int = 64,
        expansion: int = 4,
        shift: Literal["output", "input"] = "output",
        scale: Literal["exp", "softplus"] = "exp",
        soft_clip: float = 0.0,
        norm: Literal["layer", "rms"] = "layer",
        final_norm: bool = False,
        positions: Literal["learned", "rotary"] = "learned",
        reverse_first: bool = False,
        checkpoint_blocks: bool | Literal["selective"] = False,
    ):
        super().__init__()
        self.config = {
            "in_channels": in_channels,
            "img_size": img_size,
            "patch_size": patch_size,
            "channels": channels,
            "num_blocks": num_blocks,
            "layers_per_block": layers_per_block,
            "nvp": nvp,
            "num_classes": num_classes,
            "head_dim": head_dim,
            "expansion": expansion,
        }
        for name, value in self.config.items():
            least = 0 if name in ("num_classes", "nvp") else 1
            if name in ("channels", "layers_per_block") and isinstance(value, Sequence):
                continue
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
        if img_size % patch_size:
            raise ValueError(
                f"patch_size: expected a divisor of img_size {img_size}, got {patch_size}"
            )
        widths = self._by_block("channels")
        layers = self._by_block("layers_per_block")
        if any(width % head_dim for width in widths):
            raise ValueError(f"channels: expected a multiple of {head_dim}, got {channels}")
        parts = BlockParts(shift, scale, soft_clip, norm, final_norm, positions)
        check_parts(parts, nvp, head_dim)
        # What is TarFlow's own is left out, so that programs that know no parts read plain models.
        self.config |= parts.changed()
        if reverse_first:
            self.config["reverse_first"] = True
        self.in_channels, self.img_size, self.patch_size = in_channels, img_size, patch_size
        self.num_classes, self.nvp = num_classes, nvp
        self.checkpoint_blocks, self._one_graph = checkpoint_blocks, False
        self.num_patches = (img_size // patch_size) ** 2
        self.patch_channels = in_channels * patch_size**2
        self.blocks = nn.ModuleList(
            TarFlowBlock(
                self.patch_channels,
                widths[i],
                self.num_patches,
                reverse=i % 2 != bool(reverse_first),
                num_layers=layers[i],
                head_dim=head_dim,
                expansion=expansion,
                nvp=nvp,
                num_classes=num_classes,
                parts=parts,
            )
            for i in range(num_blocks)
        )
        # Variance of the prior: stays one, unless nvp is off and `update_prior` is called.
        self.register_buffer("var", torch.ones(self.num_patches, self.patch_channels))

    @classmethod
    def starflow(cls, *args, **kwargs) -> "TarFlow":
        """A TarFlow with STARFlow's parts: ``TarFlow(*args, **STARFLOW)``; arguments named here
        come first. Its deep block is the last, as in ``layers_per_block=[2, 2, 2, 2, 2, 24]``.

        Source: Gu et al. (arXiv 2506.06276).
        """
        return cls(*args, **(STARFLOW | kwargs))

    def _by_block(self, name: str) -> list[int]:
        """The numbers of each block; sequences are kept as lists, which files can hold."""
        value, blocks = self.config[name], self.config["num_blocks"]
        if isinstance(value, int):
            return [value] * blocks
        values = self.config[name] = list(value)
        if len(values) != blocks or any(type(v) is not int or v < 1 for v in values):
            raise ValueError(
                f"{name}: expected an integer of at least 1 for each of {blocks} blocks, got "
                f"{value!r}"
            )
        return values

    def compile_blocks(self, **options) -> None:
        """Puts the forward of every block through ``torch.compile``, in place.

        Blocks that read in the same direction share a compiled graph. Weights, their names, copies
        and pickles stay as they were (copies are not compiled). ``reverse`` and ``sample`` are not
        touched. Moving the model to another device afterwards compiles anew.

        Args:
            options: of ``torch.compile``; ``fullgraph`` is on unless given.

        Raises:
            RuntimeError: in one line, if the compiler does not work here.
        """
        options = {"fullgraph": True, **options}
        _try_compiler(self.var.device, options)
        for block in self.blocks:
            block.compile(**options)
        self._one_graph = True

    # --- density ---------------------------------------------------------------------------------

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, list[Tensor], Tensor]:
        """Images to noise.

        Args:
            x: ``[B, c, H, W]``, scaled to [-1, 1].
            y: ``[B]`` integer labels, -1 for none; None for none at all.

        Returns:
            ``z [B, T, C]``; the outputs of all blocks, each ``[B, T, C]``, the last being z; and
            ``logdets [B]``, the log-determinant per dimension (nats over T * C).

        Raises:
            TypeError, ValueError: naming the argument that is off.

        Source: arXiv 2412.06329, eq. 3-6.
        """
        outputs, logdets = self.transform(x, y)
        return outputs[-1], outputs, logdets.sum(0)

    def transform(self, x: Tensor, y: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """The outputs of all blocks, each ``[B, T, C]``, and what each adds to the log-determinant
        per dimension, ``[num_blocks, B]``. Arguments and errors as ``forward``."""
        self._check_images(x)
        self._check_labels(y, x.shape[0])
        tokens, outputs, logdets = patchify(x, self.patch_size).contiguous(), [], []
        if self._one_graph and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            tokens.requires_grad_()  # as what later blocks read: the first needs no graph apart
        for block in self.blocks:
            tokens, logdet = self._through(block, tokens, y)
            outputs.append(tokens)
            logdets.append(logdet)
        return outputs, torch.stack(logdets) / (self.num_patches * self.patch_channels)

    def _through(self, block: TarFlowBlock, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        if not (self.checkpoint_blocks and torch.is_grad_enabled()):
            return block(x, y)
        if self.checkpoint_blocks == "selective":
            return block(x, y, selective=True)
        # Nothing in a block is random; fetching the generator's state would be for nothing.
        return checkpoint(block, x, y, use_reentrant=False, preserve_rng_state=False)

    def loss(self, z: Tensor, logdets: Tensor) -> Tensor:
        """Negative log-likelihood per dimension in nats, less ``ln(2 pi) / 2``, of a unit prior."""
        return 0.5 * z.float().square().mean() - logdets.mean()

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """``log p(x | y)`` in nats per image, ``[B]``, of x as given in [-1, 1]. Arguments and
        errors as ``forward``."""
        z, _, logdets = self(x, y)
        return self._log_prob(z, logdets)

    def _log_prob(self, z: Tensor, logdets: Tensor) -> Tensor:
        z = z.to(self.var.dtype)
        energy = (z.square() / self.var + self.var.log() + math.log(2 * math.pi)).sum((1, 2))
        return logdets * z[0].numel() - 0.5 * energy

    def bits_per_dim(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """``-log2 p / dimensions`` of the image on its 0..255 scale, ``[B]``: x as given, already
        dequantised or noisy. Arguments and errors as ``forward``."""
        return -self.log_prob(x, y) / (x[0].numel() * math.log(2)) + math.log2(128)

    @torch.no_grad()
    def update_prior(self, z: Tensor) -> None:
        """Moves the prior's variance by a tenth towards the batch's mean square (nvp=False)."""
        self.var.lerp_(z.square().mean(0).to(self.var.dtype), self.PRIOR_RATE)

    def denoise(self, x: Tensor, y: Tensor | None = None, noise_std: float = 0.0) -> Tensor:
        """Tweedie's estimate ``x + noise_std^2 grad_x log p(x | y)`` of the image behind noise.

        Args:
            x, y: as in ``forward``.
            noise_std: of the noise the model was trained with, in units of x.

        Returns:
            ``[B, c, H, W]``, not clamped. Only gradients of the input are computed, none of the
            weights, and what passes between the blocks is all that is kept for them.

        Source: arXiv 2412.06329 (denoising after sampling).
        """
        if not 0 <= noise_std < float("inf"):
            raise ValueError(f"noise_std: expected a finite number, at least 0, got {noise_std!r}")
        self._check_images(x)
        self._check_labels(y, x.shape[0])
        # Tensors of inference mode can't take part in a graph; copies made outside of it can.
        with torch.inference_mode(False), torch.no_grad():
            x, y = x.detach().clone(), None if y is None else y.clone()
            score = self._score(x, y)
        return x + noise_std**2 * score

    def _score(self, x: Tensor, y: Tensor | None) -> Tensor:
        """``grad_x log p(x | y)``, one block after the other: a block's forward pass is computed
        again when its turn comes. (``torch.utils.checkpoint`` would import the compiler.)"""
        tokens, inputs, logdets = patchify(x, self.patch_size).contiguous(), [], 0
        if not torch.is_autocast_enabled(x.device.type):
            tokens = tokens.to(self.blocks[0].proj_in.weight.dtype)  # samples of bf16 are fp32
        size = self.num_patches * self.patch_channels
        for block in self.blocks:
            inputs.append(tokens)
            tokens, logdet = block(tokens, y)
            logdets = logdets + logdet / size

        @torch.enable_grad()
        def gradients(of: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
            inputs = [t.detach().requires_grad_() for t in inputs]
            # Counters of operations hook what goes into a module, and can't hook a leaf.
            return torch.autograd.grad(of(*(t.view_as(t) for t in inputs)), inputs)

        def weighted(block: TarFlowBlock, z: Tensor) -> Tensor:
            frozen = {name: p.detach() for name, p in block.named_parameters()}
            z, logdet = functional_call(block, frozen, (z, y))
            return (z * grad).sum() + (logdet * grad_logdets).sum() / size

        grad, grad_logdets = gradients(lambda *t: self._log_prob(*t).sum(), tokens, logdets)
        for block, tokens in zip(reversed(self.blocks), reversed(inputs), strict=True):
            (grad,) = gradients(partial(weighted, block), tokens)
        return unpatchify(grad, self.patch_size, self.img_size)

    def train(self, mode: bool = True) -> "TarFlow":
        """As ``nn.Module.train``; also drops what was prepared for sampling, which a write through
        ``parameter.data`` to a few elements alone would leave as it was."""
        forget_weights(self)
        return super().train(mode)

    # --- checks ----------------------------------------------------------------------------------

    def _check_images(self, x: Tensor) -> None:
        expected = (self.in_channels, self.img_size, self.img_size)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x: expected a floating tensor, got {got}")
        if x.ndim != 4 or tuple(x.shape[1:]) != expected or x.shape[0] == 0:
            raise ValueError(
                f"x: expected [B >= 1, {', '.join(map(str, expected))}], got {list(x.shape)}"
            )
        if x.device != self.var.device:
            raise ValueError(f"x: expected a tensor on {self.var.device}, got one on {x.device}")

    def _check_labels(self, y: Tensor | None, batch: int) -> None:
        if y is None:
            return
        if not self.num_classes:
            raise ValueError("y: the model was built without classes (num_classes=0), got labels")
        if not isinstance(y, Tensor) or y.dtype not in (torch.int32, torch.int64):
            got = y.dtype if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(f"y: expected integer labels, got {got}")
        if y.shape != (batch,):
            raise ValueError(f"y: expected [{batch}], got {list(y.shape)}")
        if y.device != self.var.device:
            raise ValueError(f"y: expected a tensor on {self.var.device}, got one on {y.device}")
        # Looking at values on a GPU would wait for it, under torch.compile break the graph.
        if y.device.type == "cpu" and not torch.compiler.is_compiling():
            bad = y[(y < -1) | (y >= self.num_classes)]
            if bad.numel():
                raise ValueError(
                    f"y: expected labels from 0 to {self.num_classes - 1}, or -1 for none, got "
                    f"{bad[0].item()}"
                )
