"""The commands ``train`` and ``export``."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Literal

_ABOUT = """Train a TarFlow, on one process or, under torchrun, on many.

flowops train [CONFIG] [options]; CONFIG is a preset ({presets}) or a JSON file of settings such as
a run's config.json, which the options then change."""


def train(argv: list[str]) -> None:
    import tyro

    from .train_config import PRESETS, TrainConfig, load_config

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        config: Annotated[TrainConfig, tyro.conf.arg(name="")]
        data: str | None = None
        """A store of `flowops data prepare`, latents (.npy), "mnist" (without CONFIG), "digits", or
        a folder of images that fits into memory (its subfolders are the classes)."""
        validation: str | None = None
        """Images to evaluate on at the end, as `data`."""
        out: Path = Path("runs/train")
        """Where checkpoints, model, metrics and samples go; with several machines, on a file system
        that all see."""
        resume: bool = False
        """Go on from the newest checkpoint in `out`, if there is one."""
        held_out: int = 500
        """Without `validation`: images of data in memory that are kept for evaluation."""
        img_size: int | None = None
        """Folders: crop and resize to this many pixels."""
        image_channels: Literal[1, 3] = 3
        """Folders: 3 for RGB, 1 for grey."""
        samples: int = 40
        """Images in a grid of samples."""

    name = argv[0] if argv and not argv[0].startswith("-") else None
    config = load_config(name) if name else TrainConfig()
    args = tyro.cli(
        Arguments,
        prog=f"flowops train {name or ''}".strip(),
        args=argv[bool(name) :],
        default=Arguments(config),
        description=_ABOUT.format(presets=", ".join(PRESETS)),
    )
    if args.data is None:
        if name not in (None, "mnist"):
            raise ValueError(f"data: needed for {name}, e.g. a store of `flowops data prepare`")
        args = dataclasses.replace(args, data="mnist")
    from .parallel import join_world

    with join_world() as world:
        _train(args, world)


def _train(args, world) -> None:
    from rich.console import Console

    from .checkpoint import write_whole
    from .evaluate import evaluate, print_evaluation
    from .run_checkpoints import Checkpoints, read_state
    from .sources import open_data
    from .train import run_training
    from .train_config import noise_name
    from .trainer import Trainer, build_model

    console, config = Console(quiet=world.rank > 0), args.config
    checkpoints = Checkpoints(args.out / "checkpoints", world, config.keep_checkpoints)
    found = _find_checkpoint(args, world, checkpoints)
    if found:
        config = dataclasses.replace(config, precision=read_state(found)["precision"])
    data, held_out = open_data(args.data, args.img_size, args.image_channels), None
    if args.validation is not None:
        held_out = open_data(args.validation, args.img_size, args.image_channels)
    elif hasattr(data, "split") and args.held_out:
        data, held_out = data.split(args.held_out)
    trainer = Trainer(config, build_model(config, data).to(world.device), data, world)
    if found:
        trainer.load(checkpoints, found)
    if world.rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        settings = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
        write_whole(args.out / "config.json", settings.encode())
    start = f"from step {trainer.step_count}" if found else "from the start"
    console.print(
        f"{start}: {len(data):,} images, {world.size} process{'es' * (world.size > 1)}, "
        f"{trainer.precision}, {sum(p.numel() for p in trainer.model.parameters()) / 1e6:.4g} M "
        f"parameters",
        highlight=False,
    )
    with _Display(console, config.steps, trainer.step_count) as display:
        model = run_training(
            trainer,
            args.out,
            display.on_step,
            lambda model, step: draw_grid(model, world, config, args.samples, args.out, step),
        )
    result = None
    if held_out is not None:
        result = evaluate(model, held_out, config, world=world)
        print_evaluation(console, result, noise_name(config))
    if world.rank == 0:
        _plot(args.out, result, "bits per dim" if trainer.bits_offset else "bits per latent dim")
    for name in ("model.safetensors", "checkpoints", "metrics.jsonl", "samples", "curve.png"):
        if (args.out / name).exists():
            console.print(args.out / name, highlight=False)


def _plot(out: Path, result, unit: str) -> None:
    """``curve.png``, where matplotlib is installed."""
    import importlib.util

    from .curves import plot_curve

    if importlib.util.find_spec("matplotlib") is None:
        return
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    plot_curve(
        [record["step"] for record in records],
        [float(record["bits_per_dim"]) for record in records],
        out / "curve.png",
        str(out),
        None if result is None else result.bits_per_dim,
        unit,
    )


