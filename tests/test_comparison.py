"""The comparison's tables, figures and statistics, on records whose answers are known."""

import hashlib
import io
import json
import os
import re
import subprocess

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, SMALL, python, run_python
from scipy import stats

from mnist_utils import comparison
from mnist_utils.comparison import (
    difference,
    differences,
    differences_table,
    holm,
    kernel_text,
    own_table,
    ranking_text,
    read_answers,
    reference_folder,
    reference_rows,
    reported_table,
    results_table,
    show_accuracy_against_cost,
    show_learning,
    show_most_missed,
    show_reference,
    summary_table,
)
from mnist_utils.parameters import SETTINGS, run_name
from mnist_utils.runs import load_runs

IMAGES = 1000
ORIGINAL_COLUMNS = "Model, Convolution Layers, Kernel Size, Max pool, Padding, Dropout, "
ORIGINAL_COLUMNS += "Batch Normalization, test loss, test accuracy (%)"
# The original's own rows, but for the name and the two results.
C_KERNELS = "3X3 for 4th and 6th layer 2X2 for rest"
ORIGINAL_ROWS = {
    "a1": [3, "3X3 for all", "Yes", "No", "No", "No"],
    "a2": [3, "3X3 for all", "Yes", "Yes", "Yes", "Yes"],
    "b": [5, "5X5 for all", "Yes", "Yes", "Yes", "Yes"],
    "c": [7, C_KERNELS, "Yes", "Yes", "Yes", "Yes"],
    "c7": [7, f"7X7 for 1st layer {C_KERNELS}", "Yes", "Yes", "Yes", "Yes"],
}


class Runs:
    """Write records to a results folder, with predictions that miss the images given."""

    def __init__(self, folder):
        self.folder, self.written = folder, 0

    def add(
        self, setting, seed, wrong, *, trained=None, by_hand=False, arrays=None, raw=None, **changed
    ):
        """Write one run; ``changed`` are parameters, or fields of the record."""
        self.written += 1
        model, epochs = SETTINGS[setting].model, SETTINGS[setting].epochs
        run = {"epochs": epochs, "batch_size": 256, "seed": seed, "train_samples": None}
        run |= {"dataset": "mnist", "precision": "float32", **SETTINGS[setting].own}
        run |= {name: changed.pop(name) for name in [*run] if name in changed}
        trained = trained or run["epochs"]
        architecture = {"conv_layers": 1, "kernel_sizes": [[3, 3]], "parameters": 100}
        architecture |= {"macs": 10**6, "digest": changed.pop("digest", setting)}
        architecture |= dict.fromkeys(
            ("max_pool", "padding", "dropout", "batch_normalization"), False
        )
        labels = np.arange(IMAGES, dtype=np.uint8) % 10
        predicted = labels.copy()
        predicted[list(wrong)] = (labels[list(wrong)] + 1) % 10
        whole = {"probabilities": np.zeros((IMAGES, 10), np.float16), "predicted": predicted}
        whole |= {"labels": labels, "number": np.array(self.written)}  # no file is like another
        content = io.BytesIO()
        np.savez_compressed(content, **(whole | (arrays or {})))
        predictions = content.getvalue() if raw is None else raw + bytes([self.written])
        sha256 = hashlib.sha256(predictions).hexdigest()
        share = 1 - len(wrong) / IMAGES
        record = {"schema_version": 1, "model": model, "title": "", "run": run}
        record |= {"architecture": architecture, "test_loss": len(wrong) / IMAGES}
        names = ("loss", "accuracy", "val_loss", "val_accuracy")
        record |= {"history": {name: [share] * trained for name in names}}
        record |= {"test_accuracy": share, "steps": 235 * trained}
        record |= {"seconds_per_epoch": [2.0] * trained, "environment": {"cores": 2}}
        record |= {"predictions": {"file": "predictions-0.npz", "sha256": sha256}}
        record |= {"code_sha256": None if by_hand else "code"} | changed
        folder = self.folder / model / run_name(run, by_hand)
        folder.mkdir(parents=True)
        (folder / "predictions-0.npz").write_bytes(predictions)
        (folder / "metrics.json").write_text(json.dumps(record))
        return folder

    def add_several(self, setting, counts):
        for seed, count in enumerate(counts):
            self.add(setting, seed, range(count))

    def load(self) -> pd.DataFrame:
        runs, problems = load_runs(self.folder)
        assert problems == []
        return runs


