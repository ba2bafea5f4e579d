"""The emulator of tests/emulator: that it compiles the kernels, and notices what it should."""

import ctypes
import os
import subprocess

import pytest

import emulate

SOURCE = """
struct Arguments { float* out; i64 which; };
FLOWOPS_KERNEL(probe, Arguments, 64, 1) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  int i = threadIdx.x;
  shared[i] = i;
  if (args.which == 0) __syncthreads();
  if (args.which == 1 && i < 32) __syncthreads();
  if (args.which == 2 && i == 0) shared[64] = 0;
  if (args.which == 3) load_vec<float, 4>(args.out + 1);
  if (args.which == 5) __syncwarp();
  args.out[i] = shared[63 - i];
}
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulator")
    source, library = folder / "probe.cu", folder / "probe.so"
    source.write_text(f'#include "common.cuh"\n{SOURCE}')
    command = [emulate.COMPILER, *emulate.OPTIONS, f"-I{emulate.SOURCES}"]
    command += ["-include", str(emulate.HEADERS / "emulator.h"), "-x", "c++", str(source)]
    try:
        subprocess.run([*command, "-o", str(library)], check=True)
    except FileNotFoundError:
        pytest.skip(f"no compiler {emulate.COMPILER}")
    function = ctypes.CDLL(str(library)).emulate
    function.restype = ctypes.c_char_p

    def run(which, seed=1):
        out, ones = (ctypes.c_float * 64)(), (ctypes.c_uint * 3)(1, 1, 1)
        arguments = (ctypes.c_longlong * 2)(ctypes.addressof(out), which)
        block = (ctypes.c_uint * 3)(64, 1, 1)
        error = function(
            *(b"probe", ones, block, ctypes.c_size_t(256), 0, arguments, ctypes.c_ulong(seed))
        )
        return None if error is None else error.decode(), list(out)

    return run


def test_every_source_compiles():
    folder = emulate.build()
    if folder is None:
        pytest.skip(f"no compiler {emulate.COMPILER}")
    assert not [log.read_text() for log in folder.glob("*.log")]
    names = {os.path.splitext(name)[0] for name in os.listdir(folder) if name.endswith(".so")}
    assert names == {source.stem for source in emulate.SOURCES.glob("*.cu")}


@pytest.mark.parametrize("seed", range(4))
def test_a_barrier_makes_what_was_written_before_visible(probe, seed):
    assert probe(0, seed) == (None, [63.0 - i for i in range(64)])


def test_a_missing_barrier_shows(probe):
    _, out = probe(4, seed=0)
    assert any(value != value for value in out)  # shared memory begins as NaN
    _, out = probe(5, seed=0)
    assert any(value != value for value in out)


def test_a_barrier_that_some_never_reach_is_an_error(probe):
    assert "wait for each other for ever" in probe(1)[0]


def test_a_write_behind_shared_memory_is_an_error(probe):
    assert probe(2)[0] == "a write behind the shared memory"


def test_a_misaligned_vector_is_an_error(probe):
    assert probe(3)[0] == "a misaligned vector access"
