"""``decode_block`` on a GPU as CUDA graphs, so that it waits for the device and not for Python.

A graph holds a few sweeps of one block; positions, stopping and the choice of ``auto`` are on the
device, so that the same graph is replayed to the end. The exact sampler needs a known number of
replays. Otherwise the host reads how many tokens are left from a copy that the replay before the
last one has sent, while the last one runs: the device never waits for the host, and the replay too
many finds nothing to do.

Workspaces are shared by blocks of equal sizes and kept, the least recently used dropped first.
"""

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .decode_weights import PackedBlock

_SINGLE_STEPS, _WIDE_SWEEPS = 32, 2  # of a graph
_SHARE = 4  # workspaces are kept up to the device's memory over this

_lock = threading.Lock()
_capture_lock = threading.Lock()
#: By device, then by sizes; the least recently used first.
_stations: dict[torch.device, "OrderedDict[object, _Station]"] = {}


def decode_block(
    z, weights, embed, guide, heads: int, eps: float, temperature: float, reverse: bool,
    tol: float, window: int, break_even: float, precision: str,
):  # fmt: skip
    """``(x, residual, counts)`` of ``flowops.decode.decode_block_reference``, on Triton. Without
    graphs of its own in Triton's interpreter and while the caller captures one."""
    from .kernels import decode as kernels

    weights = PackedBlock(*weights)
    if z.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return kernels.decode_block(
            *(z, weights, embed, guide, heads, eps, temperature, reverse, tol, window),
            *(break_even, precision),
        )
    with torch.cuda.device(z.device):
        return _decode(
            *(z, weights, embed, guide, heads, window, reverse, break_even),
            kernels.Settings(eps, temperature, tol, precision),
        )


def _decode(z, weights, embed, guide, heads, window, reverse, break_even, settings):
    from .kernels.decode import sizes_of

    sizes = sizes_of(z, weights, embed, heads, window)
    station = _station(sizes, z.device)
    with station.lock:
        station.begin()
        station.work.load(z, embed, guide, reverse)
        station.run(weights, settings, break_even)
        result = station.work.result(reverse)
        station.free.record()
    if _stations[z.device].get(sizes) is not station:
        station.free.synchronize()  # its graphs go now
    return result


def clear() -> None:
    """Drops all workspaces and graphs."""
    with _lock:
        for stations in _stations.values():
            while stations:
                _drop_oldest(stations)


def _station(sizes, device: torch.device) -> "_Station":
    """Kept, unless it alone is more than may be kept."""
    with _lock:
        stations = _stations.setdefault(device, OrderedDict())
        if sizes not in stations:
            room = _capacity(device) - _Station.nbytes_of(sizes)
            while stations and sum(s.nbytes for s in stations.values()) > room:
                _drop_oldest(stations)
            station = _Station(sizes, device)
            if room < 0:
                return station
            stations[sizes] = station
        stations.move_to_end(sizes)
        return stations[sizes]


def _drop_oldest(stations: "OrderedDict[object, _Station]") -> None:
    _, station = stations.popitem(last=False)
    station.free.synchronize()  # its graphs may be running


def _capacity(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory // _SHARE


def _capture(function: Callable[[], None]) -> Callable[[], None]:
    """A graph of what ``function`` launches, to replay."""
    graph = torch.cuda.CUDAGraph()
    with _capture_lock, torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    return graph.replay


class _Station:
    """A workspace, the graphs that run in it, and the event after which it is free again."""

    def __init__(self, sizes, device: torch.device):
        from .kernels.decode import Workspace

        self.lock = threading.Lock()
        with torch.inference_mode(False):  # for later calls, in any mode
            self.work = Workspace(sizes, device)
        self.nbytes = sum(t.nbytes for t in self.work.tensors())
        self.free, *self.sent = (torch.cuda.Event() for _ in range(3))
        pinned = device.type == "cuda"
        self.left = torch.empty(2, 2, dtype=torch.int32, pin_memory=pinned)
        self.graphs: dict[tuple, tuple[list[StorageWeakRef], Callable[[], None]]] = {}

    @staticmethod
    def nbytes_of(sizes) -> int:
        from .kernels.decode import Workspace

        return sum(t.nbytes for t in Workspace(sizes, torch.device("meta")).tensors())

    def begin(self) -> None:
        """Makes the current stream wait for the one that was here last."""
        self.free.wait()
        for tensor in self.work.tensors():
            tensor.record_stream(torch.cuda.current_stream())

    def run(self, weights, settings, break_even: float) -> None:
        """From a loaded workspace to the result in it."""
        window, steps = self.work.sizes.window, self.work.sizes.T - 1
        if window > 1:
            if break_even > 0:
                self._graph(weights, settings, 1, _SINGLE_STEPS)  # nothing waits for it yet
            replay = self._graph(weights, settings, window, _WIDE_SWEEPS)
            steps = self._until_done(replay, break_even)
        if steps > 0:
            replay = self._graph(weights, settings, 1, _SINGLE_STEPS)
            for _ in range(-(-steps // _SINGLE_STEPS)):
                replay()

    def _until_done(self, replay: Callable[[], None], break_even: float) -> int:
        """Wide sweeps until no more are due. Returns how many single steps are."""
        for i in itertools.count():
            self.work.probe(i * _WIDE_SWEEPS, break_even)
            replay()
            self.left[i % 2].copy_(self.work.remaining(), non_blocking=True)
            self.sent[i % 2].record()
            if i > 0:
                self.sent[(i - 1) % 2].synchronize()
                wide, single = self.left[(i - 1) % 2].tolist()
                if wide == 0:
                    return single

    def _graph(self, weights, settings, window: int, sweeps: int) -> Callable[[], None]:
        """A graph of so many sweeps with these weights. It holds addresses alone: when the weights
        are gone, so is the graph."""
        from .kernels.decode import sweep

        dead = [k for k, (refs, _) in self.graphs.items() if any(r.expired() for r in refs)]
        if dead:
            self.free.synchronize()
        for key in dead:
            del self.graphs[key]
        key = (tuple(w.data_ptr() for w in weights), settings, window)
        if key not in self.graphs:
            work, state = self.work, self.work.state.clone()
            work.state[:2] = work.sizes.T - 1  # nothing to do, so that this only compiles
            sweep(work, weights, settings, window)
            work.state.copy_(state)

            def several() -> None:
                for _ in range(sweeps):
                    sweep(work, weights, settings, window)

            refs = [StorageWeakRef(w.untyped_storage()) for w in weights]
            self.graphs[key] = refs, _capture(several)
        return self.graphs[key][1]
