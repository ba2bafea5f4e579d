"""Memory, traffic and time of large runs on paper: every figure follows from the sizes of the model
and from ``Assumptions``; nothing here is measured."""

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch

from flowops.api import TarFlow
from flowops.api.flops import training_flops
from flowops.api.train_config import PRESETS

CHECKPOINTS = (False, "selective", True)
PARALLEL = ("ddp", "fsdp", "hsdp")
#: fp32 bytes a parameter that last from step to step.
STATE = {"weights": 4, "gradients": 4, "moments": 8, "averages": 4}


@dataclass(frozen=True)
class Assumptions:
    """A cluster of one kind of GPU; bytes and operations are plain numbers, times are seconds.

    Attributes:
        peak: bf16 operations a second of one GPU in large matrix products.
        mfu: parts of that which a step reaches, a low and a high one.
        memory: bytes of one GPU that a run may fill.
        node: GPUs in a machine.
        nvlink: bytes a second that a GPU sends inside its machine, in one direction.
        network: the same across machines, each GPU having a port of its own.
        hop_node, hop_network: latency of a step of a ring, inside and across machines.
        bucket: bytes of gradients that DDP adds up in one call.
    """

    peak: float = 790e12
    mfu: tuple[float, float] = (0.40, 0.65)
    memory: float = 72e9
    node: int = 8
    nvlink: float = 450e9
    network: float = 50e9
    hop_node: float = 3.4e-6
    hop_network: float = 14e-6
    bucket: float = 25 * 2**20


H100 = Assumptions()


@dataclass(frozen=True)
class Case:
    """A model (on the meta device), its published global batch, bytes of a stored image."""

    name: str
    model: TarFlow = field(repr=False)
    batch: int
    image_bytes: int

    @cached_property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def blocks(self) -> list[int]:
        """Parameters of the blocks, which FSDP2 gathers one at a time, the largest first."""
        counts = (sum(p.numel() for p in block.parameters()) for block in self.model.blocks)
        return sorted(counts, reverse=True)

    @cached_property
    def entry(self) -> float:
        """Part of the parameters in the first block: the first to be gathered, the last to get
        gradients."""
        return sum(p.numel() for p in self.model.blocks[0].parameters()) / self.parameters

    @cached_property
    def flops(self) -> int:
        return training_flops(self.model)


def cases() -> list[Case]:
    """Two of the published presets, and the published STARFlow without its text: latents of
    4 x 32 x 32 in fp16, width 3072, 5 blocks of 2 layers and one of 24.

    Source: arXiv 2412.06329; arXiv 2506.06276 and the settings of its reference program.
    """
    found = []
    with torch.device("meta"):
        for name, size in (("imagenet64-cond", 64), ("imagenet128-cond", 128)):
            c = PRESETS[name]
            model = TarFlow(3, size, c.patch_size, c.channels, c.blocks, c.layers, num_classes=1000)
            label = f"{c.patch_size}-{c.channels}-{c.blocks}-{c.layers}, {size}x{size}"
            found.append(Case(label, model, c.batch_size, 3 * size**2))
        model = TarFlow.starflow(4, 32, 1, 3072, 6, [2, 2, 2, 2, 2, 24])
    return [*found, Case("STARFlow 3072, 256x256", model, 1024, 2 * 4 * 32**2)]


# --- memory --------------------------------------------------------------------------------------


