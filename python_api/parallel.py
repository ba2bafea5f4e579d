"""The processes of a run: this one alone, or those that torchrun started.

Weights live whole in every process (DDP) or in parts (FSDP2: ``fully_shard`` a block, gathered
while the block is at work), or in parts within groups that are kept in step (HSDP).
"""

import contextlib
import datetime
import inspect
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

_TIMEOUT = datetime.timedelta(minutes=30)  # a rank may draw samples while the others wait


@dataclass(frozen=True)
class World:
    """``rank`` of ``size`` processes. Groups of their own on the CPU: ``control`` for what the
    processes tell each other, ``saves`` for checkpoints, which are written by another thread; None
    in a process alone."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: "dist.ProcessGroup | None" = None
    saves: "dist.ProcessGroup | None" = None

    def mean_(self, x: Tensor) -> Tensor:
        """The mean over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(x)
            x /= self.size
        return x

    def gather(self, x: Tensor) -> Tensor:
        """``[n, ...]`` of every process, one after the other, of the same shape in all."""
        if self.size == 1:
            return x
        x = x.contiguous()
        parts = x.new_empty((self.size, *x.shape))
        dist.all_gather(list(parts.unbind()), x)
        return parts.flatten(0, 1)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.control)

    def first(self, value):
        """What rank 0 has (an object that can be written as JSON or pickled)."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.control)
        return box[0]

    def agree(self, error: Exception | None) -> None:
        """Raises where any rank has failed, so that none waits for another: the own error, or one
        that tells the first other's."""
        errors = [None] * self.size
        if self.size > 1:
            told = None if error is None else f"{type(error).__name__}: {error}"
            dist.all_gather_object(errors, told, group=self.control)
        if error is not None:
            raise error
        for rank, told in enumerate(errors):
            if told is not None:
                raise RuntimeError(f"rank {rank} failed: {told}")


@contextlib.contextmanager
def join_world(device: str | None = None) -> Iterator[World]:
    """The world that torchrun or srun describes in the environment, or this process alone; left at
    the end.

    Args:
        device: ``"cpu"`` or ``"cuda"``; by default CUDA where there is a device.

    Raises:
        ValueError: if there are fewer devices than processes on this machine.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    size, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"processes: expected at most {torch.cuda.device_count()} on this machine, one a "
                f"CUDA device, got local rank {local}"
            )
        torch.cuda.set_device(local)
    here = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if "RANK" not in os.environ or size == 1:
        yield World(device=here)
        return
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    store, rank, size = _meeting_place()
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=size,
        timeout=_TIMEOUT,
        device_id=here if kind == "cuda" else None,
    )
    try:
        groups = [dist.new_group(backend="gloo", timeout=_TIMEOUT) for _ in ("control", "saves")]
        yield World(rank, size, here, *groups)
    finally:
        dist.destroy_process_group()


def _meeting_place() -> tuple[dist.Store, int, int]:
    """Where the processes find each other; rank, and how many there are."""
    store, rank, size = next(dist.rendezvous("env://", timeout=_TIMEOUT))
    store.set_timeout(_TIMEOUT)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun hands the store on to the processes that it starts again, and in it the addresses
        # of those that died. The machines count these starts each on its own.
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"start-{start}", store)
        several = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
        if several and rank == 0 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
            warnings.warn(
                "torchrun --max-restarts on several machines hangs after a restart, unless it is "
                "started with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment",
                stacklevel=4,
            )
    return store, rank, size


def parallelize(
    module: nn.Module,
    blocks: nn.ModuleList,
    world: World,
    parallel: str,
    shard_ranks: int,
    bf16: bool,
) -> nn.Module:
    """``module`` for all processes: what a training step calls.

    Args:
        module: whose forward returns the loss.
        blocks: its parts that FSDP2 gathers one at a time; they hold all parameters.
        parallel: ``"ddp"`` or ``"fsdp"``.
        shard_ranks: processes to a copy of the weights, 0 for all.
        bf16: FSDP2 gathers weights in bf16; gradients are always added up in fp32.

    Raises:
        ValueError: if shard_ranks does not divide the number of processes.
    """
    if world.size % (shard_ranks or 1):
        raise ValueError(
            f"shard_ranks: expected a divisor of the {world.size} processes, got {shard_ranks}"
        )
    if world.size == 1:
        return module
    if parallel == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        devices = [world.device.index] if world.device.type == "cuda" else None
        # Buffers are the same everywhere as they are; torch 2.13 renamed the switch.
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        return DistributedDataParallel(
            module, device_ids=devices, gradient_as_bucket_view=True, **{buffers: False}
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    shard = shard_ranks or world.size
    if shard == world.size:
        mesh = init_device_mesh(world.device.type, (shard,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(
            world.device.type, (world.size // shard, shard), mesh_dim_names=("replicate", "shard")
        )
    # Inputs keep their type: the affine step reads its tokens in fp32.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(module, mesh=mesh, mp_policy=policy)


@contextlib.contextmanager
def gradients_stay_here(module: nn.Module, here: bool) -> Iterator[None]:
    """Inside, a backward pass adds to this process's gradients alone, if ``here``: all but the
    last micro-batch of a step."""
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(not here)
        yield
    elif here and hasattr(module, "no_sync"):
        with module.no_sync():
            yield
    else:
        yield


def local(x: Tensor) -> Tensor:
    """The part of a sharded tensor that is here, sharing its memory; others as they are."""
    return x.to_local() if hasattr(x, "to_local") else x


def whole(x: Tensor) -> Tensor:
    """All of a sharded tensor; every process has to ask."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x
