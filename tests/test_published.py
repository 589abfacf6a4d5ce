"""What is committed: the notebooks' outputs, the reference runs, and what the pages show."""

import json
import re
import subprocess
import sys
from itertools import pairwise

import nbformat
import numpy as np
import pytest
from conftest import MODEL_NOTEBOOKS, NOTEBOOKS, ROOT, code_cells, output_text, python

from mnist_utils.comparison import ORIGINAL, reference_rows, results_table
from mnist_utils.parameters import SETTINGS
from mnist_utils.runs import code_sha256, load_model, load_record, load_runs, read_predictions

sys.path.append(str(ROOT / "tools"))
from publish import readme_table

ALL_NOTEBOOKS = [*sorted(NOTEBOOKS.glob("*.ipynb")), *sorted(ROOT.glob("studies/*.ipynb"))]
RUNS, PROBLEMS = load_runs(ROOT / "results")
FOLDERS = {f"{run.setting}-{run.precision}-{run.seed}": run.path for run in RUNS.itertuples()}
REFERENCES = reference_rows(RUNS)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def read(name: str):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)


def test_nothing_published_is_damaged_misplaced_or_a_copy():
    assert PROBLEMS == []


@pytest.mark.parametrize("path", ALL_NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_is_clean_and_executed_in_order_if_at_all(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    cells = code_cells(notebook)
    counts = [cell.execution_count for cell in cells]
    assert counts in (list(range(1, len(cells) + 1)), [None] * len(cells))
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags", "jupyter", "cellView"}
    for output in (output for cell in cells for output in cell.outputs):
        assert output.output_type != "error" and output.get("name") != "stderr"
        assert not any("widget" in kind for kind in output.get("data", {}))
        if "image/png" in output.get("data", {}):  # a text for those who cannot see it
            assert len(output.data["text/plain"]) > 10
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|work|tmp|Users)/", text)
    assert len(text) < 1_000_000


def test_the_first_cells_and_the_folded_one_are_the_same_in_every_notebook():
    setups = set()
    for path in ALL_NOTEBOOKS:
        cells = nbformat.read(path, 4).cells
        folder = f"{path.parent.name}/{path.name}"
        assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
        assert f"blob/main/{folder})" in cells[0].source  # the badge opens this very notebook
        assert cells[1].metadata.tags == ["setup"]
        assert cells[1].metadata.jupyter.source_hidden and cells[1].metadata.cellView == "form"
        setups.add(cells[1].source)
    assert len(setups) == 1


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_has_five_reference_runs_or_more(setting):
    seeds = set(REFERENCES["seed"][REFERENCES["setting"] == setting])
    assert seeds >= set(range(10 if setting == "d" else 5))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_published_run_is_made_by_the_present_cells_with_the_reference_parameters(name):
    (run,) = RUNS[RUNS["path"] == FOLDERS[name]].itertuples()
    assert run.code_sha256 == code_sha256(read(SETTINGS[run.setting].notebook))
    alike = RUNS[RUNS["path"] == run.path].assign(precision="float32")
    assert len(reference_rows(alike)) == 1
    assert not list(run.path.glob("*.ipynb"))


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/studies/*.json")), ids=lambda p: p.stem)
def test_a_study_was_measured_with_the_present_cells(path):
    measured = json.loads(path.read_text())
    for model in {row.split(":")[0] for row in measured["rows"]}:
        assert measured["code_sha256"][model] == code_sha256(read(SETTINGS[model].notebook))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_records_numbers_are_those_of_its_predictions(name, mnist):
    record, arrays = load_record(FOLDERS[name]), read_predictions(FOLDERS[name])
    np.testing.assert_array_equal(arrays["labels"], mnist[1][1])
    accuracy = (arrays["predicted"] == arrays["labels"]).mean()
    assert accuracy == pytest.approx(record.test_accuracy, abs=1e-6)
    if record.model not in ("d", "e"):  # which validate on training images kept back
        assert record.history.val_accuracy[-1] == pytest.approx(record.test_accuracy, abs=1e-6)
    # The probabilities are stored with three digits; the loss they give is nearly the same.
    true = arrays["probabilities"][np.arange(10_000), arrays["labels"]].astype(float)
    losses = -np.log(np.clip(true, 6e-8, 1))
    assert losses.mean() == pytest.approx(record.test_loss, rel=0.05)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_model_of_seed_0_is_there_and_is_the_notebooks(setting, executed):
    (run,) = REFERENCES[(REFERENCES["setting"] == setting) & (REFERENCES["seed"] == 0)].itertuples()
    assert run.digest == executed(setting).record.architecture.digest
    model = load_model(run.path)
    assert model.count_params() == run.parameters


@pytest.mark.parametrize("setting", ORIGINAL)
def test_a_setting_lands_near_what_the_original_reports(setting):
    accuracies = REFERENCES["test_accuracy"][REFERENCES["setting"] == setting]
    assert 100 * accuracies.mean() == pytest.approx(ORIGINAL[setting][1], abs=0.6)


@pytest.mark.parametrize("name", MODEL_NOTEBOOKS)
def test_a_notebooks_first_screen_shows_what_the_records_give(name):
    (cell,) = [cell for cell in code_cells(read(name)) if cell.id == "reached"]
    settings = re.findall(r'"(\w+)"', cell.source.split("import")[-1])
    shown = "".join(output.get("data", {}).get("text/plain", "") for output in cell.outputs)
    for row in str(results_table(REFERENCES, settings)).splitlines():
        assert row in shown


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s != "c7"])
def test_a_notebooks_outputs_are_those_of_its_reference_run(setting):
    text = output_text(read(SETTINGS[setting].notebook))
    (run,) = REFERENCES[(REFERENCES["setting"] == setting) & (REFERENCES["seed"] == 0)].itertuples()
    record = load_record(run.path)
    assert f"Test loss: {record.test_loss:.4f}\n" in text
    assert f"Test accuracy: {record.test_accuracy:.4f}\n" in text
    assert f"val_loss {record.history.val_loss[0]:.4f}" in text


def test_the_readmes_table_is_that_of_the_records():
    assert readme_table() in README


def test_the_readme_names_every_parameter_and_every_make_variable():
    makefile = (ROOT / "Makefile").read_text()
    (cell,) = [
        c for c in code_cells(read("4_model_c")) if "parameters" in c.metadata.get("tags", [])
    ]
    names = re.findall(r"^(\w+): ", cell.source, re.MULTILINE)
    names += re.findall(r"\$\(call (?:parameter|option),([A-Z_]+),", makefile)
    assert len(names) >= 18
    assert [name for name in names if f"`{name}`" not in README] == []


def test_the_links_in_pages_and_notebooks_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
    sources = {path: path.read_text(encoding="utf-8") for path in pages}
    for path in ALL_NOTEBOOKS:
        cells = nbformat.read(path, 4).cells
        sources[path] = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    for path, text in sources.items():
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_each_notebook_leads_to_the_one_before_and_after():
    names = [path.stem for path in ALL_NOTEBOOKS if path.parent == NOTEBOOKS]
    for before, after in pairwise(names):
        last = [read(before).cells[-1].source, *[c.source for c in read(after).cells[-2:]]]
        assert f"({after}.ipynb)" in last[0], before
        assert any(f"({before}.ipynb)" in source for source in last[1:]), after


def test_the_workflows_follow_the_schema_of_github():
    command = ("-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows")
    subprocess.run(python(*command, *ROOT.glob(".github/workflows/*.yml")), check=True)
