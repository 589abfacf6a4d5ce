"""The dynamic loss plot: one figure, redrawn in place after every epoch of ``fit``."""

import sys
import time

import matplotlib.pyplot as plt
from IPython import get_ipython
from IPython.display import display

from mnist_utils.plotting import STYLE, format_seconds, plt_dynamic, show
from mnist_utils.training import keras  # imported there without its log

BAR_SECONDS = 0.25  # between two redraws of the progress bar
BAR_WIDTH = 30
ALT = "Loss and accuracy, training and validation, by epoch"


class DynamicLossPlot(keras.callbacks.Callback):
    """A Keras callback that draws loss and accuracy while ``fit`` trains; use ``verbose=0``.

    In a notebook one image is redrawn in place, a progress bar moves below it, and each epoch
    adds one line. When training ends the bar turns into one line with the total time. In a
    plain script the lines are printed, the bar moves on a terminal, and a window is updated
    where there is a display; ``figure`` is there to be saved.

    Needs ``validation_data`` and the metric "accuracy". After training ``seconds_per_epoch``
    holds each epoch's training and validation time in seconds, drawing left out.
    """

    def on_train_begin(self, logs=None):
        self.epochs, self.steps = self.params["epochs"], self.params["steps"]
        self.seconds_per_epoch = []
        self.history = {"loss": [], "accuracy": [], "val_loss": [], "val_accuracy": []}
        self._in_notebook = hasattr(get_ipython(), "kernel")
        with plt.rc_context(STYLE):
            self.figure, self._axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        self._draw()
        if self._in_notebook:
            plt.close(self.figure)  # or it would show a second time, below the cell
            self._image = show(self.figure, ALT)
            self._bar = display({"text/plain": "Training starts."}, raw=True, display_id=True)
        self._bar_drawn = 0.0

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch, self._epoch_began = epoch, time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        done = batch + 1
        now = time.perf_counter()
        if now - self._bar_drawn < BAR_SECONDS and done != self.steps:
            return
        self._bar_drawn = now
        filled = BAR_WIDTH * done // self.steps
        bar = "=" * filled + "." * (BAR_WIDTH - filled)
        doing = "validating" if done == self.steps else f"{done / self.steps:4.0%}"
        self._show_bar(f"Epoch {self._epoch + 1}/{self.epochs} [{bar}] {doing}")

    def on_epoch_end(self, epoch, logs=None):
        self.seconds_per_epoch.append(time.perf_counter() - self._epoch_began)
        for name, values in self.history.items():
            values.append(logs[name])
        self._draw()
        if self._in_notebook:
            show(self.figure, ALT, self._image)
        elif self.figure.canvas.required_interactive_framework:
            plt.pause(0.001)  # lets the window, where there is one, redraw itself
        self._clear_terminal_bar()
        print(self._epoch_line(), flush=True)

    def on_train_end(self, logs=None):
        total = format_seconds(sum(self.seconds_per_epoch))
        count = len(self.seconds_per_epoch)
        self._show_bar(f"{count} epoch{'s' if count > 1 else ''} in {total}.")
        if not self._in_notebook and sys.stdout.isatty():
            print()

    def _draw(self):
        history, epochs = self.history, list(range(1, len(self.seconds_per_epoch) + 1))
        with plt.rc_context(STYLE):
            for ax, key in zip(self._axes, ("loss", "accuracy"), strict=True):
                plt_dynamic(
                    epochs, history[f"val_{key}"], history[key], ax, self.epochs, key.title()
                )

    def _epoch_line(self):
        epoch, seconds = len(self.seconds_per_epoch), self.seconds_per_epoch
        line = f"Epoch {epoch:{len(str(self.epochs))}}/{self.epochs}: "
        line += ", ".join(f"{name} {values[-1]:.4f}" for name, values in self.history.items())
        line += f", {format_seconds(seconds[-1])}"
        left = self.epochs - epoch
        if left:
            line += f", {format_seconds(sum(seconds) / epoch * left)} left"
        return line

    def _show_bar(self, text):
        if self._in_notebook:
            self._bar.update({"text/plain": text}, raw=True)
        elif sys.stdout.isatty():
            print(f"\r{text:<79}", end="", flush=True)

    def _clear_terminal_bar(self):
        if not self._in_notebook and sys.stdout.isatty():
            print("\r" + " " * 79 + "\r", end="")
