import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowops.api.augment import crop_and_flip

RNG = torch.tensor([3, 8])


def images(B, c, H, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (B, c, H, H), generator=generator, dtype=torch.uint8).to(dtype)


def windows(x, size, shift, flip):
    """Every square that may come out for an image ``[c, H, H]``, ``[n, c, size, size]``."""
    padded = torch.nn.functional.pad(x[None].double(), (shift,) * 4, mode="replicate")[0]
    found = padded.unfold(1, size, 1).unfold(2, size, 1).flatten(1, 2).transpose(0, 1)
    return torch.cat([found, found.flip(3)]) if flip else found


@given(
    c=st.integers(1, 3),
    H=st.integers(1, 9),
    cut=st.integers(0, 8),
    shift=st.integers(0, 4),
    flip=st.booleans(),
    dtype=st.sampled_from([torch.uint8, torch.float32, torch.bfloat16]),
    first_row=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_every_square_is_one_of_its_image(c, H, cut, shift, flip, dtype, first_row):
    size = max(1, H - cut)
    x = images(3, c, H, dtype)
    out = crop_and_flip(x, size, shift, flip, RNG, first_row)
    assert out.shape == (3, c, size, size)
    assert out.dtype == dtype
    for image, square in zip(x, out, strict=True):
        same = windows(image, size, shift, flip) == square.double()
        assert same.flatten(1).all(1).any()


@pytest.mark.parametrize(("size", "shift", "flip"), [(8, 2, True), (5, 0, True), (6, 1, False)])
def test_a_batch_may_be_cut_anywhere(size, shift, flip):
    """What an image becomes depends on its number in the batch, not on who holds it."""
    x = images(17, 3, 8)
    all_ = crop_and_flip(x, size, shift, flip, RNG)
    for cut in (1, 6, 16):
        parts = [
            crop_and_flip(x[:cut], size, shift, flip, RNG),
            crop_and_flip(x[cut:], size, shift, flip, RNG, first_row=cut),
        ]
        assert torch.equal(torch.cat(parts), all_)
    other = crop_and_flip(x, size, shift, flip, torch.tensor([3, 9]))
    assert not torch.equal(other, all_)


def test_places_and_mirrors_are_evenly_drawn():
    """Of one image whose pixels are all different, 8x8 in 6x6: 3x3 places, moved by one: 5x5."""
    n = 20_000
    x = torch.arange(64).view(1, 1, 8, 8).expand(n, 1, 8, 8)
    out = crop_and_flip(x, 6, 0, True, RNG)[:, 0]
    mirrored = out[:, 0, 0] > out[:, 0, 1]
    assert abs(mirrored.float().mean().item() - 0.5) < 0.02
    corner = torch.where(mirrored, out[:, 0, -1], out[:, 0, 0])
    counts = torch.bincount(corner, minlength=64).view(8, 8)
    assert counts[:3, :3].sum() == n
    expected = n / 9
    assert (counts[:3, :3] - expected).abs().max() < 5 * expected**0.5
    moved = crop_and_flip(x, 8, 1, False, RNG)[:, 0, 4, 4]
    counts = torch.bincount(moved, minlength=64).view(8, 8)
    assert (counts[3:6, 3:6] > 0).all()
    assert counts.sum() == counts[3:6, 3:6].sum()


def test_rows_and_columns_move_apart_from_each_other():
    x = torch.arange(64).view(1, 1, 8, 8).expand(4000, 1, 8, 8)
    corner = crop_and_flip(x, 4, 0, False, RNG)[:, 0, 0, 0]
    rows, columns = (corner // 8).double(), (corner % 8).double()
    assert abs(torch.corrcoef(torch.stack([rows, columns]))[0, 1].item()) < 0.06


def test_all_channels_move_together():
    x = images(1, 1, 8).expand(40, 3, 8, 8)
    out = crop_and_flip(x, 5, 2, True, RNG)
    assert torch.equal(out[:, 0], out[:, 1])
    assert torch.equal(out[:, 0], out[:, 2])


def test_nothing_to_draw():
    x = images(4, 3, 8)
    assert crop_and_flip(x, 8, 0, False, RNG) is x


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_devices_agree():
    x = images(9, 3, 8)
    here = crop_and_flip(x, 6, 1, True, RNG)
    there = crop_and_flip(x.cuda(), 6, 1, True, RNG.cuda())
    assert torch.equal(there.cpu(), here)
