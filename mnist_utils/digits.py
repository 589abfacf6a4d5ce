"""A reader's own digits: found in a picture or drawn, brought into MNIST's form, and answered."""

import base64
import io
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import numpy as np
import traitlets
from IPython import get_ipython
from IPython.display import display
from PIL import Image, ImageOps
from scipy import ndimage
from scipy.sparse.csgraph import connected_components

from mnist_utils.comparison import reference_folder
from mnist_utils.parameters import SETTINGS, InputError, results_folder
from mnist_utils.plotting import GREY, figure, show
from mnist_utils.runs import MODEL_FILE, RECORD_FILE, load_model, load_runs

if TYPE_CHECKING:
    import keras

SHEET = Path(__file__).with_name("sheet.png")
MOST_PIXELS = 50_000_000  # that are decoded
LEAST, LONGEST = 256, 1600  # pixels of the longer side that the search works on
BOX, SIDE = 20, 28  # MNIST's: the digit's longer side, and the image's
NO_DIGIT = "The picture shows no digit; it must show dark digits on light paper, or light on dark."

Picture = str | Path | bytes | np.ndarray


def read_picture(picture: Picture) -> tuple[np.ndarray, np.ndarray]:
    """Return the digits of a picture in reading order, and where they stood.

    ``picture`` is the path or the bytes of a file that Pillow opens, or an array (h, w) or
    (h, w, channels). Returns images, uint8 (n, 28, 28) in MNIST's form, and boxes, int (n, 4):
    top, left, bottom, right in the picture's pixels, turned as its EXIF data say. Raises
    InputError where there is no picture, none that can be decoded in little memory, or no digit.
    """
    grey, scale = read_grey(picture)
    ink, _ = find_ink(grey)
    boxes, crops = find_digits(ink)
    return np.stack([fit(crop) for crop in crops]), np.rint(boxes * scale).astype(int)


def steps(picture: Picture) -> dict[str, np.ndarray]:
    """Return what each step of the preparation makes of a picture's largest digit.

    The images are uint8 (28, 28), by the step's name; the last is as from read_picture.
    """
    grey, _ = read_grey(picture)
    ink, dark = find_ink(grey)
    crop = max(find_digits(ink)[1], key=np.size)
    parts = {"resized": grey, "inverted": 1 - grey if dark else grey}
    parts |= {"evened out": ink, "cropped": crop}
    small = {name: _bytes(_resized(part, (SIDE, SIDE))) for name, part in parts.items()}
    return small | {"20×20 box": fit(crop, by_mass=False), "centre of mass": fit(crop)}


