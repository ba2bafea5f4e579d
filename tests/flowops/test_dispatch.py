import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import flowops
from flowops import cuda_runtime, dispatch, measured
from helpers import CASES

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "flowops": "flowops",
    "kernels": "flowops.kernels",
    "python_api": "flowops.api",
    "bench": "flowops.bench",
}
OP_CASES = {case.name.split("-")[0]: case for case in CASES}

needs_native = pytest.mark.skipif(
    not dispatch.backend_state("cpu")[0], reason=dispatch.backend_state("cpu")[1]
)
by_op = pytest.mark.parametrize("op", OP_CASES)


def python(code: str, cwd, **environment: str) -> str:
    """What a fresh interpreter prints that starts in another directory than the checkout."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FLOWOPS_BACKEND")}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**env, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    """The kernels of a GPU as users have them."""
    for name in ("TRITON_INTERPRET", cuda_runtime.EMULATOR):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def toy(monkeypatch):
    """An op with two implementations that say who ran; cpu has a reason against negative values."""
    monkeypatch.delenv("FLOWOPS_BACKEND", raising=False)
    against = {"cpu": lambda x: "it is negative" if x < 0 else None, "reference": None}
    implementations = {name: (lambda x, name=name: name, why) for name, why in against.items()}
    monkeypatch.setitem(dispatch._IMPLEMENTATIONS, "toy", implementations)
    return lambda backend="auto", value=1.0: dispatch.run("toy", backend, torch.tensor(value))


@needs_native
def test_auto_takes_the_first_that_can_run(toy):
    assert toy() == "cpu"
    assert toy(value=-1.0) == "reference"


@needs_native
def test_a_backend_asked_for_by_name_runs_or_raises(toy):
    assert toy("cpu") == "cpu"
    assert toy("reference") == "reference"
    with pytest.raises(RuntimeError, match="^backend 'cpu' can't run toy: it is negative$"):
        toy("cpu", -1.0)
    for backend in ("triton", "cuda"):
        why = f"toy has no {backend} kernel in this version"
        with pytest.raises(RuntimeError, match=f"^backend '{backend}' can't run toy: {why}$"):
            toy(backend)


@needs_native
def test_gpu_kernels_do_not_run_on_cpu_tensors(toy, monkeypatch):
    for backend in ("triton", "cuda"):
        monkeypatch.setitem(dispatch._IMPLEMENTATIONS["toy"], backend, (lambda x: "gpu", None))
        assert toy() == "cpu"
        with pytest.raises(RuntimeError, match=f"'{backend}' can't run toy: .* on cpu"):
            toy(backend)
        assert dispatch.can_run("toy", backend, torch.ones(1)) == (False, "its tensors are on cpu")


@needs_native
def test_the_interpreter_runs_on_cpu_tensors_by_name_only(toy, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(
        *(dispatch._IMPLEMENTATIONS["toy"], "triton", (lambda x: "interpreted", None))
    )
    assert toy() == "cpu"
    assert toy("triton") == "interpreted"
    assert dispatch.can_run("toy", "triton", torch.ones(1)) == (True, "")
    half = torch.ones(1, dtype=torch.bfloat16)
    assert "computes bfloat16 wrongly" in dispatch.triton_dtype_reason(half)


@needs_native
def test_the_emulator_runs_on_cpu_tensors_by_name_only(toy, monkeypatch):
    monkeypatch.setenv(cuda_runtime.EMULATOR, "somewhere")
    monkeypatch.setitem(dispatch._IMPLEMENTATIONS["toy"], "cuda", (lambda x: "emulated", None))
    assert toy() == "cpu"
    assert toy("cuda") == "emulated"
    assert dispatch.can_run("toy", "cuda", torch.ones(1)) == (True, "")


def test_auto_takes_cuda_before_triton_where_that_was_measured(toy, monkeypatch):
    """On a GPU, of which the tensors here are stand-ins."""
    implementations = dispatch._IMPLEMENTATIONS["toy"]
    for name in ("triton", "cuda"):
        monkeypatch.setitem(implementations, name, (lambda x, name=name: name, None))
    monkeypatch.setattr(dispatch, "_reason", lambda *_: None)
    monkeypatch.setitem(dispatch._AUTO, "cpu", dispatch._AUTO["cuda"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    row = {"device": "a GPU", "family": "toy", "dtype": "float32", "elements": [1, 1]}
    for rows, expected in (
        ([], "triton"),
        ([row], "cuda"),
        ([row | {"device": "another"}], "triton"),
        ([row | {"dtype": "bfloat16"}], "triton"),
        ([row | {"elements": [2, 9]}], "triton"),
    ):
        measured._of_device.cache_clear()
        monkeypatch.setattr(measured, "rows", lambda rows=rows: rows)
        assert toy() == expected
    measured._of_device.cache_clear()


def test_rows_speak_for_families():
    for op, family in (
        ("affine_update", "affine"),
        ("affine_inverse_backward", "affine"),
        ("kernel_coupling_inverse", "kernel_coupling"),
        ("se_gram_matmul_backward", "se_gram_matmul"),
        ("decode_block", "decode_block"),
    ):
        assert measured.family(op) == family


def test_only_measured_rows_are_shipped():
    """Every row names the commit of the run it came from."""
    for row in measured.rows():
        assert row["ratio"] > 1
        assert row["git"]


@needs_native
def test_environment_speaks_for_calls_that_name_no_backend(toy, monkeypatch):
    for name in ("reference", "cpu"):
        monkeypatch.setenv("FLOWOPS_BACKEND", name)
        assert toy() == name
        assert toy("cpu") == "cpu"
        assert toy("reference") == "reference"
    for neutral in ("", "auto"):
        monkeypatch.setenv("FLOWOPS_BACKEND", neutral)
        assert toy() == "cpu"


@needs_native
def test_environment_that_cannot_run_raises(toy, monkeypatch):
    monkeypatch.setenv("FLOWOPS_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="^backend 'cpu' can't run toy: it is negative$"):
        toy(value=-1.0)
    monkeypatch.setenv("FLOWOPS_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="^backend 'triton' can't run toy: "):
        toy()
    assert toy("reference") == "reference"


@pytest.mark.parametrize("name", ["gpu", "CPU", "cpu,triton", " "])
def test_environment_that_names_no_backend(toy, monkeypatch, name):
    monkeypatch.setenv("FLOWOPS_BACKEND", name)
    match = f"^FLOWOPS_BACKEND: expected 'auto' or one of .*, got '{name}'$"
    with pytest.raises(ValueError, match=match):
        toy()
    assert toy("reference") == "reference"


@needs_native
def test_a_kernel_that_fails_is_not_replaced(toy, monkeypatch):
    def broken(x):
        raise MemoryError("no room")

    monkeypatch.setitem(dispatch._IMPLEMENTATIONS["toy"], "cpu", (broken, None))
    for backend in ("auto", "cpu"):
        with pytest.raises(MemoryError, match="no room"):
            toy(backend)


def test_autocast_is_off_inside(toy, monkeypatch):
    states = []
    record = (lambda x: states.append(torch.is_autocast_enabled("cpu")), None)
    monkeypatch.setitem(dispatch._IMPLEMENTATIONS["toy"], "reference", record)
    with torch.autocast("cpu", torch.bfloat16):
        toy("reference")
        assert torch.is_autocast_enabled("cpu")
    toy("reference")
    assert states == [False, False]


@pytest.fixture
def ran(monkeypatch):
    """The (op, backend) pairs that run, in order."""
    monkeypatch.delenv("FLOWOPS_BACKEND", raising=False)
    calls = []
    for op, implementations in dispatch._IMPLEMENTATIONS.items():
        for backend, (function, supports) in list(implementations.items()):

            def recording(*args, op=op, backend=backend, function=function):
                calls.append((op, backend))
                return function(*args)

            monkeypatch.setitem(implementations, backend, (recording, supports))
    return calls


def run_both_ways(case, **options):
    tensors = case.tensors(torch.float32)
    outs = case.public(*tensors, **options)
    outs = outs if isinstance(outs, tuple) else (outs,)
    torch.autograd.grad(sum(out.sum() for out in outs), tensors)


@by_op
def test_forward_and_backward_take_the_first_that_can_run(ran, op):
    run_both_ways(OP_CASES[op])
    assert {name for name, _ in ran} >= {op}
    best = {
        name: next(b for b in dispatch.BACKENDS if dispatch.can_run(name, b)[0])
        for name in dispatch.ops()
    }
    assert all(backend == best[name] for name, backend in ran)


@by_op
@pytest.mark.parametrize("how", ["argument", "environment"])
def test_reference_by_name_runs_nothing_else(ran, monkeypatch, op, how):
    if how == "environment":
        monkeypatch.setenv("FLOWOPS_BACKEND", "reference")
        run_both_ways(OP_CASES[op])
    else:
        run_both_ways(OP_CASES[op], backend="reference")
    assert (op, "reference") in ran
    assert {backend for _, backend in ran} == {"reference"}


@needs_native
@by_op
def test_cpu_by_name_runs_or_raises(ran, monkeypatch, op):
    usable, reason = dispatch.can_run(op, "cpu")
    for environment in ("auto", "reference", "triton"):
        monkeypatch.setenv("FLOWOPS_BACKEND", environment)
        ran.clear()
        if usable:
            run_both_ways(OP_CASES[op], backend="cpu")
            assert (op, "cpu") in ran
            assert {backend for _, backend in ran} == {"cpu"}, environment
        else:
            with pytest.raises(RuntimeError, match=f"backend 'cpu' can't run {op}: {reason}"):
                run_both_ways(OP_CASES[op], backend="cpu")
            assert ran == []


@by_op
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_gpu_backends_raise_on_the_cpu(ran, monkeypatch, op, backend):
    for options in ({"backend": backend}, {}):
        with pytest.raises(RuntimeError, match=f"^backend '{backend}' can't run {op}: .+"):
            run_both_ways(OP_CASES[op], **options)
        monkeypatch.setenv("FLOWOPS_BACKEND", backend)
    assert ran == []


def test_can_run():
    x, params = torch.ones(2, 3, 4), torch.ones(2, 3, 8)
    for op in dispatch.ops():
        assert dispatch.can_run(op, "reference") == (True, "")
    assert dispatch.can_run("affine_update", "reference", x, params, False) == (True, "")
    for backend in ("triton", "cuda"):
        usable, reason = dispatch.can_run("affine_update", backend, x, params, False)
        assert usable is False
        assert reason


@needs_native
def test_can_run_on_these_tensors():
    x, params = torch.ones(2, 3, 4), torch.ones(2, 3, 8)
    assert dispatch.can_run("affine_update", "cpu") == (True, "")
    assert dispatch.can_run("affine_update", "cpu", x, params, False) == (True, "")
    assert dispatch.can_run("affine_update", "cpu", x.half(), params.half(), False) == (
        False,
        "torch.float16 has no native CPU kernel",
    )
    assert dispatch.can_run("affine_update", "cpu", x.double(), params, False) == (
        False,
        "no native CPU kernel for x in torch.float64 with params in torch.float32",
    )
    usable, reason = dispatch.can_run("affine_update", "cpu", x.to("meta"), params, False)
    assert (usable, reason) == (False, "its tensors are on meta")


def test_can_run_of_unknown_names():
    with pytest.raises(ValueError, match="^op: expected one of .*'affine_update'.*, got 'affine'$"):
        dispatch.can_run("affine", "cpu")
    for backend in ("auto", "gpu", "", None):
        with pytest.raises(ValueError, match=f"^backend: expected one of .*, got {backend!r}$"):
            dispatch.can_run("affine_update", backend)


def test_backend_states_give_reasons():
    assert dispatch.backend_state("reference") == (True, f"PyTorch {torch.__version__}")
    for backend in dispatch.BACKENDS:
        usable, text = dispatch.backend_state(backend)
        assert isinstance(usable, bool)
        assert text


@needs_native
def test_state_of_the_native_backend():
    usable, text = dispatch.backend_state("cpu")
    native = dispatch.native()
    assert usable
    assert native.isa() in native.isas()
    assert text.startswith(f"{native.isa()} of {', '.join(native.isas())}; ")
    with pytest.raises(ValueError, match="isa: 'avx1024' does not run on this processor"):
        native.set_isa("avx1024")


@pytest.fixture
def _no_native(monkeypatch):
    monkeypatch.delenv("FLOWOPS_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "_load_native", lambda: (None, "no C++ compiler was found"))


@pytest.mark.usefixtures("_no_native")
def test_without_native_kernels_the_reason_is_told():
    x, params = torch.randn(2, 3, 4), torch.randn(2, 3, 8)
    reason = "no C\\+\\+ compiler was found"
    with pytest.raises(RuntimeError, match=f"backend 'cpu' can't run affine_update: {reason}"):
        flowops.affine_update(x, params, backend="cpu")
    with pytest.raises(RuntimeError, match=f"flowops has no native CPU kernels here: {reason}"):
        dispatch.native()
    assert dispatch.backend_state("cpu") == (False, "no C++ compiler was found")
    assert dispatch.can_run("affine_update", "cpu") == (False, "no C++ compiler was found")


@pytest.mark.usefixtures("_no_native")
@by_op
def test_without_native_kernels_auto_runs(ran, op):
    run_both_ways(OP_CASES[op])
    assert (op, "reference") in ran


@needs_native
def test_a_module_that_does_not_load_is_told_once(tmp_path):
    code = """
