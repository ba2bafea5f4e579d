import json
import os
import pickle
import resource

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowops.api.prepare import PrepareConfig, prepare
from flowops.api.store import ImageStore, LatentStore, NpyFile

COUNTS = (7, 1, 12)
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 3, 4, 4), dtype=np.uint8)
LABELS = np.arange(20) % 6


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of three shards."""
    folder = tmp_path_factory.mktemp("made")
    ends = np.cumsum(COUNTS)
    for k, (end, count) in enumerate(zip(ends, COUNTS, strict=True)):
        rows = slice(end - count, end)
        data = PIXELS[rows].reshape(count, -1)
        np.savez(folder / f"batch_{k}.npz", data=data, labels=LABELS[rows] + 1)
    prepare(str(folder / "batch_*.npz"), folder / "store", PrepareConfig(img_size=4))
    return folder / "store"


@pytest.fixture
def store_path(made, tmp_path):
    """A copy that may be broken."""
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture(scope="module")
def store(made):
    return ImageStore(made)


def test_sizes(store):
    assert (len(store), store.img_size, store.channels) == (20, 4, 3)
    assert store.class_names == tuple("012345")
    assert [shard["images"] for shard in store.shards] == list(COUNTS)


@settings(deadline=None)
@given(st.lists(st.integers(0, 19), max_size=40))
def test_rows_come_in_the_order_asked_for(store, chosen):
    found = store[torch.tensor(chosen, dtype=torch.int64)]
    assert found.pixels.shape == (len(chosen), 3, 4, 4)
    assert found.pixels.dtype == torch.uint8
    assert found.labels.dtype == torch.int64
    assert np.array_equal(found.pixels.numpy(), PIXELS[chosen])
    assert np.array_equal(found.labels.numpy(), LABELS[chosen])
    assert found.class_names == store.class_names


def test_numpy_opens_the_shards(made):
    shard = np.load(made / "images-00002.npy", mmap_mode="r")
    assert np.array_equal(shard, PIXELS[8:])
    labels = np.load(made / "labels-00002.npy", mmap_mode="r")
    assert labels.dtype == np.int32
    assert np.array_equal(labels, LABELS[8:])


def test_bad_indices_are_named(store):
    for index in ([0], 3, torch.zeros(2), torch.zeros(1, 1, dtype=torch.int64)):
        with pytest.raises(TypeError, match="index: expected an int64 tensor"):
            store[index]
    for index in ([-1, 3], [0, 20]):
        with pytest.raises(IndexError, match="index: expected from 0 to 19, got"):
            store[torch.tensor(index)]


def test_a_store_is_pickled_as_its_path(store):
    data = pickle.dumps(store)
    assert len(data) < 500
    copy = pickle.loads(data)
    assert torch.equal(copy[torch.tensor([19, 0])].pixels, store[torch.tensor([19, 0])].pixels)


def test_every_file_is_checked_at_opening(store_path):
    path = store_path / "images-00001.npy"
    os.truncate(path, 150)
    with pytest.raises(ValueError, match=r"images-00001.npy: expected 176 bytes, got 150"):
        ImageStore(store_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"images-00001.npy: missing, expected 176 bytes"):
        ImageStore(store_path)


def test_a_file_that_shrinks_later_is_named(store_path):
    store = ImageStore(store_path)
    store[torch.tensor([8, 19])]
    os.truncate(store_path / "images-00002.npy", 400)
    assert len(store[torch.tensor([0, 8])]) == 2
    with pytest.raises(OSError, match=r"images-00002.npy: ends before image 11; it was cut"):
        store[torch.tensor([19])]


def test_a_file_of_another_shape_is_named(store_path):
    path = store_path / "images-00001.npy"
    data = path.read_bytes().replace(b"(1, 3, 4, 4)", b"(3, 1, 4, 4)")
    path.write_bytes(data)
    store = ImageStore(store_path)
    with pytest.raises(ValueError, match=r"00001.npy: expected shape \[1, 3, 4, 4\], got \[3, 1"):
        store[torch.tensor([7])]


def test_labels_are_checked(store_path):
    path = store_path / "labels-00000.npy"
    data = path.read_bytes()
    path.write_bytes(data[:-4] + (6).to_bytes(4, "little"))
    with pytest.raises(ValueError, match=r"labels-00000.npy: expected labels below 6, got 0 to 6"):
        ImageStore(store_path)[torch.tensor([0])]


def test_what_is_no_store_is_named(tmp_path, store_path):
    with pytest.raises(FileNotFoundError, match="no such store: .*nowhere"):
        ImageStore(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: not an image store, it has no index.json"):
        ImageStore(tmp_path / "empty")
    index = store_path / "index.json"
    good = json.loads(index.read_text())
    broken = {
        "version 2": json.dumps(good | {"version": 2}),
        "the counts do not add up": json.dumps(good | {"images": 21}),
        "'shards'": json.dumps({k: v for k, v in good.items() if k != "shards"}),
        "": index.read_text()[:-30],
        "list indices": "[]",
    }
    for reason, text in broken.items():
        index.write_text(text)
        with pytest.raises(ValueError, match=f"index.json: not the index of a store .*{reason}"):
            ImageStore(store_path)
    index.unlink()
    with pytest.raises(ValueError, match="not complete yet, `flowops data prepare` goes on"):
        ImageStore(store_path)


def test_verify_names_bad_files(store_path):
    store = ImageStore(store_path)
    seen = []
    assert store.verify(seen.append) == []
    assert sum(seen) == PIXELS.nbytes + 4 * len(LABELS)
    for name in ("images-00002.npy", "labels-00000.npy"):
        data = bytearray((store_path / name).read_bytes())
        data[-1] ^= 1
        (store_path / name).write_bytes(data)
    (store_path / "images-00001.npy").unlink()
    faults = store.verify()
    assert len(faults) == 3
    assert "labels-00000.npy: expected the checksum" in faults[0]
    assert "images-00001.npy" in faults[1]
    assert "images-00002.npy: expected the checksum" in faults[2]


def test_the_fingerprint_tells_stores_apart(store, made, tmp_path):
    ours = store.fingerprint()
    sizes = {"img_size": 4, "channels": 3, "images": 20, "classes": 6}
    assert ours == {**sizes, "crc32": ours["crc32"]}
    assert ImageStore(made).fingerprint() == ours
    np.savez(tmp_path / "a.npz", data=PIXELS.reshape(20, -1)[::-1], labels=LABELS + 1)
    prepare(str(tmp_path / "a.npz"), tmp_path / "store", PrepareConfig(img_size=4))
    theirs = ImageStore(tmp_path / "store").fingerprint()
    assert {k for k in ours if ours[k] != theirs[k]} == {"crc32"}


def test_more_shards_than_files_may_be_open(made):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        ImageStore(made)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 3 + 512
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- latents -------------------------------------------------------------------------------------


@pytest.fixture(params=["float16", "float32"])
def latents(request, tmp_path):
    values = np.random.default_rng(1).standard_normal((9, 4, 2, 2)).astype(request.param)
    np.save(tmp_path / "train.npy", values)
    return tmp_path / "train.npy", values


def test_latents(latents):
    path, values = latents
    store = LatentStore(path)
    assert (len(store), store.img_size, store.channels, store.class_names) == (9, 2, 4, ())
    found = store[torch.tensor([8, 0, 8])]
    assert found.pixels.dtype == getattr(torch, str(values.dtype))
    assert np.array_equal(found.pixels.numpy(), values[[8, 0, 8]])
    assert found.labels is None
    assert pickle.loads(pickle.dumps(store)).fingerprint() == store.fingerprint()
    assert store.verify() == []


def test_latents_with_labels(latents):
    path, _ = latents
    without = LatentStore(path).fingerprint()
    np.save(path.with_name("train.labels.npy"), np.arange(9, dtype=np.int16) // 3)
    store = LatentStore(path)
    assert store.class_names == ("0", "1", "2")
    assert store[torch.tensor([8, 0])].labels.tolist() == [2, 0]
    assert store.fingerprint()["crc32"] != without["crc32"]
    for labels, reason in (
        (np.arange(8), "expected 9 labels, got 8"),
        (np.arange(9) - 1, "expected labels from 0, got -1"),
        (np.arange(9.0), "expected integers"),
    ):
        np.save(path.with_name("train.labels.npy"), labels)
        with pytest.raises(ValueError, match=f"train.labels.npy: {reason}"):
            LatentStore(path)


def test_latents_that_are_not_finite_are_found(latents):
    path, values = latents
    values[7, 1, 0, 1] = np.inf
    np.save(path, values)
    assert LatentStore(path).verify() == [f"{path}: latent 7 is not finite"]


def test_bad_latents_are_named(latents, tmp_path):
    path, values = latents
    with pytest.raises(FileNotFoundError, match="no such file: .*nowhere.npy"):
        LatentStore(tmp_path / "nowhere.npy")
    for array, reason in (
        (values.astype(np.float64), "expected float16 or float32, got float64"),
        (values[:, 0], r"expected shape \[n, c, H, H\], got \[9, 2, 2\]"),
        (values[:0], r"expected shape \[n, c, H, H\], got \[0, 4, 2, 2\]"),
        (np.asfortranarray(values), "expected little-endian numbers in C order"),
        (values.astype(values.dtype.newbyteorder(">")), "expected little-endian numbers"),
        (np.array([None]), "expected little-endian numbers"),
    ):
        np.save(path, array, allow_pickle=True)
        with pytest.raises(ValueError, match=f"train.npy: {reason}"):
            LatentStore(path)
    np.save(path, values)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"train.npy: expected \d+ bytes, got \d+"):
        LatentStore(path)
    path.write_bytes(b"not numpy")
    with pytest.raises(ValueError, match=r"train.npy: not a .npy file that can be read"):
        NpyFile.open(path)
