"""Measure one thing in a process of its own, and print it as JSON.

Usage: python benchmarks/one.py SETTING float32|mixed_bfloat16|original|pytorch [IMAGES]
       python benchmarks/one.py gemm float32|mixed_bfloat16
       python benchmarks/one.py 1_model_a1|8_comparison around
"""

import contextlib
import io
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from mnist_utils.data import load_mnist  # noqa: E402 - without TensorFlow
from mnist_utils.parameters import SETTINGS  # noqa: E402

GEMM_SIZE = 4096
WHOLE = ("d", "e")  # trained whole: their learning rate follows from the number of epochs


def timed_fit(run: Callable[[], Any]) -> float:
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
    run()
    (only,) = seconds
    return only


def train_notebook(name: str, precision: str, images: int | None) -> dict:
    """Train for one epoch by the notebook's own cells; return its multiply-adds an image too."""
    import mnist_utils.training  # noqa: F401 - before Keras, as in the notebook
    from mnist_utils.runs import describe_architecture

    given = {"epochs": 1, "precision": precision, "train_samples": images}
    variables: dict[str, Any] = {}
    seconds = timed_fit(lambda: variables.update(run_cells(name, **given)))
    return {"seconds": seconds, "macs": describe_architecture(variables["model"])["macs"]}


def run_cells(name: str, **given) -> dict[str, Any]:
    """Run a model notebook's code cells up to its training; return its variables."""
    variables: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as results:  # the notebook tries whether it can write
        given = {**SETTINGS[name].own, **given, "results_dir": results}
        for cell in nbformat.read(ROOT / f"notebooks/{SETTINGS[name].notebook}.ipynb", 4).cells:
            tags = cell.metadata.get("tags", [])
            if cell.cell_type != "code" or "setup" in tags:
                continue
            exec(cell.source, variables)
            if "parameters" in tags:
                variables.update(given)
            if "model.fit(" in cell.source:
                break
    return variables


def run_by_papermill(notebook: str, **given) -> tuple[float, list[dict]]:
    """Run a notebook in a kernel; return its seconds and the records that it left."""
    import papermill

    with tempfile.TemporaryDirectory() as folder:
        given = {**given, "results_dir": folder}
        executed = os.path.join(folder, "executed.ipynb")
        where = {"cwd": ROOT / "notebooks", "progress_bar": False}
        began = time.perf_counter()
        papermill.execute_notebook(ROOT / f"notebooks/{notebook}.ipynb", executed, given, **where)
        seconds = time.perf_counter() - began
        return seconds, [json.loads(p.read_text()) for p in Path(folder).rglob("metrics.json")]


def train_whole(name: str, precision: str, images: int | None) -> dict:
    """Run a notebook with all its epochs; return the seconds of one, with its share of the
    evaluation."""
    given = {"precision": precision, "train_samples": images}
    _, (record,) = run_by_papermill(SETTINGS[name].notebook, **given)
    whole = sum(record["seconds_per_epoch"]) + record["evaluation_seconds"]
    return {"seconds": whole / record["run"]["epochs"]}


def run_around(notebook: str) -> dict:
    """Return the seconds of a notebook, from its kernel's start, that are not its training."""
    short = {} if notebook == "8_comparison" else {"train_samples": 1000}
    seconds, records = run_by_papermill(notebook, **short)
    return {"seconds": seconds - sum(sum(record["seconds_per_epoch"]) for record in records)}


def multiply(precision: str) -> dict:
    """Return the multiply-adds a second of a large matrix product: the machine's limit."""
    from mnist_utils.training import tf

    a = tf.cast(tf.random.normal([GEMM_SIZE, GEMM_SIZE]), precision.removeprefix("mixed_"))
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        tf.matmul(a, a).numpy()
        seconds.append(time.perf_counter() - began)
    return {"giga_macs_per_second": GEMM_SIZE**3 / min(seconds) / 1e9}


def measure(name: str, way: str, images: int | None) -> dict:
    if name == "gemm":
        return multiply(way)
    if way == "around":
        return run_around(name)
    if way == "original":
        import original  # never mnist_utils.training: it has TensorFlow use other kernels

        data = load_mnist(train_samples=images)
        return {"seconds": timed_fit(lambda: original.train(name, data))}
    if way == "pytorch":
        import plain_pytorch

        return {"seconds": plain_pytorch.train(name, load_mnist(train_samples=images))}
    return (train_whole if name in WHOLE else train_notebook)(name, way, images)


def main(name: str, way: str, number: str | None = None) -> None:
    os.environ.setdefault("MPLBACKEND", "agg")
    with contextlib.redirect_stdout(io.StringIO()):
        measured = measure(name, way, int(number) if number else None)
    # A kernel is a child process. Linux counts in KiB, macOS in bytes.
    in_kernel = way == "around" or name in WHOLE
    who = resource.RUSAGE_CHILDREN if in_kernel else resource.RUSAGE_SELF
    measured["megabytes"] = resource.getrusage(who).ru_maxrss / 1e6
    measured["megabytes"] *= 1 if sys.platform == "darwin" else 1024
    print(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
