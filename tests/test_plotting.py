"""The figures show what they should, and the loss plot lives through what users do to fit."""

import inspect
import os
import re
from types import SimpleNamespace

import nbclient
import nbformat
import numpy as np
import pytest
from conftest import ROOT, run_python

from mnist_utils import loss_plot, plotting
from mnist_utils.loss_plot import DynamicLossPlot, keras
from mnist_utils.parameters import InputError
from mnist_utils.plotting import format_seconds, show_confusion, show_mistakes
from mnist_utils.training import tf

# Each image is of its own number, so that it can be told apart.
IMAGES = np.arange(20.0)[:, None, None] * np.ones((28, 28))
TINY = """
import numpy as np
from mnist_utils.loss_plot import DynamicLossPlot, keras
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, "softmax")])
model.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
x, y = np.random.default_rng(0).normal(size=(80, 2)), np.eye(2)[[0, 1] * 40]
"""
ALL = "loss accuracy val_loss val_accuracy"
EARLY = keras.callbacks.EarlyStopping(min_delta=9, patience=1)  # stops after two epochs


@pytest.fixture
def shown(monkeypatch):
    """What is shown, a figure and its text at a time, to be looked at instead."""
    figures = []
    monkeypatch.setattr(plotting, "show", lambda fig, alt: figures.append((fig, alt)))
    return figures


def test_the_matrix_has_a_row_a_true_class_and_colours_only_the_errors(shown):
    show_confusion(np.eye(10)[[4, 4, 9]], np.eye(10)[[4, 9, 9]])
    ((fig, alt),) = shown
    ax = fig.axes[0]
    assert alt == "Confusion matrix: 1 errors in 3 test images"
    assert {(t.get_position(), t.get_text(), t.get_color()) for t in ax.texts} == {
        ((4, 4), "1", plotting.GREY),
        ((9, 4), "1", "white"),  # x is the guess, y the truth
        ((9, 9), "1", plotting.GREY),
    }
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted class", "true class")
    with pytest.raises(InputError, match=r"\(n, 10\), not \(3,\) and \(3, 10\)"):
        show_confusion(np.array([4, 4, 9]), np.eye(10)[[4, 9, 9]])


def test_the_surest_mistakes_are_shown_with_truth_guess_and_confidence(shown, capsys):
    y_test = np.eye(10)[np.zeros(20, int)]
    probabilities = y_test.copy()  # all are right, but for twelve that are surer and surer of a 7
    for sure, image in enumerate(range(5, 17)):
        probabilities[image] = (0.8 + sure / 100) * np.eye(10)[7]
    show_mistakes(IMAGES[..., None], y_test, probabilities)
    ((fig, alt),) = shown
    drawn = [(ax.get_images()[0].get_array()[0, 0], ax.get_title()) for ax in fig.axes]
    assert drawn == [(image, f"is 0\nguess 7\n{75 + image}.00%") for image in range(16, 6, -1)]
    assert alt.startswith("The most confident mistakes: is 0, guess 7, 91.00%; ")
    show_mistakes(IMAGES, y_test, y_test)
    assert capsys.readouterr().out.startswith("No mistakes: every test image")


def test_times_are_said_in_words():
    times = {4.24: "4.2 s", 9.96: "10 s", 37.4: "37 s", 59.6: "1 min 0 s", 333: "5 min 33 s"}
    assert {seconds: format_seconds(seconds) for seconds in times} == times
    assert format_seconds(7500) == "2 h 5 min"


def tiny_model(metrics=("accuracy",)):
    """Return a model that learns nothing of worth, and data of ten batches of eight."""
    names = {}
    exec(TINY.replace('["accuracy"]', "metrics"), {"metrics": metrics and list(metrics)}, names)
    return names["model"], (names["x"], names["y"])


def fit(model, data, *callbacks, **options):
    plot = DynamicLossPlot()
    options = {"epochs": 3, "batch_size": 8, "validation_data": data} | options
    model.fit(*data, callbacks=[*callbacks, plot], verbose=0, **options)
    return plot


