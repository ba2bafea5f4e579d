"""Model files: written whole or not at all, read with every mismatch named.

Files are safetensors (weights plus a JSON header). Reading also takes the ``.pth`` of other
programs, never running code that a pickle may carry.
"""

import contextlib
import json
import os
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .tarflow import TarFlow

Tensors = dict[str, Tensor]


def write_whole(path: str | Path, data: bytes) -> None:
    """Writes a file under a temporary name, syncs it and renames it: a crash at any moment leaves
    the previous file or the new one.

    Raises:
        OSError: naming the file (no room, no directory, no permission). Nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(
            error.errno, f"could not write {path}, the previous file is intact: {error.strerror}"
        ) from error
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes the renames in a directory last."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def save_tensors(path: str | Path, tensors: Tensors, metadata: dict) -> None:
    """Saves tensors as safetensors, with ``metadata`` as JSON in its header. Errors as
    ``write_whole``."""
    contiguous = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    write_whole(path, save(contiguous, {name: json.dumps(v) for name, v in metadata.items()}))


def read_tensors(path: str | Path) -> tuple[Tensors, dict]:
    """Reads tensors and metadata from ``.safetensors``, or tensors from ``.pth``/``.pt``.

    Raises:
        FileNotFoundError, ValueError: naming the file (missing, truncated, not a table of tensors).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: truncated or not a safetensors file ({error})") from error
        return tensors, {name: _decode(text) for name, text in metadata.items()}
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path}: truncated, or more than a table of tensors ({reason})"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path}: expected a table of tensors (a state dict)")
    return tensors, {}


def load_into(model: torch.nn.Module, tensors: Tensors, source: str | Path) -> None:
    """``model.load_state_dict`` that names what differs and refuses weights that are not finite.

    Raises:
        ValueError: naming the first keys and shapes that differ, or the first key with a NaN or an
            infinity. The model is left as it was.
    """
    tensors = {k: t for k, t in tensors.items() if not k.endswith(".attn_mask")}
    expected = model.state_dict()
    differences = [
        *(f"{k} is missing" for k in expected if k not in tensors),
        *(f"{k} is not in the model" for k in tensors if k not in expected),
        *(
            f"{k} is {list(tensors[k].shape)}, expected {list(expected[k].shape)}"
            for k in expected
            if k in tensors and tensors[k].shape != expected[k].shape
        ),
    ]
    if differences:
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise ValueError(f"{source} does not fit the model: {'; '.join(differences[:5])}{more}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{source}: {name} holds values that are not finite")
    model.load_state_dict(tensors)


def save_model(model: TarFlow, path: str | Path, **metadata) -> None:
    """Saves a TarFlow with all that ``load_model`` needs; more metadata may be named."""
    save_tensors(path, model.state_dict(), {"config": model.config, **metadata})


def load_model(path: str | Path, **config) -> TarFlow:
    """Builds a TarFlow from a file.

    Args:
        path: ``.safetensors`` written here, or a checkpoint of the reference program
            (``.safetensors`` or ``.pth``).
        config: the constructor's arguments, where the file does not hold them.

    Raises:
        FileNotFoundError, ValueError: naming the file and what is off.
    """
    tensors, metadata = read_tensors(path)
    config = {**metadata.get("config", {}), **config}
    if not config:
        raise ValueError(
            f"{path} holds weights without a configuration: pass TarFlow's arguments "
            "(in_channels=..., img_size=..., patch_size=..., ...)"
        )
    model = TarFlow(**config)
    load_into(model, tensors, path)
    return model


def _decode(text: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
