"""The command ``eval``."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal


def evaluate_model(argv: list[str]) -> None:
    import tyro

    from .sampling_options import SamplingOptions

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        """Bits per dim and classification by Bayes' rule on held-out images, and the FID of
        samples, on one process or, under torchrun, on many."""

        model: tyro.conf.Positional[Path]
        """model.safetensors"""
        data: str = "mnist"
        """A store of `flowops data prepare` or latents (.npy), all of which are taken; "mnist",
        "digits", or a folder of images."""
        held_out: int = 500
        """Data in memory: as in training, so that the same images are held out; 0: all images."""
        img_size: int | None = None
        """Folders: crop and resize to this many pixels, the model's by default."""
        image_channels: Literal[1, 3] | None = None
        """Folders: 3 for RGB, 1 for grey, as the model's by default."""
        classify: int | None = None
        """Images to classify, the first ones: a pass for every image and class. 0: none; by default
        all, or none for a model of more than 50 classes."""
        batch_size: int = 256
        """Images at a time."""
        precision: Literal["fp32", "tf32", "bf16"] = "fp32"
        """Of bits per dim and classification; samples are drawn in fp32."""
        fid: int = 0
        """Draw this many samples, as in `flowops sample`, and print their FID against all images of
        the data; 0: none."""
        fid_weights: Path | None = None
        """Weights of FID's Inception network; by default where torch.hub keeps them."""
        sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = dataclasses.field(
            default_factory=SamplingOptions
        )
        denoise: bool = True
        """fid: remove the training noise (Tweedie)."""
        seed: int = 0
        """fid: of the samples."""

    args = tyro.cli(Arguments, prog="flowops eval", args=argv)
    from .parallel import join_world

    with join_world() as world:
        _evaluate(args, world)


def _evaluate(args, world) -> None:
    from rich.console import Console

    from .checkpoint import load_model, read_tensors
    from .evaluate import evaluate, print_evaluation
    from .fid import compute_fid, load_inception
    from .sources import open_data
    from .train_config import config_from, noise_name

    if args.fid < 0:
        raise ValueError(f"fid: expected a number of samples, at least 0, got {args.fid}")
    console = Console(quiet=world.rank > 0)
    model = load_model(args.model).to(world.device).eval()
    metadata = read_tensors(args.model)[1]
    if "train_config" not in metadata:
        raise ValueError(f"{args.model}: holds no training configuration, so its noise is unknown")
    config = config_from(metadata["train_config"], args.model)
    feature = load_inception(args.fid_weights) if args.fid else None
    channels = args.image_channels or model.in_channels
    data = open_data(args.data, args.img_size or model.img_size, channels)
    held_out = data
    if hasattr(data, "split") and args.held_out:
        held_out = data.split(args.held_out)[1]
    known = tuple(metadata.get("class_names", ()))
    if model.num_classes and data.class_names and known and known != tuple(data.class_names):
        console.print("the classes of the data have other names than those of the model")
    with _Bar(console, "evaluating") as bar:
        result = evaluate(
            *(model, held_out, config, args.classify),
            world=world,
            batch_size=args.batch_size,
            precision=args.precision,
            on_batch=bar.on_batch,
        )
    print_evaluation(console, result, noise_name(config))
    if not args.fid:
        return
    with _Bar(console, "FID") as bar:
        fid = compute_fid(
            *(model, data, args.fid),
            world=world,
            feature=feature,
            denoise_std=config.noise_std if args.denoise and config.noise == "gaussian" else 0.0,
            seed=args.seed,
            batch_size=args.batch_size,
            on_batch=bar.on_batch,
            **dataclasses.asdict(args.sampling),
        )
    console.print(f"FID {fid:.2f} ({args.fid} samples against {len(data)} images)")


class _Bar:
    """What this process has done, in a terminal."""

    def __init__(self, console, name: str):
        from rich.progress import Progress

        self._bar = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(name)

    def __enter__(self) -> "_Bar":
        self._bar.start()
        return self

    def __exit__(self, *error) -> None:
        self._bar.stop()

    def on_batch(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)
