"""Reference numbers of a small TarFlow, and the arguments behind its samples."""

import json
from pathlib import Path

from safetensors import safe_open

#: The arguments behind each kind of sample.
SAMPLES = {
    "plain": {"y": "y"},
    "guided": {"y": "y", "guidance": 1.5},
    "guide_a": {"y": "y", "guidance": 0.7, "guide_what": "a"},
    "guide_b": {"y": "y", "guidance": 0.7, "guide_what": "b"},
    "annealed": {"y": "y", "guidance": 1.5, "annealed_guidance": True},
    "temp": {"guidance": 0.5, "attn_temp": 0.6},
}


def load() -> tuple[dict, dict, dict]:
    """The model's configuration, its state dict, and all tensors by name."""
    with safe_open(Path(__file__).parent / "golden" / "tarflow_small.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    weights = {k.removeprefix("model."): t for k, t in tensors.items() if k.startswith("model.")}
    return config, weights, tensors
