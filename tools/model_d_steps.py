"""Measure what each step of model D buys, on training images held out; never on the test set.

Usage, in the checkout's root: .venv/bin/python tools/model_d_steps.py [--seeds 0-4]
                               .venv/bin/python tools/model_d_steps.py --frontier
                               .venv/bin/python tools/model_d_steps.py --other-split

Each step is the notebook with a few words of its code replaced. It runs as any sweep does, on
other data sets: 50,000 training images, and 10,000 held out in the test set's place, in another
split for every seed. Writes results/d/steps.json, which the notebook shows. With --frontier:
the budgets with fewer and more epochs, on the same splits; writes results/d/frontier.json. With
--other-split: the budgets as they are, on all 70,000 images split anew; writes
results/d/other_split.json, which the comparison shows.
"""

import argparse
import io
import json
import re
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np

from mnist_utils.data import load_mnist
from mnist_utils.headless import Task, code_sha256, notebook_path, read_notebook
from mnist_utils.parameters import check_parameters
from mnist_utils.runs import write_whole
from mnist_utils.sweep import parse_seeds, run_sweep

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "runs" / "d_steps"
RESULTS = ROOT / "results" / "d"
HELD_OUT = 10_000
BUDGETS = {"d-speed": {"budget": "speed"}, "d-accuracy": {"budget": "accuracy"}}
FRONTIER = {"speed": (1, 3, 6), "accuracy": (3, 7, 14)}  # epochs

NORMALIZATION = "    model.add(FusedBatchNormalization(momentum=0.9))\n"
FILTERS = "(32, 5, True), (32, 3, False), (64, 3, True), (96, 3, False)"
# For each step: what is replaced in the notebook's code by what, and the parameters given.
STEPS = {
    "the whole": ({}, {}),
    "1 epoch": ({}, {"epochs": 1}),
    "6 epochs": ({}, {"epochs": 6}),
    "without batch normalization, peak rate 0.001": (
        {
            NORMALIZATION: "",
            "use_bias=False": "use_bias=True",
            '"speed": (0.02, 0.01)': '"speed": (0.001, 0.01)',
        },
        {},
    ),
    "constant rate of 0.001 in the schedule's place": (
        {"Muon(learning_rate,": "Muon(0.001,"},
        {},
    ),
    "without augmentation": ({'"speed": (2.0,': '"speed": (0.0,'}, {}),
    "also turned, stretched and slanted": (
        {'"speed": (2.0, 0.0, 0.0, 0.0)': '"speed": (2.0, 10.0, 0.1, 0.1)'},
        {},
    ),
    "without label smoothing": ({"label_smoothing=0.1": "label_smoothing=0.0"}, {}),
    "half as many filters": (
        {FILTERS: "(16, 5, True), (16, 3, False), (32, 3, True), (48, 3, False)"},
        {},
    ),
    "twice as many filters": (
        {FILTERS: "(64, 5, True), (64, 3, False), (128, 3, True), (192, 3, False)"},
        {},
    ),
    "weights averaged over some 100 steps": (
        {"beta_2=0.99)": "beta_2=0.99, use_ema=True, ema_momentum=0.99)"},
        {},
    ),
    "distorted less in the last epoch": ({"epochs // 7": "1"}, {}),
    "four more looks at each test image": (
        {'"speed": [(0, 0)]': '"speed": [(0, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)]'},
        {},
    ),
    "batches of 128, peak rate 0.01": (
        {'"speed": (0.02, 0.01)': '"speed": (0.01, 0.01)'},
        {"batch_size": 128},
    ),
    "Keras's own batch normalization": ({"model.add(FusedBatch": "model.add(Batch"}, {}),
    "AdamW in Muon's place": ({"optimizer=Muon(": "optimizer=keras.optimizers.AdamW("}, {}),
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", default="0-4")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--frontier", action="store_true")
    which.add_argument("--other-split", action="store_true")
    options = parser.parse_args()
    seeds = parse_seeds(options.seeds)
    if options.other_split:
        return measure(other_split_tasks(seeds), RESULTS / "other_split.json", "budgets")
    if options.frontier:
        return measure(frontier_tasks(seeds), RESULTS / "frontier.json", "frontier")
    return measure(step_tasks(seeds), RESULTS / "steps.json", "steps")


