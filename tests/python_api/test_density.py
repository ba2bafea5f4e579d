import json

import numpy as np
import pytest
import torch

from flowops.api import cli
from flowops.api.density import MODELS, Density, FlowSpec, gaussian_log_probs, is_density
from flowops.api.fit import FitConfig
from flowops.api.sets import load_set, load_toy
from flowops.api.table import Table, read_table, write_table

QUICK = FitConfig(steps=30, eval_every=15)


def fitted(model, table, **options):
    density = Density.untrained(FlowSpec(model, layers=2, **options), table)
    density.fit(table, table[:50], QUICK)
    return density


@pytest.mark.parametrize("model", MODELS)
def test_a_saved_density_is_the_same_density(model, tmp_path):
    table = load_toy("moons", 200)
    density = fitted(model, table)
    path = tmp_path / "model.safetensors"
    density.save(path)
    loaded = Density.load(path)
    assert is_density(path)
    assert (loaded.spec, loaded.columns) == (density.spec, table.columns)
    scores = density.log_prob(table.values, seed=3)
    assert torch.equal(loaded.log_prob(table.values, seed=3), scores)
    assert np.array_equal(loaded.sample(10, seed=4), density.sample(10, seed=4))
    assert not np.array_equal(loaded.sample(10, seed=5), density.sample(10, seed=4))


def test_likelihoods_are_in_the_units_of_the_data():
    """A density integrates to 1 over the data's own units."""
    rng = np.random.Generator(np.random.PCG64(0))
    table = Table(rng.normal(100, 0.01, (300, 2)), ("a", "b"))
    density = fitted("ferumal", table, points=20)
    side = np.linspace(99.9, 100.1, 401)
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    mass = density.log_prob(grid).exp().sum().item() * (side[1] - side[0]) ** 2
    assert mass == pytest.approx(1, abs=1e-3)
    samples = density.sample(2000)
    assert np.allclose(samples.mean(0), 100, atol=0.002)
    assert np.allclose(samples.std(0), 0.01, rtol=0.25)


def test_gaussian_baselines():
    rng = np.random.Generator(np.random.PCG64(0))
    rows = rng.normal(size=(400, 2)) @ np.array([[1.0, 0.9], [0.0, 0.3]]) + 7
    train, test = Table(rows[:300], ("a", "b")), Table(rows[300:], ("a", "b"))
    values = dict(gaussian_log_probs(train, [test]))
    mean, covariance = train.values.mean(0), np.cov(train.values.T, bias=True)
    for name, matrix in (
        ("independent Gaussians", np.diag(np.diag(covariance))),
        ("Gaussian, full covariance", covariance),
    ):
        expected = torch.distributions.MultivariateNormal(
            torch.tensor(mean), torch.tensor(matrix)
        ).log_prob(torch.tensor(test.values))
        torch.testing.assert_close(values[name][0], expected, rtol=1e-9, atol=1e-9)
    few = Table(rows[:2], ("a", "b"))
    assert list(dict(gaussian_log_probs(few, [few]))) == ["independent Gaussians"]


def test_specifications_that_cannot_be():
    with pytest.raises(ValueError, match="^model: expected one of ferumal, .*got 'glow'"):
        FlowSpec("glow")
    with pytest.raises(ValueError, match="^pad: expected at least 1 for padded-nsf, got 0"):
        FlowSpec("padded-nsf", pad=0)
    with pytest.raises(ValueError, match="needs at least 2, the data have 1; take padded-ferumal"):
        FlowSpec("ferumal").build(1)
    with pytest.raises(ValueError, match="^points: expected at most .* 20, got 21"):
        Density.untrained(FlowSpec("ferumal", points=21), load_toy("moons", 20))
    assert Density.untrained(FlowSpec("ferumal"), load_toy("moons", 20)).spec.points == 20


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture
def wine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = load_set("wine")
    write_table("wine.csv", Table(table.values[:, :4], table.columns[:4]))
    return table.columns[:4]


FIT = ["fit", "wine.csv", "--steps", "40", "--eval-every", "20", "--layers", "2", "--points", "30"]


def test_fit_score_and_sample(wine, capsys):
    assert cli.main([*FIT, "--model", "padded-ferumal", "--out", "out"]) == 0
    printed = capsys.readouterr().out
    assert "144 train, 17 valid, 17 test rows of 4 columns" in printed
    assert "independent Gaussians" in printed
    assert "Gaussian, full covariance" in printed
    with open("out/report.json") as file:
        report = json.load(file)
    scores = report["log_likelihood"]["padded-ferumal"]
    assert set(scores) == {"train", "valid", "test"}
    for name in ("marginals.png", "pairs.png"):
        with open(f"out/{name}", "rb") as file:
            assert file.read(8) == b"\x89PNG\r\n\x1a\n"

    assert cli.main(["score", "out/model.safetensors", "wine.csv", "--out", "s.csv"]) == 0
    scored = read_table("s.csv")
    assert (scored.columns, len(scored)) == (("log_prob",), 178)
    parts = sum(scores[k]["mean"] * n for k, n in (("train", 144), ("valid", 17), ("test", 17)))
    # Pads are drawn by row, and rows have another order here: within their noise.
    assert scored.values.mean() == pytest.approx(parts / 178, abs=0.2)

    assert cli.main(["sample", "out/model.safetensors", "--n", "25", "--out", "d.csv"]) == 0
    drawn = read_table("d.csv")
    assert (drawn.columns, len(drawn)) == (wine, 25)


def test_a_model_is_not_overwritten_unasked(wine, capsys):
    assert cli.main([*FIT, "--out", "out"]) == 0
    assert cli.main([*FIT, "--out", "out"]) == 1
    assert "out/model.safetensors exists; take another directory" in capsys.readouterr().err
    assert cli.main([*FIT, "--out", "out", "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3,2\n5,2\n", "constant columns have no density, leave them out: 'b' (always"),
        ("a,b\n1,2\n3,nan\n", "column 'b' (number 2) holds an empty or NaN cell in row 2"),
        ("a,b\n1,2\ninf,3\n", "column 'a' (number 1) holds inf in row 2"),
        ("a,b\n1,2\n", "one row"),
        ("a,b\n1,red\n2,blue\n", "column 'b' (number 2) holds text, first 'red' in row 1"),
        ("a,b\n1,2\n3,4\n5", "expected 2 cells"),
        ("a,b\n1,2\n3,4\n5,7\n", "need 10 rows or more, got 3"),
    ],
)
def test_bad_tables_leave_nothing_behind(tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.csv").write_text(text)
    assert cli.main(["fit", "bad.csv", "--out", "out"]) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bad.csv"]


def test_scoring_with_the_wrong_file(wine, tmp_path, capsys):
    assert cli.main([*FIT, "--out", "out"]) == 0
    (tmp_path / "cut.safetensors").write_bytes(
        (tmp_path / "out/model.safetensors").read_bytes()[:-9]
    )
    np.save("narrow.npy", np.ones((5, 3)) + np.arange(5.0)[:, None])
    (tmp_path / "other.csv").write_text("a,b\n1,2\n3,4\n")
    for model, data, message in (
        ("cut.safetensors", "wine.csv", "cut.safetensors: truncated"),
        ("out/model.safetensors", "narrow.npy", "expected 4 columns"),
        ("out/model.safetensors", "other.csv", "has no column"),
        ("nothing.safetensors", "wine.csv", "no such file"),
    ):
        assert cli.main(["score", model, data]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "scores.csv").exists()