def test_the_figure_is_the_originals_plot_and_the_error():
    plot = fit(*tiny_model([keras.metrics.CategoricalAccuracy(name="accuracy")]))
    (loss, error), history = plot.figure.axes, plot.model.history.history
    for ax, key, name in ((loss, "loss", "Loss"), (error, "accuracy", "Error")):
        lines = ax.get_lines()
        assert [line.get_label() for line in lines] == [f"Validation {name}", f"Train {name}"]
        assert [line.get_color() for line in lines] == ["tab:blue", "tab:red"]
        for line, values in zip(lines, (history[f"val_{key}"], history[key]), strict=True):
            drawn = line.get_ydata() if key == "loss" else 1 - line.get_ydata() / 100
            assert list(drawn) == pytest.approx(values)
        assert (ax.get_xlabel(), *ax.get_xlim()) == ("epoch", 0.94, 3.06)
    assert (loss.get_ylabel(), loss.get_yscale()) == ("Categorical Crossentropy Loss", "linear")
    assert (error.get_ylabel(), error.get_yscale()) == ("Error (%)", "log")
    assert {"20", "50", "100"} & {tick.get_text() for tick in error.get_yticklabels()}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("error", [100, 1, 1e-5, 0, np.nan])
def test_any_error_can_be_drawn(error):
    plot = DynamicLossPlot()
    plot.set_model(tiny_model()[0])
    plot.set_params({"epochs": 1, "steps": 1})
    plot.on_train_begin()
    plot.on_epoch_begin(0)
    plot.on_epoch_end(0, {"loss": np.nan, "accuracy": 1 - error / 100})
    plot.on_train_end()
    bottom, top = plot.figure.axes[1].get_ylim()
    assert 0 < bottom < top <= 100
    assert error != 1 or bottom < error < top


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ({"validation_data": None, "epochs": 1}, ["1/1 loss accuracy"]),
        ({"validation_freq": 2}, ["1/3 loss accuracy", f"2/3 {ALL}", "3/3 loss accuracy"]),
        ({"callbacks": EARLY, "epochs": 12}, [f" 1/12 {ALL}", f" 2/12 {ALL}"]),
        ({"initial_epoch": 8, "epochs": 10}, [f" 9/10 {ALL}", f"10/10 {ALL}"]),
        ({"initial_epoch": 5, "epochs": 2}, []),
    ],
)
def test_the_epochs_lines_and_history_tell_what_was_trained(options, lines, capsys):
    early = [options.pop("callbacks")] if "callbacks" in options else []
    plot = fit(*tiny_model(), *early, **options)
    printed = capsys.readouterr().out.splitlines()
    assert all(re.search(r", \d[\d.]* (s|min|h)[\w. ,]*$", line) for line in printed)
    values = [dict(re.findall(r"(\w+) (\d\.\d{4}),", line)) for line in printed]
    epochs = [line.removeprefix("Epoch ").split(":")[0] for line in printed]
    told = [f"{epoch} {' '.join(found)}" for epoch, found in zip(epochs, values, strict=True)]
    assert told == lines
    for name, recorded in plot.history.items():
        expected = [found.get(name) for found in values]
        assert [None if value is None else f"{value:.4f}" for value in recorded] == expected
    assert len(plot.seconds_per_epoch) == len(lines)
    assert (plot.fresh, plot.steps, plot.epochs) == (True, 10, options.get("epochs", 3))


def test_the_bar_tells_the_steps_where_their_number_is_not_known(monkeypatch):
    bars = []
    monkeypatch.setattr(DynamicLossPlot, "_show_bar", lambda self, text, end="": bars.append(text))
    monkeypatch.setattr(loss_plot, "BAR_SECONDS", 0)
    model, (x, y) = tiny_model()
    whole = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    data = whole.filter(lambda x, y: True)  # of a length that nobody can know
    plot = fit(model, (data,), batch_size=None, validation_data=whole, shuffle=False, epochs=2)
    assert bars[:2] == ["Training starts.", f"Epoch 1/2 [{'.' * 30}] step 1"]
    assert f"Epoch 2/2 [{'=' * 15}{'.' * 15}]  50%" in bars
    assert f"Epoch 2/2 [{'=' * 30}] validating, step 1" in bars
    assert re.fullmatch(r"2 epochs in [\w. ]+\.", bars[-1])
    assert plot.steps == 10
    fit(model, (x, y), EARLY, epochs=9)
    assert bars[-1].startswith("2 of 9 epochs in ")


@pytest.mark.parametrize("metrics", [None, [], ["mse"]])
def test_a_model_without_accuracy_is_refused_before_it_is_trained(metrics):
    model, data = tiny_model(metrics)
    with pytest.raises(InputError, match=r'^The loss plot needs metrics=\["accuracy"\] in '):
        fit(model, data)
    assert model.optimizer.iterations == 0


def test_after_an_interruption_fit_draws_again():
    model, data = tiny_model()
    plot = DynamicLossPlot()

    def interrupt(batch, logs):
        if plot.seconds_per_epoch and batch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, data, plot, keras.callbacks.LambdaCallback(on_train_batch_end=interrupt))
    assert len(plot.history["loss"]) == 1
    model.fit(*data, epochs=4, validation_data=data, callbacks=[plot], verbose=0)
    assert [len(values) for values in plot.history.values()] == [4] * 4
    assert len(plot.figure.axes[0].get_lines()) == 2  # without the thin one


