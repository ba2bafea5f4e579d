"""What a user holds: layers, flows, model files. The command line is ``flowops.api.cli``."""

from .checkpoint import load_model, save_model
from .tarflow import TarFlow, TarFlowBlock, gaussian_noise, patchify, uniform_dequantize, unpatchify

__all__ = [
    "TarFlow",
    "TarFlowBlock",
    "gaussian_noise",
    "load_model",
    "patchify",
    "save_model",
    "uniform_dequantize",
    "unpatchify",
]
