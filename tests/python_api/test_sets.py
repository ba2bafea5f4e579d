import sys

import numpy as np
import pytest
from scipy.stats import kstest
from sklearn import datasets

from flowops.api.sets import SETS, TOYS, load_set, load_toy
from flowops.api.table import check_variation, read_table, split, write_table

SHAPES = {
    "iris": (150, 4),
    "wine": (178, 13),
    "breast_cancer": (569, 30),
    "diabetes": (442, 10),
    "digits": (1797, 61),
    "patches": (500, 63),
}


@pytest.mark.parametrize("name", SETS)
def test_sets(name, tmp_path):
    table = load_set(name, n=500 if name == "patches" else None)
    assert table.values.shape == SHAPES[name]
    assert len(table.columns) == SHAPES[name][1]
    notes = check_variation(table)
    assert [note.split("'")[1] for note in notes] == (["sex"] if name == "diabetes" else [])
    assert min(map(len, split(table))) > 10
    write_table(tmp_path / "t.csv", table)
    back = read_table(tmp_path / "t.csv")
    assert back.columns == table.columns
    assert np.array_equal(back.values, table.values)


def test_measurements_are_the_known_ones():
    iris = load_set("iris")
    assert iris.columns[0] == "sepal length (cm)"
    assert iris.values[0].tolist() == [5.1, 3.5, 1.4, 0.2]
    assert load_set("diabetes").values[0, :4].tolist() == [59, 2, 32.1, 101]
    assert load_set("wine").values.max() == 1680


def test_digits_are_dequantised():
    raw = datasets.load_digits().data
    table = load_set("digits", seed=3)
    named = [8 * int(c[6]) + int(c[8]) for c in table.columns]  # pixel_<row>_<column>
    assert sorted(set(range(64)) - set(named)) == np.flatnonzero(raw.max(axis=0) == 0).tolist()
    assert np.array_equal(np.floor(table.values * 17), raw[:, named])
    noise = table.values * 17 - raw[:, named]
    assert kstest(noise.ravel(), "uniform").statistic < 1.95 / np.sqrt(noise.size)
    assert np.array_equal(load_set("digits", seed=3).values, table.values)
    assert not np.array_equal(load_set("digits", seed=4).values, table.values)


def test_patches_are_from_the_photographs():
    """Differences of pixels are those of grey levels at one place, up to two noises below 1."""
    table = load_set("patches", n=400)
    whole = np.column_stack([table.values, -table.values.sum(axis=1)])  # with the pixel left out
    assert len(np.unique(whole, axis=0)) == 400
    red, green, blue = np.moveaxis(np.stack(datasets.load_sample_images().images), 3, 0) * 1.0
    grey = np.rint(0.299 * red + 0.587 * green + 0.114 * blue)
    for patch in 256 * whole[::20]:
        photo, row, column = np.indices((2, 420, 633)).reshape(3, -1)
        for k in range(1, 64):
            i, j = divmod(k, 8)
            difference = grey[photo, row + i, column + j] - grey[photo, row, column]
            near = np.abs(difference - (patch[k] - patch[0])) < 1
            photo, row, column = photo[near], row[near], column[near]
        assert len(photo) == 1


def test_patches_are_drawn_by_seed():
    table = load_set("patches", n=100, seed=1)
    assert np.array_equal(load_set("patches", n=100, seed=1).values, table.values)
    assert not np.array_equal(load_set("patches", n=100, seed=2).values, table.values)
    assert len(load_set("patches")) == 50_000


@pytest.mark.parametrize("n", [1, 7, 1000])
@pytest.mark.parametrize("name", TOYS)
def test_toys_have_the_rows_asked_for(name, n):
    table = load_toy(name, n, seed=5)
    assert table.values.shape == (n, 3 if name == "sphere" else 2)
    assert table.values.dtype == np.float64
    assert table.columns == ("x", "y", "z")[: table.values.shape[1]]
    assert np.isfinite(table.values).all()
    assert np.array_equal(load_toy(name, n, seed=5).values, table.values)
    assert not np.array_equal(load_toy(name, n, seed=6).values, table.values)


N = 20_000


def toy(name):
    return load_toy(name, N).values


def assert_same_distribution(found, expected):
    """Kolmogorov-Smirnov at the level of 0.001, for fixed seeds."""
    samples = isinstance(expected, np.ndarray)
    limit = 1.95 * np.sqrt((2 if samples else 1) / len(found))
    assert kstest(found, expected).statistic < limit


@pytest.mark.parametrize("name", ["moons", "circles", "swissroll"])
def test_toys_that_scikit_learn_has(name):
    if name == "moons":
        expected = datasets.make_moons(N, noise=0.1, random_state=0)[0] * 2 - (1, 0.2)
    elif name == "circles":
        expected = datasets.make_circles(N, factor=0.5, noise=0.08, random_state=0)[0] * 3
    else:
        expected = datasets.make_swiss_roll(N, noise=1.0, random_state=0)[0][:, [0, 2]] / 5
    found = toy(name)
    for direction in np.eye(2)[0], np.eye(2)[1], (0.6, 0.8), (0.8, -0.6):
        assert_same_distribution(found @ direction, expected @ direction)
    assert_same_distribution(np.hypot(*found.T), np.hypot(*expected.T))


