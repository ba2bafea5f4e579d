import json
import os
import subprocess
import sys

import pytest

from flowops.api import TarFlow, load_model
from flowops.api.cli import COMMANDS, main

TINY = ["--data", "digits", "--patch-size", "4", "--channels", "64", "--blocks", "2"]
TINY += ["--layers", "1", "--steps", "20", "--batch-size", "16", "--held-out", "50"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("train") / "run"
    assert main(["train", *TINY, "--out", str(out)]) == 0
    return out


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert main([]) == 2


def test_unknown_command(capsys):
    assert main(["fly"]) == 2
    assert "no command 'fly'" in capsys.readouterr().err


def test_doctor_says_what_runs_and_why(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("flowops", "torch", "reference usable", "\n  triton    ", "affine_update"):
        assert word in text


def test_doctor_needs_no_extras():
    code = """
import sys
for name in ("tyro", "rich", "PIL", "matplotlib"):
    sys.modules[name] = None
from flowops.api.cli import main
assert main(["doctor"]) == 0
assert main(["train"]) == 1
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "train needs the package tyro: pip install 'flowops[demo]'" in result.stderr


def test_train_leaves_its_files(trained):
    names = {path.name for path in trained.iterdir()} - {"tensorboard"}
    assert names == {
        "checkpoint.safetensors",
        "metrics.jsonl",
        "model.safetensors",
        "samples.png",
    }
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 20
    assert last["images_per_second"] > 0


def test_train_does_not_overwrite_a_run(trained, capsys):
    assert main(["train", *TINY, "--out", str(trained)]) == 1
    assert "checkpoint.safetensors exists; go on from it with --resume" in capsys.readouterr().err


def test_train_compiles_and_checkpoints_on_demand(tmp_path, monkeypatch, capsys):
    models = []
    monkeypatch.setattr(TarFlow, "compile_blocks", lambda model: models.append(model))
    out = str(tmp_path / "run")
    assert main(["train", *TINY, "--compile", "--checkpoint-blocks", "--out", out]) == 0
    assert [model.checkpoint_blocks for model in models] == [True]

    def broken(model):
        raise RuntimeError("torch.compile does not work here")

    monkeypatch.setattr(TarFlow, "compile_blocks", broken)
    assert main(["train", *TINY, "--compile", "--out", str(tmp_path / "other")]) == 1
    assert "flowops: compile: torch.compile does not work here\n" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_resume_on_other_data(trained, capsys):
    changed = ["--held-out", "51"]
    assert main(["train", *TINY, *changed, "--out", str(trained), "--resume"]) == 1
    assert "images 1747, this run has 1746" in capsys.readouterr().err


def test_resume_of_a_finished_run(trained):
    before = load_model(trained / "model.safetensors").state_dict()
    assert main(["train", *TINY, "--out", str(trained), "--resume"]) == 0
    after = load_model(trained / "model.safetensors").state_dict()
    assert all((after[k] == before[k]).all() for k in before)


def test_sample_writes_a_grid(trained, tmp_path, capsys):
    out = tmp_path / "grid.png"
    arguments = ["--n", "12", "--columns", "4", "--guidance", "1.0", "--out", str(out)]
    assert main(["sample", str(trained / "model.safetensors"), *arguments]) == 0
    assert out.read_bytes()[:4] == b"\x89PNG"
    first = out.read_bytes()
    assert main(["sample", str(trained / "model.safetensors"), *arguments]) == 0
    assert out.read_bytes() == first


def test_eval_reports_bits_and_accuracy(trained, capsys):
    model = str(trained / "model.safetensors")
    assert main(["eval", model, "--data", "digits", "--held-out", "50"]) == 0
    text = capsys.readouterr().out
    assert "bits per dim (50 held-out images, gaussian, std 0.1 noise)" in text
    assert "classified right by Bayes' rule" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "/nowhere"], "data: expected 'mnist', 'digits' or a folder"),
        (["train", *TINY, "--steps", "0"], "steps: expected a positive number, got 0"),
        (["train", *TINY, "--patch-size", "3"], "patch_size: expected a divisor of img_size 8"),
        (["train", *TINY, "--precision", "tf32"], "precision: tf32 needs tensor cores of a CUDA"),
        (["train", *TINY, "--out", "/proc/x/y"], "/proc/x"),
        (["sample", "/nowhere/model.safetensors"], "no such file: /nowhere/model.safetensors"),
        (["eval", "/nowhere/model.safetensors"], "no such file: /nowhere/model.safetensors"),
        (["doctor", "please"], "doctor: takes no options, got 'please'"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("flowops: ")
    assert message in lines[0]


def test_options_that_do_not_parse(capsys):
    for arguments, message in (
        (["demo", "--minutes", "0"], "minutes: expected a positive number, got 0.0"),
        (["train", "--lr", "fast"], "--lr"),
        (["train", "--speed", "9"], "--speed"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err


def test_sample_errors_name_the_argument(trained, capsys):
    model = str(trained / "model.safetensors")
    for arguments, message in (
        (["--label", "11"], "y: expected labels from 0 to 9, or -1 for none, got 11"),
        (["--n", "0"], "n: expected a positive number of images, got 0"),
        (["--columns", "0"], "columns: expected a positive number"),
        (["--out", "/nowhere/grid.png"], "could not write /nowhere/grid.png"),
    ):
        assert main(["sample", model, *arguments]) == 1
        assert message in capsys.readouterr().err


def test_python_dash_m():
    result = subprocess.run(
        [sys.executable, "-m", "flowops", "doctor"],
        capture_output=True,
        text=True,
        env={**os.environ, "FLOWOPS_BACKEND": ""},
    )
    assert result.returncode == 0
    assert "backends" in result.stdout
