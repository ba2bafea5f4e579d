import subprocess
import sys
import time
from contextlib import closing

import pytest
import torch

from flowops.bench import loading


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return loading.synthetic_store(tmp_path_factory.mktemp("noise"), 30, 4)


def test_a_store_of_noise(store):
    assert (len(store), store.img_size, store.channels) == (30, 4, 3)
    pixels = store[torch.arange(30)].pixels
    assert len(pixels.unique()) > 200


@pytest.mark.parametrize("workers", [1, 2])
def test_threads_give_the_same_batches(store, workers):
    with (
        closing(loading.with_batches(store, 8, 0)) as expected,
        closing(loading.with_threads(store, 8, workers)) as found,
    ):
        for _ in range(10):
            assert torch.equal(next(found).pixels, next(expected).pixels)


def test_the_command_prints_a_row_for_every_loader(store, capsys, monkeypatch):
    monkeypatch.setattr(loading, "_usable", lambda loader: loader is not loading.with_grain)
    rows = {k: row for k, row in loading.ROWS.items() if "worker" not in k or "grain" in k}
    monkeypatch.setattr(loading, "ROWS", rows)
    command = ["--store", str(store.path), "--batch-size", "8", "--compute", "1"]
    assert loading.main([*command, "--seconds", "0.02", "--rounds", "2"]) == 0
    printed = capsys.readouterr().out
    assert "30 images 3x4x4, batches of 8" in printed
    lines = {name: line for name in rows for line in printed.splitlines() if f"│ {name} " in line}
    assert list(lines) == list(rows)
    assert set(rows) > {"in turn", "1 thread", "grain, 2 workers"}
    assert all(("not installed" in line) == ("grain" in name) for name, line in lines.items())


def test_time_of_the_cpu_counts_child_processes():
    burn = "import time\nwhile time.process_time() < 0.5: pass\ninput()"
    before = loading.cpu_seconds() - time.process_time()
    with subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE) as process:
        limit = time.monotonic() + 60
        while not loading.cpu_seconds() - time.process_time() > before + 0.3:
            assert time.monotonic() < limit
            time.sleep(0.05)
        process.communicate(b"\n")
