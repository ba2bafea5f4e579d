import errno
import json
import os
import resource
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open

from dist_helpers import run_ranks
from flowops.api.parallel import World, local, whole
from flowops.api.run_checkpoints import Checkpoints, check_same_data, read_state


def tensors(value=0.0):
    generator = torch.Generator().manual_seed(1)
    return {
        "model.weight": torch.randn(5, 3, generator=generator) + value,
        "model.bias": torch.randn(1, generator=generator) + value,
        "optimizer.weight.step": torch.tensor(7.0 + value),
        "ema.half": (torch.randn(4, generator=generator) + value).bfloat16(),
    }


def save(checkpoints, step, value=None):
    checkpoints.save(tensors(step if value is None else value), {"step": step}, step)
    checkpoints.finish()


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def assert_holds(checkpoints, path, value):
    loaded = {name: torch.zeros_like(t) for name, t in tensors().items()}
    checkpoints.load(path, loaded)
    for name, t in tensors(value).items():
        assert torch.equal(loaded[name], t), name


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path, World())


@pytest.fixture
def held(monkeypatch):
    """Holds all writing of tensors until it is set."""
    go, good = threading.Event(), dcp.HuggingFaceStorageWriter.write_data

    def write_data(*args):
        assert go.wait(60)
        return good(*args)

    monkeypatch.setattr(dcp.HuggingFaceStorageWriter, "write_data", write_data)
    yield go
    go.set()


def test_a_save_sees_the_tensors_of_the_call(checkpoints, tmp_path, held):
    saved = tensors()
    checkpoints.save(saved, {"step": 3}, 3)
    for t in saved.values():
        t.fill_(float("nan"))
    checkpoints.poll()
    assert names(tmp_path) == [".step-00000003.partial"]
    assert checkpoints.latest() is None
    held.set()
    checkpoints.finish()
    assert names(tmp_path) == ["step-00000003"]
    assert_holds(checkpoints, tmp_path / "step-00000003", 0)


def test_poll_completes_a_save(checkpoints, tmp_path):
    checkpoints.poll()
    checkpoints.save(tensors(), {}, 3)
    while names(tmp_path) != ["step-00000003"]:
        checkpoints.poll()
    checkpoints.poll()
    checkpoints.finish()
    assert checkpoints.latest() == tmp_path / "step-00000003"


def test_the_next_save_waits_for_the_one_at_work(checkpoints, tmp_path, held):
    checkpoints.save(tensors(1), {}, 1)
    threading.Timer(0.2, held.set).start()
    checkpoints.save(tensors(2), {}, 2)
    assert "step-00000001" in names(tmp_path)
    checkpoints.finish()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_keeps_the_newest(tmp_path, keep):
    checkpoints = Checkpoints(tmp_path, World(), keep)
    for step in (9, 10, 11, 100_000_000):
        save(checkpoints, step)
    kept = ["step-00000009", "step-00000010", "step-00000011", "step-100000000"][-keep:]
    assert names(tmp_path) == sorted(kept)
    assert checkpoints.latest() == tmp_path / "step-100000000"
    for path in kept:
        assert_holds(checkpoints, tmp_path / path, int(path.removeprefix("step-")))


def test_holds_tensors_and_json_and_no_pickle(checkpoints, tmp_path):
    state = {"step": 4, "train_config": {"lr": 1e-3}, "precision": "fp32"}
    checkpoints.save(tensors(), state, 4)
    checkpoints.finish()
    path = tmp_path / "step-00000004"
    found = {}
    for file in path.iterdir():
        if file.name == "state.json":
            continue
        assert file.suffix == ".safetensors"
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert found.keys() == tensors().keys()
    for name, t in tensors().items():
        assert torch.equal(found[name], t)
        assert found[name].dtype == t.dtype
    written = read_state(path)
    sizes = written.pop("files")
    assert written == state
    assert sizes == {f.name: f.stat().st_size for f in path.glob("*.safetensors")}


def test_files_are_synced_before_the_name_and_the_name_after(checkpoints, tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(descriptor):
        fsync(descriptor)
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))

    def noted_replace(source, target):
        replace(source, target)
        events.append(("name", str(target)))

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    save(checkpoints, 2)
    path, partial = tmp_path / "step-00000002", tmp_path / ".step-00000002.partial"
    named = events.index(("name", str(path)))
    before = [where for what, where in events[:named] if what == "sync"]
    for file in path.glob("*.safetensors"):
        assert str(partial / file.name) in before
    state = max(i for i, e in enumerate(events) if e == ("name", str(partial / "state.json")))
    assert any("state.json" in where for what, where in events[:state] if what == "sync")
    assert ("sync", str(partial)) in events[state:named]  # the names of the files
    assert ("sync", str(tmp_path)) in events[named:]


