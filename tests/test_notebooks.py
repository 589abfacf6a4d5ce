"""Every model notebook, executed by papermill on real MNIST images with small parameters."""

import os
import re
import sys
from importlib import import_module
from types import ModuleType

import nbformat
import numpy as np
import papermill
import pytest
from conftest import (
    MODEL_NOTEBOOKS,
    NOTEBOOKS,
    ORIGINAL_NOTEBOOKS,
    ROOT,
    SMALL,
    code_cells,
    output_text,
    run_python,
)

from mnist_utils.data import load_mnist
from mnist_utils.muon import Muon, orthogonal
from mnist_utils.parameters import OWN, SETTINGS, InputError, check_parameters
from mnist_utils.runs import architecture_digest, load_model, load_runs, read_predictions
from mnist_utils.training import keras, make_batches, prepare_data, prepare_images, tf

# The original's layer tables: layer, output shape, parameters.
ORIGINAL_LAYERS = {
    "a1": """
        Conv2D (None, 26, 26, 16) 160
        Conv2D (None, 24, 24, 32) 4640
        Conv2D (None, 22, 22, 64) 18496
        MaxPooling2D (None, 11, 11, 64) 0
        Flatten (None, 7744) 0
        Dense (None, 64) 495680
        Dense (None, 10) 650""",
    "a2": """
        Conv2D (None, 28, 28, 32) 320
        Conv2D (None, 26, 26, 16) 4624
        MaxPooling2D (None, 13, 13, 16) 0
        Dropout (None, 13, 13, 16) 0
        Conv2D (None, 11, 11, 32) 4640
        MaxPooling2D (None, 5, 5, 32) 0
        BatchNormalization (None, 5, 5, 32) 128
        Flatten (None, 800) 0
        Dense (None, 64) 51264
        Dropout (None, 64) 0
        BatchNormalization (None, 64) 256
        Dense (None, 10) 650""",
    "b": """
        Conv2D (None, 28, 28, 32) 832
        Conv2D (None, 28, 28, 128) 102528
        MaxPooling2D (None, 14, 14, 128) 0
        Dropout (None, 14, 14, 128) 0
        Conv2D (None, 14, 14, 64) 204864
        MaxPooling2D (None, 7, 7, 64) 0
        Dropout (None, 7, 7, 64) 0
        Conv2D (None, 7, 7, 64) 102464
        BatchNormalization (None, 7, 7, 64) 256
        Conv2D (None, 7, 7, 32) 51232
        MaxPooling2D (None, 3, 3, 32) 0
        Dropout (None, 3, 3, 32) 0
        Flatten (None, 288) 0
        Dense (None, 128) 36992
        BatchNormalization (None, 128) 512
        Dropout (None, 128) 0
        Dense (None, 10) 1290""",
    "c": """
        Conv2D (None, 28, 28, 64) 320
        Conv2D (None, 28, 28, 128) 32896
        Conv2D (None, 28, 28, 64) 32832
        MaxPooling2D (None, 14, 14, 64) 0
        Dropout (None, 14, 14, 64) 0
        Conv2D (None, 14, 14, 64) 36928
        Conv2D (None, 14, 14, 32) 8224
        MaxPooling2D (None, 7, 7, 32) 0
        Conv2D (None, 7, 7, 32) 9248
        Conv2D (None, 7, 7, 32) 4128
        Dropout (None, 7, 7, 32) 0
        BatchNormalization (None, 7, 7, 32) 128
        Flatten (None, 1568) 0
        Dense (None, 64) 100416
        Dropout (None, 64) 0
        Dense (None, 10) 650""",
}
ORIGINAL_LAYERS["c7"] = ORIGINAL_LAYERS["c"].replace("64) 320", "64) 3200")
PARAMETERS = {"a1": 519_626, "a2": 61_882, "b": 500_970, "c": 225_770, "c7": 228_650}
EPOCH_LINE = re.compile(
    r"^Epoch (\d)/2: loss [\d.]+, accuracy [\d.]+, val_loss [\d.]+, val_accuracy [\d.]+, "
    r"[\d.]+ s(, [\d.]+ s left)?$",
    re.MULTILINE,
)


