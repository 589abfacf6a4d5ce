"""A notebook opened alone, as in Colab: no checkout around it, no helpers installed."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import nbformat
import pytest
from conftest import MODEL_NOTEBOOKS, NOTEBOOKS, ROOT, SMALL, output_text, python
from packaging.requirements import Requirement

from mnist_utils import runs, training
from mnist_utils.runs import code_sha256, load_runs

# Preinstalled in Colab on 2026-08-19, says pip-freeze.txt of googlecolab/backend-info; the last
# four to the minor version. anywidget and papermill are not: the first cell brings them.
COLAB = {
    "ipykernel": "6.17.1",
    "ipython": "7.34.0",
    "keras": "3.13.2",
    "matplotlib": "3.10.0",
    "nbformat": "5.11.1",
    "numpy": "2.1.3",
    "prettytable": "3.18.0",
    "pydantic": "2.13.4",
    "tensorflow": "2.20.0",
    "distributed": "2025.5",
    "pandas": "2.2",
    "pillow": "11.3",
    "scipy": "1.16",
}
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
    """The Python of a fresh environment that has this one's packages, but not the helpers."""
    folder = tmp_path_factory.mktemp("fresh")
    # Without its own pip and setuptools, older ones, before those of this environment.
    subprocess.run(python("-m", "venv", "--without-pip", folder), check=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth file brings packages in, but not what is installed as editable.
    (site_packages / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin/python"


def open_alone(name, repository, folder) -> Path:
    """Copy a notebook into an empty folder; its first cell leads to the stand-in."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
    (setup,) = [c for c in notebook.cells if "setup" in c.metadata.get("tags", [])]
    # Without isolation pip builds with the packages that are here, and needs no registry.
    here = f"--no-build-isolation git+file://{repository}"
    source = re.sub(r"git\+https://github\.com/\S+", here, setup.source)
    assert source != setup.source
    setup.source = source
    path = folder / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path


def execute_alone(path, fresh_python, *parameters):
    done = subprocess.run(
        [fresh_python, "-m", "papermill", path.name, "out.ipynb", *map(str, parameters)],
        cwd=path.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return nbformat.read(path.parent / "out.ipynb", 4)


def test_notebooks_alone_fetch_the_helpers_the_data_and_the_reference_runs(
    repository, fresh_python, tmp_path
):
    command = [fresh_python, "-c", "import mnist_utils"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode != 0
    path = open_alone("2_model_a2", repository, tmp_path)
    notebook = execute_alone(path, fresh_python, "-p", "epochs", 1, "-p", "train_samples", 300)
    (run,) = load_runs(tmp_path / "runs")[0].itertuples()
    assert (run.dataset, run.by_hand) == ("mnist", True)
    assert f"Saved the run in runs/a2/{run.path.name}" in output_text(notebook)

    notebook = execute_alone(open_alone("8_comparison", repository, tmp_path), fresh_python)
    count = len(load_runs(ROOT / "results")[0])
    assert f"{count} runs of the collection, 1 of your own." in output_text(notebook)

    notebook = execute_alone(open_alone("7_your_digits", repository, tmp_path), fresh_python)
    assert "The models disagree on:" in output_text(notebook)


def test_papermill_from_another_folder_leaves_the_run_in_the_project(
    repository, small_mnist, tmp_path
):
    given = SMALL | {"epochs": 1, "dataset": small_mnist.name}
    pairs = [text for name, value in given.items() for text in ("-p", name, value)]
    shutil.copy(small_mnist, repository)  # a relative place counts from the project as well
    notebook = repository / "notebooks/2_model_a2.ipynb"
    done = subprocess.run(
        python("-m", "papermill", notebook, "out.ipynb", *pairs),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert os.listdir(tmp_path) == ["out.ipynb"]
    (run,) = load_runs(repository / "runs")[0].itertuples()
    text = output_text(nbformat.read(tmp_path / "out.ipynb", 4))
    assert f"Saved the run in runs/a2/{run.path.name}\n" in text


def test_the_ranges_allow_what_colab_has():
    required = map(Requirement, importlib.metadata.requires("mnist-notebooks"))
    ranges = {requirement.name: requirement.specifier for requirement in required}
    for name, version in COLAB.items():
        assert ranges[name].contains(version), name


def test_make_links_sets_the_public_name_everywhere(repository, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(repository, copy)
    before = {name: nbformat.read(copy / f"notebooks/{name}.ipynb", 4) for name in MODEL_NOTEBOOKS}
    subprocess.run(python(copy / "tools/links.py", "somebody/digits"), check=True)
    text = "".join(path.read_text(encoding="utf-8") for path in copy.rglob("*.ipynb"))
    text += (copy / "README.md").read_text() + (copy / "pyproject.toml").read_text()
    assert "YOUR_NAME" not in text
    assert text.count("github.com/somebody/digits") >= 6
    assert text.count(
        "colab.research.google.com/github/somebody/digits/blob/main/notebooks"
    ) == len(list(copy.rglob("*.ipynb")))
    # The records stay those of the same code.
    for name, old in before.items():
        new = nbformat.read(copy / f"notebooks/{name}.ipynb", 4)
        assert code_sha256(new) == code_sha256(old)


def test_make_links_refuses_a_name_that_is_none():
    done = subprocess.run(python(ROOT / "tools/links.py", "digits"), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "REPO is 'digits'; it must be owner/name, as on GitHub.\n"


@pytest.fixture
def pretended_gpu(monkeypatch):
    """There is no GPU in the tests: only what a CPU can do in the same way is tested."""
    monkeypatch.setattr(training, "GPUS", ["pretended"])
    before = training.keras.config.dtype_policy()
    yield
    training.keras.config.set_dtype_policy(before)


def test_mixed_float16_trains_with_a_scaled_loss(pretended_gpu, small_arrays, capsys):
    keras = training.keras
    training.set_up(0, "mixed_float16")
    assert capsys.readouterr().out == "Training on a GPU, precision mixed_float16, seed 0.\n"
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(10, activation="softmax", dtype="float32"),
        ]
    )
    model.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    images = training.prepare_images(small_arrays["x_train"])
    labels = keras.utils.to_categorical(small_arrays["y_train"], 10)
    batches = training.make_batches(images, labels, 64, shuffle_seed=0)
    history = model.fit(batches, epochs=3, verbose=0, shuffle=False).history
    assert history["loss"][-1] < history["loss"][0]
    assert model.predict(images[:2], verbose=0).dtype == "float32"


@pytest.mark.parametrize(("given", "used"), [(None, "1"), ("0", "0")])
def test_onednns_kernels_are_asked_for_unless_a_reader_set_it(given, used, monkeypatch):
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS", raising=False)
    if given:
        monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", given)
    script = "import os, mnist_utils.training; print(os.environ['TF_ENABLE_ONEDNN_OPTS'])"
    done = subprocess.run(python("-c", script), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == used


def test_variables_that_change_numbers_are_recorded_but_never_a_path(monkeypatch):
    for name in [name for name in os.environ if runs.LIBRARIES.match(name)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "1")  # as always
    assert runs.describe_environment()["variables"] == ""
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/home/somebody/dump")
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "3")
    found = runs.describe_environment()
    assert found["variables"] == "ONEDNN_MAX_CPU_ISA=AVX2 TF_ENABLE_ONEDNN_OPTS=0 XLA_FLAGS"
    assert found["threads"] == 3
    assert not {os.uname().nodename, os.environ.get("USER", "-")} & {*map(str, found.values())}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("sse avx2 avx512f avx512_bf16", "AVX-512 with bfloat16"), ("sse avx2", "AVX2")],
)
def test_a_processor_is_told_by_its_generation_and_its_widest_vectors(flags, expected, monkeypatch):
    info = f"model name\t: X 9\ncpu family\t: 6\nmodel\t: 85\nflags\t: {flags}\n\n"
    monkeypatch.setattr(runs.Path, "read_text", lambda path: info)
    assert runs.processor() == f"X 9, family 6 model 85, {expected}"
    monkeypatch.setattr(runs.Path, "read_text", lambda path: exec("raise FileNotFoundError"))
    assert runs.processor()
