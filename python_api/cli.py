"""The command line ``flowops``: the roof of the house, the one place that may call every floor.

``doctor`` runs on a bare installation; the others need an extra and say so.
"""

import dataclasses
import importlib.util
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated

USAGE = """usage: flowops COMMAND [options]

commands:
  demo     train a TarFlow on 5,000 MNIST digits in about three minutes, draw and measure
  data     prepare images for large runs, check and describe what was prepared
  train    train a TarFlow, on one process or many
  export   one file of weights out of a run's checkpoint
  fit      fit a density to a table: kernel flows, padded flows, spline and autoregressive ones
  score    log-likelihood of the rows of a table under a fitted density
  sample   draw images from a trained TarFlow, or rows from a fitted density
  eval     bits per dim, classification and FID of a trained model
  bench    time the ops and the model against what else there is, on the CPU or the GPU
  doctor   versions, devices, and which backends are usable and why

`flowops COMMAND --help` lists the options.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit status. Errors are one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        print(f"flowops: no command {name!r}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    try:
        return COMMANDS[name](rest) or 0
    except KeyboardInterrupt:
        print("\nflowops: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "flowops":
            raise
        extra = "density" if name in ("fit", "score") else "demo"
        print(
            f"flowops: {name} needs the package {error.name}: pip install 'flowops[{extra}]'",
            file=sys.stderr,
        )
        return 1
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        print(f"flowops: {error}", file=sys.stderr)
        return 1


# --- doctor --------------------------------------------------------------------------------------


def doctor(argv: list[str]) -> None:
    if argv:
        raise ValueError(f"doctor: takes no options, got {argv[0]!r}")
    import torch

    from flowops import __version__, cuda_runtime, dispatch

    print(f"flowops   {__version__}")
    print(f"python    {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in ("torch", "numpy", "safetensors", "triton", "cupy-cuda13x", "cupy-cuda12x"):
        try:
            print(f"{package:9s} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package:9s} not installed")
    print("\ndevices")
    print(f"  cpu      {torch.get_num_threads()} threads")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        print(
            f"  cuda:{i}   {properties.name}, compute capability "
            f"{properties.major}.{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        )
    print("\nbackends")
    for backend in dispatch.BACKENDS:
        usable, state = dispatch.backend_state(backend)
        if backend == "cuda" and not usable and importlib.util.find_spec("cupy"):
            try:
                state += f"; kernels: {cuda_runtime.origin()}"
            except RuntimeError as error:
                state += f"; {error}" if str(error) not in state else ""
        print(f"  {backend:9s} {'usable' if usable else 'not usable'}: {state}")
    devices = {"cpu": "cpu"} | ({"gpu": "triton"} if torch.cuda.is_available() else {})
    for device, backend in devices.items():
        print(f"\nops on the {device}")
        for op in dispatch.ops():
            usable, reason = dispatch.can_run(op, backend)
            print(f"  {op:32s} {backend if usable else f'reference ({reason})'}")


# --- the commands that tyro parses ---------------------------------------------------------------


def demo(argv: list[str]) -> None:
    import tyro

    from flowops.bench.demo import DemoConfig, run

    run(tyro.cli(DemoConfig, prog="flowops demo", args=argv))


def bench(argv: list[str]) -> int:
    from flowops.bench.run import main as run

    return run(argv)


def train(argv: list[str]) -> None:
    from .cli_train import train as run

    run(argv)


def data(argv: list[str]) -> int | None:
    from .cli_data import data as run

    return run(argv)


def export(argv: list[str]) -> None:
    from .cli_train import export as run

    run(argv)


def evaluate_model(argv: list[str]) -> None:
    from .cli_eval import evaluate_model as run

    run(argv)


def fit(argv: list[str]) -> None:
    from .cli_density import fit as run

    run(argv)


def score(argv: list[str]) -> None:
    from .cli_density import score as run

    run(argv)


def sample(argv: list[str]) -> int | None:
    from .cli_density import sample as sample_rows
    from .density import is_density

    if any(is_density(argument) for argument in argv if not argument.startswith("-")):
        return sample_rows(argv)
    return _sample_images(argv)


def _sample_images(argv: list[str]) -> int:
    import torch
    import tyro

    from .checkpoint import load_model, read_tensors
    from .data import save_array, save_grid
    from .sampling import SamplingInterrupted
    from .sampling_options import SamplingOptions

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        """Draw images from a model that `flowops train` or `flowops demo` saved. With a model of
        `flowops fit` the command draws rows: --out samples.csv, --n, --seed."""

        model: tyro.conf.Positional[Path]
        """model.safetensors"""
        out: Path = Path("samples.png")
        """A picture, or .npy: the samples [n, c, H, W] themselves, as of latents."""
        n: int = 40
        label: int | None = None
        """Class of all images; otherwise the classes in turn."""
        sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = dataclasses.field(
            default_factory=SamplingOptions
        )
        batch_size: int = 256
        """Images at a time, at most."""
        denoise: bool = True
        """Remove the training noise (Tweedie)."""
        columns: int = 10
        seed: int = 0

    args = tyro.cli(Arguments, prog="flowops sample", args=argv)
    if args.columns < 1:
        raise ValueError(f"columns: expected a positive number, got {args.columns}")
    model = load_model(args.model).to(_device()).eval()
    array = args.out.suffix == ".npy"
    if not array and model.in_channels not in (1, 3):
        raise ValueError(
            f"out: expected a .npy file for samples of {model.in_channels} channels, got {args.out}"
        )

    def save(images):
        if array:
            save_array(images, args.out)
        else:
            save_grid(images, args.out, args.columns)

    trained = read_tensors(args.model)[1].get("train_config", {})
    gaussian = trained.get("noise") == "gaussian"
    labels = args.label if args.label is not None else _labels_in_turn(model, args.n)
    started = time.perf_counter()
    try:
        images, report = model.sample(
            args.n,
            labels,
            batch_size=args.batch_size,
            denoise_std=trained["noise_std"] if args.denoise and gaussian else 0.0,
            rng=torch.tensor([args.seed, 0], device=model.var.device),
            progress=sys.stderr.isatty(),
            return_report=True,
            **dataclasses.asdict(args.sampling),
        )
    except SamplingInterrupted as interrupt:
        written = "nothing written"
        if interrupt.images is not None:
            save(interrupt.images)
            written = f"written to {args.out}"
        print(f"\nflowops: {interrupt}, {written}", file=sys.stderr)
        return 130
    images = images.cpu()  # waits for them
    seconds = time.perf_counter() - started
    save(images)
    print(args.out)
    print(f"{args.n} images in {seconds:.3g} s, {args.n / seconds:.3g} images/s")
    if args.sampling.method != "exact":
        _print_sampling_report(report, f"{args.sampling.method}, tol {args.sampling.tol:g}")
    return 0


def _print_sampling_report(report, title: str) -> None:
    """A line for each block, in the order they are inverted."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for heading in ("block", "sweeps", "single steps", "largest residual"):
        table.add_column(heading, justify="right")
    for block in reversed(range(report.sweeps.shape[1])):
        sweeps, steps = (
            f"{t[:, block].double().mean():.3g}" for t in (report.sweeps, report.steps)
        )
        table.add_row(str(block), sweeps, steps, f"{report.residual[:, block].max():.1e}")
    Console().print(table)


def _labels_in_turn(model, n: int):
    """The classes in turn, or None for a model without."""
    import torch

    if not model.num_classes or n < 1:
        return None
    return torch.arange(n, device=model.var.device) % model.num_classes


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "demo": demo,
    "data": data,
    "train": train,
    "export": export,
    "fit": fit,
    "score": score,
    "sample": sample,
    "eval": evaluate_model,
    "bench": bench,
    "doctor": doctor,
}

if __name__ == "__main__":
    sys.exit(main())
