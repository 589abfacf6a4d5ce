"""The figures of the notebooks; none of them needs TensorFlow."""

import base64
import io
from contextlib import contextmanager

import numpy as np
from IPython.display import display
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, RED, GREY = "tab:blue", "tab:red", "#7d7d7d"
CLASS_NAMES = [str(digit) for digit in range(10)]

# Grey text on nothing can be read on a light and on a dark page alike.
STYLE = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.facecolor": "none",
    "legend.edgecolor": GREY,
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.titlecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": GREY,
    "grid.alpha": 0.35,
    "font.size": 11,
    "legend.framealpha": 0,
}
DPI = 160
SHOWN_DPI = 80  # half of it on the page, so that the figures are sharp on fine screens


@contextmanager
def figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (9, 3.4), **options):
    """Give a styled figure and its axes.

    It is made without pyplot, which takes time to import and would show it a second time.
    """
    with rc_context(STYLE):
        fig = Figure(figsize=size, layout="constrained")
        yield fig, fig.subplots(rows, columns, **options)


def show(fig: Figure, alt: str, handle=None):
    """Show a figure in the notebook as a PNG, with a text for those who cannot see it.

    Returns the display's handle; given that handle, the image is replaced in place.
    """
    buffer = io.BytesIO()
    with rc_context(STYLE):
        fig.savefig(buffer, format="png", dpi=DPI)
    width, height = (round(inches * SHOWN_DPI) for inches in fig.get_size_inches())
    image = base64.b64encode(buffer.getvalue()).decode("ascii")
    data = {"image/png": image, "text/plain": alt}
    metadata = {"image/png": {"width": width, "height": height, "alt": alt}}
    if handle is None:
        return display(data, metadata=metadata, raw=True, display_id=True)
    handle.update(data, metadata=metadata, raw=True)
    return handle


def plt_dynamic(x, vy, ty, ax, epochs: int, quantity: str = "Loss") -> None:
    """Draw the original's plot on ``ax``, anew: validation in blue, training in red.

    The original's function of this name credits stackoverflow.com/a/14434334 and
    gist.github.com/greydanus/f6eee59eaf1d90fcb3b534a25362cea4.

    ``x`` are the epochs so far, ``vy`` and ``ty`` the validation and training values, one for
    each; ``epochs`` fixes the x axis from the start.
    """
    ax.clear()
    ax.plot(
        x,
        vy,
        color=BLUE,
        marker=".",
        clip_on=False,
        in_layout=False,
        label=f"Validation {quantity}",
    )
    ax.plot(x, ty, color=RED, marker=".", clip_on=False, in_layout=False, label=f"Train {quantity}")
    ax.set_xlabel("epoch")
    ax.set_ylabel("Categorical Crossentropy Loss" if quantity == "Loss" else quantity)
    ax.set_xlim(*((1, epochs) if epochs > 1 else (0.5, 1.5)))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(visible=True)
    ax.legend()


def show_digits(images: np.ndarray, titles: list[str], alt: str) -> None:
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


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return counts of shape (10, 10), int64: row is the true class, column the predicted one."""
    counts = np.zeros((10, 10), dtype=np.int64)
    np.add.at(counts, (labels, predicted), 1)
    return counts


def show_confusion(labels: np.ndarray, predicted: np.ndarray) -> None:
    """Show the confusion matrix; only the errors are coloured, so that the diagonal is quiet."""
    counts = confusion_matrix(labels, predicted)
    errors = counts.copy()
    np.fill_diagonal(errors, 0)
    summary = f"{errors.sum():,} errors in {counts.sum():,} test images"
    with figure(size=(6.4, 5.4)) as (fig, ax):
        shades = np.ma.masked_equal(errors, 0)
        picture = ax.imshow(shades, cmap="Reds", vmin=0, vmax=max(1, errors.max()))
        for (true, guess), count in np.ndenumerate(counts):
            if not count:
                continue
            dark = true != guess and count > 0.55 * errors.max()
            colour = GREY if true == guess else "white" if dark else "black"
            ax.text(guess, true, count, ha="center", va="center", color=colour, fontsize=10)
        ax.set_xticks(range(10), CLASS_NAMES)
        ax.set_yticks(range(10), CLASS_NAMES)
        ax.set_xticks(np.arange(-0.5, 10), minor=True)
        ax.set_yticks(np.arange(-0.5, 10), minor=True)
        ax.grid(which="minor")
        ax.tick_params(which="both", length=0)
        ax.set_xlabel("predicted class")
        ax.set_ylabel("true class")
        ax.set_title(summary, fontsize=11)
        fig.colorbar(picture, label="errors", ticks=MaxNLocator(integer=True))
        show(fig, f"Confusion matrix: {summary}")


def show_mistakes(images: np.ndarray, labels: np.ndarray, probabilities: np.ndarray) -> None:
    """Show the ten mistakes that the model was most sure of: truth, guess and confidence.

    ``probabilities`` has shape (n, 10).
    """
    predicted = probabilities.argmax(axis=1)
    confidence = probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    surest = wrong[np.argsort(-confidence[wrong], kind="stable")][:10]
    if len(surest) == 0:
        print("No mistakes: every test image was classified correctly.")
        return
    titles = [f"is {labels[i]}\nguess {predicted[i]}\n{confidence[i]:.2%}" for i in surest]
    alt = "The most confident mistakes: " + "; ".join(titles).replace("\n", ", ")
    show_digits(images[surest], titles, alt)


def format_seconds(seconds: float) -> str:
    """Return a time in words: "4.2 s", "37 s", "5 min 33 s" or "2 h 5 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
