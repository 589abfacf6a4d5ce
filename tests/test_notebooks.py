"""Every model notebook, executed by papermill on real MNIST images with small parameters."""

import re
import subprocess

import matplotlib
import nbformat
import numpy as np
import pytest
from conftest import NOTEBOOKS, ORIGINAL_NOTEBOOKS, ROOT, SMALL, code_cells, output_text, python

from mnist_utils.parameters import OWN, SETTINGS
from mnist_utils.runs import architecture_digest, load_runs

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
ROW = re.compile(r"│ *\w+ \((\w+)\) *│ *(\([\w, ]+\)) *│ *([\d,]+) *│")
EPOCH_LINE = re.compile(
    r"^Epoch (\d)/2: loss [\d.]+, accuracy [\d.]+, val_loss [\d.]+, val_accuracy [\d.]+, "
    r"[\d.]+ s(, [\d.]+ s left)?$",
    re.MULTILINE,
)


def summary_layers(notebook):
    """Return what model.summary() printed, a row a layer: kind, output shape, parameters."""
    texts = [
        output.data["text/plain"]
        for cell in code_cells(notebook)
        for output in cell.outputs
        if "data" in output and "text/plain" in output.data
    ]
    plain = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(texts))
    # A long name is wrapped onto a second line of its cell.
    plain = re.sub(r" *│([^│\n]*)│([^│\n]*)│\n│ (\w+\)|\(\w+\)) *│ *│ *│", r" \3 │\1│\2│", plain)
    return [" ".join(row).replace(",", "").split() for row in ROW.findall(plain)]


@pytest.mark.parametrize("setting", PARAMETERS)
def test_the_model_is_the_originals_layer_by_layer(setting, executed):
    expected = [line.replace(",", "").split() for line in ORIGINAL_LAYERS[setting].split("\n")[1:]]
    assert summary_layers(executed(setting).notebook) == expected
    assert executed(setting).record.architecture.parameters == PARAMETERS[setting]


def original_model(setting: str):
    """Return a model built as the original's code builds it."""
    from keras import Input, Sequential
    from keras.layers import (
        BatchNormalization,
        Conv2D,
        Dense,
        Dropout,
        Flatten,
        MaxPooling2D,
    )

    def conv(filters, size, padding="same"):
        return Conv2D(filters, kernel_size=(size, size), activation="relu", padding=padding)

    def pool():
        return MaxPooling2D(pool_size=(2, 2))

    first = 7 if setting == "c7" else 2
    middle = {
        "a1": lambda: [
            *(conv(16, 3, "valid"), conv(32, 3, "valid"), conv(64, 3, "valid"), pool()),
            *(Flatten(), Dense(64, activation="relu")),
        ],
        "a2": lambda: [
            *(conv(32, 3), conv(16, 3, "valid"), pool(), Dropout(0.5)),
            *(conv(32, 3, "valid"), pool(), BatchNormalization(), Flatten()),
            *(Dense(64, activation="relu"), Dropout(0.5), BatchNormalization()),
        ],
        "b": lambda: [
            *(conv(32, 5), conv(128, 5), pool(), Dropout(0.25)),
            *(conv(64, 5), pool(), Dropout(0.25)),
            *(conv(64, 5), BatchNormalization(), conv(32, 5), pool(), Dropout(0.25)),
            *(Flatten(), Dense(128, activation="relu"), BatchNormalization(), Dropout(0.5)),
        ],
        "c": lambda: [
            *(conv(64, first), conv(128, 2), conv(64, 2), pool(), Dropout(0.25)),
            *(conv(64, 3), conv(32, 2), pool(), conv(32, 3), conv(32, 2), Dropout(0.25)),
            *(BatchNormalization(), Flatten(), Dense(64, activation="relu"), Dropout(0.5)),
        ],
    }[setting.rstrip("7")]()
    return Sequential([Input((28, 28, 1)), *middle, Dense(10, activation="softmax")])


@pytest.mark.parametrize("setting", PARAMETERS)
def test_activations_rates_and_kernels_are_the_originals_too(setting, executed):
    assert executed(setting).record.architecture.digest == architecture_digest(
        original_model(setting)
    )


