"""The dynamic loss plot: one figure, redrawn in place while ``fit`` trains."""

import sys
import time
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import numpy as np
from IPython import get_ipython
from IPython.display import DisplayHandle, display

from mnist_utils.parameters import InputError
from mnist_utils.plotting import RED, Figure, format_seconds, own_style, plt_dynamic, show
from mnist_utils.training import keras, tf  # imported there without what they would print

BAR_SECONDS = 0.25  # between two redraws of the progress bar
# Between two redraws of the plot: seconds, and times what the last took, so at most 5 % of training
LEAST_REST, REST = 1.0, 20
ALT = "Loss, and error in per cent, of training and validation, by epoch"
ERROR_TICKS = [digit * 10.0**power for power in range(-4, 2) for digit in (1, 2, 5)] + [100.0]
_trained: WeakSet = WeakSet()  # models; compiling one again sets its optimizer's count back to 0


class DynamicLossPlot(keras.callbacks.Callback):
    """A Keras callback that draws loss and error while ``fit`` trains; use ``verbose=0``.

    One image is redrawn in place, with a thin line for the running loss of the epoch under way; a
    bar moves below it, and each epoch prints a line. A script has a window where there is a
    display. Afterwards ``history`` holds loss, accuracy, val_loss and val_accuracy, a value an
    epoch, None where not validated; ``seconds_per_epoch`` leaves drawing out; ``fresh`` says
    whether the model had not been trained before, ``ended`` whether ``fit`` came to its end;
    ``figure`` can be saved. Raises InputError for a model without the metric "accuracy".
    """

    def on_train_begin(self, logs: dict | None = None) -> None:
        metrics = getattr(self.model._compile_metrics, "_user_metrics", None)
        if "accuracy" not in [getattr(m, "name", m) for m in keras.tree.flatten(metrics)]:
            raise InputError('The loss plot needs metrics=["accuracy"] in model.compile.')
        self.fresh = self.model not in _trained and int(self.model.optimizer.iterations) == 0
        self.ended = False
        if not self.fresh:
            print(
                "This model was trained before, so what follows is not what the seed gives, and "
                "will not be saved. To start anew, run the model's cell first."
            )
        # What save_run must know to refuse numbers that are not those of the seed: the seed set
        # last, and an older training's evaluation, where a notebook has one.
        self.seed = tf.compat.v1.get_seed(1)[0]
        main = vars(sys.modules["__main__"])
        self.outdated = [main.get(name) for name in ("score", "probabilities")]
        self.epochs, self.steps = self.params["epochs"], self.params["steps"]
        names = "loss", "accuracy", "val_loss", "val_accuracy"
        self.history: dict[str, list[float | None]] = {name: [] for name in names}
        self.seconds_per_epoch: list[float] = []
        self._first, self._redrawing = 0, 0.0
        self._running: list[tuple[float, float]] = []
        self._image: DisplayHandle | None = None
        self._bar: DisplayHandle | None = None
        self._bar_drawn = 0.0
        self._make_figure()
        self._redraw()
        self._rest_until = time.perf_counter() + LEAST_REST  # the first redraw takes longer
        self._show_bar("Training starts.")

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        if not self.seconds_per_epoch:
            self._first = epoch
        self._epoch, self._done, self._redrawing = epoch, 0, 0.0
        self._epoch_began = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict) -> None:
        _trained.add(self.model)
        self._done = batch + 1
        if self.steps:
            share = min(1.0, self._done / self.steps)
            self._running.append((self._epoch + share, logs["loss"]))
            self._progress(share, f"{share:4.0%}")
        else:  # as in the first epoch over a generator
            self._progress(0, f"step {self._done}")
        if time.perf_counter() >= self._rest_until:
            self._redraw()

    def on_test_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._progress(1, f"validating, step {batch + 1}", at_once=batch == 0)

    def on_epoch_end(self, epoch: int, logs: dict) -> None:
        self.seconds_per_epoch.append(time.perf_counter() - self._epoch_began - self._redrawing)
        self.steps = self.steps or self._done
        for name, values in self.history.items():
            values.append(logs.get(name))
        self._running = []
        if time.perf_counter() >= self._rest_until:
            self._redraw()
        line = self._epoch_line()
        print(f"\r{line:<79}" if self._on_terminal else line, flush=True)

    def on_train_end(self, logs: dict | None = None) -> None:
        self.ended = True
        self._redraw(ended=True)
        trained, asked = len(self.seconds_per_epoch), self.epochs - self._first
        count = f"{trained}{f' of {asked}' if trained < asked else ''} epoch{'s' * (asked != 1)}"
        self._show_bar(f"{count} in {format_seconds(sum(self.seconds_per_epoch))}.", end="\n")

    def _make_figure(self) -> None:
        options: dict[str, Any] = {"figsize": (9, 3.4), "layout": "constrained"}
        self.figure, self._window = Figure(**options), None
        self._in_notebook = hasattr(get_ipython(), "kernel")
        self._on_terminal = not self._in_notebook and sys.stdout.isatty()
        # MPLBACKEND may name a toolkit that is not there.
        with own_style(), suppress(ImportError):
            if not self._in_notebook:
                from matplotlib import pyplot

                window = pyplot.figure(**options)
                if window.canvas.required_interactive_framework:
                    self.figure, self._window = window, pyplot
                else:
                    pyplot.close(window)
        with own_style():
            self._axes = self.figure.subplots(1, 2)

    def _redraw(self, ended: bool = False) -> None:
        began = time.perf_counter()
        with own_style():
            self._draw(ended)
            self._image = show(self.figure, ALT, self._image)
            if self._window:
                self._window.pause(0.001)  # lets it redraw itself
            elif ended:  # what is made at the first drawing is made here, in our style
                self.figure.draw_without_rendering()
        now = time.perf_counter()
        self._redrawing += now - began
        self._rest_until = now + max(LEAST_REST, REST * (now - began))

    def _draw(self, ended: bool) -> None:
        loss, accuracy, val_loss, val_accuracy = self.history.values()
        last = self._first + len(loss)
        epochs, (left, right) = range(self._first + 1, last + 1), self._axes
        plt_dynamic(epochs, val_loss, loss, left)
        if self._running:
            left.plot(*zip(*self._running, strict=True), color=RED, linewidth=1)
        left.set_ylim(0, None if loss or self._running else 2.5)
        val_error, error = (  # an error of 0 has no place on a logarithmic axis
            [100 * (1 - value) if value is not None and value < 1 else None for value in values]
            for values in (val_accuracy, accuracy)
        )
        plt_dynamic(epochs, val_error, error, right, "Error")
        right.set(yscale="log", ylabel="Error (%)", yticks=ERROR_TICKS)
        right.set_yticks((), minor=True)
        right.yaxis.set_major_formatter("{x:g}")
        seen = np.clip([value for value in val_error + error if value] or [1, 99], 0.001, 99)
        bottom = max(tick for tick in ERROR_TICKS if tick < 0.99 * seen.min())
        right.set_ylim(bottom, min(tick for tick in ERROR_TICKS if tick > 1.01 * seen.max()))
        begin, end = (self._first + 1, last) if ended else (self._first, self.epochs)
        margin = 0.03 * (end - begin) or 0.5
        for ax in self._axes:
            ax.set_xlim(begin - margin, end + margin)

    def _epoch_line(self) -> str:
        epoch, seconds = self._epoch + 1, self.seconds_per_epoch
        line = f"Epoch {epoch:{len(str(self.epochs))}}/{self.epochs}: "
        for name, values in self.history.items():
            line += "" if values[-1] is None else f"{name} {values[-1]:.4f}, "
        line += format_seconds(seconds[-1])
        if left := self.epochs - epoch:
            line += f", {format_seconds(sum(seconds) / len(seconds) * left)} left"
        return line

    def _progress(self, share: float, doing: str, at_once: bool = False) -> None:
        if at_once or time.perf_counter() - self._bar_drawn >= BAR_SECONDS:
            self._bar_drawn = time.perf_counter()
            bar = f"{'=' * int(30 * share):.<30}"
            self._show_bar(f"Epoch {self._epoch + 1}/{self.epochs} [{bar}] {doing}")

    def _show_bar(self, text: str, end: str = "") -> None:
        if self._on_terminal:
            print(f"\r{text:<79}", end=end, flush=True)
        elif self._in_notebook and self._bar:
            self._bar.update({"text/plain": text}, raw=True)
        elif self._in_notebook:
            self._bar = display({"text/plain": text}, raw=True, display_id=True)
