"""The CUDA kernels as machine code of three architectures: what they take and are made of.

No GPU is needed: NVRTC compiles, and nvcc where there is one, and Triton's tools take it apart.
"""

import json
import re

import pytest

import cuda_compile
from cuda_compile import ARCHITECTURES
from flowops import cuda_runtime

pytestmark = pytest.mark.skipif(
    cuda_compile.missing() is not None, reason=str(cuda_compile.missing())
)

VECTOR_LOAD, VECTOR_STORE = r"LDG\.E\.(\w+\.)*128", r"STG\.E\.(\w+\.)*128"
TF32, EXP = r"HMMA\.\w+\.F32\.TF32", r"MUFU\.EX2"
#: Source -> kernels, architectures, instructions that all of these have, those that none has.
EXPECTED = {
    "affine": [
        (r"(f32_f32_v4|16_v8|f64_v2)$", r"", [VECTOR_LOAD, VECTOR_STORE], []),
        # The inverse is elementwise: no thread waits for another.
        (r"inverse_(?!backward)", r"", [], [r"LDS|STS|BAR"]),
    ],
    "noise": [
        (r"^noise_(normal|uniform|words)$", r"", [VECTOR_STORE], []),
    ],
    "padding": [
        (r"on_padding\w*_(f32_v4|16_v8|f64_v2)$", r"", [VECTOR_LOAD, VECTOR_STORE], []),
    ],
    "gram": [
        (r"tf32$", r"", [TF32, EXP], []),
        (r"(fp32|few\w+)$", r"", [EXP], []),
    ],
    "gram_backward": [(r"backward", r"", [TF32, EXP], [])],
    "gram_backward_many": [(r"tf32$", r"", [TF32, EXP], [])],
    # Copies to shared memory pass by the registers, fragments leave it a matrix at a time.
    "attention": [(r"_fwd_", r"", [r"HMMA\.16816", r"LDSM", r"LDGSTS\S*\.128", EXP], [])],
    # One warp group copies and gives its registers to those that compute.
    "attention_hopper": [
        (r"", r"sm_90a", [r"HGMMA", r"USETMAXREG", r"UBLKCP|UTMALDG|LDGSTS", EXP], [r"LDL|STL"]),
    ],
    # Weights are streamed; blocks hand each other packets of 16 bytes, whole or not at all.
    "decode": [
        (r"", r"", [r"LDGSTS\S*\.128", r"LDG\S*128\S*STRONG\.GPU", r"STG\S*128\S*STRONG\.GPU"], []),
        (r"bf16$", r"", [r"HMMA\.16816\.F32\.BF16"], []),
    ],
}
#: Kernels that may keep something on the stack, on which architectures, and why.
STACK = [
    (r"_f64", r"", "nothing is trained or sampled in fp64; the tests of the formulas are"),
    (r"^gram_many_o64_fp32$", r"sm_100", "six words, read back outside the loop of products"),
]

by_source = pytest.mark.parametrize("source", cuda_runtime.names())


def compiled(source):
    """(architecture, kernel, what is known of it) for all architectures."""
    return [
        (arch, kernel, found)
        for arch, kernels in cuda_compile.kernels_of(source).items()
        for kernel, found in kernels.items()
    ]


def may_use_stack(kernel, arch=None):
    """On any architecture if none is named."""
    return any(
        re.search(kernels, kernel) and (arch is None or re.search(archs, arch))
        for kernels, archs, _ in STACK
    )


@by_source
def test_nvrtc_compiles_the_same_kernels_for_all(source):
    names = {arch: set() for arch in ARCHITECTURES}
    for arch, kernel, _ in compiled(source):
        names[arch].add(kernel)
    assert names[ARCHITECTURES[0]]
    assert all(found == names[ARCHITECTURES[0]] for found in names.values()), names


@by_source
def test_the_runtime_finds_all_kernels(source):
    for arch, binary in cuda_compile.compile_with_nvrtc(source).items():
        kernels = cuda_compile.kernels_of(source)[arch]
        assert cuda_runtime._kernels_in(binary) == sorted(kernels)


@by_source
def test_nothing_spills(source):
    """Nor does anything else live on the stack: it is memory, and slow."""
    for arch, kernel, found in compiled(source):
        assert may_use_stack(kernel, arch) or not found["stack"], (
            f"{arch} {kernel}: {found['stack']} bytes"
        )


@by_source
def test_expected_instructions(source):
    assert source in EXPECTED, f"csrc/cuda/{source}.cu: say in EXPECTED what it must be made of"
    for kernels, archs, needed, banned in EXPECTED[source]:
        seen = False
        for arch, kernel, found in compiled(source):
            if not (re.search(kernels, kernel) and re.search(archs, arch)):
                continue
            seen, names = True, "\n".join(found["instructions"])
            for form in needed:
                assert re.search(rf"^({form})", names, re.MULTILINE), f"{arch} {kernel}: no {form}"
            for form in banned:
                match = re.search(rf"^({form}).*", names, re.MULTILINE)
                assert match is None, f"{arch} {kernel}: {match[0]}"
        assert seen, f"no kernel is called {kernels}"


@pytest.mark.parametrize("source", ["noise", "padding"])
def test_noise_rounds_after_every_operation(source):
    """The contract by which it is the same everywhere. The assembler may fuse a product and a sum
    that do not name their rounding."""
    for kernel, text in cuda_compile.ptx_of(source).items():
        forms = r"\b((?:add|sub|mul|div|fma|mad|sqrt|rsqrt|ex2|lg2|sin|cos)\.[\w.]*f(?:32|64))\b"
        arithmetic = set(re.findall(forms, text))
        exact = {f"{name}.rn.{kind}" for name in ("add", "mul", "sqrt") for kind in ("f32", "f64")}
        assert arithmetic <= exact, f"{kernel}: {arithmetic - exact}"
        assert "words" in kernel or arithmetic


@by_source
@pytest.mark.skipif(cuda_compile.nvcc() is None, reason="no nvcc")
def test_nvcc_compiles_the_same_kernels(source):
    found = cuda_compile.kernels_of_nvcc(source, "sm_90a")
    assert {kernel for kernel, _ in found} == set(cuda_compile.kernels_of(source)["sm_90a"])
    for kernel, resources in found:
        assert may_use_stack(kernel) or not resources.get("stack"), f"{kernel}: {resources}"


@by_source
def test_no_kernel_grows(source):
    """More registers, stack or shared memory may mean fewer warps at once."""
    on_record = json.loads(cuda_compile.RECORD.read_text())
    if cuda_compile.nvrtc_version() != on_record["nvrtc"]:
        pytest.skip(f"recorded with NVRTC {on_record['nvrtc']}")
    complaints = []
    for arch, kernel, found in compiled(source):
        before = on_record[arch].get(kernel)
        if before is None:
            complaints.append(f"{arch} {kernel} is not on record")
        else:
            complaints += [
                f"{arch} {kernel}: {what} {before[what]} -> {found[what]}"
                for what in before
                if found[what] > before[what]
            ]
    hint = "if that is meant: python tests/cuda_compile.py --record, and look at the diff"
    assert not complaints, "\n".join([*complaints, hint])


def test_nothing_is_on_record_that_is_gone():
    on_record = json.loads(cuda_compile.RECORD.read_text())
    known = {kernel for source in cuda_runtime.names() for _, kernel, _ in compiled(source)}
    for arch in ARCHITECTURES:
        assert set(on_record[arch]) <= known
