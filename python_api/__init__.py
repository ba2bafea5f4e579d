"""What a user holds: layers, flows, densities, model files. The command line is
``flowops.api.cli``; tables and data sets are in ``flowops.api.table``, ``uci`` and ``sets``."""

from .accelerate import accelerate, restore
from .affine import AffineUpdate
from .checkpoint import load_model, save_model
from .density import Density, FlowSpec
from .ferumal import FerumalFlow, KernelCoupling
from .fit import FitConfig, fit_flow
from .mixing import ActNorm, LULinear, Permutation
from .padded import PaddedFlow, PadNoise
from .patches import patchify, unpatchify
from .sampling import SamplingInterrupted, SamplingReport
from .tarflow import TarFlow, TarFlowBlock, gaussian_noise, uniform_dequantize

__all__ = [
    "ActNorm",
    "AffineUpdate",
    "Density",
    "FerumalFlow",
    "FitConfig",
    "FlowSpec",
    "KernelCoupling",
    "LULinear",
    "PadNoise",
    "PaddedFlow",
    "Permutation",
    "SamplingInterrupted",
    "SamplingReport",
    "TarFlow",
    "TarFlowBlock",
    "accelerate",
    "fit_flow",
    "gaussian_noise",
    "load_model",
    "patchify",
    "restore",
    "save_model",
    "uniform_dequantize",
    "unpatchify",
]
