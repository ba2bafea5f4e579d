"""Augmentations on the device, drawn from the noise contract."""

import torch
from torch import Tensor

from flowops import noise_words


def crop_and_flip(
    x: Tensor, size: int, shift: int, flip: bool, rng: Tensor, first_row: int = 0
) -> Tensor:
    """Squares of the images at random places, mirrored at random.

    Args:
        x: ``[B, c, H, H]``, any dtype.
        size: side of the squares in pixels, at most H.
        shift: how far a square may reach over the border; what lies there repeats the edge.
        flip: mirror images left to right, each with a probability of one half.
        rng: as in ``flowops.make_rng``.
        first_row: what image of its batch the first of x is.

    Returns:
        ``[B, c, size, size]``; x itself where there is nothing to draw.
    """
    B, c, H, _ = x.shape
    room = H - size + 2 * shift
    if not room and not flip:
        return x
    words = noise_words((B, 3), rng=rng, device=x.device, first_row=first_row)
    offsets = words[:, :2] % (room + 1) - shift
    at = torch.arange(size, device=x.device)
    rows = (at + offsets[:, :1]).clamp(0, H - 1)
    columns = (at + offsets[:, 1:2]).clamp(0, H - 1)
    if flip:
        mirrored = words[:, 2:] >= 2**31
        columns = torch.where(mirrored, columns.flip(1), columns)
    x = x.gather(2, rows[:, None, :, None].expand(B, c, size, H))
    return x.gather(3, columns[:, None, None, :].expand(B, c, size, size))