def _find_checkpoint(args, world, checkpoints) -> Path | None:
    """The checkpoint to go on from, the same in all processes."""
    found = world.first(checkpoints.latest() if world.rank == 0 else None)
    if found and not args.resume:
        raise ValueError(
            f"out: {found} exists; go on from it with --resume or choose another directory"
        )
    earlier = args.out / "checkpoint.safetensors"
    if not found and earlier.exists():
        raise ValueError(
            f"out: {earlier} is of an earlier version, which this one can't go on from; choose "
            f"another directory"
        )
    return found


class _Display:
    """A bar in a terminal; a line a record where the output goes to a file."""

    def __init__(self, console, steps: int, step: int):
        from rich.progress import Progress

        self._console = console
        self._bar = Progress(console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("training", total=steps, completed=step)
        self._steps, self._shown = steps, 0.0

    def __enter__(self) -> "_Display":
        self._bar.start()
        return self

    def __exit__(self, *error) -> None:
        self._bar.stop()

    def on_step(self, record: dict) -> None:
        step = record["step"]
        text = (
            f"{record['bits_per_dim']:.4f} bits/dim  {record['images_per_second']:.3g} images/s  "
            f"MFU {record['mfu']:.1%}"
        )
        self._bar.update(self._task, completed=step, description=text)
        if record["refused"]:
            self._console.print(
                f"step {step} refused: loss {record['loss']}, gradient norm {record['grad_norm']}"
            )
        elif not self._console.is_terminal and time.monotonic() - self._shown > 10:
            self._console.print(f"step {step}/{self._steps}  {text}", highlight=False)
            self._shown = time.monotonic()


def draw_grid(model, world, config, n: int, out: Path, step: int) -> None:
    """Samples from the same noise at every step, each process its share, as
    ``out/samples/step-*.png``; latents as ``.npy``."""
    import torch

    from flowops import noise_normal

    from .data import save_array, save_grid

    if n < 1:
        return
    share = -(-n // world.size)
    shape = (share, model.num_patches * model.patch_channels)
    rng = torch.tensor([config.seed, 0], device=world.device)
    noise = noise_normal(shape, rng=rng, first_row=world.rank * share)
    labels = None
    if model.num_classes:
        first = torch.arange(share, device=world.device) + world.rank * share
        labels = first % model.num_classes
    images = model.reverse(noise.view(share, model.num_patches, model.patch_channels), labels)
    if config.noise == "gaussian" and config.noise_std:
        images = model.denoise(images, labels, config.noise_std)
    images = world.gather(images)[:n].cpu()
    if world.rank:
        return
    path = out / "samples" / f"step-{step:08d}"
    path.parent.mkdir(exist_ok=True)
    if model.in_channels in (1, 3):
        save_grid(images, path.with_suffix(".png"), columns=min(n, 10))
    else:
        save_array(images, path.with_suffix(".npy"))


def export(argv: list[str]) -> None:
    import tyro

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        """One file of weights out of a checkpoint, with the names that the published reference
        program loads."""

        checkpoint: tyro.conf.Positional[Path]
        """A run's directory (its newest checkpoint) or one of its checkpoints/step-*."""
        out: Path = Path("model.safetensors")
        weights: Literal["ema", "model"] = "ema"
        """The averaged weights, or those of the last step."""

    args = tyro.cli(Arguments, prog="flowops export", args=argv)
    _export(args)


def _export(args) -> None:
    import torch

    from .checkpoint import save_tensors
    from .parallel import World
    from .run_checkpoints import Checkpoints, read_state
    from .tarflow import TarFlow

    path = args.checkpoint
    if (path / "checkpoints").is_dir():
        path = Checkpoints(path / "checkpoints", World()).latest()
        if path is None:
            raise ValueError(f"checkpoint: there is none in {args.checkpoint}")
    state = read_state(path)
    model = TarFlow(**state["config"])
    tensors = {f"{args.weights}.{name}": t for name, t in model.state_dict().items()}
    Checkpoints(path.parent, World()).load(path, tensors)
    weights = model.state_dict()
    mask = torch.ones(model.num_patches, model.num_patches).tril()
    if "shift" not in state["config"]:  # TarFlow's own program keeps it among the weights
        weights |= {f"blocks.{i}.attn_mask": mask.clone() for i in range(len(model.blocks))}
    save_tensors(
        args.out,
        weights,
        {"config": state["config"], "train_config": state["train_config"], "step": state["step"]},
    )
    print(args.out)
