"""Which backend runs an op, and why another one does not.

An op is a name with up to four implementations. ``backend="auto"`` takes the first of
``cuda, triton, cpu, reference`` that can run on the given tensors; ``cuda`` only where it was
measured to be faster (``flowops.measured``); ``reference`` always can. A backend asked for by name,
in the call or through the environment variable ``FLOWOPS_BACKEND`` (which speaks for every call
that names none), runs or raises. Triton's interpreter (``TRITON_INTERPRET=1``) runs the triton
kernels on CPU tensors, and the emulator of the tests (``FLOWOPS_CUDA_EMULATOR``) the cuda ones, by
name only.
"""

import ctypes
import functools
import importlib.util
import os
import platform
import sys
import warnings
from collections.abc import Callable
from types import ModuleType

import torch

from . import cuda_runtime, measured

BACKENDS = ("cuda", "triton", "cpu", "reference")

#: What ``auto`` tries, by the type of the tensors' device.
_AUTO = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}

#: op name -> backend -> (function, supports); ``supports(*args)`` returns a reason not to, or None.
_IMPLEMENTATIONS: dict[str, dict[str, tuple[Callable, Callable | None]]] = {}

_FLOPS: dict[str, Callable] = {}
_FLOP_COUNTER = "torch.utils.flop_counter"

#: Storage types of the native CPU kernels and their codes in csrc/cpu/kernels.h.
NATIVE_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}

_TRITON_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def implement(op: str, backend: str, supports: Callable[..., str | None] | None = None):
    """Decorator: the function computes ``op`` on ``backend`` wherever ``supports`` has no reason
    against it. ``supports`` sees the arguments of the op."""

    def register(function):
        _IMPLEMENTATIONS.setdefault(op, {})[backend] = (function, supports)
        return function

    return register


def define_op(schema: str, flops: Callable | None = None):
    """Registers ``flowops::<op>`` with torch.library; decorates its shape function.

    The schema is that of the op's arguments, tensors first; ``str backend`` is appended to them.
    The decorated function takes the same arguments without the backend and returns empty outputs
    (what torch.library calls the fake). ``flops`` takes the arguments with shapes for tensors.
    """
    op, rest = schema.split("(", 1)
    arguments, returns = rest.rsplit(") ->", 1)
    name = f"flowops::{op}"
    torch.library.define(name, f"({arguments}, str backend) ->{returns}")
    torch.library.impl(name, "default", lambda *args: run(op, args[-1], *args[:-1]))
    if flops is not None:
        _FLOPS[op] = flops
        if _FLOP_COUNTER in sys.modules:
            _register_flops(sys.modules[_FLOP_COUNTER], op)

    def register(fake):
        torch.library.register_fake(name, lambda *args: fake(*args[:-1]))
        return fake

    return register


class _FlopCounterHook:
    """Registers the formulas when somebody imports torch's flop counter. That module imports
    Triton, which ``import flowops`` must not."""

    def find_spec(self, name, path=None, target=None):
        if name != _FLOP_COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            _register_flops(module, *_FLOPS)

        spec.loader.exec_module = execute_and_register
        return spec


if _FLOP_COUNTER not in sys.modules:
    sys.meta_path.insert(0, _FlopCounterHook())


def _register_flops(counter: ModuleType, *names: str) -> None:
    for name in names:
        counter.register_flop_formula(getattr(torch.ops.flowops, name))(
            lambda *args, out_shape=None, flops=_FLOPS[name], **kwargs: flops(*args[:-1])
        )


def ops() -> list[str]:
    """Names of all ops, backward passes included."""
    return sorted(_IMPLEMENTATIONS)


def run(op: str, backend: str, *args):
    """Calls the implementation of ``op`` that ``backend`` selects. Autocast is off inside: every
    op states its own arithmetic."""
    device_type = args[0].device.type
    function = _select(op, backend, args, device_type)
    if torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return function(*args)
    return function(*args)


