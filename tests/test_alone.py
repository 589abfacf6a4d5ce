"""A notebook opened alone, as in Colab: no checkout around it, no helpers installed."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import (
    MODEL_NOTEBOOKS,
    NOTEBOOKS,
    ROOT,
    SMALL,
    make_environment,
    output_text,
    python,
    run_python,
)
from packaging.requirements import Requirement

from mnist_utils.runs import code_sha256, load_runs

# Preinstalled in Colab on 2026-08-19, says pip-freeze.txt of googlecolab/backend-info; the last
# four to the minor version. anywidget and papermill are not: the first cell brings them.
COLAB = """ipykernel==6.17.1 ipython==7.34.0 keras==3.13.2 matplotlib==3.10.0 nbformat==5.11.1
    numpy==2.1.3 prettytable==3.18.0 pydantic==2.13.4 tensorflow==2.20.0
    distributed==2025.5 pandas==2.2 pillow==11.3 scipy==1.16"""
IGNORED = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A git repository of the present files, standing in for the public one."""
    folder = tmp_path_factory.mktemp("public") / "repository"
    folder.mkdir()
    for name in ("mnist_utils", "results", "notebooks", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=IGNORED)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def fresh_python(tmp_path_factory) -> Path:
    return make_environment(tmp_path_factory.mktemp("fresh"))


@pytest.fixture
def execute_alone(repository, fresh_python, tmp_path):
    """Return a function that executes a notebook in an empty folder, by the fresh Python."""

    def execute(name, *parameters):
        notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
        (setup,) = [c for c in notebook.cells if "setup" in c.metadata.get("tags", [])]
        # Its first cell leads to the stand-in. Without isolation pip builds with the packages
        # that are here, and needs no registry.
        here = f"--no-build-isolation git+file://{repository}"
        setup.source, count = re.subn(r"git\+https://github\.com/\S+", here, setup.source)
        assert count == 1
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
        return papermill(fresh_python, tmp_path, f"{name}.ipynb", *parameters)

    return execute


def papermill(python, folder, notebook, *parameters, **variables):
    """Execute a notebook from a folder; return the executed one."""
    command = [python, "-m", "papermill", notebook, "out.ipynb", *parameters]
    options = {"cwd": folder, "env": os.environ | variables, "capture_output": True}
    done = subprocess.run([*map(str, command)], text=True, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return nbformat.read(folder / "out.ipynb", 4)


def test_notebooks_alone_fetch_the_helpers_the_data_and_the_reference_runs(
    execute_alone, fresh_python, tmp_path
):
    command = [fresh_python, "-c", "import mnist_utils"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode != 0
    notebook = execute_alone("2_model_a2", "-p", "epochs", 1, "-p", "train_samples", 300)
    (run,) = load_runs(tmp_path / "runs")[0].itertuples()
    assert (run.dataset, run.by_hand) == ("mnist", True)
    assert f"Saved the run in runs/a2/{run.path.name}\n" in output_text(notebook)
    count = len(load_runs(ROOT / "results")[0])
    text = output_text(execute_alone("8_comparison"))
    assert f"{count} runs of the collection, 1 of your own." in text
    assert "The models disagree on:" in output_text(execute_alone("7_your_digits"))


def test_papermill_from_elsewhere_leaves_the_run_in_the_project(repository, small_mnist, tmp_path):
    given = SMALL | {"epochs": 1, "dataset": small_mnist.name}
    pairs = [text for name, value in given.items() for text in ("-p", name, value)]
    shutil.copy(small_mnist, repository)  # a relative place counts from the project as well
    path = repository / "notebooks/2_model_a2.ipynb"
    notebook = papermill(sys.executable, tmp_path, path, *pairs, PYTHONPATH=str(repository))
    assert os.listdir(tmp_path) == ["out.ipynb"]
    (run,) = load_runs(repository / "runs")[0].itertuples()
    assert f"Saved the run in runs/a2/{run.path.name}\n" in output_text(notebook)


def test_the_ranges_allow_what_colab_has():
    text = (ROOT / "pyproject.toml").read_text()
    required = ast.literal_eval(re.search(r"^dependencies = (\[.*?^\])", text, re.M | re.S)[1])
    ranges = {Requirement(text).name: Requirement(text).specifier for text in required}
    for name, version in (pair.split("==") for pair in COLAB.split()):
        assert ranges[name].contains(version), name


def test_make_links_sets_the_public_name_everywhere(repository, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(repository, copy)
    paths = {name: copy / f"notebooks/{name}.ipynb" for name in MODEL_NOTEBOOKS}
    before = {name: code_sha256(nbformat.read(path, 4)) for name, path in paths.items()}
    subprocess.run(python(copy / "tools/links.py", "somebody/digits"), check=True)
    text = "".join(path.read_text(encoding="utf-8") for path in copy.rglob("*.ipynb"))
    text += (copy / "README.md").read_text() + (copy / "pyproject.toml").read_text()
    assert "YOUR_NAME" not in text
    assert text.count("github.com/somebody/digits") >= 6
    badge = "colab.research.google.com/github/somebody/digits/blob/main/notebooks"
    assert text.count(badge) == len(list(copy.rglob("*.ipynb")))
    # The records stay those of the same code.
    assert before == {name: code_sha256(nbformat.read(path, 4)) for name, path in paths.items()}


def test_make_links_refuses_a_name_that_is_none():
    done = run_python(ROOT / "tools/links.py", "digits")
    assert done.returncode == 1
    assert done.stderr == "REPO is 'digits'; it must be owner/name, as on GitHub.\n"
