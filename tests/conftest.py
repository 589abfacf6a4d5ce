"""What the tests share: small real data, and each notebook executed once by papermill."""

import os
import signal
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("MPLBACKEND", "agg")

import nbformat
import numpy as np
import papermill
import pytest
from filelock import FileLock

from mnist_utils.data import balanced_subset, load_mnist
from mnist_utils.parameters import CODE_VARIABLE, SETTINGS
from mnist_utils.runs import code_sha256, load_record, load_runs

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
MODEL_NOTEBOOKS = sorted({setting.notebook for setting in SETTINGS.values()})
# The four that come from the original; D and E do some things in other ways.
ORIGINAL_NOTEBOOKS = MODEL_NOTEBOOKS[:4]
SMALL = {"epochs": 2, "batch_size": 64, "seed": 3}
# What runs of a reader's own must not see: this checkout's runs/, and a cluster's address.
for name in ("MNIST_UTILS_RESULTS", "MNIST_UTILS_DATASET", CODE_VARIABLE):
    os.environ.pop(name, None)

# Tests that a shell starts in the background have SIGINT ignored, and so would what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def write_npz(path: Path, arrays: dict) -> Path:
    np.savez_compressed(path, **arrays)
    return path


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def output_text(notebook) -> str:
    """Return everything that a notebook printed."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def execute(name: str, output: Path, **parameters):
    """Execute a notebook by papermill, from the repository's root."""
    return papermill.execute_notebook(
        NOTEBOOKS / f"{name}.ipynb", output, parameters, cwd=ROOT, progress_bar=False
    )


@pytest.fixture(autouse=True)
def seeded():
    """Seed what is random: TensorFlow asks for it in a process where any test set up a run."""
    if keras := sys.modules.get("keras"):
        keras.utils.set_random_seed(0)


@pytest.fixture(scope="session")
def mnist():
    return load_mnist()


@pytest.fixture(scope="session")
def small_arrays(mnist):
    """600 training and 200 test images of the real MNIST, as many of each digit."""
    arrays = {}
    for part, size, (x, y) in zip(("train", "test"), (600, 200), mnist, strict=True):
        chosen = balanced_subset(y, size, seed=1)
        arrays |= {f"x_{part}": x[chosen], f"y_{part}": y[chosen]}
    return arrays


@pytest.fixture(scope="session")
def common_folder(tmp_path_factory, worker_id) -> Path:
    """The folder that all processes of pytest-xdist share."""
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent


@pytest.fixture(scope="session")
def small_mnist(small_arrays, common_folder) -> Path:
    path = common_folder / "small.npz"
    with FileLock(common_folder / "small.lock"):
        return path if path.exists() else write_npz(path, small_arrays)


@pytest.fixture(scope="session")
def executed(small_mnist, common_folder):
    """Return a function that executes a setting's notebook once: it gives the executed notebook,
    the run's folder and its record."""

    @cache
    def execute_setting(setting: str, **changed) -> SimpleNamespace:
        folder = common_folder / "-".join(map(str, [setting, *changed.values()]))
        path = folder / "executed.ipynb"
        with FileLock(f"{folder}.lock"):
            if not path.exists():
                folder.mkdir(exist_ok=True)
                name, _, own, _ = SETTINGS[setting]
                parameters = SMALL | own | {"dataset": str(small_mnist)} | changed
                parameters["results_dir"] = str(folder / "runs")
                source = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setenv(CODE_VARIABLE, code_sha256(source))
                    execute(name, folder / "executing.ipynb", **parameters)
                (folder / "executing.ipynb").rename(path)
        runs, problems = load_runs(folder / "runs")
        assert problems == []
        (run,) = runs.path
        notebook = nbformat.read(path, 4)
        return SimpleNamespace(notebook=notebook, folder=run, record=load_record(run))

    return execute_setting


def python(*arguments) -> list[str]:
    """Return the command that runs this Python with arguments."""
    return [sys.executable, *map(str, arguments)]


def run_python(*arguments, **options):
    """Run this Python with arguments; return how it ended and what it printed."""
    return subprocess.run(python(*arguments), capture_output=True, text=True, **options)


def make_environment(folder: Path) -> Path:
    """Make an environment with this one's packages, but without the helpers; return its Python."""
    # Without its own pip and setuptools, older ones, before those of this environment.
    run_python("-m", "venv", "--without-pip", folder, check=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth file brings packages in, but not what is installed as editable.
    (site_packages / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin/python"
