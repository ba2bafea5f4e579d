"""Data sets that need no download: those that scikit-learn ships, and toy densities.

Real data: ``load_set``. Toy densities in the plane, and distributions without a density there (on a
curve, on a surface, on a lattice), drawn from a seed: ``load_toy``.
"""

from collections.abc import Callable

import numpy as np

from .table import Table

SETS = ("iris", "wine", "breast_cancer", "diabetes", "digits", "patches")


def load_set(name: str, *, n: int | None = None, seed: int = 0) -> Table:
    """Real data from scikit-learn's files, without class labels or targets.

    - ``iris`` 150 x 4, ``wine`` 178 x 13, ``breast_cancer`` 569 x 30, ``diabetes`` 442 x 10: as
      measured, so values repeat (iris is rounded to a millimetre; diabetes holds a sex of 1 or 2).
    - ``digits`` 1,797 x 61: counts k from 0 to 16 as ``(k + u) / 17`` with u uniform in [0, 1), so
      that they have a density: ``log p(k) >= log p(x) - 61 log 17`` on average over u. Of the 8x8
      pixels the three that are 0 in all images are left out.
    - ``patches`` n x 63, the recipe of BSDS300 on two photographs: distinct 8x8 patches of grey
      levels ``(k + u) / 256``, less the mean of the patch, without the last pixel (which is minus
      the sum of the others). Patches overlap: held-out ones share pixels with training ones.

    Args:
        name: one of ``SETS``.
        n: number of patches, 50,000 by default; the other sets have a fixed size.
        seed: of the noise u and of the places of patches.

    Raises:
        ValueError: naming the argument.
        ImportError: without scikit-learn, or Pillow for ``patches``.

    Source: ``patches``: Uria, Murray, Larochelle, "RNADE" (arXiv 1306.0186); Zoran and Weiss (ICCV
    2011).
    """
    if name not in SETS:
        raise ValueError(f"name: expected one of {', '.join(SETS)}, got {name!r}")
    rng = _generator(seed)
    if name == "patches":
        return _patches(50_000 if n is None else n, rng)
    if n is not None:
        raise ValueError(f"n: the set {name!r} has a fixed size, got {n}")
    datasets = _sklearn_datasets()
    if name == "diabetes":
        found = datasets.load_diabetes(scaled=False)
    else:
        found = getattr(datasets, f"load_{name}")()
    values, columns = found.data.astype(np.float64), np.array(found.feature_names)
    if name == "digits":
        varies = values.min(axis=0) < values.max(axis=0)
        values, columns = values[:, varies], columns[varies]
        values = (values + rng.random(values.shape)) / 17
    return Table(values, tuple(columns.tolist()))


def _patches(n: int, rng: np.random.Generator, size: int = 8) -> Table:
    try:
        photographs = _sklearn_datasets().load_sample_images().images
    except ImportError as error:
        raise ImportError("set 'patches' needs Pillow: pip install 'flowops[demo]'") from error
    # Grey as most programs take it (ITU-R BT.601), in whole levels.
    grey = np.stack([np.rint(image @ (0.299, 0.587, 0.114)) for image in photographs])
    windows = np.lib.stride_tricks.sliding_window_view(grey, (size, size), axis=(1, 2))
    places = windows.shape[:3]
    _check_count(n, int(np.prod(places)))
    chosen = np.unravel_index(rng.choice(np.prod(places), n, replace=False), places)
    values = windows[chosen].reshape(n, size * size)
    values = (values + rng.random(values.shape)) / 256
    values -= values.mean(axis=1, keepdims=True)
    columns = tuple(f"pixel_{row}_{column}" for row in range(size) for column in range(size))
    return Table(values[:, :-1].copy(), columns[:-1])


def _sklearn_datasets():
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("these sets need scikit-learn: pip install 'flowops[demo]'") from error
    return datasets


def load_toy(name: str, n: int, seed: int = 0) -> Table:
    """Independent rows of a toy distribution, float64.

    Two-dimensional densities, of the sizes used in the literature: ``moons``, ``circles``,
    ``rings``, ``8gaussians``, ``pinwheel``, ``swissroll``, ``2spirals``, ``checkerboard``. Without
    a density: ``circle`` (radius 1 in the plane), ``sines`` (two curves that cross), ``sphere``
    (radius 1 in space), ``lattice`` (uniform on the 25 points of {-2, ..., 2}^2).

    Args:
        name: one of ``TOYS``.
        n: number of rows, at least 1.
        seed: of the rows; another number of rows gives other rows.

    Raises:
        ValueError: naming the argument.

    Source: the densities as in Grathwohl et al., "FFJORD" (arXiv 1810.01367); ``sines`` as in Meng
    et al., "PaddingFlow" (arXiv 2403.08216).
    """
    if name not in TOYS:
        raise ValueError(f"name: expected one of {', '.join(TOYS)}, got {name!r}")
    _check_count(n)
    values = _TOYS[name](n, _generator(seed))
    return Table(values, ("x", "y", "z")[: values.shape[1]])


