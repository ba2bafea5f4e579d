import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowops.api import cli
from flowops.bench import against, ceilings, report, run
from flowops.bench.ceilings import Ceilings, Work
from flowops.bench.job import OURS, OpJob, Spec

RATES = Ceilings(1e11, 1e11, 1e10, 1e9)


def fake_specs(*, op="fake", wrong=False, jobs=1):
    ours = (lambda x: x.exp() + 1) if wrong else torch.exp

    def specs(device):
        for i in range(jobs):
            x = torch.randn(4, 8)
            build = lambda x=x: OpJob(  # noqa: E731
                Work(bytes=1), {OURS: ours, "eager": torch.exp}, (x,), truth=torch.exp
            )
            yield Spec(op, "forward", f"job {i}", "fp32", build)

    return specs


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder that looks like a checkout, with one op in the benchmark."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "run.py").touch()
    (tmp_path / "README.md").write_text("<!-- bench:begin -->\n<!-- bench:end -->\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "OPS", {"fake": fake_specs()})
    monkeypatch.setattr(ceilings, "measure", lambda device: RATES)
    return tmp_path


def stored(checkout: Path) -> Path:
    (folder,) = (checkout / "bench" / "results").iterdir()
    return folder


def test_a_run_prints_and_stores(checkout, capsys):
    assert cli.main(["bench", "--device", "cpu", "--seconds", "0.01", "--readme"]) == 0
    folder = stored(checkout)
    assert {path.name for path in folder.iterdir()} == {"all.csv", "last.json", "fake.png"}
    last = json.loads((folder / "last.json").read_text())
    assert last["ceilings"] == RATES.asdict()
    assert [row["provider"] for row in last["rows"]] == [OURS, "eager"]
    assert all(row["time"] for row in last["rows"])
    assert last["environment"]["torch"] == torch.__version__
    assert "| fake | forward | job 0, fp32 |" in (checkout / "README.md").read_text()
    assert capsys.readouterr().out.splitlines()[-1].startswith("fake  forward  job 0, fp32")


def test_a_failed_gate_is_reported_and_the_run_goes_on(checkout, monkeypatch, capsys):
    both = {"bad": fake_specs(op="bad", wrong=True), "fake": fake_specs()}
    monkeypatch.setattr(run, "OPS", both)
    assert run.main(["--device", "cpu", "--seconds", "0.01"]) == 1
    rows = report.load(stored(checkout))[1]
    assert [row.ok for row in rows] == [False, False, True, True]
    assert "bad forward job 0 fp32 flowops: FAILED: output 0: error" in capsys.readouterr().out


@pytest.mark.parametrize(("device", "status"), [("cuda", 1), ("cpu", 0)])
def test_a_regression_fails_on_a_gpu_and_warns_on_a_cpu(
    checkout, monkeypatch, capsys, device, status
):
    monkeypatch.setattr(report, "regressions", lambda *args: ["fake: 9 % slower"])
    args = run.parse(["--device", "cpu", "--seconds", "0.01"])
    env = run.environment("cpu")
    monkeypatch.setattr(run, "environment", lambda device: env)
    monkeypatch.setattr(run, "run_all", lambda *args, **options: [])
    args.device = device
    assert run.bench(args) == status
    said = capsys.readouterr().out
    assert ("REGRESSION: fake" if status else "warning: fake") in said


def test_a_spent_budget_lists_the_rest(checkout, monkeypatch):
    monkeypatch.setattr(run, "OPS", {"fake": fake_specs(jobs=3)})
    assert run.main(["--device", "cpu", "--seconds", "0.01", "--budget", "1e-9"]) == 0
    rows = report.load(stored(checkout))[1]
    assert [row.status.split(":")[0] for row in rows] == ["not run"] * 3


def test_first_jobs_of_all_ops_come_first():
    jobs = [Spec(op, "", str(i), "", None) for op in "ab" for i in range(2)]
    assert [(job.op, job.shape) for job in run.in_turns(jobs)] == [
        *(("a", "0"), ("b", "0"), ("a", "1"), ("b", "1")),
    ]


def test_every_job_has_its_own_name():
    for device in ("cpu", "cuda"):
        jobs = run.specs([], device)
        assert len({(job.op, job.job, job.shape, job.dtype) for job in jobs}) == len(jobs)
        assert {job.op for job in jobs} >= set(run.OPS) - {"threads"}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["fast"], "op: expected some of affine, .* got 'fast'"),
        (["--seconds", "0"], "seconds: expected a positive number, got 0"),
        (["--budget", "-1"], "budget: expected a positive number, got -1"),
        (["--upstream", "nowhere"], "upstream: expected a folder with transformer_flow.py"),
    ],
)
def test_errors_name_the_argument(argv, said, capsys):
    with pytest.raises(ValueError, match=said):
        run.parse(argv)
    assert cli.main(["bench", *argv]) == 1
    assert capsys.readouterr().err.startswith(f"flowops: {said.split(':')[0]}:")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_cuda_without_a_gpu():
    with pytest.raises(ValueError, match="device: expected cpu, got cuda"):
        run.parse(["--device", "cuda"])


