import itertools
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowops.api.data import Images
from flowops.api.loading import batches, epoch_order, sample_indices
from flowops.api.prepare import PrepareConfig, prepare
from flowops.api.store import ImageStore

N = 50
PIXELS = torch.arange(N, dtype=torch.uint8).view(N, 1, 1, 1).expand(N, 1, 2, 2).contiguous()
DATA = Images(PIXELS, torch.arange(N), ("a", "b"))


def loaded(**options):
    """Numbers of the images, a list for each batch."""
    options = {"seed": 3, "batch_size": 12, "first_step": 0, "steps": 9, **options}
    found = []
    for images in batches(DATA, **options):
        assert torch.equal(images.pixels, PIXELS[images.labels])
        assert images.class_names == DATA.class_names
        found.append(images.labels.tolist())
    return found


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.integers(0, 2**62), st.integers(0, 2**40))
def test_an_order_is_a_permutation(n, seed, epoch):
    order = epoch_order(n, seed, epoch)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(n))
    epoch_order.cache_clear()
    assert torch.equal(epoch_order(n, seed, epoch), order)


def test_orders_are_those_written_down():
    """A run that goes on with a later version has to see the same images."""
    assert epoch_order(8, 0, 0).tolist() == GOLDEN[0]
    assert epoch_order(8, 0, 1).tolist() == GOLDEN[1]
    assert epoch_order(8, 1, 0).tolist() == GOLDEN[2]


GOLDEN = ([4, 1, 7, 2, 0, 6, 5, 3], [0, 5, 1, 7, 2, 4, 3, 6], [1, 6, 0, 4, 7, 5, 2, 3])


def test_the_order_does_not_touch_the_global_generator():
    before = torch.get_rng_state()
    loaded()
    assert torch.equal(torch.get_rng_state(), before)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 20), st.integers(0, 60), st.integers(0, 60))
def test_indices_are_a_piece_of_the_endless_stream(n, first, count):
    stream = torch.cat([epoch_order(n, 5, epoch) for epoch in range((first + count) // n + 1)])
    assert torch.equal(sample_indices(n, 5, first, count), stream[first : first + count])


def test_every_image_comes_once_an_epoch():
    seen = list(itertools.chain.from_iterable(loaded(batch_size=20, steps=5)))
    assert sorted(seen[:N]) == sorted(seen[N:]) == list(range(N))
    assert seen[:N] != seen[N:]


def test_going_on_gives_what_would_have_come():
    assert loaded(first_step=0, steps=4) + loaded(first_step=4) == loaded()
    assert loaded(first_step=9) == []


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_and_parts_share_a_step_in_order(world_size, parts):
    whole = loaded(batch_size=24, steps=3)
    ranks = [
        loaded(batch_size=24, steps=3, world_size=world_size, rank=rank, parts=parts)
        for rank in range(world_size)
    ]
    for step in range(3):
        joined = [
            ranks[rank][step * parts + part] for part in range(parts) for rank in range(world_size)
        ]
        assert {len(run) for run in joined} == {24 // world_size // parts}
        assert list(itertools.chain.from_iterable(joined)) == whole[step]


def test_batches_larger_than_the_data():
    (batch,) = loaded(batch_size=2 * N, steps=1)
    assert sorted(batch) == sorted([*range(N), *range(N)])


def test_workers_change_nothing_and_end_when_closed():
    state = torch.get_rng_state()
    assert loaded(workers=2, parts=2) == loaded(parts=2)
    assert not multiprocessing.active_children()
    iterator = batches(DATA, seed=3, batch_size=12, first_step=0, steps=10**9, workers=1)
    assert next(iterator).labels.tolist() == loaded(steps=1)[0]
    assert len(multiprocessing.active_children()) == 1
    iterator.close()
    assert not multiprocessing.active_children()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def broken(tmp_path):
    """A store whose second shard has another shape than the index says, which reading finds."""
    for k in range(2):
        np.savez(tmp_path / f"{k}.npz", data=np.zeros((N // 2, 12), np.uint8))
    prepare(str(tmp_path / "*.npz"), tmp_path / "store", PrepareConfig(img_size=2))
    shard = tmp_path / "store" / "images-00001.npy"
    shard.write_bytes(shard.read_bytes().replace(b"(25, 3, 2, 2)", b"(25, 2, 3, 2)"))
    return ImageStore(tmp_path / "store")


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_the_data_are_handed_on(broken, workers):
    options = {"seed": 0, "batch_size": N, "first_step": 0, "steps": 1, "workers": workers}
    with pytest.raises(ValueError, match=rf"^{broken.path}/images-00001.npy: expected shape"):
        next(batches(broken, **options))
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_is_named_and_interrupts_do_not_kill_it():
    data = Images(PIXELS, None)
    iterator = batches(data, seed=3, batch_size=10, first_step=0, steps=10**9, workers=1)
    assert next(iterator).labels is None
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGINT)
    for _ in range(20):
        next(iterator)
    assert worker.is_alive()
    worker.kill()
    with pytest.raises(RuntimeError, match=rf"DataLoader worker \(pid.* {worker.pid}\)"):
        list(iterator)
    assert not multiprocessing.active_children()


def test_pinning_without_a_gpu_has_no_effect():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without")
    assert loaded(pin=True) == loaded()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("workers", [0, 1])
def test_pinned_batches(workers):
    options = {"seed": 3, "batch_size": 12, "first_step": 0, "steps": 2, "workers": workers}
    for images in batches(DATA, **options, pin=True):
        assert images.pixels.is_pinned()
        assert images.labels.is_pinned()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("batch_size", {"batch_size": 0}),
        ("batch_size", {"batch_size": 10, "world_size": 2, "parts": 2}),
        ("world_size", {"world_size": 0}),
        ("parts", {"parts": 0}),
        ("rank", {"rank": 1}),
        ("rank", {"rank": -1}),
        ("first_step", {"first_step": 10}),
        ("first_step", {"first_step": -1}),
        ("workers", {"workers": -1}),
    ],
)
def test_bad_arguments_are_named_at_the_call(name, options):
    options = {"seed": 3, "batch_size": 12, "first_step": 0, "steps": 9, **options}
    with pytest.raises(ValueError, match=f"{name}: expected"):
        batches(DATA, **options)
    with pytest.raises(ValueError, match="data: expected at least one image"):
        batches(DATA[torch.arange(0)], seed=0, batch_size=1, first_step=0, steps=1)
    with pytest.raises(ValueError, match="expected n of at least 1"):
        epoch_order(0, 0, 0)
    with pytest.raises(ValueError, match="expected n of at least 1"):
        sample_indices(5, 0, -1, 3)
