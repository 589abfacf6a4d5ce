"""Digits read from pictures, on photographs made of MNIST's test digits."""

import io
import shutil
import tracemalloc
from functools import cache

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageDraw
from scipy import ndimage

from mnist_utils import digits
from mnist_utils.data import load_mnist
from mnist_utils.digits import Canvas, draw, photograph, predict, read_picture, steps
from mnist_utils.parameters import InputError

PHOTOGRAPHS = 120


@pytest.fixture
def x(mnist) -> np.ndarray:
    """MNIST's test images."""
    return mnist[1][0]


@cache
def models() -> dict:
    """The reference models, of which at least D's must be there for what needs them."""
    try:
        found = digits.trained_models("no-such-folder")
    except InputError:
        found = {}
    if "CNN D" not in found:
        pytest.skip("the results have no model files yet")
    return found


def encode(picture: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(file, kind, **options)
    return file.getvalue()


def turned_jpeg(picture: np.ndarray, turns: int, quality: int) -> bytes:
    """Return a JPEG of a picture that was turned, with the EXIF tag that turns it back."""
    exif = Image.Exif()
    exif[0x0112] = {0: 1, 1: 6, 2: 3, 3: 8}[turns]
    return encode(np.rot90(picture, turns).copy(), "JPEG", quality=quality, exif=exif)


def random_photograph(image: np.ndarray, seed: int) -> bytes:
    """Return a file: dark on light or light on dark, a JPEG however turned, or a PNG."""
    picture = photograph(image, seed)
    rng = np.random.default_rng(1000 + seed)
    if rng.random() < 0.5:
        picture = 255 - picture
    if rng.random() < 0.25:
        return encode(np.stack([picture] * 3, axis=2), "PNG")
    return turned_jpeg(picture, int(rng.integers(4)), quality=30)


def make_sheet(images, seed: int = 0, squared: float = 0.12) -> np.ndarray:
    """Return a sheet of squared paper, uint8 (600, 800), with 12 digits on three lines, and dust.

    The one in mnist_utils/sheet.png is made by write_sheet, below.
    """
    rng = np.random.default_rng(seed)
    ink = np.zeros((600, 800), np.float32)
    ink[::25] = ink[:, ::25] = squared
    for place, image in enumerate(images):
        side = int(rng.integers(110, 160))
        top = 190 * (place // 4) + int(rng.integers(5, 40))
        left = 195 * (place % 4) + int(rng.integers(5, 40))
        large = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
        there = ink[top : top + side, left : left + side]
        np.maximum(there, np.asarray(large) / 255, out=there)
    for y, x in rng.integers(5, 590, size=(6, 2)):
        ink[y : y + 3, x : x + 3] = 1
    y, x = np.mgrid[-1:1:600j, -1:1:800j]
    light = 0.8 * (1 + 0.2 * rng.uniform(-1, 1) * y + 0.2 * x - 0.1 * (x**2 + y**2))
    grey = ndimage.gaussian_filter(light * (1 - 0.75 * ink), 0.7)
    return (255 * np.clip(grey + rng.normal(0, 0.01, grey.shape), 0, 1)).astype(np.uint8)


SHEET = [3, 2, 1, 18, 4, 8, 11, 0, 61, 7, 10, 63]  # which test images


def write_sheet() -> None:
    """Write mnist_utils/sheet.png; with few grey levels, so that it stays small."""
    sheet = make_sheet(load_mnist()[1][0][SHEET]) // 16 * 16 + 8
    Image.fromarray(sheet).quantize(16).save(digits.SHEET, optimize=True)


def likeness(read: np.ndarray, image: np.ndarray) -> float:
    """Return the correlation of two images, one of them shifted by a pixel where that is better."""
    shifts = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    shifted = [np.roll(read, shift, (0, 1)) for shift in shifts]
    return max(np.corrcoef(one.ravel(), image.ravel())[0, 1] for one in shifted)


def test_the_models_read_photographed_digits(x, mnist):
    chosen = np.random.default_rng(7).permutation(len(x))[:PHOTOGRAPHS]
    found = [read_picture(random_photograph(x[i], i))[0] for i in chosen.tolist()]
    one = np.array([len(images) == 1 for images in found])
    assert one.mean() >= 0.99
    images = np.stack([images[0] for images in found])
    for name, model in models().items():
        accuracy = (one & (predict(model, images).argmax(axis=1) == mnist[1][1][chosen])).mean()
        assert accuracy >= (0.985 if name == "CNN D" else 0.97), (name, accuracy)


def test_without_the_preparation_they_do_not(x, mnist):
    y = mnist[1][1]
    made = [steps(photograph(image, seed)) for seed, image in enumerate(x[:60])]
    accuracy = {
        step: (predict(models()["CNN D"], np.stack([m[step] for m in made])).argmax(1) == y[:60])
        for step in made[0]
    }
    assert accuracy["resized"].mean() < 0.5
    assert accuracy["inverted"].mean() < 0.7
    assert accuracy["centre of mass"].mean() >= 0.98


def test_a_prepared_photograph_is_nearly_the_image_it_was_made_of(x):
    for seed, image in enumerate(x[:30]):
        (read,), _ = read_picture(photograph(image, seed))
        assert likeness(read, image) > 0.9
        np.testing.assert_array_equal(steps(photograph(image, seed))["centre of mass"], read)
        assert read.dtype == np.uint8 and read.max() == 255
        assert 19 <= max(np.ptp(axis) + 1 for axis in np.nonzero(read)) <= 20
        middle = ndimage.center_of_mass(read)
        assert np.abs(np.subtract(middle, 14)).max() < 1.5


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dark", [True, False])
def test_all_digits_of_a_sheet_are_found_in_order(x, seed, dark):
    images = x[100 + 12 * seed : 112 + 12 * seed]
    sheet = make_sheet(images, seed)
    found, boxes = read_picture(sheet if dark else 255 - sheet)
    assert len(found) == 12
    for read, image in zip(found, images, strict=True):
        assert likeness(read, image) > 0.85
    tops, lefts = boxes[:, 0].reshape(3, 4), boxes[:, 1].reshape(3, 4)
    assert (np.diff(lefts, axis=1) > 0).all() and tops[0].max() < tops[1].min() < tops[2].min()
    for top, left, bottom, right in boxes:
        assert sheet[top:bottom, left:right].min() < 110


def test_a_line_of_digits_may_slope(x):
    sheet = Image.fromarray(make_sheet(x[:12], squared=0)).rotate(6, fillcolor=190)
    found, _ = read_picture(np.asarray(sheet))
    for read, image in zip(found, x[:12], strict=True):
        assert likeness(read, image) > 0.6


def test_the_sheet_that_ships_is_made_of_test_digits(x):
    with Image.open(digits.SHEET) as sheet:
        made = make_sheet(x[SHEET]).astype(int)
        assert np.abs(np.asarray(sheet.convert("L")) - made).max() <= 16
    assert digits.SHEET.stat().st_size < 120_000
    found, _ = read_picture(digits.SHEET)
    assert len(found) == 12


@pytest.mark.parametrize("turns", range(4))
def test_exif_rotation_is_heeded_and_boxes_are_those_of_the_turned_picture(x, turns):
    picture = photograph(x[0], 2)
    expected, box = read_picture(picture)
    found, turned_box = read_picture(turned_jpeg(picture, turns, quality=95))
    assert np.abs(found.astype(int) - expected).mean() < 3
    assert np.abs(turned_box - box).max() <= 4


def five(gap: int) -> np.ndarray:
    """Return a 5 of 200 pixels whose bar stands apart by ``gap`` pixels."""
    picture = Image.new("L", (400, 400), 220)
    pen = ImageDraw.Draw(picture)
    pen.line([(160, 120), (160, 190)], fill=40, width=18)
    pen.arc([130, 180, 260, 310], 200, 130, fill=40, width=18)
    pen.line([(175 + gap // 2, 112 - gap), (260, 108 - gap)], fill=40, width=18)
    return np.asarray(picture)


def test_a_bar_close_to_its_five_belongs_to_it():
    for gap in (8, 20, 30):
        assert len(read_picture(five(gap))[0]) == 1


def test_specks_and_a_dark_table_are_no_digits(x):
    picture = photograph(x[0], 3).copy()
    expected, _ = read_picture(picture)
    speckled = picture.copy()
    for y, x in np.random.default_rng(0).integers(3, min(picture.shape) - 6, size=(12, 2)):
        speckled[y : y + 3, x : x + 3] = 10
    assert len(read_picture(speckled)[0]) == 1
    table = np.pad(picture, ((0, 14), (14, 0)), mode="reflect")
    table[-9:] = table[:, :11] = 30
    (found,), _ = read_picture(table)
    assert likeness(found, expected[0]) > 0.9


def test_every_kind_of_picture_that_pillow_opens_is_read(x, tmp_path):
    picture = photograph(x[0], 4)
    expected, _ = read_picture(picture)
    image = Image.fromarray(picture)
    path = tmp_path / "sheet.png"
    image.save(path)
    colour = np.stack([picture] * 3, axis=2)
    opaque = np.dstack([colour, np.full_like(picture, 255)])
    gif = encode(image, "GIF", save_all=True, append_images=[image.rotate(90)])
    wide = encode(picture.astype(np.uint16) * 257, "PNG")
    given = [path, str(path), colour, opaque, picture / 255, picture[..., None]]
    given += [encode(picture, "BMP"), encode(opaque, "WEBP"), gif, wide]
    for one in [*given, encode(image.convert("P"), "PNG")]:
        found, _ = read_picture(one)
        assert len(found) == 1
        assert likeness(found[0], expected[0]) > 0.95


@pytest.mark.parametrize("colour", [0, 255])
def test_ink_on_nothing_is_read(x, colour):
    alpha = np.kron(x[0], np.ones((9, 9), np.uint8))
    expected, _ = read_picture(alpha)
    found, _ = read_picture(np.dstack([np.full((*alpha.shape, 3), colour, np.uint8), alpha]))
    assert likeness(found[0], expected[0]) > 0.95


def test_mnists_own_images_are_pictures_too(x):
    for image in x[:20]:
        for picture in (image, 255 - image):
            (read,), _ = read_picture(picture)
            assert likeness(read, image) > 0.85


def no_pictures():
    rng = np.random.default_rng(0)
    empty = np.clip(rng.normal(200, 5, (600, 800)), 0, 255).astype(np.uint8)
    lit = (np.linspace(120, 240, 800) * np.ones((600, 1))).astype(np.uint8)
    yield from (empty, lit, 255 - lit, np.full((50, 50), 7, np.uint8), np.zeros((9, 9, 7)))
    yield from (np.zeros(s, np.uint8) for s in ((9, 9, 4), (0, 5)))
    yield from (np.zeros(4), np.full((40, 40), np.nan), encode(empty, "PNG")[:5000], None, 7)
    yield from (b"", b"no picture", "no-such-file.png", ".")
    yield encode(Image.new("LAB", (40, 40)), "TIFF")  # colours that Pillow cannot make grey


@pytest.mark.parametrize("picture", list(no_pictures()), ids=range(17))
def test_what_is_no_picture_of_digits_is_refused_in_one_sentence(picture):
    with pytest.raises(InputError, match=r"^The picture.*\.$"):
        read_picture(picture)


def test_a_huge_picture_is_refused_before_it_is_decoded():
    pictures = [encode(Image.new("1", (side, side)), "PNG") for side in (20_000, 9_000)]
    tracemalloc.start()
    for picture in pictures:
        with pytest.raises(InputError, match="too large"):
            read_picture(picture)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_a_large_jpeg_is_decoded_small(x):
    picture = Image.fromarray(photograph(x[0], 5)).resize((9000, 8000))
    found, boxes = read_picture(encode(picture, "JPEG"))
    assert len(found) == 1 and boxes.max() > 1600


def test_a_damaged_model_is_named_and_the_reference_stands_in(tmp_path, capsys):
    (reference,) = (ROOT / "results/a2").glob("*-float32-seed0")
    copy = tmp_path / "a2" / reference.name
    shutil.copytree(reference, copy)
    assert "CNN A.2, yours" in digits.trained_models(str(tmp_path))
    (copy / "model.keras").write_bytes(b"x")
    found = digits.trained_models(str(tmp_path))
    assert "CNN A.2" in found and "CNN A.2, yours" not in found
    assert f"Left out: {copy / 'model.keras'}: not the record's file" in capsys.readouterr().out


class Echo:
    """A model that answers as if the mean of the image's middle were all it saw."""

    input_shape = (None, 24, 24, 1)

    def __call__(self, x, training):
        assert x.shape[1:] == (24, 24, 1) and not training and 0 <= x.min() <= x.max() <= 1
        return np.tile(x.mean(axis=(1, 2)), 10)


def test_the_canvas_answers_what_is_drawn():
    import base64

    canvas = Canvas({"one": Echo(), "two": Echo()})
    drawn = np.zeros((280, 280, 4), np.uint8)
    drawn[40:240, 130:150, 3] = 255
    png = base64.b64encode(encode(drawn, "PNG")).decode()
    canvas.drawing = {"number": 3, "png": png}
    assert canvas.answer["number"] == 3
    image = np.reshape(canvas.answer["pixels"], (28, 28))
    assert image.max() == 255 and np.nonzero(image)[0].tolist()[::39] == [4, 23]
    assert np.shape(canvas.answer["probabilities"]) == (2, 10)
    blank = base64.b64encode(encode(0 * drawn, "PNG")).decode()
    canvas.drawing = {"number": 4, "png": blank}
    assert canvas.answer["number"] == 4 and not any(canvas.answer["pixels"])


def test_without_a_page_nothing_is_left_but_a_picture():
    draw({"one": Echo()})  # no kernel at all: nothing fails