# --- damage --------------------------------------------------------------------------------------


def cut(path):
    file = next(path.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 1)


def remove(path):
    next(path.glob("*.safetensors")).unlink()


def forget(path):
    (path / "state.json").unlink()


def garble(path):
    (path / "state.json").write_bytes(b"\xff\x00{")


def hide(path):
    state = json.loads((path / "state.json").read_text())
    del state["files"]
    (path / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut, r"\.safetensors has \d+ of \d+ bytes"),
        (remove, r"\.safetensors is missing"),
        (forget, r"is not a checkpoint of a training run \(.*No such file"),
        (garble, r"is not a checkpoint of a training run"),
        (hide, r"state.json lists no files"),
    ],
)
def test_latest_passes_over_the_damaged(tmp_path, harm, said):
    checkpoints = Checkpoints(tmp_path, World(), keep=3)
    for step in (1, 2, 3):
        save(checkpoints, step)
    harm(tmp_path / "step-00000003")
    with pytest.warns(UserWarning, match=rf"step-00000003 is passed over: .*{said}"):
        assert checkpoints.latest() == tmp_path / "step-00000002"
    assert_holds(checkpoints, tmp_path / "step-00000002", 2)
    harm(tmp_path / "step-00000002")
    harm(tmp_path / "step-00000001")
    with pytest.warns(UserWarning, match="is passed over") as warned:
        assert checkpoints.latest() is None
    assert len(warned) == 3


def test_partial_ones_are_never_taken_and_swept(checkpoints, tmp_path):
    save(checkpoints, 1)
    for step in (1, 2):
        partial = tmp_path / f".step-{step:08d}.partial"
        partial.mkdir()
        for file in (tmp_path / "step-00000001").iterdir():
            (partial / file.name).write_bytes(file.read_bytes())
    assert checkpoints.latest() == tmp_path / "step-00000001"
    checkpoints.begin(1)
    assert names(tmp_path) == ["step-00000001"]


def test_begin_removes_what_the_run_makes_again(tmp_path):
    checkpoints = Checkpoints(tmp_path, World(), keep=5)
    for step in (5, 10, 15):
        save(checkpoints, step)
    cut(tmp_path / "step-00000015")
    leftover = tmp_path / ".step-00000015.partial"
    leftover.mkdir()
    (leftover / "state.json").write_text("{}")
    checkpoints.begin(5)
    assert names(tmp_path) == ["step-00000005"]
    checkpoints.begin(0)
    assert names(tmp_path) == []
    Checkpoints(tmp_path / "none", World()).begin(0)


def test_other_names_are_left_alone(checkpoints, tmp_path):
    save(checkpoints, 1)
    for name in ("step-best", "step-00000009.bak", "notes"):
        (tmp_path / name).mkdir()
    assert checkpoints.latest() == tmp_path / "step-00000001"
    checkpoints.begin(0)
    assert names(tmp_path) == ["notes", "step-00000009.bak", "step-best"]


def test_a_save_replaces_what_a_crash_left(checkpoints, tmp_path):
    partial = tmp_path / ".step-00000002.partial"
    partial.mkdir()
    (partial / "shard-00009-model-00001-of-00001.safetensors").write_bytes(b"half")
    save(checkpoints, 2)
    assert names(tmp_path) == ["step-00000002"]
    assert_holds(checkpoints, tmp_path / "step-00000002", 2)


# --- what does not fit ---------------------------------------------------------------------------


def test_what_does_not_fit_is_named(checkpoints, tmp_path):
    save(checkpoints, 1)
    path = tmp_path / "step-00000001"
    other = tensors() | {"model.weight": torch.zeros(5, 4)}
    with pytest.raises(ValueError, match=r"step-00000001 does not fit this run: .*model.weight"):
        checkpoints.load(path, other)
    with pytest.raises(ValueError, match=r"step-00000001 does not fit this run: .*model.more"):
        checkpoints.load(path, tensors() | {"model.more": torch.zeros(2)})
    with pytest.raises(ValueError, match="nowhere is not a checkpoint of a training run"):
        read_state(tmp_path / "nowhere")


