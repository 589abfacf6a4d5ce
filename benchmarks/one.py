"""Measure one thing in a process of its own, and print it as JSON: mostly a model's epoch.

Usage: python benchmarks/one.py a2 original|float32|mixed_bfloat16|pytorch [IMAGES]
       python benchmarks/one.py gemm float32|mixed_bfloat16
       python benchmarks/one.py a1 whole|bare
       python benchmarks/one.py d-speed|d-accuracy float32|mixed_bfloat16 SEED
       python benchmarks/one.py d-speed|d-accuracy batches
       python benchmarks/one.py comparison opened
"""

import contextlib
import io
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

GEMM_SIZE = 4096
SHORT = 1000  # training images where the time around the training is measured


def load_data(images: int | None):
    from mnist_utils.data import load_mnist

    (x_train, y_train), (x_test, y_test) = load_mnist()
    return (x_train[:images], y_train[:images]), (x_test, y_test)


def timed_fit(run) -> float:
    """Return the seconds of the one ``fit`` that ``run()`` calls, after a few steps to warm up."""
    import keras

    seconds = []
    fit = keras.Model.fit

    def warm_and_timed(model, x, y=None, **options):
        # Arrays with a smaller last batch, as an epoch has: else its shapes are traced anew.
        few = (x.take(2), None) if y is None else (x[:600], y[:600])
        size = options.get("batch_size")
        validation = few[0] if y is None else few
        fit(model, *few, batch_size=size, validation_data=validation, verbose=0)
        began = time.perf_counter()
        history = fit(model, x, y, **options)
        seconds.append(time.perf_counter() - began)
        # Not that of validation, which is chance after few steps: the averages of the batch
        # normalization are still far behind.
        assert history.history["accuracy"][-1] > 0.2, "the model learnt nothing"
        assert "val_accuracy" in history.history, "the model was not validated"
        return history

    keras.Model.fit = warm_and_timed
    with contextlib.redirect_stdout(io.StringIO()):
        run()
    (only,) = seconds
    return only


def train_original(name: str, images: int | None) -> float:
    import original  # never mnist_utils.training: it has TensorFlow use other kernels

    return timed_fit(lambda: original.train(name, load_data(images)))


def read_cells(name: str) -> list:
    """Return the code cells of a model's notebook."""
    from mnist_utils.headless import notebook_path, read_notebook
    from mnist_utils.parameters import SETTINGS

    cells = read_notebook(notebook_path(SETTINGS[name].notebook)).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def run_cells(name: str, last: str, **given) -> dict:
    """Run the notebook's own cells up to the one that holds a text; return their variables.

    ``given`` are parameters. Only these cells are run, so nothing is saved.
    """
    variables = {}
    for cell in read_cells(name):
        tags = cell.metadata.get("tags", [])
        if "setup" in tags:
            continue
        exec(cell.source, variables)
        if "parameters" in tags:
            variables.update(given, results_dir=tempfile.mkdtemp())  # the notebook tries it
        if last in cell.source:
            return variables
    raise ValueError(f"{name} has no cell with {last!r}")


def train_notebook(name: str, precision: str, images: int | None) -> float:
    """Train by the notebook's own cells, for one epoch in this precision."""
    import mnist_utils.training  # noqa: F401 - before Keras, as in the notebook

    given = {"epochs": 1, "precision": precision, "train_samples": images}
    return timed_fit(lambda: run_cells(name, "model.fit(", **given))


def draw_batches(name: str) -> float:
    """Return the seconds that an epoch's batches take to draw and distort, with no training."""
    from mnist_utils.parameters import SETTINGS

    batches = run_cells(name, "train_batches = (", **SETTINGS[name].own)["train_batches"]
    for _ in batches.take(2):
        pass
    began = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - began


def run_whole(name: str) -> None:
    """Run a model's notebook by papermill, as make run does, for ten short epochs."""
    from mnist_utils.headless import execute, notebook_path, read_notebook
    from mnist_utils.parameters import SETTINGS

    given = {"results_dir": tempfile.mkdtemp(), "train_samples": SHORT}
    notebook = read_notebook(notebook_path(SETTINGS[name].notebook))
    problem = execute(notebook, given, Path(tempfile.mkdtemp()))
    assert problem is None, problem


