"""Data by the name that a user gives it."""

from pathlib import Path

from .data import Images, load_images
from .store import ImageStore, LatentStore


def open_data(
    source: str, img_size: int | None = None, channels: int = 3
) -> Images | ImageStore | LatentStore:
    """A store of ``flowops data prepare``, latents in a ``.npy`` file, or what ``load_images``
    takes, whose arguments the others are.

    Raises:
        ValueError, FileNotFoundError, ImportError: naming what is missing or broken.
    """
    path = Path(source)
    if (path / "index.json").is_file():
        return ImageStore(path)
    if path.suffix == ".npy":
        return LatentStore(path)
    return load_images(source, img_size, channels)
