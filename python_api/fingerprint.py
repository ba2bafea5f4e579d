"""Which images a checkpoint was trained on."""

import zlib
from pathlib import Path

from .data import Images


def fingerprint(data: Images) -> dict[str, int]:
    """Sizes and a checksum of pixels and labels: of all images, or of evenly spaced ones that make
    up 64 MiB."""
    n, c, H, _ = data.pixels.shape
    every = -(-data.pixels.numel() // 2**26)
    checksum = zlib.crc32(data.pixels[::every].contiguous().cpu().numpy())
    if data.labels is not None:
        checksum = zlib.crc32(data.labels.contiguous().cpu().numpy(), checksum)
    sizes = {"img_size": H, "channels": c, "images": n, "classes": len(data.class_names)}
    return {**sizes, "crc32": checksum}


def check_same_data(theirs: dict, ours: dict, path: Path) -> None:
    """Raises ValueError naming what of two fingerprints differs. An empty one is of an earlier
    version, which kept none."""
    differ = [k for k in ours if k in theirs and theirs[k] != ours[k]]
    if differ == ["crc32"]:
        raise ValueError(f"data: {path} was trained on as many images, but other ones")
    if differ:
        values = (f"{k} {theirs[k]}, this run has {ours[k]}" for k in differ if k != "crc32")
        raise ValueError(f"data: {path} was trained on other images: {'; '.join(values)}")
