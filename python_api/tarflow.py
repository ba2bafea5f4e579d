"""TarFlow: a stack of causal Transformers on image patches, trained by maximum likelihood.

Source: Zhai et al., "Normalizing Flows are Capable Generative Models" (arXiv 2412.06329).
Attribute names, initialisation and returned values are those of its reference program, so that its
checkpoints load unchanged.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flowops import noise_normal, noise_uniform
from flowops.noise import Rng, make_rng

from .decode import Guidance, invert_block
from .transformer import TarFlowBlock


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Image ``[B, c, H, W]`` to tokens ``[B, T, C]``: raster order, (c, dy, dx) inside a patch."""
    return F.unfold(x, patch_size, stride=patch_size).transpose(1, 2)


def unpatchify(tokens: Tensor, patch_size: int, img_size: int) -> Tensor:
    """The inverse of ``patchify``."""
    return F.fold(tokens.transpose(1, 2), img_size, patch_size, stride=patch_size)


def gaussian_noise(x: Tensor, std: float, rng: Rng = None) -> Tensor:
    """``x + std * eps``, one row of the noise contract an image."""
    eps = noise_normal((x.shape[0], x[0].numel()), rng=rng, device=x.device, dtype=x.dtype)
    return x + std * eps.view_as(x)


def uniform_dequantize(x: Tensor, rng: Rng = None) -> Tensor:
    """8-bit images in [-1, 1] to ``2 (k + u) / 256 - 1``, ``k = (x + 1) 255 / 2``, u uniform."""
    u = noise_uniform((x.shape[0], x[0].numel()), rng=rng, device=x.device, dtype=x.dtype)
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


