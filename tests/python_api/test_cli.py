import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from flowops.api import TarFlow, load_model
from flowops.api.checkpoint import read_tensors
from flowops.api.cli import COMMANDS, main
from flowops.api.train_config import PRESETS, load_config

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
        "checkpoints",
        "config.json",
        "curve.png",
        "metrics.jsonl",
        "model.safetensors",
        "samples",
    }
    assert [path.name for path in (trained / "samples").iterdir()] == ["step-00000020.png"]
    assert [path.name for path in (trained / "checkpoints").iterdir()] == ["step-00000020"]
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 20
    assert last["images_per_second"] > 0
    assert last["mfu"] > 0
    assert len(last["logdets"]) == 2
    assert json.loads((trained / "config.json").read_text())["channels"] == 64


def test_train_does_not_overwrite_a_run(trained, capsys):
    assert main(["train", *TINY, "--out", str(trained)]) == 1
    assert (
        "checkpoints/step-00000020 exists; go on from it with --resume" in capsys.readouterr().err
    )


def test_train_compiles_and_checkpoints_on_demand(tmp_path, monkeypatch, capsys):
    models = []
    monkeypatch.setattr(TarFlow, "compile_blocks", lambda model: models.append(model))
    out = str(tmp_path / "run")
    assert main(["train", *TINY, "--compile", "--checkpoint-blocks", "True", "--out", out]) == 0
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


def test_a_run_of_an_earlier_version_is_refused(tmp_path, capsys):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"")
    assert main(["train", *TINY, "--out", str(tmp_path), "--resume"]) == 1
    assert "checkpoint.safetensors is of an earlier version" in capsys.readouterr().err


def test_train_takes_a_preset_or_a_file_and_changes_it(trained, tmp_path):
    small = ["--data", "digits", "--steps", "3", "--samples", "4", "--log-every", "1"]
    out = tmp_path / "preset"
    assert main(["train", "mnist", *small, "--channels", "64", "--out", str(out)]) == 0
    config = load_config(str(out / "config.json"))
    changes = {"steps": 3, "channels": 64, "log_every": 1}
    assert config == dataclasses.replace(PRESETS["mnist"], **changes)
    again = tmp_path / "file"
    arguments = [str(out / "config.json"), "--data", "digits", "--out", str(again)]
    assert main(["train", *arguments, "--lr", "0.001", "--sample-every", "2"]) == 0
    assert load_config(str(again / "config.json")).lr == 0.001
    assert len(list((again / "samples").iterdir())) == 2


def test_export_writes_what_the_reference_program_loads(trained, tmp_path, capsys):
    """Every name of its state dict, also the masks."""
    for weights in ("ema", "model"):
        out = tmp_path / f"{weights}.safetensors"
        assert main(["export", str(trained), "--out", str(out), "--weights", weights]) == 0
        assert capsys.readouterr().out == f"{out}\n"
        tensors, metadata = read_tensors(out)
        assert torch.equal(tensors["blocks.1.attn_mask"], torch.ones(4, 4).tril())
        assert metadata["step"] == 20
        model = load_model(out)
        assert set(tensors) == {*model.state_dict(), *(f"blocks.{i}.attn_mask" for i in range(2))}
    averaged = load_model(trained / "model.safetensors").state_dict()
    exported = load_model(tmp_path / "ema.safetensors").state_dict()
    assert all(torch.equal(averaged[name], exported[name]) for name in averaged)
    assert main(["export", str(tmp_path)]) == 1
    assert "is not a checkpoint of a training run" in capsys.readouterr().err