def activation_bytes(model: TarFlow, checkpoint: bool | str = False, bf16: bool = True) -> int:
    """Bytes that wait for the backward pass, an image, at the moment when there are most.

    A token of a layer of width W keeps, with products in e bytes: fp32 inputs of two norms (8 W)
    with mean and deviation (16 bytes), what the four products read (e (1 + 1 + 1 + 4) W), q, k, v
    and the perceptron's hidden units (e (3 + 4) W; rotary positions: turned q and k too, 2 e W)
    and 4 bytes a head. A block adds what its first and last product, a final norm and the affine
    step read. With checkpoints, a block at a time is whole, the others keep their input (and
    "selective" what attention returned).
    """
    e, T, C = (2 if bf16 else 4), model.num_patches, model.patch_channels
    whole, kept = [], []
    for block in model.blocks:
        W, layers = block.proj_in.out_features, len(block.attn_blocks)
        rotary = 2 * e * W if block.parts.positions == "rotary" else 0
        layer = (8 + 14 * e) * W + rotary + 16 + 4 * block.num_heads
        final = 8 * W if block.final_norm is not None else 0
        whole.append(T * (layers * layer + final + e * W + (4 + 3 * e) * C))
        attention = layers * (e * W + 4 * block.num_heads) if checkpoint == "selective" else 0
        kept.append(T * (4 * C + attention))
    if not checkpoint:
        return sum(whole) + 4 * T * C
    return sum(kept) + max(w - k for w, k in zip(whole, kept, strict=True))


def memory(
    case: Case,
    shard: int,
    images: int,
    checkpoint: bool | str = False,
    accumulate: int = 1,
    bf16: bool = True,
) -> dict[str, float]:
    """Bytes of a process.

    Args:
        shard: processes that share one copy of the state; 1 for DDP.
        images: a micro-batch.
        accumulate: micro-batches a step; FSDP2 holds whole gradients from one to the next.

    Returns:
        ``state``; ``passing``, weights and gradients of the block at work, or autocast's copies;
        ``activations``.
    """
    P, e = case.parameters, 2 if bf16 else 4
    if shard == 1:
        passing = 2 * P if bf16 else 0
    else:
        # Two blocks are gathered, one of them has gradients, which are added up in fp32.
        passing = e * sum(case.blocks[:2]) + (e + 4) * case.blocks[0]
        passing += 4 * P if accumulate > 1 else 0
    return {
        "state": sum(STATE.values()) * P / shard,
        "passing": passing,
        "activations": images * activation_bytes(case.model, checkpoint, bf16),
    }