@pytest.mark.parametrize("setting", PARAMETERS)
def test_the_model_is_the_originals_layer_by_layer(setting, executed):
    layers = load_model(executed(setting).folder).layers
    found = [f"{type(one).__name__} {one.output.shape} {one.count_params()}" for one in layers]
    assert found == [line.strip() for line in ORIGINAL_LAYERS[setting].split("\n")[1:]]
    assert executed(setting).record.architecture.parameters == PARAMETERS[setting]
    assert "Total params: " in str(executed(setting).notebook)  # model.summary() shows them


@pytest.mark.parametrize("setting", ["a1", "a2", "b", "c"])
def test_activations_rates_and_kernels_are_the_originals_too(setting, executed, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    model = import_module("original").MODELS[setting]()
    assert executed(setting).record.architecture.digest == architecture_digest(model)


@pytest.mark.parametrize("name", ORIGINAL_NOTEBOOKS)
def test_training_is_the_originals(name):
    source = "\n".join(c.source for c in code_cells(nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)))
    for text in (
        "epochs: int = 10\nbatch_size: int = 256\n",
        'keras.optimizers.Adam(), "categorical_crossentropy", metrics=["accuracy"]',
        "validation_data=test_batches",
    ):
        assert text in source


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_record_is_what_the_notebook_printed(setting, executed):
    record, text = executed(setting).record, output_text(executed(setting).notebook)
    assert record.model == SETTINGS[setting].model
    assert f"Test loss: {record.test_loss:.4f}\n" in text
    assert f"Test accuracy: {record.test_accuracy:.4f}\n" in text
    for name, values in record.history.model_dump().items():
        printed = re.findall(rf"^Epoch.*?\b{name} ([\d.]+)", text, re.MULTILINE)
        assert printed == [f"{value:.4f}" for value in values]
    assert "600 train samples\n200 test samples\n(600,)\n[" in text
    run = record.run.model_dump()
    assert {name: run[name] for name in SMALL} == SMALL
    for name in OWN:
        assert run.get(name) == SETTINGS[setting].own.get(name)


@pytest.mark.parametrize("setting", PARAMETERS)
def test_the_test_set_is_the_originals_validation_set(setting, executed):
    record = executed(setting).record
    assert (record.test_loss, record.test_accuracy) == (
        pytest.approx(record.history.val_loss[-1], rel=1e-4),
        pytest.approx(record.history.val_accuracy[-1]),
    )
    assert record.evaluation_seconds == 0


@pytest.mark.parametrize(
    ("setting", "changed"), [*((s, {}) for s in SETTINGS), ("a2", {"precision": "mixed_bfloat16"})]
)
def test_the_saved_model_gives_the_recorded_predictions(setting, changed, executed, small_arrays):
    run = executed(setting, **changed)
    model, arrays = load_model(run.folder), read_predictions(run.folder)
    images = prepare_images(small_arrays["x_test"])
    # E looks five times: as it is, and moved towards each corner.
    corners = [(-1, -1), (-1, 1), (1, -1), (1, 1)] if setting == "e" else []
    looks = [np.roll(images, look, axis=(1, 2)) for look in [(0, 0), *corners]]
    probabilities = np.mean([model.predict(look, verbose=0) for look in looks], axis=0)
    np.testing.assert_array_equal(probabilities.argmax(axis=1), arrays["predicted"])
    np.testing.assert_array_equal(arrays["labels"], small_arrays["y_test"])
    accuracy = (arrays["predicted"] == arrays["labels"]).mean()
    assert accuracy == pytest.approx(run.record.test_accuracy, abs=1e-6)
    tolerance = 2e-2 if changed else 1e-3
    np.testing.assert_allclose(probabilities, arrays["probabilities"], atol=tolerance)
    assert not getattr(model, "optimizer", None)  # its state is not kept


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_loss_plot_leaves_one_image_and_one_line_an_epoch(setting, executed):
    (cell,) = [c for c in code_cells(executed(setting).notebook) if "model.fit(" in c.source]
    images = [o for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(images) == 1
    text = "".join(o.text for o in cell.outputs if o.output_type == "stream")
    assert EPOCH_LINE.findall(text)[0][0] == "1"
    assert len(EPOCH_LINE.findall(text)) == len(text.splitlines()) == 2
    # What was the progress bar has become the total time.
    (bar,) = [o.data["text/plain"] for o in cell.outputs if "data" in o and o is not images[0]]
    assert re.fullmatch(r"2 epochs in [\d.]+ s\.", bar)


@pytest.mark.parametrize("setting", SETTINGS)
def test_nothing_is_written_to_standard_error(setting, executed):
    outputs = [o for c in code_cells(executed(setting).notebook) for o in c.outputs]
    assert [o for o in outputs if o.get("name") == "stderr" or o.output_type == "error"] == []


def test_another_seed_gives_other_numbers(executed):
    first, other = executed("a2").record, executed("a2", seed=4).record
    assert first.history != other.history
    assert first.predictions.sha256 != other.predictions.sha256


def test_bfloat16_trains_and_gives_float32_probabilities(executed):
    first = executed("a2").record
    other = executed("a2", precision="mixed_bfloat16").record
    assert other.run.precision == "mixed_bfloat16"
    assert other.architecture == first.architecture
    assert other.history.loss != first.history.loss
    assert other.history.loss == pytest.approx(first.history.loss, rel=0.1)


def run_cells(name: str, *ids: str, **variables):
    """Execute code cells of a notebook, by their ids, and return the variables they leave."""
    sources = {cell.id: cell.source for cell in nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells}
    main = ModuleType("__main__")  # as in a kernel
    vars(main).update(variables)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "__main__", main)
        for cell in ids:
            exec(sources[cell], vars(main))
    return vars(main)


