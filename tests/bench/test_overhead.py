"""What a call costs beyond its kernel. `flowops bench overhead` prints the differences."""

import pytest
import torch

from flowops import dispatch
from flowops.bench import overhead

pytestmark = pytest.mark.skipif(
    not dispatch.backend_state("cpu")[0], reason="needs the native CPU kernels"
)


@pytest.mark.parametrize("level", ["raw kernel", "registered op", "public function"])
def test_a_small_call(benchmark, level):
    call = overhead.calls()[level]
    with torch.no_grad():
        benchmark(call)


def test_the_levels_compute_the_same():
    calls = overhead.calls()
    _, _, z, logdet = calls["raw kernel"].__defaults__[0]
    with torch.no_grad():
        calls["raw kernel"]()
        for level in ("registered op", "public function"):
            for expected, actual in zip((z, logdet), calls[level](), strict=True):
                assert torch.equal(actual, expected), level


def test_the_command_prints_the_differences(capsys, monkeypatch):
    monkeypatch.setattr(overhead, "REPEATS", 10)
    monkeypatch.setattr(overhead, "SECONDS", 0.01)
    assert overhead.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == list(overhead.calls())
    assert all("µs over the raw kernel" in line for line in lines)
