"""Fused kernels for normalizing flows: the public ops. Layers and flows are in ``flowops.api``."""

import torch as _torch

from ._version import __version__
from .affine import affine_inverse, affine_update
from .attention import causal_attention
from .coupling import kernel_coupling, kernel_coupling_inverse
from .cuda_runtime import warmup
from .decode import Decoded, decode_block
from .decode_weights import BlockWeights, LayerWeights, pack_block
from .gram import se_gram, se_gram_matmul
from .noise import make_rng, noise_normal, noise_uniform, noise_words
from .padding import pad_noise
from .patch_attention import causal_patch_attention

#: What selective activation checkpointing should keep (``CheckpointPolicy.MUST_SAVE``) instead of
#: running it again in backward: the ops that cost more than the memory of what they return.
SAC_SAVE_OPS = frozenset(
    {
        _torch.ops.flowops.causal_attention.default,
        _torch.ops.flowops.causal_patch_attention.default,
    }
)

__all__ = [
    "SAC_SAVE_OPS",
    "BlockWeights",
    "Decoded",
    "LayerWeights",
    "__version__",
    "affine_inverse",
    "affine_update",
    "causal_attention",
    "causal_patch_attention",
    "decode_block",
    "kernel_coupling",
    "kernel_coupling_inverse",
    "make_rng",
    "noise_normal",
    "noise_uniform",
    "noise_words",
    "pack_block",
    "pad_noise",
    "se_gram",
    "se_gram_matmul",
    "warmup",
]