def can_run(op: str, backend: str, *args) -> tuple[bool, str]:
    """Says whether ``backend`` can run ``op``; with ``args`` (the op's own, tensors first), whether
    it can run it on those.

    Returns:
        ``(True, "")`` or ``(False, reason)``.

    Raises:
        ValueError: if there is no such op or backend.
    """
    if op not in _IMPLEMENTATIONS:
        raise ValueError(f"op: expected one of {ops()}, got {op!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    reason = _reason_against(op, backend, args)
    return reason is None, reason or ""


def backend_state(backend: str) -> tuple[bool, str]:
    """Whether ``backend`` is usable in this process: ``(usable, what is active or why not)``."""
    if backend == "reference":
        return True, f"PyTorch {torch.__version__}"
    if backend == "cpu":
        module, reason = _load_native()
        if module is None:
            return False, reason
        return (
            True,
            f"{module.isa()} of {', '.join(module.isas())}; {torch.get_num_threads()} threads",
        )
    return _gpu_state(backend, _on_cpu(backend))


def _on_cpu(backend: str) -> bool:
    """Whether the kernels of ``triton`` or ``cuda`` run on CPU tensors, and on no others."""
    return interpreting() if backend == "triton" else cuda_runtime.emulating()


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _gpu_state(backend: str, on_cpu: bool) -> tuple[bool, str]:
    if backend == "cuda" and on_cpu:
        return True, f"the emulator in {os.environ.get(cuda_runtime.EMULATOR)}"
    package = "triton" if backend == "triton" else "cupy"
    if importlib.util.find_spec(package) is None:
        extra = ": pip install 'flowops[cuda13]', or cuda12" if package == "cupy" else ""
        return False, f"the package {package} is not installed{extra}"
    if backend == "triton":
        import triton

        if on_cpu:
            return True, f"the interpreter of Triton {triton.__version__} (TRITON_INTERPRET=1)"
    reason = _no_device()
    if reason is not None:
        return False, f"no CUDA device is visible to PyTorch: {reason}"
    if backend == "cuda" and torch.version.hip:
        return False, "this PyTorch is for ROCm"
    if not torch.version.hip and torch.cuda.get_device_capability() < (8, 0):
        return False, f"{torch.cuda.get_device_name()} has no compute capability 8.0"
    if backend == "cuda":
        try:
            return True, f"{cuda_runtime.origin()} on {torch.cuda.get_device_name()}"
        except RuntimeError as error:
            return False, str(error)
    return True, f"Triton {triton.__version__} on {torch.cuda.get_device_name()}"


def _no_device() -> str | None:
    """Why PyTorch sees no GPU, in the first sentence of its own words; None if it sees one."""
    with warnings.catch_warnings(record=True):  # it warns of a driver that is too old
        if torch.cuda.is_available():
            return None
        try:
            torch.cuda.init()
        except (AssertionError, RuntimeError) as error:
            return str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")
    return "torch.cuda.is_available() is False"


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype of the arithmetic: fp32 whatever the storage, fp64 if any tensor is."""
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def computing(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All in the dtype of the arithmetic."""
    dtype = compute_dtype(*tensors)
    return tuple(t.to(dtype) for t in tensors)


def needs_grad(*tensors: torch.Tensor) -> bool:
    """Whether a backward pass may follow. Where it can't, the op is called without its autograd
    Function, which costs more than a small kernel does."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return False


def native() -> ModuleType:
    """The module ``flowops._C``.

    Raises:
        RuntimeError: saying why it could not be loaded.
    """
    module, reason = _load_native()
    if module is None:
        raise RuntimeError(f"flowops has no native CPU kernels here: {reason}")
    return module


def check_backend(backend: str) -> None:
    """Raises ValueError unless ``backend`` is "auto" or a backend's name."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {BACKENDS}, got {backend!r}")


def check_floating(**tensors: torch.Tensor) -> None:
    """Raises TypeError or ValueError, naming the argument, unless all are floating tensors on the
    device of the first."""
    first = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        if first is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(
                f"{name}: expected a tensor on {device} like {first}, got one on {tensor.device}"
            )


def cpu_dtype_reason(*tensors: torch.Tensor) -> str | None:
    """Why the native CPU kernels can't take these storage types, or None."""
    for tensor in tensors:
        if tensor.dtype not in NATIVE_DTYPES:
            return f"{tensor.dtype} has no native CPU kernel"
    return None


def triton_dtype_reason(*tensors: torch.Tensor) -> str | None:
    """Why the Triton kernels can't take these storage types, or None."""
    for tensor in tensors:
        if tensor.dtype not in _TRITON_DTYPES:
            return f"{tensor.dtype} has no Triton kernel"
        if tensor.dtype == torch.bfloat16 and interpreting():
            return "Triton's interpreter computes bfloat16 wrongly"
    return None


def _select(op: str, backend: str, args: tuple, device_type: str) -> Callable:
    asked = backend if backend != "auto" else os.environ.get("FLOWOPS_BACKEND") or "auto"
    implementations = _IMPLEMENTATIONS[op]
    if asked == "auto":
        for candidate in _AUTO.get(device_type, ("reference",)):
            entry = implementations.get(candidate)
            if candidate == "cuda" and not measured.prefers_cuda(op, args[0]):
                continue
            if entry is not None and _reason(candidate, device_type, entry[1], args) is None:
                return entry[0]
    if asked not in BACKENDS:
        raise ValueError(f"FLOWOPS_BACKEND: expected 'auto' or one of {BACKENDS}, got {asked!r}")
    reason = _reason_against(op, asked, args)
    if reason is not None:
        raise RuntimeError(f"backend {asked!r} can't run {op}: {reason}")
    return implementations[asked][0]


def _reason_against(op: str, backend: str, args: tuple) -> str | None:
    entry = _IMPLEMENTATIONS[op].get(backend)
    if entry is None:
        return f"{op} has no {backend} kernel in this version"
    return _reason(backend, args[0].device.type if args else None, entry[1], args)


def _reason(
    backend: str, device_type: str | None, supports: Callable | None, args: tuple
) -> str | None:
    """Why an implementation can't run, on ``args`` if there are any."""
    if backend == "reference":
        return None
    if backend == "cpu":
        needed = "cpu"
        module, reason = _load_native()
        usable = module is not None
    else:
        needed = "cpu" if _on_cpu(backend) else "cuda"
        usable, reason = backend_state(backend)
    if device_type not in (needed, None):
        return f"its tensors are on {args[0].device}"
    if not usable:
        return reason
    return supports(*args) if supports is not None and args else None


@functools.cache
def _load_native() -> tuple[ModuleType | None, str]:
    if importlib.util.find_spec("flowops._C") is None:
        return None, _build_note()
    error = _share_openmp_runtime()
    try:
        import flowops._C as module
    except ImportError as exception:
        return None, f"flowops._C does not load: {exception}{error}"
    return module, ""


def _build_note() -> str:
    note = os.path.join(os.path.dirname(__file__), "_native_note.txt")
    if os.path.exists(note):
        with open(note) as file:
            return file.read().strip()
    return "flowops._C was not built; reinstall with FLOWOPS_NATIVE=1 to see why"


def _share_openmp_runtime() -> str:
    """Makes the OpenMP runtime that torch runs visible to ``_C``, which is linked against none.

    Two runtimes mean two pools, and the idle threads of one spin on the cores of the other for
    milliseconds after every parallel region. Returns a note for the error message if there is no
    runtime to share.
    """
    if platform.system() != "Linux":
        candidates = []
    else:
        with open("/proc/self/maps") as maps:
            loaded = dict.fromkeys(line.split(maxsplit=5)[-1].strip() for line in maps)
        names = ("libgomp", "libiomp5", "libomp")
        candidates = [path for path in loaded if os.path.basename(path).startswith(names)]
        home = os.path.dirname(os.path.dirname(torch.__file__))
        candidates.sort(key=lambda path: not path.startswith(home))
    for library in [*candidates, "libgomp.so.1"]:
        try:
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
            return ""
        except OSError:
            continue
    return "; no OpenMP runtime (libgomp) was found"