def open_comparison() -> float:
    """Return the seconds from the start of a kernel to the comparison's last cell, as in Jupyter.

    The runs are those in results/ alone.
    """
    from nbclient import NotebookClient

    from mnist_utils.headless import COMPARISON, notebook_path, read_notebook

    notebook = read_notebook(notebook_path(COMPARISON))
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    parameters.source = f"results_dir = {tempfile.mkdtemp()!r}"
    where = {"metadata": {"path": str(ROOT / "notebooks")}}
    began = time.perf_counter()
    client = NotebookClient(notebook, resources=where, extra_arguments=["--log-level=ERROR"])
    with client.setup_kernel():
        for number, cell in enumerate(notebook.cells):
            client.execute_cell(cell, number)
        return time.perf_counter() - began


def run_budget(setting: str, precision: str, seed: int) -> dict:
    """Run a budget of D's as make run does; return its seconds, evaluation included, and epochs."""
    from mnist_utils.headless import execute, make_task

    task = make_task(setting, {"precision": precision, "seed": seed})
    problem = execute(task.notebook, task.given, task.folder)
    assert problem is None, problem
    record = task.finished_run().record
    return {"seconds": record.total_seconds, "epochs": record.run.epochs}


def run_bare(name: str) -> None:
    """Do what a notebook must: load, build, train ten short epochs without a plot, evaluate."""
    from mnist_utils.data import load_mnist
    from mnist_utils.training import keras, make_batches, prepare_images, set_up

    set_up(0, "float32")
    (x_train, labels_train), (x_test, labels_test) = load_mnist("mnist", SHORT, 0)
    y_train, y_test = (keras.utils.to_categorical(y, 10) for y in (labels_train, labels_test))
    train_batches = make_batches(prepare_images(x_train), y_train, 256, shuffle_seed=0)
    test_batches = make_batches(prepare_images(x_test), y_test, 256)
    variables = {"x_train": prepare_images(x_train), "num_classes": 10}
    (cell,) = (cell for cell in read_cells(name) if "model = Sequential" in cell.source)
    exec(cell.source, variables)
    model = variables["model"]
    model.compile(
        loss="categorical_crossentropy", optimizer=keras.optimizers.Adam(), metrics=["accuracy"]
    )
    model.fit(train_batches, epochs=10, validation_data=test_batches, shuffle=False, verbose=0)
    model.evaluate(test_batches, verbose=0)


def multiply(precision: str) -> float:
    """Return the multiply-adds a second of a large matrix product: the machine's limit."""
    from mnist_utils.training import tf

    a = tf.cast(tf.random.normal([GEMM_SIZE, GEMM_SIZE]), precision.removeprefix("mixed_"))
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        tf.matmul(a, a).numpy()
        seconds.append(time.perf_counter() - began)
    return GEMM_SIZE**3 / min(seconds)


def main(name: str, way: str, number: str | None = None) -> None:
    os.environ.setdefault("MPLBACKEND", "agg")
    count = int(number) if number else None
    if name == "gemm":
        measured = {"macs_per_second": multiply(way)}
    elif way == "original":
        measured = {"seconds": train_original(name, count)}
    elif way == "pytorch":
        import plain_pytorch

        measured = {"seconds": plain_pytorch.train(name, load_data(count))}
    elif way in ("whole", "bare"):
        with contextlib.redirect_stdout(io.StringIO()):
            (run_whole if way == "whole" else run_bare)(name)
        measured = {"seconds": time.time() - psutil.Process().create_time()}
    elif way == "batches":
        with contextlib.redirect_stdout(io.StringIO()):
            measured = {"seconds": draw_batches(name)}
    elif name.startswith("d-"):
        with contextlib.redirect_stdout(io.StringIO()):
            measured = run_budget(name, way, count)
    elif way == "opened":
        measured = {"seconds": open_comparison()}
    else:
        measured = {"seconds": train_notebook(name, way, count)}
    # A notebook's kernel is a child process. Linux counts in KiB.
    kernel = (name.startswith("d-") and way != "batches") or way in ("whole", "opened")
    who = resource.RUSAGE_CHILDREN if kernel else resource.RUSAGE_SELF
    measured["peak_megabytes"] = resource.getrusage(who).ru_maxrss * 1024 / 1e6
    print(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