@pytest.mark.parametrize(("step", "drawing"), [(0.01, 0.2), (1.2, 0.3)])
def test_redrawing_takes_a_twentieth_of_the_training_and_none_of_the_recorded_time(
    step, drawing, monkeypatch
):
    clock, redraws = SimpleNamespace(now=0.0), []

    def draw(self, ended):
        clock.now += drawing
        redraws.append((clock.now, len(self._running), ended))

    def work(batch, logs):
        clock.now += step

    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(loss_plot, "time", clock)
    monkeypatch.setattr(DynamicLossPlot, "_draw", draw)
    working = keras.callbacks.LambdaCallback(on_train_batch_begin=work)
    plot = fit(*tiny_model(), working, epochs=6)
    assert plot.seconds_per_epoch == pytest.approx([10 * step] * 6)
    assert (len(redraws) - 2) * drawing <= 0.05 * 60 * step  # all but the first and the last
    assert [ended for *_, ended in redraws] == [False] * (len(redraws) - 1) + [True]
    if step > 1:  # as B on two cores: it moves at least every ten seconds, within the epoch
        assert np.diff([at for at, *_ in redraws]).max() < 10
        assert any(0 < running < 10 for _, running, _ in redraws)


def picture(path) -> bytes:
    with plotting.figure(size=(3, 2)) as (fig, ax):
        ax.plot([3, 4, 2], label="a line")
        ax.legend()
        assert plotting.show(fig, "not in a script") is None
        fig.savefig(path)
    return path.read_bytes()


def test_a_script_draws_the_same_whatever_the_readers_settings(tmp_path):
    (tmp_path / "matplotlibrc").write_text(
        "text.usetex: True\nfont.size: 30\nfigure.figsize: 2, 2\nfigure.dpi: 30\nno.such: 1\n"
        "savefig.bbox: tight\nsavefig.dpi: 50\naxes.prop_cycle: cycler('color', ['k'])\n"
    )
    (tmp_path / "script.py").write_text(
        f"{TINY}from pathlib import Path\nfrom mnist_utils import plotting\n"
        "plot = DynamicLossPlot()\n"
        "model.fit(x, y, epochs=2, validation_data=(x, y), callbacks=[plot], verbose=0)\n"
        f"plot.figure.savefig('plot.png')\n{inspect.getsource(picture)}picture(Path('line.png'))"
    )
    # A toolkit without a display, and a home folder that cannot be written, by root neither.
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": "/dev/null"}
    environment["MPLBACKEND"] = "TkAgg"
    done = run_python("script.py", cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line[:10] for line in done.stdout.splitlines()] == ["Epoch 1/2:", "Epoch 2/2:"]
    assert (tmp_path / "plot.png").stat().st_size > 5000
    assert (tmp_path / "line.png").read_bytes() == picture(tmp_path / "here.png")


class Watched(nbclient.NotebookClient):
    """Notes in order what a kernel sends: an image, its update, or an epoch's line."""

    def process_message(self, message, cell, cell_index):
        if "image/png" in message["content"].get("data", {}):
            self.seen.append(message["msg_type"])
        self.seen += re.findall(r"Epoch \d", message["content"].get("text", ""))
        return super().process_message(message, cell, cell_index)


def test_in_a_notebook_one_image_is_redrawn_within_the_epochs():
    cell = f"""{TINY}
import itertools, types
from mnist_utils import loss_plot
clock = itertools.count(step=2.0)  # every look at it takes two seconds
loss_plot.time, loss_plot.REST = types.SimpleNamespace(perf_counter=lambda: next(clock)), 0
plot, data = DynamicLossPlot(), (x, y)
model.fit(*data, epochs=2, batch_size=8, validation_data=data, callbacks=[plot], verbose=0)"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    client = Watched(notebook, resources={"metadata": {"path": str(ROOT)}})
    client.seen = []
    client.execute(env=os.environ | {"MPLBACKEND": "QtAgg"})
    first, second = client.seen.index("Epoch 1"), client.seen.index("Epoch 2")
    assert client.seen[0] == "display_data"
    assert client.seen[1:first] == ["update_display_data"] * (first - 1)
    assert first > 5
    assert second - first > 5
    outputs = notebook.cells[0].outputs
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    assert re.search(r"'2 epochs in [\w. ]+'", str(outputs))
