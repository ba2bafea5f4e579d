import contextlib
import errno
import gzip
import io
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from flowops.api import prepare_readers
from flowops.api.cli import main
from flowops.api.cli_data import data as data_command
from flowops.api.data import decode_image, read_image
from flowops.api.prepare import PrepareConfig, PrepareInterrupted, prepare
from flowops.api.prepare_sources import find_source
from flowops.api.store import ImageStore

SIZE = 8
GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.integers(0, 256, (12, 20, 24, 3), dtype=np.uint8)
LABELS = [k % 3 for k in range(12)]


def encoded(k, suffix="png"):
    file = io.BytesIO()
    Image.fromarray(IMAGES[k]).save(file, {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[suffix])
    return file.getvalue()


def expected(k, suffix="png", channels=3):
    return decode_image(io.BytesIO(encoded(k, suffix)), SIZE, channels)


def write_folder(folder, count=12):
    for k in range(count):
        path = folder / f"n{LABELS[k]:02d}" / f"{k:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(k))
    return folder


def tar_bytes(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def samples(numbers):
    for k in numbers:
        yield f"a/{k:04d}.png", encoded(k)
        yield f"a/{k:04d}.cls", f"{LABELS[k]}\n".encode()


def write_tars(folder):
    folder.mkdir()
    for shard in range(3):
        members = samples(range(4 * shard, 4 * shard + 4))
        (folder / f"train-{shard:04d}.tar").write_bytes(tar_bytes(members))
    return folder


def write_parquets(folder, names=("a", "b", "c"), images=None, struct=True):
    folder.mkdir()
    images = [encoded(k) for k in range(12)] if images is None else images
    column = [{"bytes": b, "path": None} for b in images] if struct else images
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    schema = pa.schema([("image", kind), ("label", pa.int64())])
    if names:
        features = {"label": {"names": list(names), "_type": "ClassLabel"}}
        about = json.dumps({"info": {"features": features}})
        schema = schema.with_metadata({"huggingface": about})
    for shard in range(3):
        rows = slice(4 * shard, 4 * shard + 4)
        columns = {"image": column[rows], "label": LABELS[rows]}
        pq.write_table(
            pa.table(columns, schema=schema), folder / f"train-{shard:05d}-of-00003.parquet"
        )
    return folder


NPZ_PIXELS = GENERATOR.integers(0, 256, (12, 3 * SIZE * SIZE), dtype=np.uint8)


def write_npzs(folder, labels=None):
    folder.mkdir()
    labels = np.array(LABELS) + 1 if labels is None else labels
    for shard in range(3):
        rows = slice(4 * shard, 4 * shard + 4)
        mean = NPZ_PIXELS.mean(0)
        path = folder / f"train_data_batch_{shard + 1}.npz"
        np.savez(path, data=NPZ_PIXELS[rows], labels=labels[rows], mean=mean)
    return folder


def run(source, out, workers=0, max_skipped=0.0, **config):
    result = prepare(
        source,
        out,
        PrepareConfig(**{"img_size": SIZE, "shard_images": 5, **config}),
        workers=workers,
        max_skipped=max_skipped,
    )
    return ImageStore(out), result


def everything(store):
    return store[torch.arange(len(store))]


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def by_class():
    return sorted(range(12), key=lambda k: (LABELS[k], k))


# --- sources -------------------------------------------------------------------------------------


def test_a_folder_of_classes(tmp_path):
    store, result = run(str(write_folder(tmp_path / "source")), tmp_path / "store")
    assert (result.images, result.shards, result.kept, result.classes) == (12, 3, 0, 3)
    assert store.class_names == ("n00", "n01", "n02")
    found = everything(store)
    assert found.labels.tolist() == sorted(LABELS)
    assert torch.equal(found.pixels, torch.stack([expected(k) for k in by_class()]))
    assert store.verify() == []


def test_a_flat_folder_has_no_labels(tmp_path):
    source = tmp_path / "source" / "deep"
    write_folder(source)
    (source / ".cache").mkdir()
    (source / ".cache" / "thumb.png").write_bytes(encoded(0))
    flat = source / "n00"
    store, _ = run(str(flat), tmp_path / "store")
    assert (len(store), store.class_names, everything(store).labels) == (4, (), None)
    assert not list((tmp_path / "store").glob("labels-*"))
    one_class, _ = run(str(source.parent), tmp_path / "other")
    assert (len(one_class), one_class.class_names) == (12, ())


def test_grey_and_other_sizes(tmp_path):
    source = write_folder(tmp_path / "source")
    store, _ = run(str(source), tmp_path / "store", channels=1, img_size=5)
    path = source / "n00" / "00.png"
    assert torch.equal(everything(store).pixels[0], read_image(path, 5, 1))


@pytest.mark.parametrize("form", ["folder", "glob", "range", "names", "gz"])
def test_tar_shards(tmp_path, form):
    folder = write_tars(tmp_path / "source")
    if form == "gz":
        for path in folder.glob("*.tar"):
            path.with_suffix(".tar.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    source = {
        "folder": str(folder),
        "gz": str(folder),
        "glob": str(folder / "train-*.tar"),
        "range": str(folder / "train-{0000..0002}.tar"),
        "names": sorted(str(path) for path in folder.iterdir()),
    }[form]
    store, result = run(source, tmp_path / "store")
    assert (result.images, result.shards, store.class_names) == (12, 3, ("0", "1", "2"))
    assert everything(store).labels.tolist() == LABELS
    assert torch.equal(everything(store).pixels, torch.stack([expected(k) for k in range(12)]))


def test_tar_members_of_many_kinds(tmp_path):
    members = [
        ("x/0.meta.txt", b"ignored"),
        ("x/0.JPG", encoded(0, "jpg")),
        ("x/0.json", b'{"label": 4}'),
        ("x/._0.jpg", b"left by a Mac"),
        ("x/1.webp", encoded(1, "webp")),
        ("x/1.json", b'{"cls": 1, "width": 3}'),
        ("x/2.seg.png", b"another kind of image"),
        ("x/2.png", encoded(2)),
        ("x/2.cls", b" 2 "),
        ("y/2.png", encoded(3)),
        ("y/2.cls", b"0"),
        ("readme.json", b"[1]"),
    ]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    store, _ = run(str(tmp_path / "a.tar"), tmp_path / "store")
    found = everything(store)
    assert found.labels.tolist() == [4, 1, 2, 0]
    want = [expected(0, "jpg"), expected(1, "webp"), expected(2), expected(3)]
    assert torch.equal(found.pixels, torch.stack(want))
    assert len(store.class_names) == 5


def test_tars_without_labels(tmp_path):
    members = [(f"{k}.png", encoded(k)) for k in range(3)]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    store, _ = run(str(tmp_path / "a.tar"), tmp_path / "store")
    assert everything(store).labels is None


@pytest.mark.parametrize("struct", [True, False])
def test_parquet(tmp_path, struct):
    folder = write_parquets(tmp_path / "source", struct=struct)
    store, _ = run(str(folder), tmp_path / "store")
    assert store.class_names == ("a", "b", "c")
    assert everything(store).labels.tolist() == LABELS
    assert torch.equal(everything(store).pixels, torch.stack([expected(k) for k in range(12)]))


def test_parquet_columns_are_chosen(tmp_path):
    table = pa.table({"jpg": [encoded(0)], "fine": [7], "label": [1]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = str(tmp_path / "a.parquet")
    store, _ = run(source, tmp_path / "store", image_column="jpg", label_column="fine")
    assert everything(store).labels.tolist() == [7]
    with pytest.raises(ValueError, match=r"a.parquet: no column 'image', it has jpg, fine, label"):
        run(source, tmp_path / "other")
    with pytest.raises(ValueError, match=r"column 'fine': expected images, got int64"):
        run(source, tmp_path / "other", image_column="fine")
    with pytest.raises(ValueError, match=r"column 'jpg': expected integers, got binary"):
        run(source, tmp_path / "other", image_column="jpg", label_column="jpg")


def test_npz_batches_keep_their_bytes(tmp_path):
    store, _ = run(str(write_npzs(tmp_path / "source")), tmp_path / "store", classes=10)
    assert everything(store).labels.tolist() == LABELS
    assert torch.equal(
        everything(store).pixels, torch.from_numpy(NPZ_PIXELS).view(12, 3, SIZE, SIZE)
    )
    assert len(store.class_names) == 10


def test_npz_batches_are_resized_and_made_grey(tmp_path):
    folder = write_npzs(tmp_path / "source")
    store, _ = run(str(folder), tmp_path / "store", img_size=4, channels=1)
    pixels = NPZ_PIXELS[0].reshape(3, SIZE, SIZE).transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    file.seek(0)
    assert torch.equal(everything(store).pixels[0], decode_image(file, 4, 1))


def test_modes_of_pixels():
    deep = np.full((8, 8), 200 * 256 + 17, dtype=np.uint16)
    palette = Image.new("P", (8, 8), 3)
    palette.putpalette([0, 0, 0] * 3 + [10, 20, 30])
    cases = {
        (200, 200, 200): (Image.fromarray(deep), {}),
        (10, 20, 30): (palette, {"transparency": bytes([255, 0, 0, 9])}),
        (7, 8, 9): (Image.new("RGBA", (8, 8), (7, 8, 9, 0)), {}),
        (50, 50, 50): (Image.new("LA", (8, 8), (50, 0)), {}),
    }
    for color, (image, options) in cases.items():
        file = io.BytesIO()
        image.save(file, "PNG", **options)
        file.seek(0)
        assert decode_image(file, 4, 3)[:, 0, 0].tolist() == list(color)
    file = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(file, "TIFF")
    file.seek(0)
    assert decode_image(file, 4, 3)[:, 0, 0].tolist() == [255, 0, 0]


def test_unclear_sources_are_named(tmp_path):
    def refused(pattern, *names):
        with pytest.raises((ValueError, FileNotFoundError), match=pattern):
            find_source([str(name) for name in names], 10)

    refused("no such file: .*nowhere", tmp_path / "nowhere")
    refused("no such file: .*a-03.tar", tmp_path / "a-{03..04}.tar")
    refused(r"range \{4..3\} of .* is empty", tmp_path / "a-{4..3}.tar")
    refused("expected a folder, or files")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("empty holds neither images", empty)
    text = tmp_path / "a.txt"
    text.write_text("no images")
    refused(r"expected .tar, .parquet or .npz files of one kind, got .*a.txt", text)
    splits = write_parquets(tmp_path / "splits")
    (splits / "test-00000-of-00003.parquet").touch()
    refused(r"several names \(test-\*-of-\*.parquet, train-\*-of-\*.parquet\)", splits)
    mixed = write_tars(tmp_path / "mixed")
    (mixed / "more").mkdir()
    refused("mixed holds train-0000.tar and more: name the files", mixed)
    refused("expected one folder, or files; .*mixed is a folder", mixed, text)
    folder = write_folder(tmp_path / "folder")
    (folder / "loose.jpg").write_bytes(encoded(0))
    refused("folder holds folders, and images as loose.jpg", folder)
    write_folder(tmp_path / "imagenet" / "train")
    write_folder(tmp_path / "imagenet" / "val")
    refused(r"\(train, val\) look like splits", tmp_path / "imagenet")
    (tmp_path / "a.tar").write_bytes(b"not a tar" * 200)
    refused("a.tar: not a tar file", tmp_path / "a.tar")
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    refused("a.parquet: truncated, or not a parquet file", tmp_path / "a.parquet")
    (tmp_path / "a.npz").write_bytes(b"not a zip")
    refused("a.npz: truncated, or not an .npz", tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", data=np.zeros((3, 5), np.uint8))
    refused(r"b.npz: expected data uint8 \[n, 3\*S\*S\], got uint8 \[3, 5\]", tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", x=np.zeros(3))
    refused("c.npz: truncated, or not an .npz with `data`", tmp_path / "c.npz")
    other = write_parquets(tmp_path / "other", names=("x", "y", "z"))
    (other / "train-00009-of-00003.parquet").write_bytes(
        (splits / "train-00000-of-00003.parquet").read_bytes()
    )
    refused("train-00009.*: its classes are not those of", other)


# --- what is broken ------------------------------------------------------------------------------


def skips(store):
    return [json.loads(line) for line in (store.path / "skipped.jsonl").read_text().splitlines()]


def test_a_broken_file_in_a_folder(tmp_path):
    source = write_folder(tmp_path / "source")
    (source / "n00" / "00.png").write_bytes(encoded(0)[:60])
    (source / "n01" / "01.png").write_bytes(b"")
    out = tmp_path / "store"
    with pytest.raises(
        ValueError, match=r"2 of 12 images were skipped, more than --max-skipped 0 "
    ):
        run(str(source), out)
    assert not (out / "index.json").exists()
    store, result = run(str(source), out, max_skipped=0.2)
    assert (result.images, result.skipped, result.kept, store.skipped) == (10, 2, 3, 2)
    assert [skip["name"] for skip in skips(store)] == ["n00/00.png", "n01/01.png"]
    assert "truncated" in skips(store)[0]["reason"]
    good = [k for k in by_class() if k > 1]
    assert torch.equal(everything(store).pixels, torch.stack([expected(k) for k in good]))


def test_broken_samples_in_a_tar(tmp_path):
    members = [
        *samples([0]),
        ("a/x1.png", b"not an image"),
        ("a/x1.cls", b"1"),
        ("a/x2.png", encoded(2)),
        ("a/x3.png", encoded(2)),
        ("a/x3.cls", b"two"),
        ("a/x4.cls", b"2"),
        ("a/x5.png", encoded(2)),
        ("a/x5.cls", b"-1"),
        ("a/x6.png", encoded(2)),
        ("a/x6.json", b'{"label": 1.5}'),
        *samples([3]),
    ]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    store, _ = run(str(tmp_path / "a.tar"), tmp_path / "store", max_skipped=0.8)
    assert everything(store).labels.tolist() == [LABELS[0], LABELS[3]]
    reasons = {skip["name"][-2:]: skip["reason"] for skip in skips(store)}
    assert "of no known format" in reasons["x1"]
    assert reasons["x2"] == "no label"
    assert "not an integer" in reasons["x3"]
    assert reasons["x4"] == "a label without an image"
    assert "label -1, expected from 0" in reasons["x5"]
    assert "got 1.5" in reasons["x6"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "cut", ["in an image", "in a header", "between members", "a broken header"]
)
def test_a_tar_that_ends_early(tmp_path, cut, packed):
    whole = tar_bytes(samples(range(4)))
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        last = archive.getmember("a/0003.png")
    keep = {
        "in an image": last.offset_data + 100,
        "in a header": last.offset + 100,
        "between members": last.offset,
    }.get(cut, last.offset)
    data = whole[:keep] + (b"x" * 2000 if cut == "a broken header" else b"")
    path = tmp_path / ("a.tar.gz" if packed else "a.tar")
    path.write_bytes(gzip.compress(data) if packed else data)
    store, _ = run(str(path), tmp_path / "store", max_skipped=0.5)
    assert everything(store).labels.tolist() == LABELS[:3]
    (skip,) = skips(store)
    assert skip["name"] == path.name
    assert "ends early or is broken after a/000" in skip["reason"]


def test_a_gzip_that_ends_early(tmp_path):
    data = gzip.compress(tar_bytes(samples([*range(12)] * 3)))
    (tmp_path / "a.tar.gz").write_bytes(data[: len(data) * 3 // 4])
    store, _ = run(str(tmp_path / "a.tar.gz"), tmp_path / "store", max_skipped=0.5)
    assert 0 < len(store) < 36
    assert "ends early" in skips(store)[0]["reason"]


def test_broken_rows_in_parquet(tmp_path):
    images = [encoded(k) for k in range(12)]
    images[2], images[7] = b"not an image", None
    source = str(write_parquets(tmp_path / "source", images=images))
    store, _ = run(source, tmp_path / "store", max_skipped=0.5)
    found = [(skip["shard"], skip["name"].split(", ")[1], skip["images"]) for skip in skips(store)]
    assert found == [(0, "row 2", 1), (1, "row 3", 1)]
    assert "no bytes" in skips(store)[1]["reason"]


def test_a_broken_page_of_parquet(tmp_path):
    folder = write_parquets(tmp_path / "source")
    path = folder / "train-00001-of-00003.parquet"
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)
    path.write_bytes(data)
    store, _ = run(str(folder), tmp_path / "store", max_skipped=0.5)
    assert everything(store).labels.tolist() == LABELS[:4] + LABELS[8:]
    (skip,) = skips(store)
    assert (skip["name"], skip["images"]) == (path.name, 4)
    assert "unreadable from row 0 on" in skip["reason"]


def test_labels_outside_of_the_classes(tmp_path):
    source = str(write_parquets(tmp_path / "source", names=("a", "b")))
    store, _ = run(source, tmp_path / "store", max_skipped=0.5)
    assert len(store) == 8
    assert skips(store)[0]["reason"] == "label 2, expected from 0 to 1"
    labels = np.array([0, *LABELS[1:]]) + np.array([0] + [1] * 11)
    store, _ = run(str(write_npzs(tmp_path / "npz", labels)), tmp_path / "other", max_skipped=0.5)
    assert len(store) == 11
    assert skips(store)[0]["reason"].startswith("label -1, expected from 0")


def test_a_broken_batch_of_npz_is_refused(tmp_path):
    """Its checksum covers all of it, so nothing says which images are good."""
    folder, out = tmp_path / "source", tmp_path / "store"
    folder.mkdir()
    for batch in (1, 2):
        np.savez(folder / f"batch_{batch}.npz", data=np.tile(NPZ_PIXELS, (30, 1)))
    path = folder / "batch_2.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[:400] + bytes([whole[400] ^ 1]) + whole[401:])
    with pytest.raises(ValueError, match=r"batch_2.npz: broken \(Bad CRC-32"):
        run(str(folder), out)
    assert sorted(contents(out)) == ["images-00000.npy", "prepare.json", "shard-00000.json"]
    path.write_bytes(whole)
    store, result = run(str(folder), out)
    assert (len(store), result.kept, store.class_names) == (720, 1, ())
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"batch_2.npz: truncated, or not an .npz with `data`"):
        run(str(folder), out)


def test_nothing_but_broken_images(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 of 1 images were skipped.*first a.png: unreadable"):
        run(str(source), tmp_path / "store", max_skipped=1.0)


# --- going on ------------------------------------------------------------------------------------


def test_the_store_does_not_depend_on_the_number_of_workers(tmp_path):
    source = write_folder(tmp_path / "source")
    (source / "n02" / "02.png").write_bytes(b"broken")
    stores = [tmp_path / f"store-{workers}" for workers in range(3)]
    for workers, out in enumerate(stores):
        run(str(source), out, workers=workers, max_skipped=0.5)
    assert contents(stores[0]) == contents(stores[1]) == contents(stores[2])
    assert len(contents(stores[0])) == 3 * 3 + 3


def test_what_is_there_is_kept_and_what_is_cut_made_again(tmp_path):
    source, out = write_folder(tmp_path / "source"), tmp_path / "store"
    run(str(source), out)
    before = contents(out)
    os.truncate(out / "images-00001.npy", 300)
    (out / "labels-00002.npy").unlink()
    (out / ".images-00000.npy.123.tmp").write_bytes(b"left by a process that was killed")
    with pytest.raises(ValueError, match=r"images-00001.npy: expected 1,088 bytes, got 300"):
        ImageStore(out)
    _, result = run(str(source), out)
    assert result.kept == 1
    assert contents(out) == before


def test_other_options_are_refused_by_name(tmp_path):
    source, out = write_folder(tmp_path / "source"), tmp_path / "store"
    run(str(source), out)
    with pytest.raises(ValueError, match=r"img_size: .*store was begun with 8, this run has 9"):
        run(str(source), out, img_size=9)
    other = write_folder(tmp_path / "other")
    with pytest.raises(ValueError, match=r"source: .* was begun with .*source, .* has .*other"):
        run(str(other), out)
    (source / "n00" / "new.png").write_bytes(encoded(0))
    with pytest.raises(ValueError, match=r"source: the files of .*source changed since"):
        run(str(source), out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"full is not empty and not a store"):
        run(str(other), tmp_path / "full")
    with pytest.raises(ValueError, match=r"out: .* is inside of the source"):
        run(str(other), other / "store")


def test_bad_arguments_are_named(tmp_path):
    for name, value in {"img_size": 0, "channels": 2, "shard_images": 0, "classes": 2**17}.items():
        with pytest.raises(ValueError, match=f"{name}: expected"):
            PrepareConfig(**{"img_size": 8, name: value})
    source = str(write_parquets(tmp_path / "source"))
    with pytest.raises(ValueError, match="classes: the source names 3, got 4"):
        run(source, tmp_path / "store", classes=4)
    with pytest.raises(ValueError, match="expected workers of at least 0"):
        run(source, tmp_path / "store", workers=-1)


def test_an_interrupt_keeps_what_is_done(tmp_path, monkeypatch):
    source, out = write_folder(tmp_path / "source"), tmp_path / "store"
    decode, count = decode_image, 0

    def interrupted(*arguments):
        nonlocal count
        count += 1
        if count == 8:
            raise KeyboardInterrupt
        return decode(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(prepare_readers, "decode_image", interrupted)
        with pytest.raises(PrepareInterrupted, match="1 of 3 shards are done; the same command"):
            run(str(source), out)
    assert not list(out.glob(".*"))
    with pytest.raises(ValueError, match="not complete yet"):
        ImageStore(out)
    _, result = run(str(source), out)
    assert result.kept == 1
    run(str(source), tmp_path / "straight")
    assert contents(out) == contents(tmp_path / "straight") | {
        "prepare.json": (out / "prepare.json").read_bytes()
    }


def wait_for(found, process):
    limit = time.monotonic() + 60
    while not found():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.002)


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


SLOW = PrepareConfig(img_size=64, shard_images=20)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A source that takes seconds, and the store that it makes."""
    folder = tmp_path_factory.mktemp("slow") / "source"
    file = io.BytesIO()
    Image.fromarray(GENERATOR.integers(0, 256, (800, 800, 3), dtype=np.uint8)).save(file, "JPEG")
    for k in range(240):
        path = folder / f"c{k % 2}" / f"{k:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.getvalue())
    prepare(str(folder), folder.parent / "store", SLOW)
    return folder, contents(folder.parent / "store")


def finish(source, out, whole):
    """Goes on with a store that was begun, which then is as if nothing had happened."""
    assert not (out / "index.json").exists()
    done = len(list(out.glob("shard-*.json")))
    assert 2 <= done < 12
    assert prepare(str(source), out, SLOW).kept == done
    assert contents(out) == whole


def test_a_worker_that_is_killed_is_named(slow, tmp_path):
    source, whole = slow
    out = tmp_path / "store"

    def kill(images):
        if len(list(out.glob("shard-*.json"))) >= 2:
            multiprocessing.active_children()[0].kill()

    named = r"the worker that made shard-000\d\d \(.*was killed by SIGKILL \(out of memory\?\)"
    with pytest.raises(ChildProcessError, match=named):
        prepare(str(source), out, SLOW, workers=2, on_images=kill)
    assert not multiprocessing.active_children()
    assert not list(out.glob(".*"))
    finish(source, out, whole)


@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGINT"])
def test_the_command_is_stopped_in_the_middle(slow, tmp_path, signal_name):
    source, whole = slow
    out = tmp_path / "store"
    command = [sys.executable, "-m", "flowops.api.cli", "data", "prepare", str(source)]
    command += ["--out", str(out), "--img-size", "64", "--shard-images", "20", "--workers", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes, start_new_session=True)
    try:
        wait_for(lambda: len(list(out.glob("shard-*.json"))) >= 2, process)
        workers = children(process.pid)
        if signal_name == "SIGKILL":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    limit = time.monotonic() + 30
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < limit
        time.sleep(0.02)
    if signal_name == "SIGINT":
        assert process.returncode == 130
        assert "of 12 shards are done; the same command goes on from there" in errors
        assert "Traceback" not in errors
        assert not list(out.glob(".*"))
    finish(source, out, whole)


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    source, out = write_folder(tmp_path / "source"), tmp_path / "store"

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda fd: full(fd) if written(fd, "images") else None)
        with pytest.raises(OSError, match=r"could not write .*images-00000.npy: No space left"):
            run(str(source), out)
    assert sorted(contents(out)) == ["prepare.json"]
    assert run(str(source), out)[1].images == 12


def written(descriptor, name):
    return name in os.readlink(f"/proc/self/fd/{descriptor}")


def test_a_file_that_may_not_grow(tmp_path):
    """The real thing, in a process that may only write small files."""
    source, out = write_folder(tmp_path / "source"), tmp_path / "store"

    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, "-m", "flowops.api.cli", "data", "prepare", str(source)]
    command += ["--out", str(out), "--img-size", "64", "--workers", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=small_files, check=False
    )
    assert done.returncode == 1
    assert f"could not write {out / 'images-00000.npy'}: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(contents(out)) == ["prepare.json"]


# --- the command line ----------------------------------------------------------------------------


def test_prepare_verify_info(tmp_path, capsys):
    source, out = write_tars(tmp_path / "source"), tmp_path / "store"
    prepared = ["prepare", str(source), "--out", str(out), "--img-size", "8", "--workers", "1"]
    assert not data_command(prepared)
    printed = capsys.readouterr().out
    assert "12 images, 3 classes, 3 shards (0 kept)" in printed
    assert str(out) in printed
    assert data_command(["verify", str(out)]) == 0
    assert "12 images" in capsys.readouterr().out
    data_command(["info", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert "images   12 of 3 x 8 x 8" in lines
    assert "classes  3 (0, 1, 2)" in lines
    assert "skipped  0" in lines
    data = bytearray((out / "images-00002.npy").read_bytes())
    data[200] ^= 1
    (out / "images-00002.npy").write_bytes(data)
    assert data_command(["verify", str(out)]) == 1
    captured = capsys.readouterr()
    assert "images-00002.npy: expected the checksum" in captured.err
    assert "images-00001" not in captured.err


def test_usage(capsys):
    assert data_command([]) == 2
    assert data_command(["--help"]) == 0
    assert "flowops data COMMAND" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected one of prepare, verify, info, got 'clean'"):
        data_command(["clean"])
    assert main is not None