def test_other_data_is_named():
    ours = {"images": 10, "classes": 2, "crc32": 1}
    check_same_data(ours, ours, Path("it"))
    with pytest.raises(ValueError, match="data: it was trained on as many images, but other ones"):
        check_same_data(ours | {"crc32": 2}, ours, Path("it"))
    with pytest.raises(ValueError, match="other images: images 9, this run has 10$"):
        check_same_data(ours | {"images": 9, "crc32": 2}, ours, Path("it"))


# --- writes that fail ----------------------------------------------------------------------------


def no_room(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk(checkpoints, tmp_path, monkeypatch):
    save(checkpoints, 1)
    with monkeypatch.context() as patch:
        patch.setattr(dcp.HuggingFaceStorageWriter, "write_data", no_room)
        checkpoints.save(tensors(2), {}, 2)
        with pytest.raises(OSError, match=r"could not write .*step-00000002, earlier .*No space"):
            checkpoints.finish()
    assert names(tmp_path) == ["step-00000001"]
    checkpoints.finish()
    save(checkpoints, 2)
    assert checkpoints.latest() == tmp_path / "step-00000002"


def test_a_full_disk_is_told_by_the_next_save(checkpoints, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(dcp.HuggingFaceStorageWriter, "write_data", no_room)
        checkpoints.save(tensors(), {}, 1)
        while not checkpoints._pending[1].done():
            pass
        checkpoints.poll()
    with pytest.raises(OSError, match="could not write .*step-00000001"):
        checkpoints.save(tensors(), {}, 2)
    assert names(tmp_path) == []


def test_a_disk_that_is_full_when_the_name_is_given(checkpoints, tmp_path, monkeypatch):
    checkpoints.save(tensors(), {}, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_room)
        with pytest.raises(OSError, match="could not write .*step-00000001"):
            checkpoints.finish()
    assert names(tmp_path) == []


def test_a_file_that_may_not_grow(checkpoints, tmp_path):
    """A write that the kernel refuses halfway through the file."""
    save(checkpoints, 1)
    big = {"model.weight": torch.zeros(2**18)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        checkpoints.save(big, {}, 2)
        with pytest.raises(OSError, match="could not write .*step-00000002, earlier .*too large"):
            checkpoints.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step-00000001"]


def test_close_lets_the_save_at_work_end(checkpoints, tmp_path, held, monkeypatch):
    """And keeps it, if it went well."""
    checkpoints.close()
    checkpoints.save(tensors(), {}, 1)
    threading.Timer(0.2, held.set).start()
    checkpoints.close()
    assert checkpoints.latest() == tmp_path / "step-00000001"
    monkeypatch.setattr(dcp.HuggingFaceStorageWriter, "write_data", no_room)
    checkpoints.save(tensors(), {}, 2)
    checkpoints.close()
    assert names(tmp_path) == ["step-00000001"]


def test_a_directory_that_can_not_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Checkpoints(tmp_path / "file" / "checkpoints", World()).save(tensors(), {}, 1)


# --- two processes -------------------------------------------------------------------------------


def rewrite_in_two(world, folder):
    """Reads what one process wrote into parts, whose sizes do not divide, and writes the parts."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world.size,))
    checkpoints = Checkpoints(Path(folder), world)
    parts = {
        name: distribute_tensor(torch.zeros_like(t), mesh, [Shard(0)]) if t.dim() else t.zero_()
        for name, t in tensors().items()
    }
    checkpoints.load(Path(folder) / "step-00000001", parts)
    rows = {name: len(local(t)) for name, t in parts.items() if t.dim()}
    same = [name for name, t in tensors(1).items() if torch.equal(whole(parts[name]), t)]
    for t in parts.values():
        local(t).add_(1)
    checkpoints.save(parts, {}, 2)
    for t in parts.values():
        local(t).zero_()
    while world.rank == 0 and not (Path(folder) / "step-00000002").exists():
        checkpoints.poll()
    checkpoints.finish()
    return {"rows": rows, "same": same}


def test_whole_tensors_and_parts_are_the_same_checkpoint(checkpoints, tmp_path):
    save(checkpoints, 1)
    ranks = run_ranks(2, rewrite_in_two, str(tmp_path))
    assert [rank["rows"]["model.weight"] for rank in ranks] == [3, 2]
    assert [rank["rows"]["model.bias"] for rank in ranks] == [1, 0]
    assert all(rank["same"] == list(tensors()) for rank in ranks)
    path = tmp_path / "step-00000002"
    assert len(list(path.glob("*.safetensors"))) == 2
    loaded = {name: torch.zeros_like(t) for name, t in tensors().items()}
    checkpoints.load(path, loaded)
    for name, t in tensors(1).items():
        assert torch.equal(loaded[name], t + 1), name
