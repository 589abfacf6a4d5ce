"""The parts of model D's notebook do what its prose says, and what it shows is not stale."""

import json
import re
import sys

import nbformat
import numpy as np
import pytest
from conftest import NOTEBOOKS, ROOT

from mnist_utils.headless import code_sha256
from mnist_utils.parameters import SETTINGS
from mnist_utils.training import keras, make_batches, tf

PATH = NOTEBOOKS / "5_model_d.ipynb"
NOTEBOOK = nbformat.read(PATH, 4)
RESULTS = ROOT / "results" / "d"


def run_cells(*ids, **variables) -> dict:
    """Execute cells of the notebook, and return the variables that they leave."""
    variables = {"keras": keras, "tf": tf, "np": np, "budget": "speed", **variables}
    sources = {cell.id: cell.source for cell in NOTEBOOK.cells}
    for name in ids:
        exec(sources[name], variables)
    return variables


@pytest.fixture
def digits(mnist):
    return (mnist[0][0][:32, ..., None] / 255).astype("float32")


@pytest.mark.parametrize("budget", ["speed", "accuracy"])
def test_without_distortion_an_image_shows_its_middle(budget, digits):
    cells = run_cells("augmentation", budget=budget)
    cells["shift"] = cells["turn"] = cells["stretch"] = cells["slant"] = 0.0
    border = (28 - cells["window"]) // 2
    middle = digits[:, border : 28 - border, border : 28 - border]
    assert cells["distort"](digits, (1, 2)).numpy() == pytest.approx(middle, abs=1e-6)


def test_each_distortion_does_what_its_name_says():
    """A bright line through the middle, along one axis, seen after each distortion alone."""
    line = np.zeros((200, 28, 28, 1), "float32")
    line[:, 13:15, 4:24] = 1
    lines = {"horizontal": line, "vertical": line.transpose(0, 2, 1, 3)}
    rows, columns = np.mgrid[:28, :28] - 13.5
    across = {"horizontal": rows, "vertical": columns}
    along = {"horizontal": columns, "vertical": rows}

    def distorted(direction, **amounts):
        cells = run_cells("augmentation", budget="accuracy")
        cells.update(shift=0.0, turn=0.0, stretch=0.0, slant=0.0)
        cells.update(amounts)
        return cells["distort"](lines[direction], (1, 2)).numpy()[..., 0]

    def slopes(direction, **amounts):
        seen = distorted(direction, **amounts)
        products = (seen * across[direction] * along[direction]).sum((1, 2))
        return products / (seen * along[direction] ** 2).sum((1, 2))

    for direction in lines:
        shifted = distorted(direction, shift=2.0)
        places = (shifted * across[direction]).sum((1, 2)) / shifted.sum((1, 2))
        assert -2 <= places.min() < -1.8 and 1.8 < places.max() <= 2

        angles = np.degrees(np.arctan(slopes(direction, turn=12.0)))
        assert angles.max() == pytest.approx(12, abs=1.5)
        assert angles.min() == pytest.approx(-12, abs=1.5)

        # Along the axis alone: how wide the line is does not count.
        stretched, plain = (
            np.sqrt((seen * along[direction] ** 2).sum((1, 2)) / seen.sum((1, 2)))
            for seen in (distorted(direction, stretch=0.12), distorted(direction))
        )
        lengths = stretched / plain
        assert lengths.max() > 1.08 and lengths.min() < 0.92

    # A slant moves rows sideways: what lies stays, what stands leans.
    assert slopes("horizontal", slant=0.12) == pytest.approx(np.zeros(200), abs=0.01)
    leaning = slopes("vertical", slant=0.12)
    assert leaning.max() == pytest.approx(0.12, abs=0.015)
    assert leaning.min() == pytest.approx(-0.12, abs=0.015)


def test_the_same_seed_gives_the_same_distortion(digits):
    distort = run_cells("augmentation")["distort"]
    first, again, other = (distort(digits, seed).numpy() for seed in ((1, 2), (1, 2), (1, 3)))
    assert (first == again).all()
    assert (first != other).any()


def batch_cells(digits) -> dict:
    """Run the cells that make the batches, from 32 images; return what they define."""
    return run_cells(
        "augmentation",
        "batches",
        x_train=digits,
        y_train=np.eye(10, dtype="float32")[np.zeros(32, int)],
        x_validation=digits,
        y_validation=np.zeros((32, 10)),
        middle=slice(2, 26),
        batch_size=32,
        seed=3,
        make_batches=make_batches,
    )


