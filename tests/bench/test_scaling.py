import json
from dataclasses import replace

import pytest
import torch

from flowops.api import TarFlow
from flowops.bench import scaling, scaling_docs
from flowops.bench.scaling import Cell, cells
from flowops.bench.scaling_plan import (
    Assumptions,
    Case,
    activation_bytes,
    cases,
    images_to_hide,
    memory,
    plan,
    step_seconds,
    traffic,
)

approx = pytest.approx

#: With ``Known``, numbers that are easy by hand.
SMALL = Assumptions(
    peak=1.0,
    mfu=(1.0, 1.0),
    memory=1e6,
    node=4,
    nvlink=100.0,
    network=10.0,
    hop_node=0.0,
    hop_network=0.0,
    bucket=1600.0,
)


class Known(Case):
    parameters = 1600
    blocks = (1000, 600)
    entry = 0.5
    flops = 12


@pytest.fixture(scope="module")
def published():
    return cases()


@pytest.fixture
def known():
    return Known("known", None, 32, 100)


# --- activations ---------------------------------------------------------------------------------


def saved_bytes(model, images, bf16):
    """What autograd keeps of a forward pass, other than weights: every storage once."""
    weights = [*model.parameters(), *model.buffers()]
    known = {t.untyped_storage().data_ptr() for t in weights}
    kept, alive = {}, []

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            alive.append(t)
        return t

    x = torch.randn(images, model.in_channels, model.img_size, model.img_size)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        outputs, logdets = model.transform(x)
        model.loss(outputs[-1], logdets.sum(0))
    return sum(kept.values())


@pytest.mark.parametrize(
    ("make", "bf16", "tolerance"),
    [
        (TarFlow, True, 0.002),
        (TarFlow, False, 0.002),
        (TarFlow.starflow, True, 0.03),  # what clip and softplus keep, 21 C, is left out
    ],
)
def test_activations_are_what_autograd_keeps(make, bf16, tolerance):
    model = make(3, 16, 2, 128, 2, 2)
    each = saved_bytes(model, 3, bf16) - saved_bytes(model, 2, bf16)  # copies of weights cancel
    assert activation_bytes(model, bf16=bf16) == approx(each, rel=tolerance)


def test_activations_by_hand():
    model = TarFlow(3, 16, 2, 128, 4, 2)
    layer = 36 * 128 + 16 + 4 * 2
    block = 64 * (2 * layer + 2 * 128 + 10 * 12)
    assert activation_bytes(model) == 4 * block + 4 * 64 * 12
    entry = 64 * 4 * 12
    assert activation_bytes(model, True) == 3 * entry + block
    kept = entry + 64 * 2 * (2 * 128 + 4 * 2)
    assert activation_bytes(model, "selective") == 3 * kept + block


# --- the plan ------------------------------------------------------------------------------------


def test_memory_by_hand(published):
    case = published[0]
    P, block = case.parameters, case.parameters // 8
    assert memory(case, 1, 0) == {"state": 20 * P, "passing": 2 * P, "activations": 0}
    assert memory(case, 1, 0, bf16=False)["passing"] == 0
    sharded = memory(case, 8, 2, True)
    assert sharded["state"] == 20 * P / 8
    assert sharded["passing"] == 2 * 2 * block + 6 * block
    assert sharded["activations"] == 2 * activation_bytes(case.model, True)
    assert memory(case, 8, 2, accumulate=2)["passing"] == 10 * block + 4 * P


def test_traffic_inside_a_machine(known):
    ddp = traffic(known, "ddp", 4, SMALL)
    assert (ddp.gather, ddp.bare) == (0, 1 / 4)  # 6400 bytes of gradients
    assert ddp.reduce_bytes == 2 * 3 / 4 * 6400
    assert ddp.reduce == approx(96)
    fsdp = traffic(known, "fsdp", 4, SMALL)
    assert (fsdp.gather_bytes, fsdp.reduce_bytes) == (3 / 4 * 3200, 3 / 4 * 6400)
    assert (fsdp.gather, fsdp.reduce, fsdp.bare) == (approx(24), approx(48), 0.5)
    assert 2 * fsdp.gather_bytes + fsdp.reduce_bytes == ddp.reduce_bytes


def test_traffic_across_machines(known):
    # A machine of 4 sends 40 bytes a second.
    assert traffic(known, "ddp", 16, SMALL).reduce == approx(2 * 15 / 16 * 6400 / 40)
    assert traffic(known, "fsdp", 16, SMALL).gather == approx(15 / 16 * 3200 / 40)
    hsdp = traffic(known, "hsdp", 16, SMALL)
    assert hsdp.gather == approx(24)
    assert hsdp.reduce == approx(48 + 2 * 3 / 4 * 1600 / 10)


