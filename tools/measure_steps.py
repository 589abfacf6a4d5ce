"""Measure what each step of models D and E buys, on images held out; never on the test set.

Usage, in the checkout's root:
.venv/bin/python tools/measure_steps.py [steps|epochs|other_split] [--models d e] [--seeds 0-9]

Each step is a notebook with a few words of its code replaced, run as any other, on 50,000
training images and 10,000 held out in the test set's place, in another split for every seed.
"epochs" runs D and E with fewer and more epochs on the same splits; "other_split" runs them as
they are on all 70,000 images split anew. Writes results/studies/<what>.json, which the study
shows, from all runs of these seeds that runs/studies/ holds; these are not run again. What it
holds of the other model stays.
"""

import argparse
import io
import json
import re
import sys
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from nbformat import NotebookNode

from mnist_utils import headless
from mnist_utils.__main__ import parse_seeds
from mnist_utils.data import load_mnist
from mnist_utils.headless import Task, read_notebook, run_tasks
from mnist_utils.parameters import SETTINGS, InputError
from mnist_utils.runs import Record, code_sha256, write_whole

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "runs" / "studies"
HELD_OUT = 10_000
EPOCHS = [("d", 1), ("d", 2), ("d", 3), ("d", 6), ("e", 3), ("e", 7), ("e", 14)]
# The first edition's layer: Keras's own, in training by one operation of TensorFlow.
FUSED = """
import tensorflow as tf

class BatchNormalization(keras.layers.BatchNormalization):
    def call(self, inputs, training=None):
        if not training:
            return super().call(inputs, training=False)
        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs, scale=self.gamma, offset=self.beta, mean=[], variance=[],
            epsilon=self.epsilon,
        )
        for average, value in ((self.moving_mean, mean), (self.moving_variance, variance)):
            average.assign(self.momentum * average + (1 - self.momentum) * value)
        return outputs

keras.utils.set_random_seed"""
# For each step of each model: what is replaced in the notebook's code by what.
STEPS: dict[str, dict[str, dict[str, str]]] = {
    "d": {
        "the whole": {},
        "AdamW in Muon's place": {"    Muon(": "    keras.optimizers.AdamW("},
        "SGD in Muon's place, peak 0.8": {
            "    Muon(learning_rate, weight_decay=0.01, beta_2=0.99)": "    keras.optimizers.SGD("
            "learning_rate, momentum=0.9, nesterov=True)",
            "warmup_target=0.02": "warmup_target=0.8",
        },
        "with fused batch normalization": {"keras.utils.set_random_seed": FUSED},
        "without label smoothing": {"label_smoothing=0.1": "label_smoothing=0.0"},
        "with shifts of up to two pixels": {
            "shuffle_seed=seed)\n": "shuffle_seed=seed)\n"
            "shift = keras.layers.RandomTranslation(2 / 28, 2 / 28, 'constant', seed=seed)\n"
            "train_batches = train_batches.map(lambda x, y: (shift(x, training=True), y))\n"
        },
        "constant rate of 0.001": {"    Muon(learning_rate,": "    Muon(0.001,"},
        "without batch normalization, peak 0.001": {
            "    model.add(BatchNormalization(momentum=0.9))\n": "",
            "use_bias=False": "use_bias=True",
            "warmup_target=0.02": "warmup_target=0.001",
        },
        "half as many filters": {
            "(32, 5, True)": "(16, 5, True)",
            "(32, 3, False)": "(16, 3, False)",
            "(64, 3, True)": "(32, 3, True)",
            "(96, 3, False)": "(48, 3, False)",
        },
        "twice as many filters": {
            "(32, 5, True)": "(64, 5, True)",
            "(32, 3, False)": "(64, 3, False)",
            "(64, 3, True)": "(128, 3, True)",
            "(96, 3, False)": "(192, 3, False)",
        },
    },
    "e": {
        "the whole": {},
        "one look": {"looks = [(0, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)]": "looks = [(0, 0)]"},
        "shifts alone": {
            "angle * 12": "angle * 0",
            "1 + 0.12 * wide, 1 + 0.12 * high, 0.12 * slant": "1.0, 1.0, 0.0 * slant",
        },
        "no distortion": {"return distorted.prefetch(2)": "return batches.prefetch(2)"},
    },
}
# The rows of each measurement: model, name, what is replaced, and parameters.
ROWS: dict[str, list[tuple[str, str, dict[str, str], dict[str, int]]]] = {
    "steps": [(m, step, code, {}) for m in STEPS for step, code in STEPS[m].items()],
    "epochs": [(m, f"{n} epoch{'s' * (n > 1)}", {}, {"epochs": n}) for m, n in EPOCHS],
    "other_split": [(m, "other split", {}, {}) for m in STEPS],
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what each step of D and E buys.")
    parser.add_argument("what", nargs="?", default="steps", choices=ROWS)
    parser.add_argument("--models", nargs="+", default=[*STEPS], choices=STEPS)
    parser.add_argument("--seeds", default="0-4")
    given = parser.parse_args()
    # Seed by seed, so that a slow spell of the machine falls on every row alike.
    tasks = [task for seed in parse_seeds(given.seeds) for task in make_tasks(given.what, seed)]
    tasks = [task for task in tasks if task.setting in given.models]
    if run_tasks(tasks):
        return 1
    path = ROOT / "results" / "studies" / f"{given.what}.json"
    code = {model: code_sha256(read_notebook(SETTINGS[model].notebook)) for model in STEPS}
    rows = kept_rows(path, code, given.models)
    for task in tasks:
        if record := task.finished_run():
            rows.setdefault(task.name.split(" seed ")[0], []).append(outcome(record))
    content = json.dumps({"code_sha256": code, "rows": rows}, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.encode())
    return 0


def kept_rows(path: Path, code: dict[str, str], measured: list[str]) -> dict[str, Any]:
    """Return the recorded rows of the models that are not measured now, if by the same code."""
    if not path.exists():
        return {}
    before = json.loads(path.read_text())
    kept = {model for model in code if before["code_sha256"][model] == code[model]}
    kept -= set(measured)
    return {name: runs for name, runs in before["rows"].items() if name.split(":")[0] in kept}


def make_tasks(what: str, seed: int) -> list[Task]:
    """Return a task for each row of a measurement, on a split of the seed's own.

    "other_split" is on all 70,000 images split anew, once for all seeds.
    """
    if what == "other_split":
        split = write_split(what, load_mnist(), seed=0)
    else:
        split = write_split(f"held_out{seed}", load_mnist()[:1], seed)
    return [make_task(*row, seed, split) for row in ROWS[what]]


def make_task(
    model: str, name: str, replaced: dict[str, str], given: dict[str, Any], seed: int, split: Path
) -> Task:
    """Return the task of one run, its results in a folder of the name's."""
    notebook = changed(read_notebook(SETTINGS[model].notebook), replaced)
    folder = FOLDER / re.sub(r"\W+", "_", name)
    given = {**given, "seed": seed, "dataset": str(split), "results_dir": str(folder)}
    task = headless.make_task(model, notebook, given | {"keep_model": False}, [])
    return task._replace(name=f"{model}: {name} seed {seed}")


def changed(notebook: NotebookNode, replaced: dict[str, str]) -> NotebookNode:
    """Return a copy of a notebook with texts of its code replaced, wherever they stand."""
    copy = deepcopy(notebook)
    for old, new in replaced.items():
        cells = [cell for cell in copy.cells if cell.cell_type == "code" and old in cell.source]
        assert cells, f"the notebook has no {old!r}"
        for cell in cells:
            cell.source = cell.source.replace(old, new)
    return copy


def write_split(name: str, sets: Iterable[tuple[np.ndarray, np.ndarray]], seed: int) -> Path:
    """Write, if need be, all images of these sets as one data set, and return where it is.

    Its test set is 10,000 of them, drawn by the seed.
    """
    path = FOLDER / f"{name}.npz"
    if not path.exists():
        images, labels = (np.concatenate(parts) for parts in zip(*sets, strict=True))
        order = np.random.default_rng(seed).permutation(len(images))
        content = io.BytesIO()
        arrays: dict[str, Any] = {}
        for part, chosen in (("train", order[:-HELD_OUT]), ("test", order[-HELD_OUT:])):
            arrays |= {f"x_{part}": images[chosen], f"y_{part}": labels[chosen]}
        np.savez_compressed(content, **arrays)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.getvalue())
    return path


def outcome(record: Record) -> dict[str, Any]:
    return {
        "seed": record.run.seed,
        "accuracy": record.test_accuracy,
        "seconds": round(record.total_seconds, 1),
        "threads": record.environment["threads"],
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(str(error))
