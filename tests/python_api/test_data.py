import numpy as np
import pytest
import torch
from PIL import Image

from flowops.api.data import Images, load_images, save_grid, scale_pixels


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for name, mode, shape in (
        ("cats/a.png", "RGB", (20, 30, 3)),
        ("cats/b.jpg", "RGB", (31, 17, 3)),
        ("dogs/c.png", "L", (16, 16)),
        ("dogs/deep/d.webp", "RGB", (40, 40, 3)),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8), mode).save(path)
    (tmp_path / "cats" / "notes.txt").write_text("not an image")
    return tmp_path


def test_mnist_is_the_real_thing():
    data = load_images("mnist")
    assert data.pixels.shape == (5000, 1, 28, 28)
    assert data.pixels.dtype == torch.uint8
    assert torch.equal(data.labels.bincount(), torch.full((10,), 500))
    assert data.pixels.max() == 255


def test_digits_span_the_byte_range():
    data = load_images("digits")
    assert data.pixels.shape == (1797, 1, 8, 8)
    assert data.pixels.max() == 255
    assert data.class_names == tuple("0123456789")


def test_split_is_disjoint_and_the_same_every_time():
    pixels = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1)
    data = Images(pixels, torch.arange(100))
    train, held_out = data.split(30)
    assert (len(train), len(held_out)) == (70, 30)
    assert torch.equal(torch.cat([train.labels, held_out.labels]).sort().values, data.labels)
    assert torch.equal(data.split(30)[1].labels, held_out.labels)
    assert torch.equal(held_out.pixels.flatten().long(), held_out.labels)


def test_a_folder_of_classes(folder):
    data = load_images(str(folder), img_size=12, channels=3)
    assert data.pixels.shape == (4, 3, 12, 12)
    assert data.class_names == ("cats", "dogs")
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert load_images(str(folder), img_size=12, channels=1).pixels.shape == (4, 1, 12, 12)


def test_a_folder_without_classes(folder):
    data = load_images(str(folder / "cats"), img_size=8)
    assert data.labels is None
    assert data.class_names == ()
    assert len(data) == 2


def test_images_are_cropped_to_the_centre(tmp_path):
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    pixels = load_images(str(tmp_path), img_size=10).pixels
    assert (pixels == 200).all()


@pytest.mark.parametrize("name", ["broken.png", "broken.jpg"])
@pytest.mark.parametrize("keep", [0, 30, 0.5])
def test_a_broken_image_is_named(folder, name, keep):
    whole = folder / "cats" / ("a.png" if name.endswith("png") else "b.jpg")
    data = whole.read_bytes()
    keep = int(keep * len(data)) if isinstance(keep, float) else keep
    (folder / "dogs" / name).write_bytes(data[:keep])
    with pytest.raises(ValueError, match=rf"dogs/{name}: unreadable or truncated image"):
        load_images(str(folder), img_size=12)


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="data: expected 'mnist', 'digits' or a folder"):
        load_images(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="img_size: needed for the folder"):
        load_images(str(folder))
    with pytest.raises(ValueError, match=r"channels: expected 1 \(grey\) or 3 \(RGB\), got 2"):
        load_images(str(folder), img_size=8, channels=2)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="empty holds no images"):
        load_images(str(empty), img_size=8)


def test_scale_pixels():
    pixels = torch.tensor([0, 255], dtype=torch.uint8)
    assert scale_pixels(pixels).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_places_images_by_rows(tmp_path, channels):
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, channels, 4, 4)
    path = tmp_path / "grid.png"
    save_grid(images, path, columns=3, zoom=1)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape[:2] == (2 * 5 + 1, 3 * 5 + 1)
    for i in range(5):
        tile = sheet[1 + 5 * (i // 3) :, 1 + 5 * (i % 3) :][:4, :4]
        assert (tile == round(255 * i / 4 + 1e-6)).all()
