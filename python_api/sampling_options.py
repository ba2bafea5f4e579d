"""How to draw, as options of the commands that do."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SamplingOptions:
    """Arguments of ``TarFlow.sample`` by name."""

    guidance: float = 0.0
    """Strength of guidance towards the class."""
    guidance_kind: Literal["linear", "gaussian"] = "linear"
    """How: extrapolate the parameters (TarFlow), or combine the Gaussians (STARFlow)."""
    guide_what: Literal["ab", "a", "b"] = "ab"
    """linear: guide log-scales (a), shifts (b) or both."""
    attn_temp: float = 1.0
    """The unguided pass divides its attention scores by it."""
    annealed_guidance: bool = False
    """Guidance grows linearly along the tokens."""
    method: Literal["exact", "jacobi", "auto"] = "exact"
    """Token by token, sweeps over windows of tokens, or for each block what pays."""
    tol: float = 1e-3
    """jacobi, auto: the largest residual left in a block; 0 for the exact images."""
    window: int | None = None
    """jacobi, auto: tokens a sweep; what suits the device by default."""