def test_hops(known):
    slow = replace(SMALL, hop_node=1.0, hop_network=100.0)
    extra = lambda how, n, name: (  # noqa: E731
        getattr(traffic(known, how, n, slow), name) - getattr(traffic(known, how, n, SMALL), name)
    )
    assert extra("fsdp", 4, "gather") == approx(2 * 3)
    assert extra("fsdp", 16, "gather") == approx(2 * (12 + 3 * 100))
    assert extra("ddp", 16, "reduce") == approx(4 * 2 * (3 + 2 * 100))
    assert extra("hsdp", 16, "reduce") == approx(2 * 3 + 2 * 2 * 2 * 100)


def test_step_seconds_by_hand(known):
    ddp, fsdp = (traffic(known, how, 4, SMALL) for how in ("ddp", "fsdp"))
    # 100 images: 400 s forward and 800 s backward hide all but the last bucket, or the first
    # gathering and the last sum.
    assert step_seconds(known, ddp, 100, 1.0, a=SMALL) == approx(1200 + 96 / 4)
    assert step_seconds(known, fsdp, 100, 1.0, a=SMALL) == approx(1200 + 24 / 2 + 48 / 2)
    # 1 image: 4 s and 8 s hide behind the traffic.
    assert step_seconds(known, ddp, 1, 1.0, a=SMALL) == approx(4 + 96)
    assert step_seconds(known, fsdp, 1, 1.0, a=SMALL) == approx(24 + 24 + 48)
    # A forward pass more, behind the traffic, or not.
    assert step_seconds(known, ddp, 1, 1.0, True, a=SMALL) == approx(4 + 96)
    assert step_seconds(known, ddp, 100, 1.0, True, a=SMALL) == approx(1600 + 24)
    # The weights are gathered for every micro-batch, the gradients are added up once.
    two = step_seconds(known, fsdp, 100, 1.0, accumulate=2, a=SMALL)
    assert two == approx(2 * 1200 + 2 * 24 / 2 + 48 / 2)


def test_images_to_hide(known):
    # 12 n seconds of computing; the last of four buckets, 24 s, stays.
    assert images_to_hide(known, "ddp", 4, 1.0, SMALL) == 40


def test_published_sizes(published):
    small, large, star = published
    assert small.flops == approx(3.15e12, rel=0.01)  # the counts of arXiv 2412.06329's models
    assert large.flops == approx(5.44e12, rel=0.01)
    assert [round(c.parameters / 1e6) for c in published] == [466, 824, 3852]
    assert [c.entry for c in published] == [1 / 8, 1 / 8, star.blocks[1] / star.parameters]
    assert star.blocks[0] == approx(12 * 24 * 3072**2, rel=0.01)
    assert [c.batch for c in published] == [256, 768, 1024]


def test_plan_rows(published):
    rows = plan(worlds=(8, 256))
    small, star = published[0], published[2]
    of = {(r["model"], r["world"], r["parallel"]): r for r in rows}
    assert ("hsdp", 8) not in {(r["parallel"], r["world"]) for r in rows}
    row = of[small.name, 8, "ddp"]
    assert (row["batch"], row["accumulate"], row["checkpoint"]) == (32, 1, False)
    assert row["computing"][0] == approx(32 * small.flops / (0.4 * 790e12))
    assert row["sent"] == approx(2 * 7 / 8 * 4 * small.parameters)
    assert row["images_per_second"][0] == approx(256 / row["seconds"][0])
    assert row["store"][0] == approx(row["images_per_second"][0] * 3 * 64 * 64)
    across = of[small.name, 256, "hsdp"]
    assert across["store"][0] == approx(across["images_per_second"][0] * 3 * 64 * 64 / 32)
    assert not of[star.name, 8, "ddp"]["fits"]
    assert all(r["total"] <= 72e9 for r in rows if r["fits"])
    assert all(r["kept_rate"][0] <= 1 for r in rows)


# --- measuring -----------------------------------------------------------------------------------

TINY = Cell("4-64-2-1@1x8", 1, "ddp", 0, False, 4)


def test_cells():
    found = [(c.world, c.parallel, c.shard_ranks) for c in cells([TINY.model], [1, 2, 3], [4])]
    first = [(1, "ddp", 0), (2, "ddp", 0), (2, "fsdp", 0), (2, "fsdp", 1)]
    assert found == 3 * [*first, (3, "ddp", 0), (3, "fsdp", 0)]


def test_a_cell_in_this_process():
    found = scaling.measure_cell(TINY, "cpu", 0.01)
    P = found["parameters"]
    tensors = {"weights": 4 * P, "gradients": 4 * P, "moments": 8 * P}
    tensors["averages"] = 4 * (P + 4 * 16)  # with the prior's variance
    assert found["state"] == tensors
    assert sum(found["state_formula"].values()) == 20 * P
    assert len(found["times"]) >= 3
    assert found["rate"] > 0


def test_a_cell_of_two_processes():
    found = scaling.run_cell(replace(TINY, world=2, parallel="fsdp"), "cpu", 0.01)
    assert "error" not in found
    for name, size in found["state_formula"].items():
        assert size == {"moments": 8}.get(name, 4) * found["parameters"] / 2
        assert found["state"][name] == approx(size, rel=0.03)