class TarFlow(nn.Module):
    """A TarFlow on square images.

    Args:
        in_channels: colour channels c of the image.
        img_size: height and width of the image in pixels.
        patch_size: side of a patch, a divisor of img_size.
        channels: width of the Transformer, a multiple of head_dim.
        num_blocks: autoregressive blocks; every second one reads the tokens in reverse.
        layers_per_block: Transformer layers in each.
        nvp: affine steps; False: shifts alone (volume preserving), with a learned prior variance.
        num_classes: 0 for an unconditional model.
        head_dim: width of an attention head.
        expansion: hidden width of the perceptrons, in multiples of channels.
        checkpoint_blocks: keep only what passes between the blocks for the backward pass, which
            computes each block again. An attribute of the same name, free to change; no part of
            the saved model.

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
        channels: int,
        num_blocks: int,
        layers_per_block: int,
        nvp: bool = True,
        num_classes: int = 0,
        *,
        head_dim: int = 64,
        expansion: int = 4,
        checkpoint_blocks: bool = False,
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
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
        if img_size % patch_size:
            raise ValueError(
                f"patch_size: expected a divisor of img_size {img_size}, got {patch_size}"
            )
        if channels % head_dim:
            raise ValueError(f"channels: expected a multiple of {head_dim}, got {channels}")
        self.in_channels, self.img_size, self.patch_size = in_channels, img_size, patch_size
        self.num_classes, self.nvp = num_classes, nvp
        self.checkpoint_blocks, self._one_graph = checkpoint_blocks, False
        self.num_patches = (img_size // patch_size) ** 2
        self.patch_channels = in_channels * patch_size**2
        self.blocks = nn.ModuleList(
            TarFlowBlock(
                self.patch_channels,
                channels,
                self.num_patches,
                reverse=bool(i % 2),
                num_layers=layers_per_block,
                head_dim=head_dim,
                expansion=expansion,
                nvp=nvp,
                num_classes=num_classes,
            )
            for i in range(num_blocks)
        )
        # Variance of the prior: stays one, unless nvp is off and `update_prior` is called.
        self.register_buffer("var", torch.ones(self.num_patches, self.patch_channels))

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
        self._check_images(x)
        self._check_labels(y, x.shape[0])
        tokens, outputs, logdets = patchify(x, self.patch_size).contiguous(), [], 0
        if self._one_graph and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            tokens.requires_grad_()  # as what later blocks read: the first needs no graph apart
        for block in self.blocks:
            tokens, logdet = self._through(block, tokens, y)
            logdets = logdets + logdet
            outputs.append(tokens)
        return tokens, outputs, logdets / (self.num_patches * self.patch_channels)

    def _through(self, block: TarFlowBlock, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        if not (self.checkpoint_blocks and torch.is_grad_enabled()):
            return block(x, y)
        # Nothing in a block is random; fetching the generator's state would be for nothing.
        return checkpoint(block, x, y, use_reentrant=False, preserve_rng_state=False)

    def loss(self, z: Tensor, logdets: Tensor) -> Tensor:
        """Negative log-likelihood per dimension in nats, less ``ln(2 pi) / 2``, of a unit prior."""
        return 0.5 * z.float().square().mean() - logdets.mean()

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """``log p(x | y)`` in nats per image, ``[B]``, of x as given in [-1, 1]. Arguments and
        errors as ``forward``."""
        z, _, logdets = self(x, y)
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
            ``[B, c, H, W]``, not clamped. Only input gradients are computed.

        Source: arXiv 2412.06329 (denoising after sampling).
        """
        if not 0 <= noise_std < float("inf"):
            raise ValueError(f"noise_std: expected a finite number, at least 0, got {noise_std!r}")
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (score,) = torch.autograd.grad(self.log_prob(x, y).sum(), x)
        return (x + noise_std**2 * score).detach()

    # --- sampling --------------------------------------------------------------------------------

    @torch.no_grad()
    def reverse(
        self,
        noise: Tensor,
        y: Tensor | None = None,
        guidance: float = 0.0,
        guide_what: str = "ab",
        attn_temp: float = 1.0,
        annealed_guidance: bool = False,
        return_sequence: bool = False,
    ) -> Tensor | list[Tensor]:
        """Noise to images, exactly: the inverse of ``forward``.

        Args:
            noise: ``[B, T, C]``, of unit variance (the prior's is applied here); not changed.
            y: ``[B]`` labels, -1 for none; None for none at all.
            guidance: weight g of ``p += g (p - p_u)`` on the affine parameters, 0 for none.
            guide_what: which of log-scales ``"a"`` and shifts ``"b"``.
            attn_temp: the unguided pass divides its attention scores by it.
            annealed_guidance: g grows linearly along the tokens.
            return_sequence: also the images before and between the blocks.

        Returns:
            ``[B, c, H, W]``, or the list of such from noise to image.

        Raises:
            TypeError, ValueError: naming the argument that is off.

        Source: arXiv 2412.06329 (inverse and guidance).
        """
        plan = Guidance(guidance, guide_what, attn_temp, annealed_guidance)
        self._check_noise(noise)
        self._check_labels(y, noise.shape[0])
        if plan.active and not self.num_classes and attn_temp == 1:
            raise ValueError(
                "guidance: the model has no classes; without them guidance needs attn_temp other "
                "than 1"
            )
        images = [unpatchify(noise, self.patch_size, self.img_size)] if return_sequence else None
        x = noise * self.var.sqrt()
        for block in reversed(self.blocks):
            x = invert_block(block, x, y, plan)
            if return_sequence:
                images.append(unpatchify(x, self.patch_size, self.img_size))
        return images if return_sequence else unpatchify(x, self.patch_size, self.img_size)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        y: int | Tensor | None = None,
        *,
        guidance: float = 0.0,
        guide_what: str = "ab",
        attn_temp: float = 1.0,
        annealed_guidance: bool = False,
        denoise_std: float = 0.0,
        rng: Rng = None,
        batch_size: int = 256,
    ) -> Tensor:
        """Draws n images ``[n, c, H, W]``.

        Args:
            n: how many.
            y: one label for all, ``[n]`` labels, or None.
            guidance, guide_what, attn_temp, annealed_guidance: as in ``reverse``.
            denoise_std: if positive, ``denoise`` the images with it.
            rng: as in ``flowops.make_rng``. The noise of image i depends on rng and i alone; n and
                batch_size change the image by rounding only.
            batch_size: images at a time.

        Raises:
            TypeError, ValueError: naming the argument that is off.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n: expected a positive number of images, got {n!r}")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: expected a positive number, got {batch_size!r}")
        device = self.var.device
        if isinstance(y, int):
            y = torch.full((n,), y, device=device)
        self._check_labels(y, n)
        state = make_rng(rng, device)
        noise = noise_normal((n, self.num_patches * self.patch_channels), rng=state)
        noise = noise.view(n, self.num_patches, self.patch_channels).to(self.var.dtype)
        images = []
        for i in range(0, n, batch_size):
            labels = None if y is None else y[i : i + batch_size]
            batch = self.reverse(
                noise[i : i + batch_size],
                labels,
                guidance,
                guide_what,
                attn_temp,
                annealed_guidance,
            )
            if denoise_std > 0:
                batch = self.denoise(batch, labels, denoise_std)
            images.append(batch)
        return torch.cat(images)

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

    def _check_noise(self, noise: Tensor) -> None:
        if not isinstance(noise, Tensor) or not noise.is_floating_point():
            got = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
            raise TypeError(f"noise: expected a floating tensor, got {got}")
        expected = [self.num_patches, self.patch_channels]
        if noise.ndim != 3 or list(noise.shape[1:]) != expected or noise.shape[0] == 0:
            raise ValueError(
                f"noise: expected [B >= 1, {expected[0]}, {expected[1]}], got {list(noise.shape)}"
            )
        if noise.device != self.var.device:
            raise ValueError(
                f"noise: expected a tensor on {self.var.device}, got one on {noise.device}"
            )

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