# --- time ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Of one GPU in a step: seconds of gathering all weights once, of adding up the gradients; the
    part of each that no computing can hide, its first or last call; bytes it sends for one
    gathering and for the gradients."""

    gather: float
    reduce: float
    bare: float
    gather_bytes: float
    reduce_bytes: float


def _ring(size: float, n: int, nodes: int, calls: int, a: Assumptions) -> tuple[float, float]:
    """Seconds and bytes a GPU sends, of all-gathers (or reduce-scatters) of ``size`` bytes among n
    GPUs. In a ring through several machines all ports of a machine share what leaves it."""
    rate = a.nvlink if nodes == 1 else min(a.nvlink, a.network * n / nodes)
    hops = (n - nodes) * a.hop_node + (nodes - 1) * a.hop_network
    sent = (n - 1) / n * size
    return sent / rate + calls * hops, sent


def _all_reduce(size: float, n: int, nodes: int, calls: int, a: Assumptions) -> tuple[float, float]:
    """As ``_ring``, with twice the bytes and the hops of a tree across machines."""
    rate = a.nvlink if nodes == 1 else min(a.nvlink, a.network * n / nodes)
    hops = 2 * ((n / nodes - 1) * a.hop_node + math.log2(nodes) * a.hop_network)
    sent = 2 * (n - 1) / n * size
    return sent / rate + calls * hops, sent


def traffic(case: Case, parallel: str, world: int, a: Assumptions = H100) -> Traffic:
    """DDP: an all-reduce of fp32 gradients. FSDP2: all-gathers of bf16 weights and a reduce-scatter
    of fp32 gradients among all. HSDP: these inside machines, and an all-reduce of the parts."""
    P, nodes, blocks = case.parameters, max(1, world // a.node), len(case.blocks)
    if parallel == "ddp":
        calls = math.ceil(4 * P / a.bucket)
        seconds, sent = _all_reduce(4 * P, world, nodes, calls, a)
        return Traffic(0.0, seconds, 1 / calls, 0.0, sent)
    n, inside = (world, nodes) if parallel == "fsdp" else (a.node, 1)
    gather, gather_bytes = _ring(2 * P, n, inside, blocks, a)
    reduce, reduce_bytes = _ring(4 * P, n, inside, blocks, a)
    if parallel == "hsdp" and nodes > 1:
        seconds, sent = _all_reduce(4 * P / n, nodes, nodes, blocks, a)
        reduce, reduce_bytes = reduce + seconds, reduce_bytes + sent
    return Traffic(gather, reduce, case.entry, gather_bytes, reduce_bytes)


def step_seconds(
    case: Case,
    sent: Traffic,
    images: int,
    mfu: float,
    checkpoint: bool | str = False,
    accumulate: int = 1,
    a: Assumptions = H100,
) -> float:
    """A step of ``accumulate`` micro-batches of ``images``. Every gathering but the first and every
    sum of gradients but the last goes on beside the computing; checkpoints cost a forward pass."""
    forward = images * case.flops / 3 / (mfu * a.peak)
    backward = (3 if checkpoint else 2) * forward
    first, last = sent.bare * sent.gather, sent.bare * sent.reduce
    forwards = accumulate * (first + max(forward, sent.gather - first))
    backwards = (accumulate - 1) * max(backward, sent.gather)
    return forwards + backwards + max(backward, sent.gather + sent.reduce - last) + last


def _shard(parallel: str, world: int, a: Assumptions) -> int:
    return {"ddp": 1, "fsdp": world, "hsdp": min(a.node, world)}[parallel]


def plan(a: Assumptions = H100, worlds: tuple[int, ...] = (8, 32, 128, 256)) -> list[dict]:
    """A row for every case, number of GPUs and way to spread it, at the published global batch:
    micro-batches and checkpoints that fit with the shortest step at the low ``mfu``, or, where
    nothing fits, those that need least. Numbers for both ``mfu`` come as pairs."""
    rows = []
    for case in cases():
        for world in (n for n in worlds if case.batch % n == 0):
            for parallel in PARALLEL if world > a.node else PARALLEL[:2]:
                rows.append(_row(case, parallel, world, a))
    return rows


def _row(case: Case, parallel: str, world: int, a: Assumptions) -> dict:
    each, sent = case.batch // world, traffic(case, parallel, world, a)
    fitting, least = [], None
    for accumulate in (2**i for i in range(each.bit_length()) if each % 2**i == 0):
        for checkpoint in CHECKPOINTS:
            images, how = each // accumulate, (checkpoint, accumulate)
            need = memory(case, _shard(parallel, world, a), images, *how)
            seconds = [step_seconds(case, sent, images, mfu, *how, a) for mfu in a.mfu]
            option = {"checkpoint": checkpoint, "accumulate": accumulate, **need}
            option |= {"total": sum(need.values()), "seconds": seconds}
            if option["total"] <= a.memory:
                fitting.append(option)
            if least is None or option["total"] < least["total"]:
                least = option
    best = min(fitting, key=lambda option: option["seconds"][0]) if fitting else least
    rates = [case.batch / seconds for seconds in best["seconds"]]
    computing = [each * case.flops / (mfu * a.peak) for mfu in a.mfu]
    return {
        "model": case.name,
        "world": world,
        "parallel": parallel,
        "batch": each,
        "fits": bool(fitting),
        **best,
        "sent": 2 * best["accumulate"] * sent.gather_bytes + sent.reduce_bytes,
        "traffic": 2 * best["accumulate"] * sent.gather + sent.reduce,
        "computing": computing,
        "kept_rate": [c / s for c, s in zip(computing, best["seconds"], strict=True)],
        "images_per_second": rates,
        "store": [rate * case.image_bytes / max(1, world // a.node) for rate in rates],
    }


def images_to_hide(case: Case, parallel: str, world: int, mfu: float, a: Assumptions = H100) -> int:
    """The fewest images a GPU with which traffic lengthens a step by at most a twentieth."""
    sent = traffic(case, parallel, world, a)
    images = 1
    while True:
        computing = images * case.flops / (mfu * a.peak)
        if step_seconds(case, sent, images, mfu, a=a) <= 1.05 * computing:
            return images
        images += 1