def _polar(radius: np.ndarray | float, angle: np.ndarray) -> np.ndarray:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _angles(n: int, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(0, 2 * np.pi, n)


def _moons(n: int, rng: np.random.Generator) -> np.ndarray:
    half_circle = _polar(1.0, rng.uniform(0, np.pi, n))
    lower = rng.random(n) < 0.5
    half_circle[lower] = (1.0, 0.5) - half_circle[lower]
    return 2 * (half_circle + rng.normal(0, 0.1, (n, 2))) - (1.0, 0.2)


def _concentric(n: int, rng: np.random.Generator, count: int, std: float) -> np.ndarray:
    radius = rng.integers(1, count + 1, n) * (3 / count)
    return _polar(radius, _angles(n, rng)) + rng.normal(0, std, (n, 2))


def _eight_gaussians(n: int, rng: np.random.Generator) -> np.ndarray:
    centres = _polar(4.0, rng.integers(8, size=n) * (np.pi / 4))
    return (centres + rng.normal(0, 0.5, (n, 2))) / 1.414


def _pinwheel(n: int, rng: np.random.Generator) -> np.ndarray:
    along, across = rng.normal(1, 0.3, n), rng.normal(0, 0.1, n)
    angle = rng.integers(5, size=n) * (2 * np.pi / 5) + 0.25 * np.exp(along)
    cos, sin = np.cos(angle), np.sin(angle)
    return 2 * np.stack([along * cos + across * sin, across * cos - along * sin], axis=1)


def _swissroll(n: int, rng: np.random.Generator) -> np.ndarray:
    t = rng.uniform(1.5 * np.pi, 4.5 * np.pi, n)
    return (_polar(t, t) + rng.normal(0, 1, (n, 2))) / 5


def _two_spirals(n: int, rng: np.random.Generator) -> np.ndarray:
    t = 3 * np.pi * np.sqrt(rng.random(n))
    arm = _polar(t, np.pi - t) + rng.uniform(0, 0.5, (n, 2))
    return rng.choice((-1.0, 1.0), (n, 1)) * arm / 3 + rng.normal(0, 0.1, (n, 2))


def _checkerboard(n: int, rng: np.random.Generator) -> np.ndarray:
    x = rng.uniform(-2, 2, n)
    y = rng.random(n) - 2 * rng.integers(2, size=n) + np.floor(x) % 2
    return 2 * np.stack([x, y], axis=1)


def _sines(n: int, rng: np.random.Generator) -> np.ndarray:
    x = rng.uniform(-np.pi, np.pi, n)
    return np.stack([x, 1.5 * rng.choice((-1.0, 1.0), n) * np.sin(x)], axis=1)


def _sphere(n: int, rng: np.random.Generator) -> np.ndarray:
    normal = rng.normal(size=(n, 3))
    return normal / np.linalg.norm(normal, axis=1, keepdims=True)


_TOYS: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "moons": _moons,
    "circles": lambda n, rng: _concentric(n, rng, 2, 0.24),
    "rings": lambda n, rng: _concentric(n, rng, 4, 0.08),
    "8gaussians": _eight_gaussians,
    "pinwheel": _pinwheel,
    "swissroll": _swissroll,
    "2spirals": _two_spirals,
    "checkerboard": _checkerboard,
    "circle": lambda n, rng: _polar(1.0, _angles(n, rng)),
    "sines": _sines,
    "sphere": _sphere,
    "lattice": lambda n, rng: rng.integers(-2, 3, (n, 2)).astype(np.float64),
}
TOYS = tuple(_TOYS)


def _generator(seed: int) -> np.random.Generator:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed: expected an integer of at least 0, got {seed!r}")
    return np.random.Generator(np.random.PCG64(seed))


def _check_count(n: int, most: int | None = None) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1 or (most is not None and n > most):
        limit = "" if most is None else f" to {most:,}"
        raise ValueError(f"n: expected a number of rows from 1{limit}, got {n!r}")