@pytest.mark.parametrize("name", ORIGINAL_NOTEBOOKS)
def test_training_is_the_originals(name):
    source = "\n".join(c.source for c in code_cells(nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)))
    for text in (
        "epochs = 10\nbatch_size = 256\n",
        'loss="categorical_crossentropy"',
        "optimizer=keras.optimizers.Adam(),",
        "validation_data=test_batches",
    ):
        assert text in source


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_record_is_what_the_notebook_printed(setting, executed):
    record, text = executed(setting).record, output_text(executed(setting).notebook)
    assert f"Test loss: {record.test_loss:.4f}\n" in text
    assert f"Test accuracy: {record.test_accuracy:.4f}\n" in text
    for name, values in record.history.model_dump().items():
        printed = re.findall(rf"^Epoch.*?\b{name} ([\d.]+)", text, re.MULTILINE)
        assert printed == [f"{value:.4f}" for value in values]
    assert "600 train samples\n200 test samples\n" in text
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


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_predictions_give_the_recorded_accuracy(setting, executed, small_arrays):
    arrays = executed(setting).run.predictions()
    np.testing.assert_array_equal(arrays["labels"], small_arrays["y_test"])
    accuracy = (arrays["predicted"] == arrays["labels"]).mean()
    assert accuracy == pytest.approx(executed(setting).record.test_accuracy, abs=1e-6)
    np.testing.assert_allclose(arrays["probabilities"].sum(axis=1), 1, atol=0.01)


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


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_second_execution_prints_the_same_numbers(setting, executed, tmp_path):
    # nbval executes the notebook again and compares what each cell gives; in a copy, because the
    # notebook saves its run again.
    first = executed(setting)
    copy = tmp_path / "executed.ipynb"
    results = str(first.run.folder.parents[1])
    copy.write_text(first.path.read_text().replace(results, str(tmp_path / "runs")))
    done = subprocess.run(
        python(
            *("-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval"),
            *("--nbval-sanitize-with", ROOT / "tests/nbval_sanitize.cfg"),
            copy,
        ),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\d+ passed", done.stdout)
    assert len(load_runs(tmp_path / "runs")[0]) == 1


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


def test_the_notebooks_share_their_common_cells_to_the_letter():
    def common(name):
        cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells
        sources = [cell.source for cell in cells if cell.cell_type == "code"]
        return [s for s in sources if not re.search(r"check_param|Sequential|save_run|epochs =", s)]

    first, *others = map(common, ORIGINAL_NOTEBOOKS)
    for other in others:
        assert set(other) <= set(first)
        assert len(other) >= 9


def test_the_loss_plot_works_in_a_plain_script_without_a_display(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from mnist_utils.loss_plot import DynamicLossPlot\n"
        "import keras, numpy as np\n"
        "model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, 'softmax')])\n"
        "model.compile('adam', 'categorical_crossentropy', metrics=['accuracy'])\n"
        "x, y = np.zeros((8, 2)), np.eye(2)[[0, 1] * 4]\n"
        "seen = []\n"
        "class Plot(DynamicLossPlot):\n"
        "    def on_epoch_begin(self, epoch, logs=None):\n"
        "        seen.append(self.figure.axes[0].get_xlim())\n"
        "        super().on_epoch_begin(epoch, logs)\n"
        "plot = Plot()\n"
        "model.fit(x, y, epochs=2, validation_data=(x, y), callbacks=[plot], verbose=0)\n"
        "loss, accuracy = plot.figure.axes\n"
        "assert seen[0] == (1, 2)\n"
        "assert loss.get_xlim() == accuracy.get_xlim() == (1, 2)\n"
        "assert (loss.get_xlabel(), loss.get_ylabel()) == "
        "('epoch', 'Categorical Crossentropy Loss')\n"
        "validation, train = loss.get_lines()\n"
        "labels = validation.get_label(), train.get_label()\n"
        "assert labels == ('Validation Loss', 'Train Loss')\n"
        "assert list(validation.get_ydata()) == model.history.history['val_loss']\n"
        "assert list(train.get_ydata()) == model.history.history['loss']\n"
        "assert validation.get_color() == 'tab:blue' and train.get_color() == 'tab:red'\n"
        "plot.figure.savefig('plot.png')\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    environment["MPLCONFIGDIR"] = matplotlib.get_cachedir()  # or it may say that it looks for fonts
    done = subprocess.run(
        python(script), cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(EPOCH_LINE.findall(done.stdout)) == len(done.stdout.splitlines()) == 2
    assert (tmp_path / "plot.png").stat().st_size > 5000