def test_a_failed_cell_says_why():
    cell = replace(TINY, parallel="fsdp", shard_ranks=2)
    assert scaling.run_cell(cell, "cpu", 0.01) == {
        "error": "ValueError: shard_ranks: expected a divisor of the 1 processes, got 2"
    }


# --- the command ---------------------------------------------------------------------------------


def test_product_rate_is_the_best_of_the_run():
    two, bad = replace(TINY, world=2), replace(TINY, batch=1)
    runs = {TINY: [{"rate": 3.0}, {"rate": 1.0}], two: [{"rate": 8.0}], bad: [{"error": "x"}]}
    assert scaling.product_rate(runs, 1, "cpu") == 8  # two processes, the same silicon
    assert scaling.product_rate(runs, 2, "cpu") == 8
    assert scaling.product_rate(runs, 1, "cuda") == 4  # a GPU each
    assert scaling.product_rate(runs, 2, "cuda") == 8


def test_times_of_a_busy_machine_are_not_shown():
    found = fake(TINY, "cpu", 1) | {"load": 5.0}
    row = scaling.row(TINY, {TINY: [found]}, "cpu") | {"cores": 2}
    result = {"environment": {**ENV, "kind": "cpu"}, "rows": [row]}
    busy = "| busy: load 5 on 2 cores |  |  |  | 4.0 | 4.0 | 8 | 9 |"
    assert busy in scaling_docs.measured(result)
    row["load"] = 3.0
    assert "| 200 (140 to 260) | 20 | 1.00 | 5 % | 4.0 |" in scaling_docs.measured(result)
    row["load"] = 50.0  # of the host, whose cores a GPU's steps hardly need
    assert not scaling_docs.timed(row, "cpu")
    assert scaling_docs.timed(row, "cuda")


ENV = {"device": "a CPU", "torch": "2", "threads": 2, "isa": "v4", "git": "0", "dirty": False}


def fake(cell, device, seconds):
    if cell.checkpoint == "selective":
        return {"error": "RuntimeError: out of memory"}
    parts = dict.fromkeys(("weights", "gradients", "moments", "averages"), 1e6)
    rest = {"peak": 8e6, "peak_formula": 9e6, "state": parts, "state_formula": parts}
    times = [0.2, 0.1, 0.3] if cell.world == 1 else [0.4] * 3
    return {"times": times, "rate": 4e9, "flops": 1e7, "parameters": 10, "load": 1.0, **rest}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "run.py").touch()
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scaling, "run_cell", fake)
    monkeypatch.setattr(scaling, "_cores", lambda: 2)
    return tmp_path


ARGS = ["--device", "cpu", "--models", TINY.model, "--batches", "4"]


def test_results_and_page(checkout):
    names = ("measured", "assumptions", "models", "state", "plan", "tokens", "batch", "fits")
    markers = (f"<!-- scaling:{name}:begin -->\nold\n<!-- scaling:{name}:end -->" for name in names)
    page = checkout / "docs" / "scaling.md"
    page.write_text("text\n" + "\n".join(markers) + "\nend\n")
    assert scaling.main(ARGS) == 1  # a cell failed
    (path,) = checkout.glob("bench/results/*/scaling.json")
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 3 * 4
    one, two = rows[0], rows[1]
    assert (one["seconds"]["median"], one["images_per_second"], one["against_one"]) == (0.2, 20, 1)
    assert (two["world"], two["images_per_second"], two["against_one"]) == (2, 20, 1)
    assert one["mfu"] == approx(20 * 1e7 / 4e9)
    # What is not run again stays.
    assert scaling.main([*ARGS, "--worlds", "1", "--rounds", "1", "--precision", "bf16"]) == 1
    after = json.loads(path.read_text())["rows"]
    assert after[:12] == rows
    assert [row["precision"] for row in after[12:]] == 3 * ["bf16"]
    assert scaling.main([*ARGS, "--worlds", "1", "--precision", "bf16"]) == 1
    assert len(json.loads(path.read_text())["rows"]) == 15
    assert scaling.main(["--docs"]) == 0
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("text\n")
    assert text.endswith("end\n")
    assert "RuntimeError: out of memory" in text
    assert (
        "| 4-64-2-1@1x8 | fp32 | 1 | one process | no | 4 | 200 (100 to 300) | 20 | 1.00 |" in text
    )
    assert (checkout / "docs" / "scaling.png").stat().st_size > 1000


def test_a_page_without_markers(checkout):
    (checkout / "docs" / "scaling.md").write_text("nothing")
    with pytest.raises(ValueError, match="scaling.md: the markers <!-- scaling:measured:begin"):
        scaling_docs.write_docs(checkout / "bench" / "results", checkout / "docs")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--models", "768"], "models: expected patch-width"),
        (["--worlds", "3"], "worlds: expected at most 2 processes here"),
        (["--worlds", "0"], "worlds: expected positive numbers"),
        (["--batches", "0"], "batches: expected positive numbers"),
        (["--seconds", "nan"], "seconds: expected positive numbers"),
    ],
)
def test_what_is_refused(checkout, argv, message):
    with pytest.raises(ValueError, match=message):
        scaling.main(["--device", "cpu", *argv])
