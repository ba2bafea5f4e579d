import pytest
import torch

pytest.importorskip("triton")

from flowops.kernels import launch
from flowops.kernels.launch import row

SMALL, LARGE, HOPPER = row(1, BLOCK=16, limits={"n": 16}), row(4, 3, BLOCK=64), row(8, BLOCK=128)


@pytest.fixture(autouse=True)
def _table(monkeypatch):
    rows = {"default": [SMALL, LARGE], "sm90": [HOPPER], "sm80": [row(2, BLOCK=8, limits={"n": 4})]}
    monkeypatch.setitem(launch.TABLE, "toy", rows)
    monkeypatch.setattr(launch, "_TUNED", {})
    launch._find.cache_clear()
    yield
    launch._find.cache_clear()


def test_the_first_row_that_holds_is_taken():
    assert launch.choose("toy", "sm100", (("n", 16),)) == SMALL[1]
    assert launch.choose("toy", "sm100", (("n", 17),)) == LARGE[1]
    assert launch.choose("toy", "sm90", (("n", 1),)) == HOPPER[1]
    # What a family has no row for is served by the default ones.
    assert launch.choose("toy", "sm80", (("n", 4),))["BLOCK"] == 8
    assert launch.choose("toy", "sm80", (("n", 5),)) == SMALL[1]


def test_sizes_that_no_row_serves(monkeypatch):
    monkeypatch.setitem(launch.TABLE, "toy", {"default": [SMALL]})
    cpu = torch.device("cpu")
    assert launch.serves("toy", cpu, {"n": 16})
    assert not launch.serves("toy", cpu, {"n": 17})
    with pytest.raises(LookupError, match=r"toy has no launch for \{'n': 17\}"):
        launch.launch("toy", cpu, {"n": 17}, lambda choice: choice)


def test_nothing_is_timed_unless_asked(monkeypatch):
    monkeypatch.setattr(launch.triton.testing, "do_bench", None)
    assert launch.launch("toy", torch.device("cpu"), {"n": 3}, lambda choice: choice) == SMALL[1]


def test_autotuning_takes_the_fastest_that_runs_and_remembers_it(monkeypatch):
    tried = []

    def do_bench(attempt, return_mode):
        attempt()
        choice = attempt.args[0]
        if choice == LARGE[1]:
            raise launch.triton.OutOfResources(300_000, 232_448, "shared memory")
        tried.append(choice)
        return {1: 3.0, 8: 1.0}[choice.num_warps]

    monkeypatch.setattr(launch.triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    arguments = ("toy", "sm100", (("n", 10),), SMALL[1], lambda choice: choice)
    for _ in range(2):
        assert launch._tuned(*arguments) == HOPPER[1]
    assert tried == [SMALL[1], HOPPER[1]]


def test_a_graph_that_is_captured_is_not_tuned(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    arguments = ("toy", "sm100", (("n", 10),), SMALL[1], lambda choice: choice)
    assert launch._tuned(*arguments) == SMALL[1]
