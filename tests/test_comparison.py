"""The comparison's tables, from records."""

import subprocess

import pytest
from conftest import ROOT, python

from mnist_utils import comparison
from mnist_utils.comparison import (
    by_parameters,
    cost_table,
    kernel_text,
    reference_folder,
    reference_runs,
    reported_table,
    setting_of,
    show_most_missed,
    summary_table,
)
from mnist_utils.parameters import SETTINGS
from mnist_utils.runs import Run, load_runs

ORIGINAL_COLUMNS = [
    "Model",
    "Convolution Layers",
    "Kernel Size",
    "Max pool",
    "Padding",
    "Dropout",
    "Batch Normalization",
    "test loss",
    "test accuracy (%)",
]
# The original's own rows, but for the name and the two results.
ORIGINAL_ROWS = {
    "a1": [3, "3X3 for all", "Yes", "No", "No", "No"],
    "a2": [3, "3X3 for all", "Yes", "Yes", "Yes", "Yes"],
    "b": [5, "5X5 for all", "Yes", "Yes", "Yes", "Yes"],
    "c": [7, "3X3 for 4th and 6th layer 2X2 for rest", "Yes", "Yes", "Yes", "Yes"],
    "c7": [
        7,
        "7X7 for 1st layer 3X3 for 4th and 6th layer 2X2 for rest",
        "Yes",
        "Yes",
        "Yes",
        "Yes",
    ],
}


def test_kernel_sizes_are_told_in_the_originals_words():
    sizes = [[2, 2], [2, 2], [2, 2], [3, 3], [2, 2], [3, 3], [2, 2]]
    assert kernel_text(sizes) == "3X3 for 4th and 6th layer 2X2 for rest"
    assert kernel_text([[5, 5]] * 5) == "5X5 for all"
    assert kernel_text([]) == "-"


@pytest.mark.parametrize("setting", ORIGINAL_ROWS)
def test_a_run_fills_the_originals_row(setting, executed):
    run = executed(setting).run
    table = summary_table([run])
    assert table.field_names == ORIGINAL_COLUMNS
    ((_, *row, loss, accuracy),) = table.rows
    assert row == ORIGINAL_ROWS[setting]
    assert loss == f"{run.record.test_loss:.4f}"
    assert accuracy == f"{100 * run.record.test_accuracy:.2f}"
    assert setting_of(run) == setting


def test_a_model_without_a_run_shows_as_not_run_yet_with_its_command():
    table = summary_table([], missing=SETTINGS)
    assert [row[-2:] for row in table.rows] == [
        ["not run yet", f"make run MODELS={setting}"] for setting in SETTINGS
    ]
    for other in (reported_table({}), cost_table({})):
        assert len(other.rows) == len(SETTINGS)
        assert all("not run yet" in row for row in other.rows)


def test_runs_with_other_parameters_than_the_seed_are_never_in_one_table(executed):
    a1, a2, other = executed("a1").run, executed("a2").run, executed("a2", seed=4).run
    parameters = other.record.run.model_copy(update={"precision": "mixed_bfloat16"})
    lower = Run(other.record.model_copy(update={"run": parameters}), other.folder)
    groups = by_parameters([lower, other, a1, a2])
    assert [[setting_of(run) for run in group] for group in groups.values()] == [
        ["a1", "a2", "a2"],
        ["a2"],
    ]
    assert all(t.startswith("Epoch : 2 and Batch Size : 64, dataset small-") for t in groups)
    assert [t.endswith("precision mixed_bfloat16") for t in groups] == [False, True]


def test_only_runs_with_the_reference_parameters_are_references(executed):
    assert reference_runs([executed("a1").run]) == {}
    # A reader's own takes the place of one that is missing, never of one that is there.
    published = reference_runs(load_runs(ROOT / "results")[0])["a1"]
    own = Run(published.record, ROOT / "runs")
    assert reference_runs([own]) == {"a1": own}
    assert reference_runs([own, published])["a1"].folder == published.folder


def test_the_most_missed_digits_are_those_that_most_models_miss(executed, mnist, capsys):
    runs = {setting: executed(setting).run for setting in SETTINGS}
    wrong = sum(
        (arrays["predicted"] != arrays["labels"]).astype(int)
        for arrays in (run.predictions() for run in runs.values())
    )
    show_most_missed(runs, mnist[1][0])
    shown = capsys.readouterr().out.splitlines()[0]
    counts = sorted(wrong, reverse=True)[:10]
    assert shown == f"How many of the {len(runs)} models miss each of these: " + " ".join(
        map(str, counts)
    )


@pytest.fixture
def shown_figures(monkeypatch):
    """The figures that are shown, to be looked at instead."""
    figures = []
    monkeypatch.setattr(comparison, "show", lambda fig, alt: figures.append(fig))
    return figures


def test_the_loss_figure_draws_each_runs_validation_losses(executed, shown_figures):
    runs = {setting: executed(setting).run for setting in ("a1", "b")}
    comparison.show_validation_losses(runs)
    (ax,) = shown_figures[0].axes
    lines = {line.get_label(): list(line.get_ydata()) for line in ax.get_lines()}
    assert lines == {
        SETTINGS[setting].title: run.record.history.val_loss for setting, run in runs.items()
    }


def test_the_cost_figure_draws_accuracy_against_minutes(executed, shown_figures, capsys):
    reference, other_seed, near, far = (
        Run(executed(setting).record.model_copy(update={"test_accuracy": accuracy}), ROOT)
        for setting, accuracy in (("a1", 0.99), ("a1", 0.994), ("b", 0.985), ("a2", 0.5))
    )
    references = {"a1": reference, "b": near}
    groups = {"a1": [reference, other_seed]}
    comparison.show_accuracy_against_cost(references, groups, [near, far])
    (ax,) = shown_figures[0].axes
    (several, _, (bar,)), (one, _, _) = ax.containers
    minutes = reference.record.total_seconds / 60
    assert several.get_xydata().tolist() == [[pytest.approx(minutes), pytest.approx(99.2)]]
    low, high = bar.get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(0.4 / 2**0.5)  # the deviation of two runs
    near_point = (near.record.total_seconds / 60, 98.5)
    assert tuple(one.get_xydata()[0]) == pytest.approx(near_point)
    (hollow,) = (points for points in ax.collections if points is not bar)
    assert tuple(hollow.get_offsets()[0]) == pytest.approx(near_point)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    a1, b = SETTINGS["a1"].title, SETTINGS["b"].title
    assert sorted(texts) == sorted(
        [f"{a1}, mean of 2 runs", f"{b}, one run", f"yours: {b}", "train_mnist_fast"]
    )
    (cross,) = (line for line in ax.lines if line.get_marker() == "x")
    assert cross.get_xydata().tolist() == [[pytest.approx(9.5 / 60), pytest.approx(99.12)]]
    assert capsys.readouterr().out == "1 of your runs are below 97.5 % and not shown.\n"


def test_the_comparison_does_not_import_tensorflow():
    code = (
        "import sys, mnist_utils.comparison, mnist_utils.data;"
        "sys.exit('tensorflow' in sys.modules or 'keras' in sys.modules)"
    )
    subprocess.run(python("-c", code), cwd=ROOT, check=True)


def test_a_readers_folder_named_results_is_not_taken_for_the_reference_runs(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    monkeypatch.chdir(tmp_path)
    assert reference_folder() == ROOT / "results"
