"""The reference program itself as a baseline, from a checkout the user points to."""

import importlib.util
import sys
from pathlib import Path

import torch
from torch import nn

from flowops.api import TarFlow

FILE, CLASS = "transformer_flow.py", "Model"


def load_upstream(folder: Path) -> type[nn.Module]:
    """The class ``Model`` of ``folder/transformer_flow.py``.

    Raises:
        ValueError: if the file or the class is missing.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise ValueError(f"upstream: expected a folder with {FILE}, got {folder}")
    spec = importlib.util.spec_from_file_location("flowops_bench_upstream", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where torch.compile looks for its globals
    spec.loader.exec_module(module)
    model = getattr(module, CLASS, None)
    if not isinstance(model, type):
        raise ValueError(f"upstream: {path} has no class {CLASS}")
    return model


def upstream_model(cls: type[nn.Module], model: TarFlow) -> nn.Module:
    """``cls`` built like ``model``, on the very same parameters.

    Raises:
        ValueError: if the two don't have the same weights.
    """
    config = dict(model.config)
    if (config.pop("head_dim"), config.pop("expansion")) != (64, 4):
        raise ValueError("upstream: expected head_dim 64 and expansion 4, its fixed sizes")
    with torch.device(model.var.device):
        other = cls(**config)
    state = model.state_dict(keep_vars=True)
    result = other.load_state_dict(state, strict=False, assign=True)
    missing = [key for key in result.missing_keys if not key.endswith("attn_mask")]
    if missing or result.unexpected_keys:
        first = (missing + result.unexpected_keys)[0]
        raise ValueError(f"upstream: {CLASS} has other weights than this TarFlow, such as {first}")
    return other
