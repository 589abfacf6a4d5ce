"""What is committed: the notebooks' outputs, the reference records, and what prose quotes."""

import base64
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import combinations

import nbformat
import numpy as np
import pytest
from conftest import MODEL_NOTEBOOKS, NOTEBOOKS, ROOT, code_cells, python
from scipy import stats
from statsmodels.stats.multitest import multipletests

from mnist_utils.comparison import ORIGINAL, reference_runs
from mnist_utils.headless import code_sha256
from mnist_utils.parameters import SETTINGS
from mnist_utils.runs import load_run, load_runs
from mnist_utils.spread import mean_and_deviation, over_seeds, reference_sentence

ALL_NOTEBOOKS = [*sorted(NOTEBOOKS.glob("*.ipynb")), *sorted(ROOT.glob("results/*/*/*.ipynb"))]
RUNS, PROBLEMS = load_runs(ROOT / "results")
REFERENCES = reference_runs(RUNS)
GROUPS = over_seeds(RUNS)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def publish_tool():
    spec = importlib.util.spec_from_file_location("publish", ROOT / "tools/publish.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_setting_has_its_reference_run():
    assert PROBLEMS == []
    assert list(REFERENCES) == list(SETTINGS)


@pytest.mark.parametrize("path", ALL_NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_is_executed_in_order_and_clean(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert [o for o in outputs if "image/png" in o.get("data", {})]
    for output in outputs:
        if "image/png" in output.get("data", {}):
            assert output.metadata["image/png"]["alt"]
    assert path.stat().st_size < 1_000_000
    text = path.read_text(encoding="utf-8")
    assert "papermill" not in notebook.metadata
    assert '"papermill"' not in text
    for folder in ("/home/", "/root/", "/tmp/", "/Users/", "/work/", "C:\\\\"):
        assert folder not in text
    # No output is longer than a screen.
    for output in outputs:
        assert output.get("text", "").count("\n") <= 40


def test_every_published_run_is_made_by_the_present_code():
    present = {
        setting.model: code_sha256(nbformat.read(NOTEBOOKS / f"{setting.notebook}.ipynb", 4))
        for setting in SETTINGS.values()
    }
    for run in RUNS:
        assert run.record.code_sha256 == present[run.record.model], run.folder.name


def test_publishing_removes_what_other_code_made_and_leaves_out_runs_by_hand(
    tmp_path, monkeypatch, capsys
):
    publish = publish_tool()
    stale, kept = (shutil.copytree(GROUPS["a2"][i].folder, tmp_path / str(i)) for i in (1, 2))
    record = stale / "metrics.json"
    text = record.read_text()
    record.write_text(text.replace(json.loads(text)["code_sha256"], "0" * 64))
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    shutil.copytree(NOTEBOOKS, tmp_path / "notebooks")
    for folder in (stale, kept):
        publish.remove_if_stale(load_run(folder))
    assert [stale.exists(), kept.exists()] == [False, True]
    publish.publish_run("a2", load_run(kept), with_outputs=False)
    assert "left out, it has no executed notebook" in capsys.readouterr().out


def test_publishing_a_run_gives_what_is_committed(tmp_path, monkeypatch, capsys):
    publish, run = publish_tool(), REFERENCES["c7"]
    for name in ("notebooks", "results"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copytree(run.folder, tmp_path / "runs/c" / run.folder.name)
    (tmp_path / "README.md").write_text(
        re.sub(r"(tools/publish.py -->\n).*?(<!-- end)", r"\1gone\n\2", README, flags=re.DOTALL)
    )
    shutil.rmtree(tmp_path / "results/c" / run.folder.name)
    first = tmp_path / "notebooks/4_model_c.ipynb"
    first.write_text(first.read_text().replace(reference_sentence(GROUPS["c7"]), "gone"))
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    monkeypatch.setattr(publish, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(publish, "publish_comparison", lambda: None)  # tested below
    publish.main(["c7"])
    assert (tmp_path / "README.md").read_text() == README
    for path in (run.folder, NOTEBOOKS):
        for file in path.iterdir():
            copy = tmp_path / file.relative_to(ROOT)
            if file.suffix == ".ipynb":
                assert nbformat.read(copy, 4) == nbformat.read(file, 4), file.name
            elif file.is_file():
                assert copy.read_bytes() == file.read_bytes(), file.name
    assert capsys.readouterr().out == "c7, float32, seed 0: published\n"
    publish.main([])  # it is published already
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("setting", REFERENCES)
def test_a_reference_run_is_made_by_the_present_code_and_architecture(setting, executed):
    reference, name = REFERENCES[setting].record, SETTINGS[setting].notebook
    assert reference.code_sha256 == code_sha256(nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4))
    assert reference.architecture == executed(setting).record.architecture


@pytest.mark.parametrize("setting", REFERENCES)
def test_a_reference_records_numbers_are_those_of_its_predictions(setting, mnist):
    arrays = REFERENCES[setting].predictions()
    np.testing.assert_array_equal(arrays["labels"], mnist[1][1])
    accuracy = (arrays["predicted"] == arrays["labels"]).mean()
    record = REFERENCES[setting].record
    assert accuracy == pytest.approx(record.test_accuracy, abs=1e-6)
    if record.model != "d":  # which validates on training images kept back
        assert record.history.val_accuracy[-1] == pytest.approx(record.test_accuracy, abs=1e-6)
    # The probabilities are stored with three digits; the loss they give is nearly the same.
    true = arrays["probabilities"][np.arange(10_000), arrays["labels"]].astype(float)
    losses = -np.log(np.clip(true, 6e-8, 1))
    assert losses.mean() == pytest.approx(record.test_loss, rel=0.05)


@pytest.mark.parametrize("setting", REFERENCES)
def test_the_notebook_shows_the_reference_run(setting):
    run, name = REFERENCES[setting], SETTINGS[setting].notebook
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
    assert reference_sentence(GROUPS[setting]) in notebook.cells[0].source
    copy = run.folder / "executed.ipynb"
    shown = nbformat.read(copy, 4) if copy.exists() else notebook
    text = "".join(o.get("text", "") for c in code_cells(shown) for o in c.outputs)
    assert f"Test loss: {run.record.test_loss:.4f}\n" in text
    assert f"Test accuracy: {run.record.test_accuracy:.4f}\n" in text
    assert f"val_loss {run.record.history.val_loss[0]:.4f}" in text


NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
# Numbers in the notebooks' prose that no code and no output shows, and where they come from.
FACTS = {
    str(number)
    for number in (
        *(60_000, 10_000, 255, 256),  # MNIST's images and pixels, the batch
        5000,  # an example
        *(0.1, 99.7, 0.09, 0.08),  # standard errors with 10,000 images, tested below
        *("99.60", "99.75", "99.80"),  # what D aims at
        *(99.77, 0.02, "99.70", 0.03, 99.76, 99.69),  # logs of An et al.
        *("0.50", 0.09),  # entropy and loss of a smoothed answer, tested below
        *(1.2, 0.9, 1.8, 1.6, 1.3),  # speed, tested in test_benchmarks.py
        *(99.56, 0.03, 99.64, 0.01),  # D on another split, tested below
        *(99.72, 0.04),  # D, accuracy, when it took 14 epochs: results/ before this was changed
        11 * 11 * 64,
        5 * 5 * 32,  # values that reach the dense layers of A.1 and A.2
        -(-60_000 // 256),  # steps an epoch
        *(50_000, 70_000),  # D: without the images held out; training and test images
        1000,  # D: kept back to validate
        150,  # the epochs of An et al.
        512,  # AVX-512
        *(2020, 2024, 2025),  # years of papers
    )
}


@pytest.mark.parametrize("name", [*MODEL_NOTEBOOKS, "6_comparison"])
def test_the_numbers_in_prose_are_those_of_the_outputs(name):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
    settings = [s for s in SETTINGS if name in (SETTINGS[s].notebook, "6_comparison")]
    records = [REFERENCES[setting].record for setting in settings]
    known = FACTS | {str(record.architecture.parameters) for record in records}
    known.add(str(abs(records[0].architecture.parameters - records[-1].architecture.parameters)))
    for cell in code_cells(notebook):
        known |= numbers(cell.source)
        for output in cell.outputs:
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            known |= numbers(re.sub(r"\x1b\[[\d;]*m", "", text))
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            not_prose = r"\*\*Reference run\*\*.*|`[^`]*`|\]\([^)]*\)"
            # Small whole numbers count things: five seeds, 16 steps.
            said = {n for n in numbers(re.sub(not_prose, "", cell.source)) if len(n) > 2}
            assert said <= known, f"{name}: {said - known}"


def numbers(text: str) -> set[str]:
    """Return the numbers of a text, without the commas between thousands."""
    return {number.replace(",", "") for number in NUMBER.findall(text)}


def test_what_the_prose_says_of_smoothed_answers_and_standard_errors_is_so():
    right, other = 0.91, 0.01
    assert round(-right * np.log(right) - 9 * other * np.log(other), 2) == 0.50
    assert round(-np.log(right), 2) == 0.09
    errors = [100 * (p * (1 - p) / 10_000) ** 0.5 for p in (0.99, 0.997)]
    assert [round(error, 2) for error in errors] == [0.10, 0.05]


def test_what_the_prose_says_of_shares_is_so():
    a1, a2, b, c, c7 = (REFERENCES[s].record.architecture for s in ("a1", "a2", "b", "c", "c7"))
    # A.1: nearly all parameters in the first dense layer.
    assert 495_680 / a1.parameters > 0.95
    assert a1.parameters - 495_680 - 650 == 23_296
    # A.2: an eighth of A.1's parameters.
    assert round(a1.parameters / a2.parameters) == 8
    # B: fewer parameters than A.1, many more multiplications; its second convolution has a fifth
    # of the parameters and more than half of the cost.
    second = 28 * 28 * 25 * 32 * 128
    assert b.parameters < a1.parameters
    assert b.macs > 10 * a1.macs
    assert round(b.parameters / 102_528) == 5
    assert round(second / 1e6) == 80
    assert second / b.macs > 0.5
    assert c7.parameters - c.parameters == 2880


def test_what_model_ds_prose_says_of_its_window_is_so(mnist):
    images = mnist[0][0]
    outside = np.ones((28, 28), bool)
    outside[2:26, 2:26] = False
    assert round(1 / (images[:, outside] > 0).any(axis=1).mean()) == 8  # digits with ink there
    assert round(1 / outside.mean()) == 4

    def macs(window):
        first, second, third = window - 4, (window - 4) // 2 - 2, (window - 4) // 2 - 4
        last = third // 2 - 2
        convolutions = first**2 * 25 * 32, second**2 * 9 * 32 * 32, third**2 * 9 * 32 * 64
        return sum(convolutions) + last**2 * (9 * 64 * 96 + 96 * 10)

    assert macs(24) == REFERENCES["d-speed"].record.architecture.macs
    assert macs(24) / macs(28) == pytest.approx(3 / 5, abs=0.03)


def test_five_of_model_ds_steps_show_an_effect_when_corrected():
    steps = json.loads((ROOT / "results/d/steps.json").read_text())["steps"]
    accuracies = {step: [run["accuracy"] for run in runs] for step, runs in steps.items()}
    whole = accuracies.pop("the whole")
    p_values = [stats.ttest_rel(values, whole).pvalue for values in accuracies.values()]
    corrected = dict(zip(accuracies, multipletests(p_values, method="holm")[1], strict=True))
    assert len(corrected) == 15
    assert [step for step, p in corrected.items() if p < 0.05] == [
        "1 epoch",
        "without batch normalization, peak rate 0.001",
        "constant rate of 0.001 in the schedule's place",
        "without label smoothing",
        "half as many filters",
    ]
    muon = list(accuracies).index("AdamW in Muon's place")
    assert p_values[muon] < 0.05 < corrected["AdamW in Muon's place"]


def test_what_the_prose_says_of_more_epochs_is_so():
    frontier = json.loads((ROOT / "results/d/frontier.json").read_text())["frontier"]
    accuracies = {name: [run["accuracy"] for run in runs] for name, runs in frontier.items()}
    pairs = [
        ("speed, 1 epoch", "speed, 3 epochs"),
        ("speed, 3 epochs", "speed, 6 epochs"),
        ("accuracy, 3 epochs", "accuracy, 7 epochs"),
        ("accuracy, 7 epochs", "accuracy, 14 epochs"),
    ]
    p_values = [stats.ttest_rel(accuracies[a], accuracies[b]).pvalue for a, b in pairs]
    assert [p < 0.05 for p in p_values] == [True, False, True, False]
    corrected = multipletests(p_values, method="holm")[1]
    assert [p < 0.05 for p in corrected] == [True, False, False, False]


def test_what_the_prose_says_of_shared_mistakes_is_so():
    (prose,) = (
        cell.source
        for cell in nbformat.read(NOTEBOOKS / "6_comparison.ipynb", 4).cells
        if cell.id == "shared-text"
    )
    arrays = [run.predictions() for run in GROUPS["d-accuracy"]]
    labels = arrays[0]["labels"]
    wrong = np.array([one["predicted"] != labels for one in arrays])
    votes = np.mean([one["probabilities"].astype(float) for one in arrays], axis=0)
    assert f"Its five runs share {wrong.all(axis=0).sum()}," in prose
    assert f"a vote of five makes {(votes.argmax(axis=1) != labels).sum()}," in prose
    one_run = wrong.sum(axis=1).mean()
    both = np.mean([(a & b).sum() for a, b in combinations(wrong, 2)])
    assert round(10 * both / one_run) == 7 and "seven tenths" in prose


def test_on_another_split_model_d_stays_below_what_it_reaches_on_the_usual_one():
    budgets = json.loads((ROOT / "results/d/other_split.json").read_text())["budgets"]
    first = nbformat.read(NOTEBOOKS / "5_model_d.ipynb", 4).cells[0].source
    for setting, said, error in (
        ("d-speed", ", five seeds", 0.09),
        ("d-accuracy", " on the other", 0.08),
    ):
        other = [run["accuracy"] for run in budgets[setting]]
        usual = [run.record.test_accuracy for run in GROUPS[setting]]
        assert f"({mean_and_deviation(100 * np.array(other), 2)} %{said})" in first
        assert len(other) == 5
        # Seeds alone hardly explain the difference; other images may.
        low, high = stats.ttest_ind(other, usual, equal_var=False).confidence_interval()
        assert high < 0
        images = sum(p * (1 - p) / 10_000 for p in (np.mean(other), np.mean(usual))) ** 0.5
        assert round(100 * images, 2) == error
        assert np.hypot((high - low) / 2, 1.96 * images) > (high + low) / -2
    assert np.mean([run["accuracy"] for run in budgets["d-speed"]]) < 0.996
    assert np.mean([run.record.test_accuracy for run in GROUPS["d-speed"]]) >= 0.996
    assert np.mean([run.record.test_accuracy for run in GROUPS["d-accuracy"]]) < 0.9975


def test_the_times_in_the_readme_are_those_of_the_records():
    minutes = [run.record.total_seconds / 60 for run in REFERENCES.values()]
    (total,) = re.findall(r"then compare them: some (\d+) minutes on two cores", README)
    assert sum(minutes) == pytest.approx(int(total), rel=0.15)
    ((least, most),) = re.findall(r"a model takes from (\d+) seconds to (\d+) minutes", README)
    assert 60 * min(minutes) == pytest.approx(int(least), rel=0.25)
    assert max(minutes) == pytest.approx(int(most), rel=0.25)


def test_the_readme_quotes_the_records():
    assert publish_tool().markdown_table(REFERENCES, GROUPS) in README
    # Its figure is the comparison's.
    comparison = nbformat.read(NOTEBOOKS / "6_comparison.ipynb", 4)
    (picture,) = (
        output.data["image/png"]
        for cell in code_cells(comparison)
        for output in cell.outputs
        if output.get("data", {}).get("text/plain", "").startswith("Test accuracy of each model")
    )
    assert (ROOT / "results/accuracy_and_time.png").read_bytes() == base64.b64decode(picture)


def test_the_readme_names_every_parameter_and_every_make_variable():
    makefile = (ROOT / "Makefile").read_text()
    parameters = re.findall(r"^(\w+) = ", parameters_cell("4_model_c"), re.MULTILINE)
    for name in [*parameters, *re.findall(r"\$\(if \$\(([A-Z_]+)\)", makefile)]:
        assert f"`{name}`" in README


def parameters_cell(name):
    cells = code_cells(nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4))
    (cell,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    return cell.source


def test_the_links_in_readme_and_notebooks_lead_somewhere():
    sources = {ROOT: README}
    for path in ALL_NOTEBOOKS:
        cells = nbformat.read(path, 4).cells
        sources[path] = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    for place, text in sources.items():
        folder = place if place.is_dir() else place.parent
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (folder / link).exists(), f"{place.name}: {link}"


@pytest.mark.parametrize("setting", ["c7", "d-accuracy"])
def test_an_executed_copy_has_the_notebooks_present_prose(setting):
    copy = nbformat.read(REFERENCES[setting].folder / "executed.ipynb", 4)
    notebook = nbformat.read(NOTEBOOKS / f"{SETTINGS[setting].notebook}.ipynb", 4)
    prose, present = (
        [c.source.replace("../../../notebooks/", "") for c in nb.cells if c.cell_type == "markdown"]
        for nb in (copy, notebook)
    )
    assert prose == present


@pytest.mark.parametrize("setting", ORIGINAL)
def test_a_reference_run_lands_near_what_the_original_reports(setting):
    _, accuracy, _ = ORIGINAL[setting]
    assert REFERENCES[setting].record.test_accuracy == pytest.approx(accuracy, abs=0.006)


def test_the_comparison_gives_the_committed_outputs_again(tmp_path):
    # Strictly, but over results/ alone: a reader's own runs would be shown as well. nbval does
    # not compare pictures; what they draw is tested in test_comparison.py.
    for folder in ("mnist_utils", "results"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "notebooks").mkdir()
    shutil.copy(NOTEBOOKS / "6_comparison.ipynb", tmp_path / "notebooks")
    done = subprocess.run(
        python("-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval", "notebooks"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_workflow_follows_the_schema_of_github():
    subprocess.run(
        python(
            *("-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"),
            *ROOT.glob(".github/workflows/*.yml"),
        ),
        check=True,
    )


def test_code_and_notebooks_are_linted_and_formatted():
    ruff = os.path.join(os.path.dirname(sys.executable), "ruff")
    # Not the root: a reader's executed notebooks may lie there.
    ours = [ROOT / name for name in ("benchmarks", "mnist_utils", "notebooks", "tests", "tools")]
    subprocess.run([ruff, "check", *ours], check=True)
    subprocess.run([ruff, "format", "--check", *ours], check=True)