def test_the_batches_are_distorted_anew_in_every_epoch_and_alike_for_the_same_seed(digits):
    def two_epochs():
        cells = batch_cells(digits)
        # Sorted, so that the order of the images does not count.
        return [np.sort(next(iter(cells["train_batches"]))[0].numpy(), axis=0) for _ in range(2)]

    first, again = two_epochs(), two_epochs()
    assert (first[0] == again[0]).all()
    assert (first[0] != first[1]).any()
    assert first[0].shape == (32, 24, 24, 1)


def test_the_last_seventh_of_the_epochs_is_distorted_less(digits):
    cells = batch_cells(digits)
    undistorted = np.sort(digits[:, 2:26, 2:26], axis=0)

    class Model:
        """Stands in for the network: it only counts how far the batches are distorted."""

        def compile(self, **options):
            pass

        def fit(self, batches, epochs, callbacks, **options):
            self.distances = []
            for epoch in range(epochs):
                callbacks[0].on_epoch_begin(epoch, None)
                images = np.sort(next(iter(batches))[0].numpy(), axis=0)
                self.distances.append(np.abs(images - undistorted).mean())
            return self

    for epochs, settled in ((14, 2), (7, 1), (3, 0), (1, 0)):
        cells = run_cells(
            "fit",
            **cells
            | {"model": Model(), "epochs": epochs, "learning_rate": 0.1, "weight_decay": 0.1}
            | {"Muon": lambda *arguments, **options: None},
        )
        distances = np.array(cells["model"].distances)
        full, weak = distances[: epochs - settled], distances[epochs - settled :]
        assert len(weak) == settled
        assert (full > 1.3 * weak.max(initial=0)).all() and full.min() > 0


def test_the_fused_normalization_is_keras_own(digits):
    fused_class = run_cells("augmentation", "model", num_classes=10)["FusedBatchNormalization"]
    values = np.random.default_rng(0).normal(2, 3, (64, 5, 5, 4)).astype("float32")
    fused, own = fused_class(momentum=0.9), keras.layers.BatchNormalization(momentum=0.9)
    for _ in range(3):
        outputs = [layer(values, training=True).numpy() for layer in (fused, own)]
        assert outputs[0] == pytest.approx(outputs[1], abs=1e-4)
    for of_fused, of_own in zip(fused.get_weights(), own.get_weights(), strict=True):
        assert of_fused == pytest.approx(of_own, rel=2e-3)  # the variance of n or of n - 1 values
    assert fused(values).numpy() == pytest.approx(own(values).numpy(), rel=2e-3, abs=2e-3)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero():
    cells = run_cells("schedule", epochs=1, train_batches=range(10))
    rates = [float(cells["OneCycle"](0.5, 100)(step)) for step in range(100)]
    assert np.argmax(rates) == 19
    assert max(rates) == pytest.approx(0.5)
    assert rates[0] == pytest.approx(0.025)
    assert rates[-1] == pytest.approx(0, abs=1e-7)
    assert (np.diff(rates[:20]) > 0).all() and (np.diff(rates[19:]) < 0).all()


@pytest.mark.parametrize("shape", [(25, 32), (288, 64), (40, 40)])
def test_the_orthogonal_matrix_has_singular_values_of_about_one(shape):
    matrix = np.random.default_rng(0).normal(size=shape).astype("float32")
    orthogonal = run_cells("muon")["orthogonal"](tf.constant(matrix)).numpy()
    values = np.linalg.svd(orthogonal, compute_uv=False)
    assert np.linalg.cond(matrix) > 1.5
    expected = np.linalg.svd(matrix / np.linalg.norm(matrix), compute_uv=False)
    for _ in range(3):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    assert values == pytest.approx(np.sort(expected)[::-1], abs=1e-3)
    assert np.quantile(values, 0.1) > 0.5 and values.max() < 1.3
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    assert np.sum(orthogonal * (left @ right)) / min(shape) > 0.7  # in the same directions


def test_muon_turns_kernels_alone_and_leaves_the_rest_to_adamw():
    muon = run_cells("muon")["Muon"]
    gradients = [np.random.default_rng(0).normal(size=s) for s in ((3, 3, 4, 8), (20, 10), (8,))]
    moved = []
    for optimizer in (muon(0.01, weight_decay=0.1), keras.optimizers.AdamW(0.01, weight_decay=0.1)):
        variables = [keras.Variable(np.ones(g.shape, "float32")) for g in gradients]
        for _ in range(2):
            optimizer.apply([tf.constant(g, tf.float32) for g in gradients], variables)
        moved.append([variable.numpy() for variable in variables])
    kernel, *others = moved[0]
    assert all((a == b).all() for a, b in zip(others, moved[1][1:], strict=True))
    decay = (1 - 0.01 * 0.1) ** 2
    step = (kernel - decay).reshape(36, 8)
    values = np.linalg.svd(step, compute_uv=False)
    assert values.max() < 1.3 * 2 * 0.01 * 0.2 * 6
    assert values.min() > 0.5 * 2 * 0.01 * 0.2 * 6


