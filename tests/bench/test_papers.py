import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from flowops.api.fit import FitConfig
from flowops.bench.papers import claims, ferumal, padding, run
from flowops.bench.papers.contenders import (
    CONTENDERS,
    FF_REALNVP,
    GLOW,
    REALNVP,
    ZUKO,
    MLPCoupling,
    build,
)
from flowops.bench.papers.data import density_parts, sample_parts
from flowops.bench.papers.metrics import chamfer, coverage, mmd_l2
from flowops.bench.papers.verdict import (
    FAILS,
    HOLDS,
    PARTLY,
    UNDECIDED,
    Difference,
    overall,
    paired,
)

# --- metrics -------------------------------------------------------------------------------------


def test_metrics_of_points_on_a_line():
    samples = torch.tensor([[0.0], [1.0]])
    reference = torch.tensor([[0.0], [3.0], [5.0]])
    # To the nearest row: 0 and 1; to the nearest sample: 0, 2 and 4.
    assert chamfer(samples, reference) == pytest.approx((0 + 1) / 2 + (0 + 4 + 16) / 3)
    assert mmd_l2(samples, reference) == pytest.approx((0 + 2 + 4) / 3)
    assert coverage(samples, reference) == pytest.approx(1 / 3)


def test_a_sample_far_off_costs_chamfer_and_not_mmd():
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    off = torch.cat([rows, torch.tensor([[0.0, 9.0]])])
    assert mmd_l2(off, rows) == 0
    assert chamfer(off, rows) == pytest.approx(81 / 3)


def test_equal_rows_count_once_in_coverage():
    reference = torch.tensor([[0.0], [0.0], [0.0], [1.0]])
    assert coverage(torch.tensor([[0.1]]), reference) == 0.5
    assert coverage(reference, reference) == 1


def test_small_distances_far_from_zero_keep_their_digits():
    rows = 1000 + torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    assert mmd_l2(rows + 1e-6, rows) == pytest.approx(1e-6, rel=1e-6)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.zeros(3), "samples: expected .N >= 1, D."),
        (torch.zeros(0, 2), "samples: expected .N >= 1, D."),
        (torch.zeros(3, 1), "samples: expected .N >= 1, D."),
        (torch.full((1, 2), math.nan), "samples: expected finite rows"),
    ],
)
def test_metrics_name_what_is_off(samples, message):
    for metric in (chamfer, mmd_l2, coverage):
        with pytest.raises(ValueError, match=message):
            metric(samples, torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("name", "row", "distance"),
    [
        ("circle", [0.0, 3.0], 2.0),
        ("sphere", [0.0, 0.0, 0.5], 0.5),
        ("sines", [np.pi / 2, 2.5], 1.0),
        ("sines", [-np.pi / 2, 1.5], 0.0),
        ("lattice", [1.75, -5.0], np.hypot(0.25, 3.0)),
        ("digits16", [*[0.0] * 15, 16.5], 0.5),
    ],
)
def test_distance_to_the_support(name, row, distance):
    # The sines are known to half the distance of their points.
    assert padding.SUPPORT[name](np.array([row])) == pytest.approx([distance], abs=2e-3)


@pytest.mark.parametrize("name", [*padding.MANIFOLDS, *padding.DISCRETE])
def test_data_lie_on_their_support(name):
    parts = sample_parts(name, 0, (200, 50, 100))
    rows = parts.standardizer.inverse(parts.train.double().numpy())
    # Rows are kept in fp32, with values up to 16; the points of the sines are 0.005 apart.
    assert padding.SUPPORT[name](rows).max() < (3e-3 if name == "sines" else 1e-5)


# --- verdicts ------------------------------------------------------------------------------------


def test_a_difference_and_its_interval():
    difference = paired([3.0, 4.0, 5.0], [1.0, 1.0, 1.0])
    assert difference.mean == pytest.approx(3)
    assert difference.half == pytest.approx(4.303 / math.sqrt(3))
    assert difference.verdict == HOLDS
    assert paired([1.0, 1.0, 1.0], [3.0, 4.0, 5.0]).verdict == FAILS
    # Three times its standard error: not enough for three seeds.
    assert paired([1.0, 2.0, 3.0], [0.85, 0.0, 0.0]).verdict == UNDECIDED


def test_one_seed_decides_nothing():
    assert paired([9.0], [1.0]).verdict == UNDECIDED


def test_pairs_need_each_other():
    with pytest.raises(ValueError, match="better, worse: expected a number for each seed"):
        paired([1.0, 2.0], [1.0])


UP, DOWN, OPEN = Difference(1.0, 0.5, 3), Difference(-1.0, 0.5, 3), Difference(-0.5, 0.6, 3)