def test_the_helper_prepares_the_data_as_a1_does_step_by_step(small_mnist, tmp_path, capsys):
    given = SMALL | {"dataset": str(small_mnist), "train_samples": 100, "precision": "float32"}
    given |= {"results_dir": str(tmp_path), "keep_model": True}
    cells = run_cells("1_model_a1", "check", "load", "scale", "one-hot", **given)
    shown = capsys.readouterr().out
    (x_train, y_train), (x_test, y_test) = prepare_data(check_parameters("a1", given))
    printed = capsys.readouterr().out
    assert printed in shown
    assert len(printed.splitlines()) >= 7
    for name, array in {"x_train": x_train, "y_train": y_train, "x_test": x_test}.items():
        np.testing.assert_array_equal(cells[name], array)
        assert cells[name].dtype == array.dtype
    np.testing.assert_array_equal(cells["y_test"], y_test)


def test_what_is_run_twice_gives_the_same_numbers_or_is_not_saved(small_mnist, tmp_path):
    given = SMALL | {"dataset": str(small_mnist), "train_samples": 100, "precision": "float32"}
    given |= {"results_dir": str(tmp_path), "keep_model": False}
    cells = run_cells("2_model_a2", "data", "model", "training", "evaluation", **given)
    first = cells["score"]
    # The model's cell once more than needed, as happens: the same again.
    again = run_cells("2_model_a2", "model", "model", "training", "evaluation", **cells)
    assert again["score"] == first
    rest = "training", "evaluation", "confusion", "save"
    trained = run_cells("2_model_a2", "data", "model", *rest[:3], **again)
    for skipped, given in (
        (("model",), {}),  # trained on, or from another seed's first weights
        (("model",), {"seed": 4}),
        (("evaluation",), {}),
        (("confusion",), {}),
    ):
        cells = trained
        wanted = [cell for cell in ("data", "model", *rest) if cell not in skipped]
        if given:
            cells = run_cells("2_model_a2", "model", **cells)
        with pytest.raises(InputError, match="not saved"):
            run_cells("2_model_a2", *wanted, **cells | given)
    assert load_runs(tmp_path)[0].empty
    run_cells("2_model_a2", "data", "model", *rest, **cells)
    assert len(load_runs(tmp_path)[0]) == 1


