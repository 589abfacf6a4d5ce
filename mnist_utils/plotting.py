"""The figures of the notebooks; none of them needs TensorFlow."""

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
from IPython import get_ipython
from IPython.display import DisplayHandle, display
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mnist_utils.parameters import InputError

BLUE, RED, GREY = "tab:blue", "tab:red", "#7d7d7d"
# Grey text on nothing can be read on a light and on a dark page alike.
GREYS = ("text.", "axes.edge", "axes.label", "axes.title", "xtick.", "ytick.", "grid.")
STYLE: dict[str, object] = {f"{part}color": GREY for part in GREYS}
STYLE |= {f"{part}.facecolor": "none" for part in ("figure", "axes", "savefig")}
STYLE |= {"font.size": 11, "grid.alpha": 0.35, "legend.framealpha": 0, "legend.edgecolor": GREY}


def own_style() -> AbstractContextManager[None]:
    """Return a context in which a user's Matplotlib settings count for nothing."""
    return style.context(STYLE, after_reset=True)


@contextmanager
def figure(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (9, 3.4), **options: Any
) -> Iterator[tuple[Figure, Any]]:
    """Give a styled figure and its axes, made without pyplot, which would show it once more."""
    with own_style():
        fig = Figure(figsize=size, layout="constrained")
        yield fig, fig.subplots(rows, columns, **options)


def show(fig: Figure, alt: str, handle: DisplayHandle | None = None) -> DisplayHandle | None:
    """Show a figure in the notebook as a PNG, with a text for those who cannot see it.

    Returns the display's handle; given that handle, the image is replaced in place. In a plain
    script nothing is shown, and None returned.
    """
    if not hasattr(get_ipython(), "kernel"):
        return None
    buffer = io.BytesIO()
    with own_style():
        fig.savefig(buffer, format="png", dpi=160)
    # Shown at half its size, so that it is sharp on fine screens.
    width, height = (round(inches * 80) for inches in fig.get_size_inches())
    data = {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": alt}
    metadata = {"image/png": {"width": width, "height": height, "alt": alt}}
    if handle is None:
        return display(data, metadata=metadata, raw=True, display_id=True)
    handle.update(data, metadata=metadata, raw=True)
    return handle


def plt_dynamic(
    x: Sequence[int], vy: Sequence, ty: Sequence, ax: Any, quantity: str = "Loss"
) -> None:
    """Draw the original's plot on ``ax``, anew: validation in blue, training in red.

    ``x`` are the epochs; ``vy`` and ``ty`` the validation and training values, one for each, None
    where there is none. The original's function of this name credits stackoverflow.com/a/14434334
    and gist.github.com/greydanus/f6eee59eaf1d90fcb3b534a25362cea4.
    """
    ax.clear()
    for values, colour, name in ((vy, BLUE, "Validation"), (ty, RED, "Train")):
        points = [(epoch, y) for epoch, y in zip(x, values, strict=True) if y is not None]
        ax.plot(*np.reshape(points, (-1, 2)).T, ".-", color=colour, label=f"{name} {quantity}")
    ax.set(xlabel="epoch", ylabel=f"Categorical Crossentropy {quantity}")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.grid(visible=True)
    ax.legend()


def show_digits(images: Sequence | np.ndarray, titles: list[str], alt: str) -> None:
    """Show up to ten images, of shape (28, 28) or with a channel axis, in a row with titles."""
    size = 9, 0.75 + 0.3 * (1 + max(title.count("\n") for title in titles))
    no_ticks = {"xticks": (), "yticks": ()}  # placing them takes time, though they are not shown
    with figure(1, 10, size=size, subplot_kw=no_ticks) as (fig, axes):
        for ax in axes:
            ax.axis("off")
        for ax, image, title in zip(axes, images, titles, strict=False):
            ax.imshow(np.squeeze(image), cmap="gray")
            ax.set_title(title, fontsize=10)
        show(fig, alt)


def _classes(y_test: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if np.ndim(y_test) != 2 or np.shape(y_test) != np.shape(probabilities):
        shapes = f"{np.shape(y_test)} and {np.shape(probabilities)}"
        raise InputError(f"y_test and probabilities must both be of shape (n, 10), not {shapes}.")
    return np.argmax(y_test, axis=1), np.argmax(probabilities, axis=1)


def show_confusion(y_test: np.ndarray, probabilities: np.ndarray) -> None:
    """Show the confusion matrix; only the errors are coloured, so that the diagonal is quiet.

    ``y_test``, one-hot, and ``probabilities`` are of shape (n, 10), or InputError is raised.
    """
    counts = np.zeros((10, 10), int)  # row is the true class, column the predicted one
    np.add.at(counts, _classes(y_test, probabilities), 1)
    errors = counts - np.diag(counts.diagonal())
    summary = f"{errors.sum():,} errors in {counts.sum():,} test images"
    with figure(size=(6.4, 5.4)) as (fig, ax):
        shades = np.ma.masked_equal(errors, 0)
        picture = ax.imshow(shades, cmap="Reds", vmin=0, vmax=max(1, errors.max()))
        for true, guess in np.argwhere(counts):
            dark = errors[true, guess] > 0.55 * errors.max()
            colour = GREY if true == guess else "white" if dark else "black"
            text = str(counts[true, guess])
            ax.text(guess, true, text, ha="center", va="center", color=colour, fontsize=10)
        ax.set(xlabel="predicted class", ylabel="true class", xticks=range(10), yticks=range(10))
        ax.set_xticks(np.arange(-0.5, 10), minor=True)
        ax.set_yticks(np.arange(-0.5, 10), minor=True)
        ax.grid(which="minor")
        ax.tick_params(which="both", length=0)
        ax.set_title(summary, fontsize=11)
        fig.colorbar(picture, label="errors", ticks=MaxNLocator(integer=True))
        show(fig, f"Confusion matrix: {summary}")


def show_mistakes(x_test: np.ndarray, y_test: np.ndarray, probabilities: np.ndarray) -> None:
    """Show the ten mistakes that the model was most sure of: truth, guess and confidence.

    ``x_test`` has shape (n, 28, 28), or a channel axis as well; ``y_test``, one-hot, and
    ``probabilities`` are of shape (n, 10), or InputError is raised.
    """
    labels, predicted = _classes(y_test, probabilities)
    confidence = probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    surest = wrong[np.argsort(-confidence[wrong], kind="stable")][:10]
    if len(surest) == 0:
        print("No mistakes: every test image was classified correctly.")
        return
    titles = [f"is {labels[i]}\nguess {predicted[i]}\n{confidence[i]:.2%}" for i in surest]
    alt = "The most confident mistakes: " + "; ".join(titles).replace("\n", ", ")
    show_digits(x_test[surest], titles, alt)


def format_seconds(seconds: float) -> str:
    """Return a time in words: "4.2 s", "37 s", "5 min 33 s" or "2 h 5 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