@pytest.mark.parametrize(
    ("cases", "word"),
    [
        ([UP, UP, OPEN], HOLDS),
        ([UP, OPEN], UNDECIDED),
        ([DOWN, DOWN, OPEN, Difference(0.9, 1.0, 3)], UNDECIDED),
        ([DOWN, DOWN, OPEN], FAILS),
        ([UP, UP, UP, DOWN], PARTLY),
        # None of them decided, and yet all alike.
        ([Difference(1.0 + 0.1 * k, 2.0, 3) for k in range(4)], HOLDS),
        # Alike, and yet each too uncertain.
        ([Difference(1.0 + 0.1 * k, 9.0, 3) for k in range(4)], UNDECIDED),
        ([UP], HOLDS),
        ([], UNDECIDED),
    ],
)
def test_one_word_for_several_cases(cases, word):
    assert overall(cases) == word


def fitted(name, contender, seed, test, **options):
    row = {"set": name, "contender": contender, "seed": seed, "status": "ok", "test": test}
    shared = {"valid": test, "train_rows": 4000, "parameters": 100, "step_ms": 2.0}
    return row | shared | {"curve": [[10, test - 1], [20, test]]} | options


def test_the_claims_follow_the_rows():
    rows = []
    for seed in range(3):
        jitter = 0.01 * seed
        rows += [
            fitted("big", FF_REALNVP, seed, 2 + jitter, parameters=10),
            fitted("big", REALNVP, seed, 1.0),
            fitted("big", ZUKO, seed, 1.5),
            fitted("big-500", FF_REALNVP, seed, 0 + jitter, train_rows=400),
            fitted("big-500", REALNVP, seed, 1.0, train_rows=400),
        ]
    found = {claim.text: claim for claim in claims.ferumal_claims(rows)}
    more = found["FF-RealNVP has a higher test likelihood than RealNVP; more than 500 rows"]
    few = found["FF-RealNVP has a higher test likelihood than RealNVP; at most 500 rows"]
    assert (more.verdict, few.verdict) == (HOLDS, FAILS)
    # Against the better of the two: 2.01 - 1.5.
    assert more.cases[0][1].mean == pytest.approx(0.51)
    gain = found["FF-RealNVP gains more over RealNVP with 500 rows than with all of the same set"]
    assert gain.cases[0][1].mean == pytest.approx(-0.99 - 0.51)
    saved = dict(found["FF-RealNVP has fewer parameters than RealNVP"].cases)
    assert saved["big"].mean == pytest.approx(0.9)
    assert not any("Glow" in text for text in found)


def test_a_seed_without_a_partner_is_left_out():
    rows = [fitted("big", FF_REALNVP, seed, 2.0) for seed in range(3)]
    rows += [fitted("big", REALNVP, 1, 1.0), fitted("big", REALNVP, 0, 0.0, status="diverged: x")]
    claim = claims.ferumal_claims(rows)[0]
    assert claim.cases[0][1].count == 1


def test_steps_to_the_worse_ones_best():
    mine = [{"seed": 0, "valid": 5.0, "curve": [[10, 1.0], [20, 3.0], [30, 5.0]]}]
    theirs = [{"seed": 0, "valid": 2.5, "curve": [[10, 2.0], [20, 2.2], [30, 2.5]]}]
    assert claims.steps_to_reach(mine, theirs) == [(20, 30)]


def test_padding_claims_are_ratios():
    rows = [
        {
            "set": "circle",
            "family": GLOW,
            "variant": variant,
            "seed": seed,
            "status": "ok",
            "chamfer": value,
            "mmd_l2": value,
            "off": value,
            "coverage": 0.5,
            "curve": [[10, 0.0], [20, 1.0], [30, 1.5], [40, 2.0]],
        }
        for seed in range(3)
        for variant, value in (("p=0", 0.8 + 0.01 * seed), ("p=1", 0.2))
    ]
    found = {claim.text: claim for claim in claims.manifold_claims(rows)}
    lowers = found["on a manifold p = 1 lowers the Chamfer distance"]
    assert math.exp(lowers.cases[0][1].mean) == pytest.approx(4, rel=0.02)
    assert lowers.verdict == HOLDS
    grows = next(claim for text, claim in found.items() if "likelihood still grows" in text)
    assert grows.cases[0][1].mean == pytest.approx(1.0)
    more = next(claim for text, claim in found.items() if "by more than" in text)
    assert more.cases[0][1].mean == 0
    assert more.verdict == UNDECIDED


# --- contenders and data -------------------------------------------------------------------------


def test_an_mlp_coupling_is_its_own_inverse_and_knows_its_volume():
    torch.manual_seed(0)
    layer = MLPCoupling(5).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(4, 5, dtype=torch.float64)
    y, logdet = layer(x)
    back, backwards = layer.inverse(y)
    assert torch.allclose(back, x, atol=1e-12)
    assert torch.allclose(backwards, -logdet, atol=1e-12)
    for row, volume in zip(x, logdet, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda r: layer(r[None])[0][0], row)
        assert torch.allclose(jacobian.slogdet()[1], volume, atol=1e-12)


def test_twins_start_as_the_same_flow():
    rows = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    twins = [build(name, 4, 3, 10, seed=1) for name in (FF_REALNVP, REALNVP)]
    for flow in twins:
        flow.initialize(rows, generator=torch.Generator().manual_seed(0))
    first, second = (flow.log_prob(rows) for flow in twins)
    assert torch.equal(first, second)
    layers = [sum(isinstance(m, MLPCoupling) for m in flow.modules()) for flow in twins]
    assert layers == [0, 3]


