"""Rows of the noise contract that do not begin at 0."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from flowops import noise_normal, noise_uniform, noise_words
from helpers import ENGINES, running

DRAWS = {"words": noise_words, "uniform": noise_uniform, "normal": noise_normal}
#: With counters on both sides of 2^32, and up to where those of some 100 rows of 70 still fit.
FIRST_ROWS = st.integers(0, 2**63 // 18 - 100) | st.integers(2**32 - 40, 2**32)

by_engine = pytest.mark.parametrize("engine", ENGINES)
by_kind = pytest.mark.parametrize("kind", DRAWS)


@by_engine
@settings(max_examples=30, deadline=None)
@given(
    start=st.just(0) | FIRST_ROWS,
    skipped=st.integers(0, 40),
    rows=st.integers(1, 40),
    rest=st.integers(0, 3),
    width=st.integers(1, 70),
)
def test_a_range_of_rows_is_a_slice_of_the_whole(engine, start, skipped, rows, rest, width):
    first_row, all_rows, rng = start + skipped, skipped + rows + rest, torch.tensor([5, 6])
    with running(engine) as backend:
        for draw in DRAWS.values():
            whole = draw((all_rows, width), first_row=start, rng=rng, backend=backend)
            part = draw((rows, width), first_row=first_row, rng=rng, backend=backend)
            assert torch.equal(part, whole[skipped : skipped + rows])


@by_kind
def test_leading_dimensions_are_rows_of_a_range(kind):
    whole = DRAWS[kind]((40, 7), rng=(rng := torch.tensor([5, 6])))
    assert torch.equal(DRAWS[kind]((2, 3, 7), first_row=11, rng=rng).view(6, 7), whole[11:17])
    assert torch.equal(DRAWS[kind]([7], first_row=numpy.int64(11), rng=rng), whole[11])


@by_engine
@by_kind
@pytest.mark.parametrize(
    ("shape", "last"), [((3, 4), 2**63 - 4), ((3, 5), 2**62 - 4), ([3], 2**63 - 2)]
)
def test_rows_have_64_bits(engine, kind, shape, last):
    rng = torch.tensor([5, 6])
    with running(engine) as backend:
        assert DRAWS[kind](shape, first_row=last, rng=rng, backend=backend).isfinite().all()
        for first_row in (last + 1, 2**63, -1, -(2**63)):
            match = f"^first_row: expected 0 to {last} for shape .*, got {first_row}$"
            with pytest.raises(ValueError, match=match):
                DRAWS[kind](shape, first_row=first_row, rng=rng, backend=backend)


@by_kind
@pytest.mark.parametrize("first_row", [2.0, "1", None, torch.tensor(1.5)])
def test_first_rows_of_another_type_are_named(kind, first_row):
    with pytest.raises(TypeError, match=r"^first_row: expected an integer, got"):
        DRAWS[kind]((2, 3), first_row=first_row)


@by_kind
def test_compile_takes_any_first_row(kind):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    rng = torch.tensor([5, 6])

    def draw(rows, first_row):
        return DRAWS[kind]((rows, 7), first_row=first_row, rng=rng)

    compiled = torch.compile(draw, backend=counter, fullgraph=True)
    # Once with the first value as a number, then with any.
    for first_row in (8, 16, 1, 0, 17, 2**32, 2**40 + 1, 2**62 - 6):
        assert torch.equal(compiled(5, first_row), draw(5, first_row))
    assert counter.frame_count == 2
    # And once with any number of rows.
    for rows in (4, 6, 9):
        assert torch.equal(compiled(rows, 8), draw(rows, 8))
    assert counter.frame_count == 3
    torch.compiler.reset()