@pytest.fixture
def results(tmp_path):
    return Runs(tmp_path / "results")


@pytest.fixture
def own(tmp_path):
    return Runs(tmp_path / "own")


def cells(table, title="CNN A.1") -> list:
    """Return the cells of a model's row."""
    ((_, *row),) = (row for row in table.rows if row[0] == title)
    return row


def test_kernel_sizes_are_told_in_the_originals_words():
    assert kernel_text([[2, 2]] * 3 + [[3, 3], [2, 2], [3, 3], [2, 2]]) == C_KERNELS
    assert kernel_text([[5, 5]] * 5) == "5X5 for all"
    assert kernel_text([]) == "-"


@pytest.mark.parametrize("setting", ORIGINAL_ROWS)
def test_a_run_fills_the_originals_row(setting, executed):
    run = executed(setting)
    table = summary_table(load_runs(run.folder.parents[1])[0])
    assert table.field_names == ORIGINAL_COLUMNS.split(", ")
    assert table.title == "Epoch : 10 and Batch Size : 256"
    *row, loss, accuracy = cells(table, SETTINGS[setting].title)
    assert row == ORIGINAL_ROWS[setting]
    assert loss == f"{run.record.test_loss:.4f}"
    assert accuracy == f"{100 * run.record.test_accuracy:.2f}"


def test_without_runs_all_says_not_run_yet(results, monkeypatch, capsys):
    none = reference_rows(results.load(), results.load())
    summary = summary_table(none)
    for setting in SETTINGS:
        *_, loss, accuracy = cells(summary, SETTINGS[setting].title)
        assert (loss, accuracy) == ("not run yet", f"make run MODELS={setting}")
    for table in (results_table(none), reported_table(none)):
        assert all("not run yet" in row for row in table.rows)
    answers = read_answers(none)
    assert differences_table(differences(answers)).rows == []
    assert ranking_text(differences(answers)).count("not run yet") == 3
    assert own_table(none, none).rows == []
    show_most_missed(answers, np.zeros((0, 28, 28)))
    monkeypatch.setattr(comparison, "reference_folder", lambda: results.folder)
    show_reference("a1")
    assert capsys.readouterr().out.count("yet.") == 2


def test_only_headless_runs_that_differ_in_the_seed_alone_are_references(results):
    for seed in (1, 0):
        results.add("a1", seed, range(seed))
    results.add("a1", 2, range(3), by_hand=True)
    results.add("a1", 3, range(4), trained=4)
    others = [{"epochs": 9}, {"batch_size": 64}, {"train_samples": 100}]
    others += [{"dataset": "mnist-small"}, {"precision": "mixed_bfloat16"}]
    for i, other in enumerate(others):
        results.add("a1", 4, range(5 + i), **other)
    assert reference_rows(results.load())["seed"].tolist() == [0, 1]


def test_a_readers_own_stand_in_where_the_collection_has_none_and_only_there(results, own):
    results.add("a1", 0, range(10))
    own.add("a1", 1, range(20))
    own.add("b", 1, range(30))
    table = results_table(reference_rows(results.load(), own.load()))
    assert "99.00 (1)" in cells(table)
    assert "97.00 (1)" in cells(table, "CNN B, yours")


def test_what_older_code_left_does_not_stand_in_beside_what_ran_last(results, own):
    for seed, code in enumerate(("old", "new", "old")):
        record = own.add("b", seed, range(10 * seed), code_sha256=code) / "metrics.json"
        os.utime(record, (0, 100 if code == "new" else seed))
    table = results_table(reference_rows(results.load(), own.load()))
    assert "99.00 (1)" in cells(table, "CNN B, yours")


