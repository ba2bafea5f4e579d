"""Squares cut out of the photographs that scikit-image and scikit-learn ship, as a small stand-in
for downsampled ImageNet: `train.npz` and `validation.npz` in its format, from which

    flowops data prepare photos/train.npz --out photos/train --img-size 32
    flowops data prepare photos/validation.npz --out photos/validation --img-size 32
    flowops train --data photos/train --validation photos/validation --no-conditional --flip

go on. The right fifth of each photograph is for validation and shares no pixel with the rest.

    pip install 'flowops[demo]' scikit-image
    python examples/photo_patches.py --out photos
"""

import argparse
from pathlib import Path

import numpy as np

PHOTOGRAPHS = (
    *("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry"),
    *("retina", "rocket"),
)


def photographs() -> list[np.ndarray]:
    """Colour photographs, uint8 [H, W, 3]."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    return [
        *(getattr(data, name)()[..., :3] for name in PHOTOGRAPHS),
        *load_sample_images().images,
    ]


def patches(image: np.ndarray, size: int, stride: int) -> np.ndarray:
    """All squares of ``size`` pixels every ``stride`` pixels, [n, 3 * size * size], the planes of
    red, green and blue one after the other."""
    windows = np.lib.stride_tricks.sliding_window_view(image, (size, size), axis=(0, 1))
    return windows[::stride, ::stride].reshape(-1, 3 * size * size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("photos"))
    parser.add_argument("--size", type=int, default=32, help="side of a square in pixels")
    parser.add_argument("--stride", type=int, default=8, help="pixels from one to the next")
    args = parser.parse_args()
    images = photographs()
    smallest = min(min(image.shape[0], image.shape[1] // 5) for image in images)
    if not 0 < args.size <= smallest:
        parser.error(f"--size: expected from 1 to {smallest}, got {args.size}")
    if args.stride < 1:
        parser.error(f"--stride: expected at least 1, got {args.stride}")
    args.out.mkdir(parents=True, exist_ok=True)
    edges = [4 * image.shape[1] // 5 for image in images]
    parts = {
        "train": [image[:, :edge] for image, edge in zip(images, edges, strict=True)],
        "validation": [image[:, edge:] for image, edge in zip(images, edges, strict=True)],
    }
    for name, pieces in parts.items():
        # Validation squares do not overlap: each pixel counts once.
        stride = args.stride if name == "train" else args.size
        cut = [patches(piece, args.size, stride) for piece in pieces]
        labels = np.repeat(np.arange(1, len(cut) + 1), [len(part) for part in cut])
        path = args.out / f"{name}.npz"
        np.savez(path, data=np.concatenate(cut), labels=labels)
        print(f"{path}: {len(labels):,} squares of {args.size}x{args.size}")


if __name__ == "__main__":
    main()