import importlib.util, sys, torch, flowops
from flowops import cuda_runtime, dispatch, measured
tries = []
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "flowops._C":
            tries.append(name)
            return importlib.util.spec_from_loader(name, self)
    def create_module(self, spec):
        raise ImportError("undefined symbol: GOMP_parallel")
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Broken())
x, params = torch.ones(1, 2, 3), torch.ones(1, 2, 6)
for _ in range(2):
    flowops.affine_update(x, params)
    print(dispatch.backend_state("cpu"))
try:
    flowops.affine_update(x, params, backend="cpu")
except RuntimeError as error:
    print(error)
print(len(tries))
"""
    *states, message, tries = python(code, tmp_path).splitlines()
    reason = "flowops._C does not load: undefined symbol: GOMP_parallel"
    assert states == [str((False, reason))] * 2
    assert message == f"backend 'cpu' can't run affine_update: {reason}"
    assert int(tries) <= 2


def test_import_is_light(tmp_path):
    """Packages called triton and cupy are there to be found, as on a machine with a GPU."""
    for name in ("triton", "cupy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    code = """
import json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
import flowops
seconds = time.process_time() - start
print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
"""
    seconds, loaded = json.loads(python(code, tmp_path))
    assert "flowops.affine" in loaded
    heavy = {"triton", "cupy", "flowops.api", "flowops.bench", "flowops.kernels", "flowops._C"}
    assert heavy.isdisjoint(loaded)
    assert seconds < 1.0


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_after_a_native_call(tmp_path):
    code = """