def test_the_test_set_is_read_at_the_end_alone():
    cells = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
    order = [cell.id for cell in cells]
    for cell in cells:
        if "x_test" in cell.source or "labels_test" in cell.source:
            assert cell.id == "data" or order.index(cell.id) > order.index("fit")
    fit = next(cell.source for cell in cells if cell.id == "fit")
    assert "validation_data=validation_batches" in fit


@pytest.fixture
def steps_tool(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    yield __import__("model_d_steps")
    sys.modules.pop("model_d_steps")


@pytest.fixture
def small_steps_tool(steps_tool, small_arrays, monkeypatch, tmp_path):
    """The tool on few images, with its files in a folder of the test's."""
    small = [(small_arrays[f"x_{part}"], small_arrays[f"y_{part}"]) for part in ("train", "test")]
    monkeypatch.setattr(steps_tool, "load_mnist", lambda: small)
    monkeypatch.setattr(steps_tool, "HELD_OUT", 100)
    monkeypatch.setattr(steps_tool, "FOLDER", tmp_path)
    return steps_tool


def test_each_step_changes_the_notebook_as_it_is(steps_tool):
    variants = {}
    for step, (replaced, given) in steps_tool.STEPS.items():
        notebook = steps_tool.changed(NOTEBOOK, replaced)
        variants[step] = (code_sha256(notebook), *given.items())
        assert "steps" not in [cell.id for cell in notebook.cells]
    assert len(set(variants.values())) == len(variants)


def test_the_steps_are_measured_and_written(small_steps_tool, monkeypatch, tmp_path):
    steps_tool = small_steps_tool
    step = "batches of 128, peak rate 0.01"
    replaced, given = steps_tool.STEPS[step]
    monkeypatch.setattr(steps_tool, "STEPS", {step: (replaced, {"epochs": 1, **given})})
    tasks = steps_tool.step_tasks([0])
    assert steps_tool.measure(tasks, tmp_path / "steps.json", "steps") == 0
    content = json.loads((tmp_path / "steps.json").read_text())
    assert content["code_sha256"] == code_sha256(NOTEBOOK)
    (one,) = content["steps"][step]
    assert one["seed"] == 0 and 0 <= one["accuracy"] <= 1 and one["seconds"] > 0
    (run,) = tasks[step]
    assert run.finished_run().record.run.batch_size == 128


def test_the_frontier_has_each_budget_and_its_epochs_on_the_splits_of_the_steps(small_steps_tool):
    tasks = small_steps_tool.frontier_tasks([0, 1])
    runs = [task.given for group in tasks.values() for task in group]
    assert {(given["budget"], given["epochs"]) for given in runs} == {
        *(("speed", epochs) for epochs in (1, 3, 6)),
        *(("accuracy", epochs) for epochs in (3, 7, 14)),
    }
    steps = small_steps_tool.step_tasks([0, 1])["the whole"]
    for group in tasks.values():
        assert [task.parameters.dataset for task in group] == [
            task.parameters.dataset for task in steps
        ]
    assert len({task.folder for group in tasks.values() for task in group}) == len(runs)


def test_the_measured_steps_are_those_of_the_notebook(steps_tool):
    content = json.loads((RESULTS / "steps.json").read_text())
    assert content["code_sha256"] == code_sha256(NOTEBOOK)
    assert list(content["steps"]) == list(steps_tool.STEPS)
    for runs in content["steps"].values():
        assert len({run["seed"] for run in runs}) >= 5


def test_the_measured_frontier_is_that_of_the_notebook(steps_tool):
    content = json.loads((RESULTS / "frontier.json").read_text())
    assert content["code_sha256"] == code_sha256(NOTEBOOK)
    expected = {(name, epochs) for name, many in steps_tool.FRONTIER.items() for epochs in many}
    names = re.compile(r"(\w+), (\d+) epochs?")
    found = [names.fullmatch(name).groups() for name in content["frontier"]]
    assert {(name, int(epochs)) for name, epochs in found} == expected
    for runs in content["frontier"].values():
        assert len({run["seed"] for run in runs}) >= 5


def test_another_split_was_measured_with_the_present_notebook(steps_tool):
    content = json.loads((RESULTS / "other_split.json").read_text())
    assert content["code_sha256"] == code_sha256(NOTEBOOK)
    assert list(content["budgets"]) == list(steps_tool.BUDGETS)
    for setting, runs in content["budgets"].items():
        assert len({run["seed"] for run in runs}) >= 5
        assert {run["epochs"] for run in runs} == {SETTINGS[setting].epochs}
