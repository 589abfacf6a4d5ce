"""The figures that show a model's errors show the right ones."""

import numpy as np
import pytest

from mnist_utils import comparison, plotting
from mnist_utils.plotting import (
    confusion_matrix,
    format_seconds,
    show_confusion,
    show_digits,
    show_mistakes,
)

# Each image is of its own number, so that it can be told apart.
IMAGES = np.arange(20.0)[:, None, None] * np.ones((28, 28))


@pytest.fixture
def shown(monkeypatch):
    """What is shown, a figure and its text at a time, to be looked at instead."""
    figures = []
    monkeypatch.setattr(plotting, "show", lambda fig, alt: figures.append((fig, alt)))
    return figures


def images_and_titles(fig) -> list[tuple[int, str]]:
    return [
        (int(ax.get_images()[0].get_array()[0, 0]), ax.get_title())
        for ax in fig.axes
        if ax.get_images()
    ]


def test_a_row_of_the_matrix_is_the_true_class_and_a_column_the_guess():
    counts = confusion_matrix(np.array([4, 4, 9]), np.array([4, 9, 9]))
    assert counts.sum() == 3
    assert (counts[4, 4], counts[4, 9], counts[9, 4], counts[9, 9]) == (1, 1, 0, 1)


def test_the_matrix_is_drawn_with_errors_coloured_and_the_diagonal_grey(shown):
    show_confusion(np.array([4, 4, 9]), np.array([4, 9, 9]))
    ((fig, alt),) = shown
    ax = fig.axes[0]
    assert alt == "Confusion matrix: 1 errors in 3 test images"
    texts = {(t.get_position(), t.get_text(), t.get_color()) for t in ax.texts}
    assert texts == {
        ((4, 4), "1", plotting.GREY),
        ((9, 4), "1", "white"),  # x is the guess, y the truth
        ((9, 9), "1", plotting.GREY),
    }
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted class", "true class")


def test_the_surest_mistakes_are_shown_with_truth_guess_and_confidence(shown):
    labels = np.zeros(20, int)
    probabilities = np.zeros((20, 10))
    probabilities[:, 0] = 1  # all are right, but for twelve that are surer and surer of a 7
    for sure, image in enumerate(range(5, 17)):
        probabilities[image] = 0
        probabilities[image, 7] = 0.8 + sure / 100
    show_mistakes(IMAGES, labels, probabilities)
    ((fig, alt),) = shown
    assert images_and_titles(fig) == [
        (image, f"is 0\nguess 7\n{75 + image}.00%") for image in range(16, 6, -1)
    ]
    assert alt.startswith("The most confident mistakes: is 0, guess 7, 91.00%; ")


def test_a_model_without_mistakes_says_so(shown, capsys):
    show_mistakes(IMAGES[:3], np.zeros(3, int), np.eye(10)[np.zeros(3, int)])
    assert shown == []
    assert capsys.readouterr().out.startswith("No mistakes: every test image")


def test_digits_with_and_without_a_channel_axis_are_shown_in_order(shown):
    show_digits([IMAGES[3], IMAGES[8][..., None]], ["three", "eight"], "two")
    ((fig, alt),) = shown
    assert (images_and_titles(fig), alt) == ([(3, "three"), (8, "eight")], "two")


class Guesses:
    """Stands in for a run: only its predictions are looked at."""

    def __init__(self, predicted):
        self.predicted = np.array(predicted)

    def predictions(self):
        return {"labels": np.zeros(20, int), "predicted": self.predicted}


def test_the_digits_that_most_models_miss_are_shown_with_their_guesses(shown, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "show_digits", show_digits)
    first, second, third = np.zeros((3, 20), int)
    first[[2, 13]] = second[[13, 19]] = 8
    third[13] = 2
    runs = {name: Guesses(g) for name, g in (("a1", first), ("a2", second), ("b", third))}
    comparison.show_most_missed(runs, IMAGES)
    assert capsys.readouterr().out == "How many of the 3 models miss each of these: 3 1 1\n"
    ((fig, _),) = shown
    assert images_and_titles(fig) == [
        (13, "is 0\n8 ×2\n2 ×1"),
        (2, "is 0\n8 ×1"),
        (19, "is 0\n8 ×1"),
    ]
    comparison.show_most_missed({"a1": Guesses(np.zeros(20, int))}, IMAGES)
    assert capsys.readouterr().out == "No model misses any of the test images.\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (4.24, "4.2 s"),
        (9.96, "10 s"),
        (37.4, "37 s"),
        (59.6, "1 min 0 s"),
        (333, "5 min 33 s"),
        (7500, "2 h 5 min"),
    ],
)
def test_times_are_said_in_words(seconds, text):
    assert format_seconds(seconds) == text