def test_the_readers_keras_settings_change_no_number(executed, small_mnist, tmp_path):
    # channels_first builds another A.2, float16 and another epsilon give other numbers.
    (tmp_path / "keras.json").write_text(
        '{"image_data_format": "channels_first", "floatx": "float16", "epsilon": 0.01, '
        '"backend": "jax"}'
    )
    parameters = SMALL | {"dataset": small_mnist, "results_dir": tmp_path / "runs"}
    given = [text for item in parameters.items() for text in ("-p", *map(str, item))]
    given += [NOTEBOOKS / "2_model_a2.ipynb", tmp_path / "out.ipynb", "--no-progress-bar"]
    environment = os.environ | {"KERAS_HOME": str(tmp_path), "KERAS_BACKEND": "jax"}
    done = run_python("-m", "papermill", *given, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = load_runs(tmp_path / "runs")[0].itertuples()
    expected = executed("a2").record
    assert (run.parameters, run.test_loss) == (61_882, expected.test_loss)


@pytest.mark.parametrize("name", MODEL_NOTEBOOKS)
def test_papermill_knows_the_type_of_every_parameter(name):
    parameters = papermill.inspect_notebook(NOTEBOOKS / f"{name}.ipynb")
    assert len(parameters) >= 8
    assert "None" not in {parameter["inferred_type_name"] for parameter in parameters.values()}


@pytest.mark.parametrize("name", ["5_model_d", "6_model_e"])
def test_d_and_e_read_the_test_set_at_the_end_alone(name):
    cells = code_cells(nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4))
    order = [cell.id for cell in cells]
    for cell in cells:
        if "x_test" in cell.source or "y_test" in cell.source:
            assert cell.id == "data" or order.index(cell.id) > order.index("training")
    training = next(cell.source for cell in cells if cell.id == "training")
    assert "validation_data=validation_batches" in training


def test_e_distorts_its_images_anew_in_every_epoch_and_alike_for_the_same_seed():
    x = prepare_images(load_mnist("mnist-small")[0][0][:64])
    given = {"x_train": x, "y_train": np.eye(10)[[0] * 64], "batch_size": 64, "seed": 3}
    given |= {"keras": keras, "make_batches": make_batches}

    def two_epochs():
        batches = run_cells("6_model_e", "augment", **given)["make_train_batches"]()
        # Sorted, so that the order of the images does not count.
        return [np.sort(next(iter(batches))[0].numpy(), axis=0) for _ in range(2)]

    first, again = two_epochs(), two_epochs()
    assert (first[0] == again[0]).all()
    assert (first[0] != first[1]).any()
    assert first[0].shape == x.shape
    assert 0.8 < first[0].sum() / x.sum() < 1.2  # the ink is stretched, and none is lost


@pytest.mark.parametrize("shape", [(25, 32), (288, 64), (40, 40)])
def test_the_orthogonal_matrix_has_singular_values_of_about_one(shape):
    matrix = np.random.default_rng(0).normal(size=shape).astype("float32")
    result = orthogonal(tf.constant(matrix)).numpy()
    values = np.linalg.svd(result, compute_uv=False)
    assert np.quantile(values, 0.1) > 0.5 and values.max() < 1.3
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    assert np.sum(result * (left @ right)) / min(shape) > 0.7  # in the same directions


def test_muon_turns_kernels_alone_and_leaves_the_rest_to_adamw():
    gradients = [np.random.default_rng(0).normal(size=s) for s in ((3, 3, 4, 8), (20, 10), (8,))]
    moved = []
    for optimizer in (Muon(0.01, weight_decay=0.1), keras.optimizers.AdamW(0.01, weight_decay=0.1)):
        variables = [keras.Variable(np.ones(g.shape, "float32")) for g in gradients]
        for _ in range(2):
            optimizer.apply([tf.constant(g, tf.float32) for g in gradients], variables)
        moved.append([variable.numpy() for variable in variables])
    kernel, *others = moved[0]
    assert all((a == b).all() for a, b in zip(others, moved[1][1:], strict=True))
    step = (kernel - (1 - 0.01 * 0.1) ** 2).reshape(36, 8)
    values = np.linalg.svd(step, compute_uv=False)
    assert values.max() < 1.3 * 2 * 0.01 * 0.2 * 6
    assert values.min() > 0.5 * 2 * 0.01 * 0.2 * 6
