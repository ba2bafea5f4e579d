"""Sampling from a stack of autoregressive blocks: what is finished comes at once, with a report of
how each block was solved.

Source: Zhai et al. (arXiv 2412.06329); Gaussian guidance: Gu et al. (arXiv 2506.06276).
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowops import noise_normal
from flowops.noise import Rng, make_rng

from .batching import ProgressBar, fitting_batch, in_batches
from .decode import BlockReport, Guidance, Solver, check_method, invert_block
from .patches import unpatchify


@dataclass(frozen=True)
class SamplingReport:
    """How the blocks were inverted, ``[n, num_blocks]`` each, block 0 first.

    Attributes:
        residual: the largest change that one more sweep would make, in units of the block's output:
            at most ``tol``, and 0 for the exact sampler.
        sweeps: passes over windows of tokens that the image's batch took.
        steps: passes over single tokens; of the exact sampler as many as tokens are transformed,
            ``T - 1``, or ``T`` with ``shift="input"``.
    """

    residual: Tensor
    sweeps: Tensor
    steps: Tensor

    @staticmethod
    def of_blocks(reports: list[BlockReport]) -> "SamplingReport":
        residual = torch.stack([report.residual for report in reports], dim=1)
        counts = torch.stack([report.counts for report in reports], dim=1)  # [2, num_blocks]
        sweeps, steps = (row.expand(len(residual), -1) for row in counts)
        return SamplingReport(residual, sweeps, steps)

    @staticmethod
    def join(parts: list["SamplingReport"]) -> "SamplingReport":
        return SamplingReport(
            torch.cat([part.residual for part in parts]),
            torch.cat([part.sweeps for part in parts]),
            torch.cat([part.steps for part in parts]),
        )


class SamplingInterrupted(KeyboardInterrupt):
    """Ctrl-C while sampling. ``images`` are those that were finished, the first of those asked for;
    None if there are none."""

    def __init__(self, images: Tensor | None, asked: int):
        finished = 0 if images is None else len(images)
        super().__init__(f"interrupted: {finished} of {asked} images were finished")
        self.images = images


def invert_blocks(
    blocks: Iterable[nn.Module],
    z: Tensor,
    y: Tensor | None,
    guidance: Guidance,
    solver: Solver,
    layout: Callable[[nn.Module], tuple[bool, int]],
    on_block: Callable[[Tensor], None],
) -> tuple[Tensor, SamplingReport]:
    """Inverts ``blocks`` from last to first.

    Args:
        z: ``[B, T, C]`` noise of the prior's variance.
        layout: from a block to whether it reads the tokens reversed, and its heads.
        on_block: called with what each block returns.
    """
    reports = []
    for block in reversed(list(blocks)):
        reverse, heads = layout(block)
        z, report = invert_block(block, z, y, guidance, solver, reverse=reverse, heads=heads)
        reports.append(report)
        on_block(z)
    return z, SamplingReport.of_blocks(reports[::-1])


class Sampling:
    """The sampling half of ``TarFlow``."""

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
        *,
        guidance_kind: str = "linear",
        method: str = "exact",
        tol: float = 1e-3,
        window: int | None = None,
        return_report: bool = False,
        on_block: Callable[[Tensor], None] | None = None,
    ) -> Tensor | list[Tensor] | tuple[Tensor | list[Tensor], SamplingReport]:
        """Noise to images: the inverse of ``forward``.

        Args:
            noise: ``[B, T, C]``, of unit variance (the prior's is applied here); not changed.
            y: ``[B]`` labels, -1 for none; None for none at all.
            guidance: weight g of ``p += g (p - p_u)`` on the affine parameters, 0 for none.
            guide_what: which of log-scales ``"a"`` and shifts ``"b"``.
            attn_temp: the unguided pass divides its attention scores by it.
            annealed_guidance: g grows linearly along the tokens.
            return_sequence: also the images before and between the blocks.
            guidance_kind: ``"linear"``, the above, or ``"gaussian"``: mean and deviation of
                ``p^(1 + g) / p_u^g`` (``gaussian_guidance``), always of both, token by token.
            method: ``"exact"``, token by token; ``"jacobi"``, windows of tokens at once, until each
                block's equation holds to ``tol``; ``"auto"``, for each block what pays: "exact" for
                STARFlow's parts and Gaussian guidance, which sweeps are not made for.
            tol: the largest ``|F(x) - x|`` that is left in a block, in units of x; 0: the exact
                result by any method.
            window: tokens a sweep; None for what suits the device.
            return_report: also a ``SamplingReport``.
            on_block: called with the tokens ``[B, T, C]`` that each block returns.

        Returns:
            ``[B, c, H, W]``, or the list of such from noise to image; with the report a pair.

        Raises:
            TypeError, ValueError: naming the argument that is off.

        Source: arXiv 2412.06329 (inverse and guidance), arXiv 2506.06276 (Gaussian guidance).
        """
        plan = Guidance(guidance, guide_what, attn_temp, annealed_guidance, guidance_kind)
        solver = Solver(method, tol, window)
        self._check_noise(noise)
        self._check_labels(y, noise.shape[0])
        self._check_guidance(plan)
        check_method(self.blocks, plan, solver)
        sequence = [noise]

        def finished(x: Tensor) -> None:
            if return_sequence:
                sequence.append(x)
            if on_block is not None:
                on_block(x)

        x, report = invert_blocks(
            *(self.blocks, noise * self.var.sqrt(), y, plan, solver),
            *(lambda block: (block.reverse, block.num_heads), finished),
        )
        images = [
            unpatchify(tokens, self.patch_size, self.img_size)
            for tokens in (sequence if return_sequence else [x])
        ]
        images = images if return_sequence else images[0]
        return (images, report) if return_report else images

    def stream(
        self,
        n: int,
        y: int | Tensor | None = None,
        *,
        guidance: float = 0.0,
        guide_what: str = "ab",
        attn_temp: float = 1.0,
        annealed_guidance: bool = False,
        guidance_kind: str = "linear",
        method: str = "exact",
        tol: float = 1e-3,
        window: int | None = None,
        denoise_std: float = 0.0,
        rng: Rng = None,
        batch_size: int = 256,
        on_block: Callable[[Tensor], None] | None = None,
    ) -> Iterator[tuple[Tensor, SamplingReport]]:
        """Draws n images, batch by batch: an iterator over ``[b, c, H, W]`` with the report of each
        as they are finished.

        Args:
            n: how many.
            y: one label for all, ``[n]`` labels, or None.
            guidance, guide_what, attn_temp, annealed_guidance, guidance_kind, method, tol, window,
                on_block: as in ``reverse``.
            denoise_std: if positive, ``denoise`` the images with it.
            rng: as in ``flowops.make_rng``. The noise of image i depends on rng and i alone; n and
                batch_size change an exact image by rounding at most.
            batch_size: images at a time, at most: fewer if memory does not hold them, with a
                warning.

        Raises:
            TypeError, ValueError: naming the argument that is off, before the first batch.
        """
        for name, value in (("n", n), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive number of images, got {value!r}")
        if not 0 <= denoise_std < float("inf"):
            raise ValueError(
                f"denoise_std: expected a finite number, at least 0, got {denoise_std!r}"
            )
        device = self.var.device
        if isinstance(y, int):
            y = torch.full((n,), y, device=device)
        self._check_labels(y, n)
        plan = Guidance(guidance, guide_what, attn_temp, annealed_guidance, guidance_kind)
        solver = Solver(method, tol, window)
        self._check_guidance(plan)
        check_method(self.blocks, plan, solver)
        noise = noise_normal((n, self.num_patches * self.patch_channels), rng=make_rng(rng, device))
        noise = noise.view(n, self.num_patches, self.patch_channels).to(self.var.dtype)

        @torch.no_grad()
        def draw(first: int, last: int) -> tuple[Tensor, SamplingReport]:
            labels = None if y is None else y[first:last]
            images, report = self.reverse(
                *(noise[first:last], labels, guidance, guide_what, attn_temp, annealed_guidance),
                guidance_kind=guidance_kind,
                method=method,
                tol=tol,
                window=window,
                return_report=True,
                on_block=on_block,
            )
            if denoise_std > 0:
                images = self.denoise(images, labels, denoise_std)
            return images, report

        return in_batches(
            n, fitting_batch(self.blocks, min(n, batch_size), plan, solver, device), draw
        )

    def sample(
        self,
        n: int,
        y: int | Tensor | None = None,
        *,
        progress: bool = False,
        return_report: bool = False,
        on_block: Callable[[Tensor], None] | None = None,
        **options,
    ) -> Tensor | tuple[Tensor, SamplingReport]:
        """Draws n images ``[n, c, H, W]``.

        Args:
            n, y, on_block, options: as in ``stream``.
            progress: show a bar, which waits for every block (needs the package rich).
            return_report: also a ``SamplingReport``.

        Raises:
            TypeError, ValueError: naming the argument that is off.
            SamplingInterrupted: on Ctrl-C, with the images that are finished.
        """
        images, reports = [], []
        bar = ProgressBar(n, len(self.blocks)) if progress else None

        def finished(tokens: Tensor) -> None:
            if bar is not None:
                bar.on_block(tokens)
            if on_block is not None:
                on_block(tokens)

        batches = self.stream(n, y, on_block=finished, **options)
        with bar or contextlib.nullcontext():
            try:
                for batch, report in batches:
                    images.append(batch)
                    reports.append(report)
                    if bar is not None:
                        bar.on_batch(batch)
            except KeyboardInterrupt:
                raise SamplingInterrupted(torch.cat(images) if images else None, n) from None
        images = torch.cat(images)
        return (images, SamplingReport.join(reports)) if return_report else images

    def _check_guidance(self, guidance: Guidance) -> None:
        if guidance.active and not self.num_classes and guidance.attn_temp == 1:
            raise ValueError(
                "guidance: the model has no classes; without them guidance needs attn_temp other "
                "than 1"
            )

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
        if noise.device.type == "cpu" and not noise.isfinite().all():
            image = int((~noise.isfinite()).flatten(1).any(1).nonzero()[0])
            raise ValueError(
                f"noise: expected finite numbers, got NaN or infinity in image {image}"
            )