def test_splits_are_the_same_for_all_and_few_rows_share_the_test_rows():
    full, again, few = (density_parts(name, 3) for name in ("moons", "moons", "moons-500"))
    assert torch.equal(full.train, again.train)
    assert (len(few.train), len(few.valid), len(few.test)) == (400, 100, 1000)
    tests = [p.standardizer.inverse(p.test.double().numpy()) for p in (full, few)]
    assert np.allclose(*tests, atol=1e-6)
    assert not torch.equal(density_parts("moons", 4).train[:10], full.train[:10])


def test_columns_of_few_values_are_left_out():
    # Of the ten of diabetes: the sex.
    assert density_parts("diabetes", 0).train.shape[1] == 9


def test_without_zuko_its_row_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    rows = ferumal._contend("moons-500", ZUKO, ferumal.QUICK, None)
    assert [row["status"] for row in rows] == ["missing: zuko"]


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (2e-3, [2e-3, 1e-2]),
        (1e-2, [2e-3, 1e-2, 3e-2]),
        (3e-2, [2e-3, 1e-2, 3e-2, 9e-2]),
        (9e-2, [2e-3, 1e-2, 3e-2, 9e-2]),
    ],
)
def test_the_rate_is_the_best_of_validation_and_not_at_an_end_that_could_be_moved(
    monkeypatch, best, tried
):
    fits = []

    def one_fit(name, contender, seed, config, settings, points=None, data=None):
        fits.append((seed, config.lr))
        valid = -abs(math.log(config.lr / best))
        return {"status": "ok", "seed": seed, "lr": config.lr, "valid": valid}

    monkeypatch.setattr(ferumal, "one_fit", one_fit)
    rows = ferumal._contend("moons", REALNVP, ferumal.Settings(), None)
    assert [rate for seed, rate in fits if seed == 0] == pytest.approx(tried)
    assert [row["seed"] for row in rows] == [0, 1, 2]
    assert [row["lr"] for row in rows] == pytest.approx([best] * 3)


# --- the command ---------------------------------------------------------------------------------

FIT = FitConfig(steps=4, batch_size=32, eval_every=2, patience=5, num_pads=2)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """All experiments at their smallest."""
    pytest.importorskip("matplotlib")
    sizes = {
        ferumal: {"sets": ("moons-500",), "points": 5, "fit": FIT, "point_counts": (5,)},
        padding: {"rows": (100, 50, 60), "points": 5, "fit": FIT},
    }
    small = {
        name: (
            function,
            full,
            dataclasses.replace(quick, **sizes[sys.modules[function.__module__]]),
        )
        for name, (function, full, quick) in run.EXPERIMENTS.items()
    }
    out = tmp_path_factory.mktemp("papers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "EXPERIMENTS", small)
        assert run.main(["--quick", "--out", str(out)]) == 0
    return out


def test_results_are_complete(ran):
    results = {p.stem: json.loads(p.read_text()) for p in (ran / "bench/results/papers").iterdir()}
    assert results.keys() == run.EXPERIMENTS.keys()
    assert all(result["complete"] and result["quick"] for result in results.values())
    rows = results["comparison"]["rows"]
    assert {row["contender"] for row in rows} == set(CONTENDERS)
    for row in rows:
        assert row["status"] == "ok" or row["status"].startswith("missing")
    assert all(math.isfinite(row["chamfer"]) for row in results["manifold"]["rows"])


def test_the_page_comes_from_the_results_alone(ran):
    page = ran / "docs" / "papers.md"
    text = page.read_text()
    assert "**A quick run: sizes too small for any conclusion.**" in text
    assert "| FF-RealNVP has fewer parameters than RealNVP | **holds** |" in text
    assert "steps ran out: FF-RealNVP " in text
    pictures = {path.name for path in page.parent.glob("*.png")}
    assert pictures == {"papers-comparison.png", "papers-points.png", "papers-manifold.png"}
    assert all(f"]({name})" in text for name in pictures)
    page.unlink()
    assert run.main(["--page", "--out", str(ran)]) == 0
    assert page.read_text() == text


def test_bad_options_are_named(tmp_path):
    with pytest.raises(ValueError, match="data: expected a folder"):
        run.main(["--data", str(tmp_path / "none")])
    with pytest.raises(ValueError, match="seeds: expected at least 1, got 0"):
        run.main(["--seeds", "0"])
    with pytest.raises(FileNotFoundError, match="no results; run flowops bench papers first"):
        run.main(["--page", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        run.main(["--only", "none"])


def test_uci_sets_below_a_folder_are_found(tmp_path):
    for name in ("gas", "BSDS300", "other"):
        (tmp_path / name).mkdir()
    assert ferumal._below(tmp_path) == ["gas", "bsds300"]
    assert ferumal._below(None) == []