def read_grey(picture: Picture) -> tuple[np.ndarray, float]:
    """Return a picture as float32 (h, w) from 0 to 1, made small or large enough to search, and
    by how much its own pixels are more. Raises InputError as read_picture does."""
    try:
        with warnings.catch_warnings():  # of Pillow's, for what is refused below
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            if isinstance(picture, np.ndarray):
                image = Image.fromarray(_as_bytes(np.squeeze(picture)))
            elif isinstance(picture, bytes):
                image = Image.open(io.BytesIO(picture))
            else:
                image = Image.open(Path(picture).expanduser())
            longer = max(image.size)
            image.draft("L", (LONGEST, LONGEST))  # a JPEG is decoded at a fraction of its size
            if image.width * image.height > MOST_PIXELS:
                raise Image.DecompressionBombError
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":  # 16 bits and more, which Pillow would cut off
                image = Image.fromarray(_as_bytes(np.asarray(image)))
            image = image.convert("RGBA" if image.has_transparency_data else "L")
    except Image.DecompressionBombError:
        most = f"{MOST_PIXELS // 10**6} million pixels"
        raise InputError(f"The picture is too large; it must have at most {most}.") from None
    except Exception as error:  # what Pillow raises for a file that is none, or is damaged
        reason = getattr(error, "strerror", None) or "not an image, or damaged"
        name = f" {picture}" if isinstance(picture, str | Path) else ""
        raise InputError(
            f"The picture{name} cannot be read ({reason.lower()}); "
            "it must be an image such as a PNG or JPEG."
        ) from None
    size = min(LONGEST, max(LEAST, max(image.size))) / max(image.size)
    width, height = (max(1, round(pixels * size)) for pixels in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    grey = np.asarray(image.convert("L"), np.float32) / 255
    if image.mode == "RGBA":  # lay it on paper: the picture's own, or the ink's opposite
        alpha = np.asarray(image.getchannel("A"), np.float32) / 255
        opaque = grey[alpha > 0.5]
        ink = float(np.median(opaque)) if opaque.size else 0.0
        paper = ink if 2 * opaque.size > alpha.size else float(ink < 0.5)
        grey = alpha * grey + (1 - alpha) * np.float32(paper)
    return grey, longer / max(width, height)


def find_ink(grey: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return the ink of a picture, float32 (h, w), 1 where it is full and 0 on paper, and
    whether it is dark. Raises InputError for a picture without contrast."""
    grey = ndimage.gaussian_filter(grey, 1)
    shape = grey.shape[::-1]
    rough = _resized(grey, [max(1, round(150 * side / max(shape))) for side in shape])
    # Ink is the few pixels that are far from the others around them.
    far = grey - _resized(ndimage.gaussian_filter(rough, 20), shape)
    dark = bool(np.sum(far * far * far) < 0)  # ** takes ten times as long
    if dark:
        grey, rough = 1 - grey, 1 - rough
    paper = _resized(_paper(rough), shape)
    # Ink takes away a share of the light that falls on the paper.
    ink = (grey - paper) / np.maximum(1 - paper, 0.25)
    ink -= np.median(ink[::3, ::3])
    noise = 1.5 * np.median(np.abs(ink[::3, ::3]))
    most = max(20, ink.size // 10_000)
    full = float(np.partition(ink, -most, axis=None)[-most])  # a few specks may be darker
    if full < max(0.1, 8 * noise):
        raise InputError(NO_DIGIT)
    return np.clip((ink / full - 0.2) / 0.6, 0, 1), dark  # sharp, as MNIST's images are


def _paper(rough: np.ndarray) -> np.ndarray:
    """Return the dark paper below light ink, float32 (h, w)."""
    y, x = (np.linspace(-1, 1, side) for side in rough.shape)
    powers = [(i, j) for i in range(3) for j in range(3 - i)]
    terms = np.stack([np.outer(y**i, x**j).ravel() for i, j in powers], axis=1)
    some, values = terms[::7], rough.ravel()[::7]
    below = np.full(values.shape, True)
    for _ in range(4):  # a curved surface through the darkest 60 %: how the light falls
        kept = some[below]
        surface = np.linalg.lstsq(kept.T @ kept, kept.T @ values[below], rcond=None)[0]
        rest = values - some @ surface
        below = rest <= np.quantile(rest, 0.6)
    light = (terms @ surface).reshape(rough.shape)
    # The rest is what is left when all that is narrower than a quarter of the picture is away.
    return ndimage.gaussian_filter(light + ndimage.grey_opening(rough - light, (41, 41)), 4)


def find_digits(ink: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the digits' boxes in reading order, int (n, 4), and the ink of each, cut out.

    Raises InputError where there is none.
    """
    strokes, count = ndimage.label(ink > 0.2, np.ones((3, 3)))  # faint lines are below
    dark = np.bincount(strokes[ink > 0.65], minlength=count + 1) > 0
    mask = dark[strokes]
    strokes, _ = ndimage.label(mask, np.ones((3, 3)))
    boxes, amounts = _measured(strokes)
    if not len(boxes):
        raise InputError(NO_DIGIT)
    # What lies along an edge is a table or a shadow, where there is anything else.
    edge = np.concatenate([strokes[0], strokes[-1], strokes[:, 0], strokes[:, -1]])
    inside = np.bincount(edge, minlength=len(boxes) + 1)[1:] < 0.2 * len(edge)
    if amounts[inside].sum() > 0.02 * amounts.sum():
        boxes, amounts = boxes[inside], amounts[inside]
        mask &= np.append(True, inside)[strokes]
    order = np.argsort(boxes[:, 2] - boxes[:, 0])
    middle = np.searchsorted(np.cumsum(amounts[order]), amounts.sum() / 2)
    typical = np.diff(boxes[order[middle]][[0, 2]])[0]  # height: half the ink is in less high ones
    # A stroke's parts: what hardly stands apart.
    near = ndimage.distance_transform_edt(~mask) <= 0.03 * typical
    strokes = ndimage.label(near, np.ones((3, 3)))[0] * mask
    boxes, _ = _measured(strokes)
    sizes = np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
    known = np.flatnonzero(sizes >= 0.15 * typical)  # the others are specks
    groups = _joined(boxes[known], typical)
    found = []
    for group in range(max(groups, default=-1) + 1):
        members = known[groups == group]
        top, left = boxes[members, :2].min(axis=0)
        bottom, right = boxes[members, 2:].max(axis=0)
        if 0.4 * typical <= bottom - top <= 3 * typical >= right - left:
            there = slice(top, bottom), slice(left, right)
            others = (strokes[there] > 0) & ~np.isin(strokes[there], members + 1)
            others = ndimage.binary_dilation(others, iterations=3)
            found.append(((top, left, bottom, right), np.where(others, 0, ink[there])))
    if not found:
        raise InputError(NO_DIGIT)
    boxes = np.array([box for box, _ in found])
    reading = _reading_order(boxes, typical)
    return boxes[reading], [found[i][1] for i in reading]


def _measured(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the box, int (n, 4), and the number of pixels of each label from 1 to n."""
    places = ndimage.find_objects(labels)
    boxes = [(rows.start, columns.start, rows.stop, columns.stop) for rows, columns in places]
    return np.array(boxes, int).reshape(-1, 4), np.bincount(labels.ravel())[1:]


def _joined(boxes: np.ndarray, typical: int) -> np.ndarray:
    """Return for each part the digit that it belongs to: a low one close above or below another,
    such as the bar of a 5, belongs to that, and so does one whose box overlaps another's."""
    top, left, bottom, right = boxes.T
    apart = np.maximum.outer(top, top) - np.minimum.outer(bottom, bottom)
    shared = np.minimum.outer(right, right) - np.maximum.outer(left, left)
    low = np.minimum.outer(bottom - top, bottom - top) < 0.5 * typical
    under = shared >= 0.5 * np.minimum.outer(right - left, right - left)
    return connected_components(under & ((apart < 0) | low & (apart <= 0.25 * typical)))[1]


def _reading_order(boxes: np.ndarray, typical: int) -> list[int]:
    """Return the order in which boxes are read, line by line, on lines that may slope."""
    middles = boxes[:, ::2].mean(axis=1)
    lines: list[list[int]] = []
    for i in np.argsort(boxes[:, 1]).tolist():
        line = min(lines, key=lambda line: abs(middles[line[-1]] - middles[i]), default=[])
        if line and abs(middles[line[-1]] - middles[i]) < 0.8 * typical:
            line.append(i)
        else:
            lines.append([i])
    return [i for line in sorted(lines, key=lambda line: middles[line].mean()) for i in line]


def fit(crop: np.ndarray, by_mass: bool = True) -> np.ndarray:
    """Return a digit's ink (h, w) in MNIST's form: its longer side 20 pixels, its centre of mass,
    or else its box, in the middle of uint8 (28, 28)."""
    scale = BOX / max(crop.shape)
    small = _resized(crop, [max(1, round(side * scale)) for side in crop.shape[::-1]])
    small = small / small.max()
    half = np.array(small.shape) / 2
    middle = np.array(ndimage.center_of_mass(small)) if by_mass else half
    top, left = np.clip(np.rint(SIDE / 2 - middle), 0, SIDE - 2 * half).astype(int)
    image = np.zeros((SIDE, SIDE), np.float32)
    image[top : top + small.shape[0], left : left + small.shape[1]] = small
    return _bytes(image)


def _resized(grey: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Return float32 (h, w) with ``size``, (width, height); made smaller, pixels are averaged."""
    image = Image.fromarray(np.ascontiguousarray(grey, np.float32))
    return np.asarray(image.resize(list(size), Image.Resampling.HAMMING))


def _bytes(image: np.ndarray) -> np.ndarray:
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)


def _as_bytes(array: np.ndarray) -> np.ndarray:
    """Return an array of any numbers as uint8; others than uint8 are stretched from 0 to 255."""
    if array.dtype == np.uint8:
        return array
    low, high = float(array.min()), float(array.max())
    if not np.isfinite([low, high]).all():
        raise ValueError
    return _bytes((array.astype(np.float32) - low) / ((high - low) or 1))


def photograph(image: np.ndarray, seed: Any) -> np.ndarray:
    """Return an MNIST digit as a photograph of it would look, uint8 (h, w): 6 to 14 times as
    large, off centre, dark on unevenly lit paper, with noise."""
    draw = np.random.default_rng(seed)
    side = round(SIDE * draw.uniform(6, 14))
    height, width = (round(side * draw.uniform(1, 2)) for _ in range(2))
    top, left = draw.integers(height - side + 1), draw.integers(width - side + 1)
    ink = np.zeros((height, width), np.float32)
    ink[top : top + side, left : left + side] = _resized(image / 255, (side, side))
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    slope = draw.uniform(-0.2, 0.2, size=2)
    light = draw.uniform(0.6, 0.9) * (1 + slope[0] * y + slope[1] * x - 0.1 * (x**2 + y**2))
    grey = light * (1 - draw.uniform(0.5, 0.85) * ink) + draw.normal(0, 0.03, ink.shape)
    return _bytes(grey)


def trained_models(results_dir: str | None = None) -> dict[str, "keras.Model"]:
    """Return a trained model of each setting, by the name under which it is shown.

    A reader's newest run whose model was kept comes before the reference run; a damaged model is
    named and left out. Raises InputError where there is none at all.
    """
    models = {}
    places = ((results_folder(results_dir), ", yours"), (reference_folder(), ""))
    frames = [(load_runs(folder)[0], whose) for folder, whose in places]
    for key, setting in SETTINGS.items():
        for runs, whose in frames:
            kept = [
                run for run in runs["path"][runs["setting"] == key] if (run / MODEL_FILE).exists()
            ]
            kept.sort(key=lambda run: (run / RECORD_FILE).stat().st_mtime)
            while kept and setting.title + whose not in models:
                try:
                    models[setting.title + whose] = load_model(kept.pop())
                except InputError as error:
                    print("Left out:", error)
            if setting.title + whose in models:
                break
    if not models:
        raise InputError("No trained model was found; run a model's notebook, such as 5_model_d.")
    return models


def predict(model: "keras.Model", images: np.ndarray) -> np.ndarray:
    """Return a model's probabilities, float32 (n, 10), for uint8 images (n, 28, 28).

    A model of smaller images gets their middle.
    """
    border = (SIDE - model.input_shape[1]) // 2
    x = images[:, border : SIDE - border, border : SIDE - border, None].astype(np.float32) / 255
    parts = [np.asarray(model(x[i : i + 100], training=False)) for i in range(0, len(x), 100)]
    return np.concatenate(parts)


class Canvas(anywidget.AnyWidget):
    """Where a reader draws a digit; the models answer while it is drawn."""

    _esm = Path(__file__).with_name("canvas.js")
    names: traitlets.List[str] = traitlets.List().tag(sync=True)
    drawing = traitlets.Dict().tag(sync=True)  # number, png: its ink is what is not transparent
    answer = traitlets.Dict().tag(sync=True)  # number, pixels (784), probabilities (models, 10)

    def __init__(self, models: Mapping[str, "keras.Model"]):
        super().__init__(names=list(models))
        self.models = models
        self.probabilities(np.zeros((SIDE, SIDE), np.uint8))  # the first call takes longer
        self.observe(self._answer, "drawing")

    def probabilities(self, image: np.ndarray) -> list[list[float]]:
        """Return each model's probabilities for a uint8 image (28, 28)."""
        return [predict(model, image[None])[0].tolist() for model in self.models.values()]

    def _answer(self, change: dict[str, Any]) -> None:
        png = io.BytesIO(base64.b64decode(change["new"]["png"]))
        ink = np.asarray(Image.open(png).getchannel("A"), np.float32)
        image = np.zeros((SIDE, SIDE), np.uint8)
        for place in ndimage.find_objects((ink > 0).astype(int)):  # none where nothing is drawn
            image = fit(ink[place])
        self.answer = {
            "number": change["new"]["number"],
            "pixels": image.ravel().tolist(),
            "probabilities": self.probabilities(image),
        }


def draw(models: Mapping[str, "keras.Model"]) -> None:
    """Show a canvas to draw on; where nobody can, as in a headless run, a picture of one."""
    if "google.colab" in sys.modules:
        from google.colab import output

        output.enable_custom_widget_manager()
    kernel = getattr(get_ipython(), "kernel", None)
    # A page sends data of its own with a cell; nbclient, which papermill and nbval use, does not.
    if "google.colab" in sys.modules or (kernel and kernel.get_parent("shell").get("metadata")):
        display(Canvas(models))
    else:
        images, _ = read_picture(SHEET)
        show_answers(images[0], models)


def show_answers(image: np.ndarray, models: Mapping[str, "keras.Model"]) -> None:
    """Show an image, uint8 (28, 28), and each model's probabilities as bars."""
    with figure(1, 1 + len(models), size=(9, 1.9)) as (fig, axes):
        axes[0].imshow(image, cmap="gray")
        axes[0].set(xticks=(), yticks=())
        axes[0].set_title("what they see", fontsize=9)
        for ax, (name, model) in zip(axes[1:], models.items(), strict=True):
            ax.bar(range(10), predict(model, image[None])[0], color=GREY)
            ax.set(ylim=(0, 1), yticks=(0, 1) if ax is axes[1] else (), xticks=range(10))
            ax.set_title(name, fontsize=9)
            ax.tick_params(labelsize=7, length=0)
        show(fig, "A digit, and each model's probabilities")