def test_rings():
    x = toy("rings")
    radius = np.hypot(*x.T)
    ring = np.rint(radius / 0.75)
    assert set(ring) == {1, 2, 3, 4}
    assert np.bincount(ring.astype(int))[1:] == pytest.approx(
        [N / 4] * 4, abs=5 * np.sqrt(N * 3 / 16)
    )
    # Across the outer ring the noise has nearly its own standard deviation.
    assert np.std(radius[ring == 4]) == pytest.approx(0.08, rel=0.05)


def test_eight_gaussians():
    x = 1.414 * toy("8gaussians")
    mode = np.rint(np.arctan2(x[:, 1], x[:, 0]) / (np.pi / 4)) % 8
    rest = x - 4 * np.stack([np.cos(mode * np.pi / 4), np.sin(mode * np.pi / 4)], axis=1)
    assert np.bincount(mode.astype(int)) == pytest.approx([N / 8] * 8, abs=5 * np.sqrt(N * 7 / 64))
    # Modes lie 3 sigma from the border to the next: a few points count for the neighbour.
    assert rest.std(axis=0) == pytest.approx([0.5, 0.5], rel=0.02)


def test_pinwheel():
    """Turned back by an angle that grows with the radius, the arms are five Gaussians."""
    x = toy("pinwheel") / 2
    radius = np.hypot(*x.T)
    angle = np.arctan2(-x[:, 1], x[:, 0]) - 0.25 * np.exp(radius)
    arm = np.rint(angle / (2 * np.pi / 5))
    rest = angle - arm * (2 * np.pi / 5)
    far = radius > 0.7  # where the radius is nearly the distance along the arm
    assert np.bincount(arm[far].astype(int) % 5).min() > far.sum() / 5 * 0.95
    assert np.std((rest * radius)[far]) == pytest.approx(0.1, rel=0.1)
    assert np.mean(radius) == pytest.approx(1, abs=0.02)


def test_two_spirals():
    x = 3 * toy("2spirals")
    t = np.linspace(0, 3 * np.pi, 2000)
    arm = np.stack([-t * np.cos(t) + 0.25, t * np.sin(t) + 0.25], axis=1)
    distance = [
        np.min(np.hypot(*(sign * arm[:, None] - x[None, :500]).T), axis=1) for sign in (1, -1)
    ]
    # Uniform noise of 0.5 and Gaussian noise of 0.3, both across the arm and along it.
    nearest = np.minimum(*distance)
    assert nearest.max() < 1.6
    assert np.sqrt(np.mean(nearest**2)) == pytest.approx(np.hypot(0.5 / np.sqrt(12), 0.3), rel=0.1)
    assert np.mean(distance[0] < distance[1]) == pytest.approx(0.5, abs=5 * 0.5 / np.sqrt(500))


def test_checkerboard():
    x = toy("checkerboard") / 2
    assert ((np.floor(x[:, 0]) - np.floor(x[:, 1])) % 2 == 0).all()
    for column in x.T:
        assert_same_distribution((column + 2) / 4, "uniform")
    fields = np.unique(np.floor(x), axis=0, return_counts=True)[1]
    assert fields == pytest.approx([N / 8] * 8, abs=5 * np.sqrt(N * 7 / 64))


def test_distributions_without_a_density():
    x = toy("circle")
    assert np.abs(np.hypot(*x.T) - 1).max() < 1e-15 * 2
    assert_same_distribution(np.arctan2(x[:, 1], x[:, 0]) / (2 * np.pi) + 0.5, "uniform")
    x = toy("sphere")
    assert np.abs(np.linalg.norm(x, axis=1) - 1).max() < 1e-15 * 2
    for column in x.T:  # Archimedes: uniform on a sphere is uniform along every axis
        assert_same_distribution((column + 1) / 2, "uniform")
    x = toy("sines")
    assert np.array_equal(np.abs(x[:, 1]), np.abs(1.5 * np.sin(x[:, 0])))
    assert_same_distribution(x[:, 0] / (2 * np.pi) + 0.5, "uniform")
    points, counts = np.unique(toy("lattice"), axis=0, return_counts=True)
    assert points.tolist() == [[i, j] for i in range(-2, 3) for j in range(-2, 3)]
    assert counts == pytest.approx([N / 25] * 25, abs=5 * np.sqrt(N / 25))
    assert len(check_variation(load_toy("lattice", 100))) == 2


@pytest.mark.parametrize("bad", [0, -1, 2.5, "10", True])
def test_counts_and_seeds_are_checked(bad):
    with pytest.raises(ValueError, match="n: expected a number of rows from 1, got "):
        load_toy("moons", bad)
    with pytest.raises(ValueError, match="n: expected a number of rows from 1 to 531,720, got "):
        load_set("patches", n=bad)
    if bad != 0:
        with pytest.raises(ValueError, match="seed: expected an integer of at least 0, got "):
            load_set("digits", seed=bad)


def test_names_are_checked(monkeypatch):
    with pytest.raises(ValueError, match="name: expected one of iris, .*, got 'mnist'"):
        load_set("mnist")
    with pytest.raises(ValueError, match="name: expected one of moons, .*, got 'stars'"):
        load_toy("stars", 10)
    with pytest.raises(ValueError, match="n: the set 'iris' has a fixed size, got 10"):
        load_set("iris", n=10)
    with pytest.raises(
        ValueError, match="n: expected a number of rows from 1 to 531,720, got 531721"
    ):
        load_set("patches", n=531_721)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "PIL", None)
        with pytest.raises(
            ImportError, match=r"'patches' needs Pillow: pip install 'flowops\[demo\]'"
        ):
            load_set("patches")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"need scikit-learn: pip install 'flowops\[demo\]'"):
        load_set("iris")
