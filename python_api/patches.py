"""Images as sequences of tokens."""

from torch import Tensor
from torch.nn import functional as F


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Image ``[B, c, H, W]`` to tokens ``[B, T, C]``: raster order, (c, dy, dx) inside a patch."""
    return F.unfold(x, patch_size, stride=patch_size).transpose(1, 2)


def unpatchify(tokens: Tensor, patch_size: int, img_size: int) -> Tensor:
    """The inverse of ``patchify``."""
    return F.fold(tokens.transpose(1, 2), img_size, patch_size, stride=patch_size)