import torch, flowops
x, params = torch.randn(64, 64, 64), torch.randn(64, 64, 128)
torch.set_num_threads(2)
flowops.affine_update(x, params, backend="cpu")
torch.softmax(x, -1)
with open("/proc/self/maps") as maps:
    paths = {line.split(maxsplit=5)[-1].strip() for line in maps if line.count(" ") > 5}
print(*sorted(paths), sep="\\n")
"""
    paths = [Path(line) for line in python(code, tmp_path).splitlines()]
    assert any(path.name.startswith("_C.") for path in paths)
    runtimes = {
        path.resolve() for path in paths if path.name.startswith(("libgomp", "libiomp", "libomp"))
    }
    assert len(runtimes) == 1


def test_no_top_level_module_of_ours(tmp_path):
    """`kernels` is the import name of another well-known package."""
    code = """
import importlib.util
for name in ("kernels", "bench", "python_api", "csrc", "tests"):
    spec = importlib.util.find_spec(name)
    if spec is not None:
        print(name, spec.origin, *(spec.submodule_search_locations or ()), sep="|")
print("flowops", importlib.util.find_spec("flowops").origin, sep="|")
"""
    *others, ours = python(code, tmp_path).splitlines()
    for line in others:
        name, *places = line.split("|")
        assert not any(Path(place).resolve().is_relative_to(ROOT) for place in places), name
    assert Path(ours.split("|")[1]).resolve().is_relative_to(ROOT)


def imports(source: str, module: str, is_package: bool = False) -> Iterator[tuple[str, bool]]:
    """Absolute names of all that ``source`` imports, and whether at module level."""
    package = module if is_package else module.rpartition(".")[0]

    def names(node):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                parts = parts[: len(parts) - node.level + 1]
                base = ".".join([*parts, *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)

    def walk(node, top):
        for child in ast.iter_child_nodes(node):
            yield from ((name, top) for name in names(child))
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, top and not inside)

    yield from walk(ast.parse(source), True)


def is_in(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def violations(source, module, is_package=False):
    """The imports of a module that point up, by the rules of the house."""
    found = []
    for name, top in imports(source, module, is_package):
        if is_in(module, ("flowops.kernels",)):
            wrong = is_in(name, ("flowops",)) and not is_in(name, ("flowops.kernels",))
        elif is_in(module, ("flowops.api",)):
            upward = ("flowops.kernels", "flowops._C")
            if module != "flowops.api.cli":
                upward += ("flowops.bench",)
            wrong = is_in(name, upward)
        elif is_in(module, ("flowops.bench",)) or module == "flowops.__main__":
            wrong = False
        else:
            wrong = top and is_in(name, ("flowops.api", "flowops.bench", "flowops.kernels"))
        if wrong or is_in(name, ("kernels", "bench", "python_api", "csrc", "tests")):
            found.append(name)
    return found


FILES = [
    pytest.param(path, f"{package}.{path.stem}", id=f"{folder}/{path.name}")
    for folder, package in PACKAGES.items()
    for path in sorted((ROOT / folder).glob("**/*.py"))
]


@pytest.mark.parametrize(("path", "module"), FILES)
def test_imports_point_down(path, module):
    is_package = path.name == "__init__.py"
    module = module.removesuffix(".__init__")
    assert violations(path.read_text(), module, is_package) == []


def test_every_floor_has_files():
    floors = {param.values[1].rpartition(".")[0] for param in FILES}
    assert floors == set(PACKAGES.values())


@pytest.mark.parametrize(
    ("source", "module", "expected"),
    [
        ("import flowops", "flowops.kernels.affine", "flowops"),
        ("from .. import dispatch", "flowops.kernels.affine", "flowops flowops.dispatch"),
        ("def f():\n  from ..noise import x", "flowops.kernels.a", "flowops.noise flowops.noise.x"),
        ("from . import common\nimport torch", "flowops.kernels.affine", ""),
        ("from .kernels import x", "flowops.affine", "flowops.kernels flowops.kernels.x"),
        ("from . import api", "flowops.affine", "flowops.api"),
        ("import flowops.bench.run", "flowops.affine", "flowops.bench.run"),
        ("if True:\n  from .api import x", "flowops.affine", "flowops.api flowops.api.x"),
        ("class A:\n  import flowops.api", "flowops.affine", "flowops.api"),
        ("def f():\n  from .kernels import affine", "flowops.affine", ""),
        ("from . import dispatch\nfrom ._version import __version__", "flowops.affine", ""),
        ("import flowops._C", "flowops.api.data", "flowops._C"),
        ("def f():\n  from .. import kernels", "flowops.api.data", "flowops.kernels"),
        ("def f():\n  import flowops.bench.run", "flowops.api.data", "flowops.bench.run"),
        ("def f():\n  import flowops.bench.run", "flowops.api.cli", ""),
        ("from flowops import affine_update", "flowops.api.data", ""),
        ("import kernels", "flowops.bench.run", "kernels"),
        ("from flowops.api import TarFlow", "flowops.bench.run", ""),
    ],
)
def test_the_check_of_imports_sees_them(source, module, expected):
    assert violations(source, module) == expected.split()
