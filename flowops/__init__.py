"""Fused kernels for normalizing flows: the public ops. Layers and flows are in ``flowops.api``."""

from .affine import affine_inverse, affine_update

from ._version import __version__
__all__ = ["affine_inverse", "affine_update"]
