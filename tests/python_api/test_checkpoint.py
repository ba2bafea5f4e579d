import pickle
import subprocess
import sys

import pytest
import torch

from flowops.api import TarFlow, load_model, save_model
from flowops.api.checkpoint import load_into, read_tensors, save_tensors, write_whole

CONFIG = {
    "in_channels": 1,
    "img_size": 4,
    "patch_size": 2,
    "channels": 64,
    "num_blocks": 2,
    "layers_per_block": 1,
    "num_classes": 2,
}


@pytest.fixture
def model():
    return TarFlow(**CONFIG)


def test_round_trip_with_metadata(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(model, path, note={"steps": 3})
    loaded = load_model(path)
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert read_tensors(path)[1]["note"] == {"steps": 3}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_checkpoint_of_the_reference_program(model, tmp_path, suffix):
    path = tmp_path / f"reference.{suffix}"
    state = model.state_dict() | {"blocks.0.attn_mask": torch.ones(4, 4).tril()}
    if suffix == "pth":
        torch.save(state, path)
    else:
        save_tensors(path, state, {})
    loaded = load_model(path, **CONFIG)
    assert torch.equal(loaded.blocks[1].proj_in.weight, model.blocks[1].proj_in.weight)
    with pytest.raises(ValueError, match="weights without a configuration: pass TarFlow's argum"):
        load_model(path)


def test_a_file_that_does_not_fit_names_keys_and_shapes(model, tmp_path):
    path = tmp_path / "other.safetensors"
    save_model(TarFlow(**CONFIG | {"num_classes": 3, "num_blocks": 3}), path)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    expected = r"blocks\.2\.attn_blocks\.\S+ is not in the model; .* and \d+ more"
    with pytest.raises(ValueError, match=expected):
        load_into(model, read_tensors(path)[0], path)
    save_model(TarFlow(**CONFIG | {"num_classes": 3}), path)
    expected = r"blocks\.0\.class_embed is \[3, 1, 64\], expected \[2, 1, 64\]"
    with pytest.raises(ValueError, match=expected):
        load_into(model, read_tensors(path)[0], path)
    state = model.state_dict()
    del state["var"]
    with pytest.raises(ValueError, match="var is missing"):
        load_into(model, state, "memory")
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(model, tmp_path, bad):
    path = tmp_path / "bad.safetensors"
    broken = TarFlow(**CONFIG)
    broken.blocks[1].proj_out.bias.data[3] = bad
    save_model(broken, path)
    with pytest.raises(
        ValueError, match=r"bad.safetensors: blocks\.1\.proj_out\.bias holds values"
    ):
        load_model(path)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("keep", [0, 7, 1000])
def test_truncated_files(model, tmp_path, suffix, keep):
    path = tmp_path / f"cut.{suffix}"
    if suffix == "pth":
        torch.save(model.state_dict(), path)
    else:
        save_model(model, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"cut\.{suffix}: truncated"):
        load_model(path, **CONFIG)


class Payload:
    def __reduce__(self):
        return (print, ("a stranger's code runs",))


def test_a_pickle_with_code_is_refused(tmp_path, capsys):
    path = tmp_path / "stranger.pth"
    torch.save({"var": Payload()}, path)
    with pytest.raises(ValueError, match=r"stranger\.pth: truncated, or more than a table of tens"):
        load_model(path, **CONFIG)
    path.write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(ValueError, match=r"stranger\.pth"):
        load_model(path, **CONFIG)
    assert "stranger's code runs" not in capsys.readouterr().out


def test_a_table_of_other_things_is_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"step": 3}, path)
    with pytest.raises(ValueError, match="expected a table of tensors"):
        load_model(path, **CONFIG)


def test_a_missing_file_and_a_missing_directory(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file: .*nowhere"):
        load_model(tmp_path / "nowhere.safetensors")
    target = tmp_path / "nowhere" / "model.safetensors"
    with pytest.raises(OSError, match="could not write .*nowhere/model.safetensors"):
        save_model(model, target)


def test_a_full_disk_leaves_the_previous_file_whole(tmp_path):
    """In a process whose files may not grow past 4 KB, so that the write fails half-way."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"previous")
    code = f"""
import errno, resource, signal
from flowops.api import TarFlow, save_model
model = TarFlow(**{CONFIG})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_model(model, {str(path)!r})
except OSError as error:
    assert error.errno == errno.EFBIG
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"could not write {path}, the previous file is intact" in result.stdout
    assert path.read_bytes() == b"previous"
    assert list(tmp_path.iterdir()) == [path]


def test_write_whole_replaces(tmp_path):
    path = tmp_path / "data"
    write_whole(path, b"one")
    write_whole(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]