def test_it_needs_neither_tyro_nor_rich_nor_matplotlib():
    code = """
import sys
for name in ("tyro", "rich", "matplotlib"):
    sys.modules[name] = None
from flowops.api.cli import main
assert main(["bench", "fast"]) == 1
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "op: expected some of" in result.stderr


# --- against -------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one commit, whose flowops is built by linking this one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    git = ["git", "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(against.tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_against_compares_in_turns_and_cleans_up(repository, monkeypatch, capsys):
    def build(tree, site):
        assert (tree / "file").exists()
        return site

    sides = []

    def work(folder, site, ops, device, seconds, budget):
        assert (folder / "flowops_bench_copy" / "worker.py").exists()
        sides.append("there" if site else "here")
        row = report.Row("fake", "forward", "8", "fp32", OURS, "ours")
        row.p50_us = 200.0 if site else 100.0
        return [row]

    monkeypatch.setattr(against, "build", build)
    monkeypatch.setattr(against, "work", work)
    assert run.main(["affine", "--device", "cpu", "--against", "HEAD"]) == 0
    assert sides == ["there", "here"] * 2
    line = capsys.readouterr().out.splitlines()[-1].split()
    assert line == ["fake", "forward", "8,", "fp32", "100", "µs", "200", "µs", "0.50"]
    assert_clean(repository)


def assert_clean(repository):
    worktrees = subprocess.run(["git", "worktree", "list"], capture_output=True, text=True).stdout
    assert len(worktrees.splitlines()) == 1
    assert {path.name for path in repository.iterdir()} == {".git", "file"}


def test_against_cleans_up_after_a_failed_build(repository, monkeypatch):
    def build(tree, site):
        raise ValueError("against: pip failed")

    monkeypatch.setattr(against, "build", build)
    with pytest.raises(ValueError, match="against: pip failed"):
        against.compare("HEAD", ["affine"], "cpu", 0.1, None)
    assert_clean(repository)


def test_against_an_unknown_commit(repository):
    with pytest.raises(ValueError, match="against: git worktree add --detach failed: .*nowhere"):
        against.compare("nowhere", [], "cpu", 0.1, None)
    assert_clean(repository)


def test_the_worker_runs_from_a_copy(tmp_path):
    against.shutil.copytree(
        Path(run.__file__).parent,
        tmp_path / "flowops_bench_copy",
        ignore=against.shutil.ignore_patterns("results", "__pycache__"),
    )
    rows = against.work(tmp_path, None, ["noise"], "cpu", 0.01, None)
    assert [(row.op, row.provider, row.status) for row in rows] == [("noise", OURS, "ok")]
    assert rows[0].p50_us > 0