def test_starflow_on_latents(tmp_path, capsys):
    """From .npy files to guided samples in one, on the scale of the latents."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 96)
    latents = generator.normal(size=(96, 4, 4, 4)) * 0.3 + labels[:, None, None, None]
    np.save(tmp_path / "latents.npy", latents.astype(np.float16))
    np.save(tmp_path / "latents.labels.npy", labels)
    data, run = str(tmp_path / "latents.npy"), tmp_path / "run"
    sizes = ["--patch-size", "1", "--channels", "64", "--blocks", "3", "--layers", "1"]
    deep = ["--deep-layers", "2", "--deep-channels", "128", "--architecture", "starflow"]
    steps = ["--steps", "30", "--batch-size", "16", "--samples", "6", "--warmup", "5"]
    arguments = ["--data", data, *sizes, *deep, *steps, "--precision", "fp32", "--out", str(run)]
    assert main(["train", *arguments, "--validation", data]) == 0
    assert "bits per latent dim (96 held-out images" in capsys.readouterr().out
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["loss"] < records[0]["loss"] - 0.1
    assert np.load(run / "samples" / "step-00000030.npy").shape == (6, 4, 4, 4)
    model = load_model(run / "model.safetensors")
    assert model.config["channels"] == [64, 64, 128]
    assert model.config["layers_per_block"] == [1, 1, 2]
    sample = ["sample", str(run / "model.safetensors"), "--n", "4", "--guidance", "1.0"]
    assert main([*sample, "--guidance-kind", "gaussian", "--out", str(tmp_path / "a.npy")]) == 0
    assert main([*sample, "--guidance-kind", "linear", "--out", str(tmp_path / "b.npy")]) == 0
    a, b = (np.load(tmp_path / name) for name in ("a.npy", "b.npy"))
    assert a.shape == (4, 4, 4, 4)
    assert np.isfinite(a).all()
    assert np.abs(a - b).max() > 1e-3
    capsys.readouterr()
    assert main([*sample, "--out", str(tmp_path / "a.png")]) == 1
    assert "out: expected a .npy file for samples of 4 channels" in capsys.readouterr().err
    assert main(["train", "--data", data, "--noise", "uniform", "--out", str(tmp_path / "u")]) == 1
    assert "noise: expected gaussian for latents" in capsys.readouterr().err


def test_sample_writes_a_grid(trained, tmp_path, capsys):
    out = tmp_path / "grid.png"
    arguments = ["--n", "12", "--columns", "4", "--guidance", "1.0", "--out", str(out)]
    assert main(["sample", str(trained / "model.safetensors"), *arguments]) == 0
    assert out.read_bytes()[:4] == b"\x89PNG"
    first = out.read_bytes()
    assert main(["sample", str(trained / "model.safetensors"), *arguments]) == 0
    assert out.read_bytes() == first


def test_sample_by_any_method_draws_the_same_at_tol_zero(trained, tmp_path, capsys):
    model, written = str(trained / "model.safetensors"), set()
    for options in (
        ["--method", "exact"],
        ["--method", "jacobi", "--tol", "0", "--window", "3", "--batch-size", "5"],
        ["--method", "auto", "--tol", "0"],
    ):
        out = tmp_path / "grid.png"
        guided = ["--guidance", "1.0", "--guide-what", "b", "--annealed-guidance"]
        assert main(["sample", model, "--n", "12", "--out", str(out), *guided, *options]) == 0
        written.add(out.read_bytes())
        said = capsys.readouterr()
        assert said.out.startswith(f"{out}\n12 images in ")
        assert "images/s" in said.out
        assert ("largest residual" in said.out) == (options[1] != "exact")
        assert said.err == ""  # no bar where nobody looks
    assert len(written) == 1


def test_sample_passes_guidance_on(trained, tmp_path):
    model, written = str(trained / "model.safetensors"), set()
    for options in ([], ["--guide-what", "a"], ["--annealed-guidance"], ["--attn-temp", "0.5"]):
        out = tmp_path / "grid.png"
        assert main(["sample", model, "--guidance", "2", "--out", str(out), *options]) == 0
        written.add(out.read_bytes())
    assert len(written) == 4


def test_sample_reports_each_block(trained, tmp_path, capsys):
    options = ["--method", "jacobi", "--tol", "0.01", "--n", "4", "--out", str(tmp_path / "x.png")]
    assert main(["sample", str(trained / "model.safetensors"), *options]) == 0
    text = capsys.readouterr().out
    assert "jacobi, tol 0.01" in text
    lines = [line.strip("│ ").split("│") for line in text.splitlines() if line.startswith("│")]
    assert [int(line[0]) for line in lines] == [1, 0]
    for _, sweeps, steps, residual in lines:
        assert 1 <= float(sweeps) <= 3  # of 4 tokens, the first passes through
        assert float(steps) == 0
        assert 0 <= float(residual) <= 0.01


@pytest.mark.parametrize("finished", [2, 0])
def test_interrupted_sampling_keeps_the_finished_images(
    trained, tmp_path, capsys, monkeypatch, finished
):
    stream, sheets = TarFlow.stream, []

    def interrupted(*args, **options):
        for i, batch in enumerate(stream(*args, **options)):
            if i == finished:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(TarFlow, "stream", interrupted)
    monkeypatch.setattr("flowops.api.data.save_grid", lambda *args: sheets.append(args))
    out = tmp_path / "grid.png"
    options = ["--n", "20", "--batch-size", "3", "--columns", "3", "--out", str(out)]
    assert main(["sample", str(trained / "model.safetensors"), *options]) == 130
    said = capsys.readouterr().err.strip()
    where = f"written to {out}" if finished else "nothing written"
    assert said == f"flowops: interrupted: {3 * finished} of 20 images were finished, {where}"
    assert [(images.shape[0], *rest) for images, *rest in sheets] == [(6, out, 3)][:finished]


def test_eval_reports_bits_and_accuracy(trained, capsys):
    model = str(trained / "model.safetensors")
    assert main(["eval", model, "--data", "digits", "--held-out", "50"]) == 0
    text = capsys.readouterr().out
    assert "bits per dim (50 held-out images, gaussian, std 0.1 noise)" in text
    assert "classified right by Bayes' rule" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "imagenet"], "config: expected one of mnist, imagenet64-bpd"),
        (["train", "afhq256"], "data: needed for afhq256, e.g. a store"),
        (["export", "/nowhere"], "/nowhere is not a checkpoint of a training run"),
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
        (["--tol", "-1"], "tol: expected a finite number, at least 0, got -1.0"),
        (["--window", "0"], "window: expected a positive number of tokens, got 0"),
        (["--batch-size", "0"], "batch_size: expected a positive number of images, got 0"),
        (["--out", "/nowhere/grid.png"], "could not write /nowhere/grid.png"),
    ):
        assert main(["sample", model, *arguments]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_python_dash_m():
    result = subprocess.run(
        [sys.executable, "-m", "flowops", "doctor"],
        capture_output=True,
        text=True,
        env={**os.environ, "FLOWOPS_BACKEND": ""},
    )
    assert result.returncode == 0
    assert "backends" in result.stdout