def test_the_results_show_mean_deviation_n_and_cost(results, monkeypatch):
    results.add_several("a1", [10, 20, 30])
    results.add("a2", 0, range(10), steps=None)
    runs = reference_rows(results.load())
    cost = f"{3 * 10**6 * 2350 * 256 / 1e12:.2f}"
    assert cells(results_table(runs)) == ["100", cost, "98.00 ± 1.00 (3)", "0.0200"]
    assert cells(results_table(runs), "CNN A.2") == ["100", "-", "99.00 (1)", "0.0100"]
    reported = ["0.0433", "0.0200", "98.94", "98.00 ± 1.00", "98.00 ± 4.97"]
    assert cells(reported_table(runs)) == reported
    assert cells(reported_table(runs), "CNN A.2")[-2:] == ["99.00", "-"]
    shown = []
    monkeypatch.setattr(comparison, "reference_folder", lambda: results.folder)
    monkeypatch.setattr(comparison, "display", shown.append)
    show_reference("a1", "b")
    assert [row[0] for row in shown[0].rows] == ["CNN A.1", "CNN B"]


def test_the_most_missed_digits_are_those_that_most_models_miss(results, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(comparison, "show_digits", lambda *given: shown.append(given))
    for setting, wrong in (("a1", [5, 7]), ("b", [7]), ("c", [3, 5, 7])):
        results.add(setting, 0, wrong)
    images = np.arange(IMAGES * 28 * 28).reshape(IMAGES, 28, 28)
    show_most_missed(read_answers(reference_rows(results.load())), images)
    assert "3 models miss each of these: 3 2 1\n" in capsys.readouterr().out
    ((pictures, titles, _),) = shown
    assert titles == ["is 7\n8 ×3", "is 5\n6 ×2", "is 3\n4 ×1"]
    assert (pictures == images[[7, 5, 3]]).all()
    results.add("d", 0, range(20, 32))
    show_most_missed(read_answers(reference_rows(results.load())), images)
    assert capsys.readouterr().out.endswith(": 3 2 1 1 1 1 1 1 1 1\nAs many models miss 5 more.\n")


SHORT = {name: np.zeros(5, np.uint8) for name in ("labels", "predicted")}
SHORT["probabilities"] = np.zeros((5, 10), np.float16)
DAMAGED = {
    "no predictions": {"raw": b"none"},  # as whatever read_predictions refuses
    "another length": {"arrays": SHORT},
    "another accuracy": {"arrays": {"predicted": np.zeros(IMAGES, np.uint8)}},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_run_with_bad_predictions_is_named_and_left_out(damage, results, capsys):
    results.add_several("a1", [10, 20])
    results.add("a1", 2, range(30), **DAMAGED[damage])
    results.add("a2", 0, [], **DAMAGED[damage])
    labels, guesses = read_answers(reference_rows(results.load()))
    out = capsys.readouterr().out
    assert out.count("Left out: ") == 2
    assert "seed2" in out
    assert ((guesses["a1"] != labels).sum(axis=1) == [10, 20]).all()
    assert list(guesses) == ["a1"]


@pytest.fixture
def shown_figures(monkeypatch):
    """The figures that are shown, to be looked at instead."""
    figures = []
    monkeypatch.setattr(comparison, "show", lambda fig, alt: figures.append(fig))
    return figures


def assert_texts_apart(ax, texts):
    """The axes hold these texts, inside, and none hides another."""
    assert sorted(text.get_text() for text in ax.texts) == sorted(texts)
    boxes = [text.get_window_extent() for text in ax.texts]
    assert all(ax.bbox.x0 < box.x0 and box.x1 < ax.bbox.x1 for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_the_learning_figure_draws_each_models_mean_validation_error(results, shown_figures):
    results.add_several("a1", [10, 20])
    for setting in SETTINGS:
        results.add(setting, 5, range(15))  # all end at one place
    show_learning(reference_rows(results.load()))
    (ax,) = shown_figures[0].axes
    lines = dict(zip(SETTINGS, ax.get_lines(), strict=True))
    assert list(lines["a1"].get_ydata()) == pytest.approx([1.5] * 10)
    dashed = [setting for setting, line in lines.items() if line.get_linestyle() == "--"]
    assert dashed == ["d", "e"]  # they validate on images kept back
    assert_texts_apart(ax, [setting.title for setting in SETTINGS.values()])


def test_the_cost_figure_draws_accuracy_against_multiply_adds(results, own, shown_figures, capsys):
    results.add_several("a1", [10, 6])
    results.add("b", 0, range(8))
    for setting, seed, count in (("b", 1, 8), ("a1", 7, 500), ("a2", 0, 7)):
        own.add(setting, seed, range(count), steps=None if setting == "a2" else 2350)
    show_accuracy_against_cost(reference_rows(results.load()), own.load())
    (ax,) = shown_figures[0].axes
    a1, b, yours = ax.containers
    cost = 3 * 10**6 * 2350 * 256 / 1e12
    assert a1[0].get_xydata().tolist() == [[pytest.approx(cost), pytest.approx(99.2)]]
    low, high = a1[2][0].get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(0.4 / 2**0.5)  # the deviation of two runs
    for container in (b, yours):
        assert container[0].get_xydata().tolist() == [[pytest.approx(cost), pytest.approx(99.2)]]
    assert [c[0].get_markerfacecolor() for c in (b, yours)] == ["C2", "none"]
    assert_texts_apart(ax, ["CNN A.1", "CNN B", "yours: CNN B"])
    assert capsys.readouterr().out.startswith("2 of your runs are not drawn")


def test_welchs_test_is_the_special_case_of_images_that_are_alike():
    a, b = np.array([99.1, 99.3, 99.2]), np.array([98.9, 98.5, 98.8, 98.9])
    points, half, p = difference(a, b, np.ones(50), np.ones(50))
    test = stats.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval(0.95)
    assert (points, half, p) == pytest.approx(((low + high) / 2, (high - low) / 2, test.pvalue))


def test_the_paired_test_is_the_special_case_of_seeds_that_are_alike():
    generator = np.random.default_rng(1)
    shares = generator.random((2, 80))
    means = [[share.mean()] * 3 for share in shares]
    test = stats.ttest_rel(*shares)
    low, high = test.confidence_interval(0.95)
    expected = (low + high) / 2, (high - low) / 2, test.pvalue
    assert difference(*means, *shares) == pytest.approx(expected)


def test_one_run_has_no_interval_and_equal_answers_no_difference(results):
    points, half, p = difference([99.0], [98.0, 98.5], np.ones(9), np.ones(9))
    assert points == 0.75
    assert np.isnan([half, p]).all()
    assert difference([99, 99], [99, 99], np.ones(9), np.ones(9)) == (0, 0, 1)
    results.add_several("a1", [10])
    results.add_several("a2", [20, 30])
    pairs = differences(read_answers(reference_rows(results.load())))
    ((*_, p_text, shown),) = differences_table(pairs).rows
    assert (p_text, shown) == ("n = 1", "not known")


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_the_interval_covers_and_is_not_much_wider_than_needed(n):
    """Two equal models, 99.3 % right: n seeds each, on hard images that are drawn as well."""
    generator = np.random.default_rng(n)
    images, found = 10_000, []
    for _ in range(2000):
        hard = generator.binomial(images, 0.02)  # the others are never missed
        difficulty = generator.beta(0.5, 0.9, hard)
        accuracies, shares = [], []
        for _ in range(2):
            missed = generator.beta(4 * difficulty + 1e-9, 4 * (1 - difficulty) + 1e-9)
            wrong = generator.random((n, hard)) < missed * np.exp(generator.normal(0, 0.1, (n, 1)))
            accuracies.append(1 - wrong.sum(axis=1) / images)
            shares.append(np.concatenate([1 - wrong.mean(axis=0), np.ones(images - hard)]))
        found.append(difference(*accuracies, *shares)[:2])
    error, half = np.abs(np.array(found)).T
    assert np.mean(error <= half) >= 0.95
    if n == 5:
        assert half.mean() <= 4 / 3 * np.quantile(error, 0.95)


def test_holm_enlarges_the_smallest_p_most_and_leaves_what_is_no_test():
    enlarged = holm(pd.Series([0.04, 0.01, np.nan, 0.03, 0.9]))
    assert enlarged.fillna(-1).tolist() == pytest.approx([0.09, 0.04, -1, 0.09, 0.9])
    assert holm(pd.Series([0.5, 0.6])).tolist() == [1, 1]


def test_the_ranking_is_answered_in_words(results):
    results.add_several("b", [5, 6, 5])
    results.add_several("c7", [6, 5, 6])
    results.add_several("a1", [80, 81, 80])
    results.add_several("a2", [40, 41, 40])
    pairs = differences(read_answers(reference_rows(results.load())))
    assert len(pairs) == 6
    assert (pairs["points"] >= 0).all()
    text = ranking_text(pairs)
    assert "CNN B over CNN C, 7×7 first: the same order here, but it may be chance (p = " in text
    assert "CNN C, 7×7 first over CNN A.1: stands (p < 0.001)." in text
    assert "CNN A.1 over CNN A.2: the other way round here (p < 0.001)." in text
    shown = {row[0] + row[1]: row[-1] for row in differences_table(pairs).rows}
    assert shown["CNN A.2CNN A.1"] == "yes"
    assert shown["CNN BCNN C, 7×7 first"] == "no"


def test_a_readers_own_runs_stand_in_rows_of_equals_beside_the_reference(results, own):
    results.add_several("a1", [5, 7])
    own.add_several("a1", [10, 20])
    own.add("a1", 2, range(30), code_sha256="other")
    own.add("a1", 3, range(40), digest="other", by_hand=True)
    own.add("a1", 4, range(50), trained=3)
    own.add("a1", 5, range(70), digest="other", by_hand=True)  # perhaps with another optimizer
    own.add("a2", 5, range(60), epochs=2, batch_size=64, train_samples=1000)
    table = own_table(own.load(), reference_rows(results.load()))
    rows = [[row[0], row[1], *row[3:5]] for row in table.rows]
    assert rows == [
        ["CNN A.1", "", "98.50 ± 0.71 (2)", "99.40 ± 0.14"],
        ["CNN A.1", "stopped after 3, seed 4", "95.00", "99.40 ± 0.14"],
        ["CNN A.1, changed", "seed 2", "97.00", "99.40 ± 0.14"],
        ["CNN A.1, changed", "by hand, seed 3", "96.00", "99.40 ± 0.14"],
        ["CNN A.1, changed", "by hand, seed 5", "93.00", "99.40 ± 0.14"],
        ["CNN A.2", "batch_size 64, train_samples 1000, epochs 2, seed 5", "94.00", "-"],
    ]
    assert max(map(len, str(table).splitlines())) <= 100


def test_ten_thousand_runs_stay_readable(own, shown_figures, capsys):
    for count in range(7):
        own.add(list(SETTINGS)[count], 0, range(count))
    runs = own.load()
    many = pd.concat([runs] * 1429, ignore_index=True)
    many["train_samples"] = np.arange(len(many))  # each has other parameters
    table = own_table(many, reference_rows(runs))
    show_accuracy_against_cost(reference_rows(runs), many)
    assert len(table.rows) == 41
    assert table.rows[-1][0] == f"and {len(many) - 40:,} more"
    assert {row[0] for row in table.rows[:-1]} == {s.title for s in SETTINGS.values()}
    assert max(map(len, str(table).splitlines())) <= 100
    assert len(shown_figures[0].axes[0].containers) <= 200 + len(SETTINGS)


def test_the_comparison_imports_neither_tensorflow_nor_scipy():
    code = (
        "import sys, mnist_utils.comparison, mnist_utils.data;"
        "sys.exit(any(name in sys.modules for name in ('tensorflow', 'keras', 'scipy')))"
    )
    subprocess.run(python("-c", code), cwd=ROOT, check=True)


def test_a_readers_folder_named_results_is_not_taken_for_the_reference_runs(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    monkeypatch.chdir(tmp_path)
    assert reference_folder() == ROOT / "results"


@pytest.mark.parametrize(
    ("page", "printed"),
    [
        ("notebooks/5_model_d", "Saved the run in"),
        ("notebooks/8_comparison", "CNN A.1"),
        ("studies/steps_of_d", "CNN A.1"),
    ],
)
def test_they_run_as_scripts_too(page, printed, small_mnist, tmp_path):
    notebook = ROOT / f"{page}.ipynb"
    output = ["--to", "script", "--output-dir", tmp_path, "--log-level", "ERROR"]
    subprocess.run(python("-m", "nbconvert", *output, notebook), check=True)
    script = next(tmp_path.glob("*.py"))
    text, small = script.read_text(), SMALL | {"dataset": str(small_mnist)}
    for name, value in (small | {"results_dir": str(tmp_path)}).items():
        text = re.sub(rf"^{name}: .*", f"{name} = {value!r}", text, flags=re.MULTILINE)
    script.write_text(text)
    done = run_python(script, cwd=notebook.parent, check=True)
    assert printed in done.stdout
    assert "base64" not in done.stdout
    assert len(done.stdout) < 20_000