def measure(tasks: dict[str, list[Task]], file: Path, name: str) -> int:
    """Run the tasks and write what they reached; return the exit code."""
    code = code_sha256(read_notebook(notebook_path("5_model_d")))  # now: hours may pass
    # Seed by seed, so that a slow spell of the machine falls on every step alike.
    if run_sweep([task for group in zip(*tasks.values(), strict=True) for task in group]):
        return 1
    content = {
        "code_sha256": code,
        name: {group: [outcome(task) for task in tasks[group]] for group in tasks},
    }
    write_whole(file, (json.dumps(content, indent=1) + "\n").encode())
    return 0


def step_tasks(seeds: list[int]) -> dict[str, list[Task]]:
    """Return a task for each step and seed, each seed on a split of its own."""
    notebook, splits = read_notebook(notebook_path("5_model_d")), held_out_splits(seeds)
    return {
        step: [
            make_task(step, changed(notebook, replaced), own, seed, splits[seed]) for seed in seeds
        ]
        for step, (replaced, own) in STEPS.items()
    }


def frontier_tasks(seeds: list[int]) -> dict[str, list[Task]]:
    """Return a task for each budget, number of epochs and seed, on the splits of the steps."""
    notebook = changed(read_notebook(notebook_path("5_model_d")), {})
    splits = held_out_splits(seeds)
    return {
        f"{budget}, {epochs} epoch{'s' if epochs > 1 else ''}": [
            make_task(
                "frontier", notebook, {"budget": budget, "epochs": epochs}, seed, splits[seed]
            )
            for seed in seeds
        ]
        for budget, numbers in FRONTIER.items()
        for epochs in numbers
    }


def other_split_tasks(seeds: list[int]) -> dict[str, list[Task]]:
    """Return a task for each budget and seed, on all 70,000 images split anew."""
    notebook, (train, test) = read_notebook(notebook_path("5_model_d")), load_mnist()
    images, labels = (np.concatenate(parts) for parts in zip(train, test, strict=True))
    split = write_split("other_split", images, labels, seed=0)
    notebook = changed(notebook, {})
    return {
        name: [make_task("other split", notebook, given, seed, split) for seed in seeds]
        for name, given in BUDGETS.items()
    }


def changed(notebook, replaced: dict[str, str]):
    """Return a copy of the notebook with texts of its code replaced, wherever they stand.

    The cells that show the steps are left out: there is nothing to show yet.
    """
    copy = deepcopy(notebook)
    copy.cells = [cell for cell in copy.cells if not cell.id.startswith("steps")]
    for old, new in replaced.items():
        cells = [cell for cell in copy.cells if cell.cell_type == "code" and old in cell.source]
        assert cells, f"the notebook has no {old!r}"
        for cell in cells:
            cell.source = cell.source.replace(old, new)
    return copy


def make_task(name: str, notebook, own: dict, seed: int, split: Path) -> Task:
    """Return the task of one run, its results in a folder of the name's."""
    given = {"budget": "speed", "seed": seed, "dataset": str(split), **own}
    results = FOLDER / re.sub(r"\W+", "_", name)
    all_given = {"epochs": None, "batch_size": 256, "results_dir": str(results), **given}
    return Task(f"{name},", notebook, given, check_parameters("d", **all_given))


def held_out_splits(seeds: list[int]) -> dict[int, Path]:
    """Write a split of the training images for each seed."""
    images, labels = load_mnist()[0]
    return {seed: write_split(f"held_out{seed}", images, labels, seed) for seed in seeds}


def write_split(name: str, images: np.ndarray, labels: np.ndarray, seed: int) -> Path:
    """Write the images as a data set whose test set is 10,000 of them, drawn by the seed."""
    path = FOLDER / f"{name}.npz"
    if not path.exists():
        order = np.random.default_rng(seed).permutation(len(images))
        train, held_out = order[:-HELD_OUT], order[-HELD_OUT:]
        path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        np.savez_compressed(
            content,
            x_train=images[train],
            y_train=labels[train],
            x_test=images[held_out],
            y_test=labels[held_out],
        )
        write_whole(path, content.getvalue())
    return path


def outcome(task: Task) -> dict:
    record = task.finished_run().record
    return {
        "seed": record.run.seed,
        "epochs": record.run.epochs,
        "accuracy": record.test_accuracy,
        "seconds": round(record.total_seconds, 1),
        "threads": record.environment["threads"],
    }


if __name__ == "__main__":
    sys.exit(main())
