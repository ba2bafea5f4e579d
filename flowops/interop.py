"""Arrays of other libraries where an op takes tensors: CuPy, NumPy, JAX, all that speak DLPack.

    result = from_dlpack(op(torch.from_dlpack(array), ...))

The memory is shared both ways, nothing is copied. Where the array is on a GPU, each of the two
``from_dlpack`` makes the consumer's current stream wait for the producer's.

Source: Python array API standard, "Data interchange mechanisms"; DLPack, "Python specification".
"""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from . import dispatch

F = TypeVar("F", bound=Callable[..., Any])

_CPU = 1  # DLDeviceType kDLCPU


def takes_arrays(function: F) -> F:
    """Decorator: ``function``, a public op, also takes arrays, and returns what the first of them
    (in the order of its parameters) is.

    An array is what has ``__dlpack__`` and ``__dlpack_device__`` and is no tensor. Tensors may
    stand beside arrays unless they require a gradient, which arrays can't carry.

    Arrays are looked for only once ``function`` has refused its arguments, so that calls with
    tensors alone pay for one more frame and nothing else. It has to refuse what is no tensor by
    TypeError or ValueError, before it computes or draws.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (TypeError, ValueError):
            if torch.compiler.is_compiling() or not any(map(_is_array, (*args, *kwargs.values()))):
                raise
        return _call_with_arrays(function, signature.bind(*args, **kwargs))

    return call


def _is_array(value: object) -> bool:
    # Asked of the type, as protocols are: a tracer's attributes may be anything.
    kind = type(value)
    return (
        hasattr(kind, "__dlpack__")
        and hasattr(kind, "__dlpack_device__")
        and not isinstance(value, torch.Tensor)
    )


def _call_with_arrays(function: Callable, bound: inspect.BoundArguments) -> Any:
    give_back = None
    for name, value in bound.arguments.items():
        if _is_array(value):
            give_back = give_back or _consumer(name, value)
            bound.arguments[name] = _tensor(name, value)
        elif isinstance(value, torch.Tensor) and dispatch.needs_grad(value):
            raise ValueError(
                f"{name}: expected a tensor that requires no gradient beside arrays, which carry "
                "none; detach it or call under torch.no_grad()"
            )
    out = function(*bound.args, **bound.kwargs)
    return tuple(map(give_back, out)) if isinstance(out, tuple) else give_back(out)


def _tensor(name: str, array: Any) -> torch.Tensor:
    """A tensor over the memory of ``array``."""
    strides = _strides(array)
    if any(stride < 0 for stride in strides):
        raise ValueError(
            f"{name}: expected an array without negative strides, which tensors can't have, got "
            f"strides {strides}; pass a contiguous copy"
        )
    try:
        return torch.from_dlpack(array)
    except Exception as error:  # whatever the library of the array raises
        raise TypeError(
            f"{name}: expected an array that torch can share, got {_name(array)}: {error}"
        ) from error


def _strides(array: Any) -> tuple[int, ...]:
    """Those of ``array``, or () where nobody tells. Asked for because ``torch.from_dlpack`` of
    PyTorch 2.13 ends the process at a negative one instead of raising."""
    if hasattr(array, "strides"):
        return tuple(array.strides)
    if array.__dlpack_device__()[0] != _CPU:
        return ()
    import numpy

    try:
        return numpy.from_dlpack(array).strides
    except (BufferError, RuntimeError):  # a dtype that NumPy lacks
        return ()


def _consumer(name: str, array: Any) -> Callable[[torch.Tensor], Any]:
    """The function that makes tensors arrays of the kind of ``array``."""
    if hasattr(array, "__array_namespace__"):
        library = array.__array_namespace__()
    else:
        library = sys.modules.get(type(array).__module__.partition(".")[0])
    if not hasattr(library, "from_dlpack"):
        raise TypeError(
            f"{name}: expected an array whose library has from_dlpack, to return the result "
            f"through, got {_name(array)}"
        )

    def give_back(tensor: torch.Tensor) -> Any:
        try:
            with torch.cuda.device_of(tensor):  # torch exports from the current device alone
                return library.from_dlpack(tensor)
        except Exception as error:
            raise TypeError(
                f"{name}: expected an array of a kind that can hold the result ({tensor.dtype} on "
                f"{tensor.device}), got {_name(array)}: {error}"
            ) from error

    return give_back


def _name(array: Any) -> str:
    return f"{type(array).__module__}.{type(array).__qualname__}"
