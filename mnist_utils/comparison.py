"""Tables and figures over the records of runs; nothing here needs TensorFlow."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from prettytable import PrettyTable

from mnist_utils.parameters import SETTINGS
from mnist_utils.plotting import GREY, figure, show, show_digits
from mnist_utils.runs import Run

# What the original notebook reports: test loss, test accuracy, seconds an epoch on its machine.
# Its run of C had a first layer of 7x7, so that of 2x2 has no figures.
ORIGINAL = {
    "a1": (0.0433, 0.9894, 137),
    "a2": (0.0512, 0.9853, 108),
    "b": (0.0154, 0.9951, 1004),
    "c7": (0.0361, 0.9907, 650),
}
REFERENCE = {
    "epochs": 10,
    "batch_size": 256,
    "seed": 0,
    "train_samples": None,
    "dataset": "mnist",
    "precision": "float32",
}
# The fastest public notebook known to us, github.com/tuomaso/train_mnist_fast: the mean test
# accuracy of three runs of its last network, and the seconds they took on two cores.
TRAIN_MNIST_FAST = (9.5, 0.9912)
NOT_RUN = "not run yet"


def reference_folder() -> Path:
    """Return the folder of the committed reference runs: the package's, else the checkout's."""
    package = Path(__file__).parent
    installed = package / "results"
    return installed if installed.is_dir() else package.parent / "results"


def setting_of(run: Run) -> str | None:
    """Return the setting that a run belongs to, such as "a1" or "c7"; None for any other."""
    parameters = run.record.run.model_dump()
    for key, setting in SETTINGS.items():
        own = setting.own.items()
        if setting.model == run.record.model and all(parameters.get(k) == v for k, v in own):
            return key
    return None


def reference_parameters(setting: str) -> dict:
    """Return the parameters of a setting's reference run, without the model's own."""
    return REFERENCE | {"epochs": SETTINGS[setting].epochs}


def reference_runs(runs: Iterable[Run]) -> dict[str, Run]:
    """Return, in the order of SETTINGS, the run of each with the parameters of the reference.

    Of several the last counts: a reader's own run, put first, stands in where there is no other.
    """
    found = {}
    for run in runs:
        parameters = run.record.run.model_dump()
        setting = setting_of(run)
        if setting and all(parameters[k] == v for k, v in reference_parameters(setting).items()):
            found[setting] = run
    return {setting: found[setting] for setting in SETTINGS if setting in found}


def kernel_text(sizes: list[list[int]]) -> str:
    """Return kernel sizes in the original's words: "3X3 for 4th and 6th layer 2X2 for rest"."""
    names = [f"{height}X{width}" for height, width in sizes]
    if not names:
        return "-"
    if len(set(names)) == 1:
        return f"{names[0]} for all"
    rest = Counter(names).most_common(1)[0][0]
    parts = []
    for name in dict.fromkeys(names):
        if name != rest:
            places = [_ordinal(i) for i, other in enumerate(names, 1) if other == name]
            parts.append(f"{name} for {' and '.join(places)} layer")
    return " ".join([*parts, f"{rest} for rest"])


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number, "th")
    return f"{number}{ending}"


def summary_table(runs: Iterable[Run], missing: Iterable[str] = ()) -> PrettyTable:
    """Return the original's summary table: its nine columns, a row for each run.

    ``missing`` are settings that have no run; their rows say so, and which command runs them.
    """
    table = PrettyTable(
        [
            "Model",
            "Convolution Layers",
            "Kernel Size",
            "Max pool",
            "Padding",
            "Dropout",
            "Batch Normalization",
            "test loss",
            "test accuracy (%)",
        ]
    )
    for run in runs:
        architecture = run.record.architecture
        flags = (
            architecture.max_pool,
            architecture.padding,
            architecture.dropout,
            architecture.batch_normalization,
        )
        table.add_row(
            [
                title_of(run),
                architecture.conv_layers,
                kernel_text(architecture.kernel_sizes),
                *("Yes" if flag else "No" for flag in flags),
                f"{run.record.test_loss:.4f}",
                percent(run.record.test_accuracy),
            ]
        )
    for setting in missing:
        table.add_row([SETTINGS[setting].title, *[""] * 6, NOT_RUN, f"make run MODELS={setting}"])
    return table


def by_parameters(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Return runs in groups of the same parameters, in the order of SETTINGS, under a title.

    The title is the original's, with what differs from the reference runs. The seed and a model's
    own parameters do not split a group.
    """
    order = list(SETTINGS)
    groups = {}
    for run in sorted(runs, key=lambda run: order.index(setting_of(run) or order[-1])):
        parameters = run.record.run.model_dump()
        title = f"Epoch : {parameters['epochs']} and Batch Size : {parameters['batch_size']}"
        for name in ("train_samples", "dataset", "precision"):
            if parameters[name] != REFERENCE[name]:
                title += f", {name} {parameters[name]}"
        groups.setdefault(title, []).append(run)
    return groups


def reported_table(references: dict[str, Run]) -> PrettyTable:
    """Return the original's reported figures beside those of the reference runs."""
    table = PrettyTable(
        ["Model", "loss, original", "loss, here", "accuracy (%), original", "accuracy (%), here"]
    )
    for setting in SETTINGS:
        loss, accuracy, _ = ORIGINAL.get(setting, (None, None, None))
        run = references.get(setting)
        table.add_row(
            [
                SETTINGS[setting].title,
                "-" if loss is None else f"{loss:.4f}",
                f"{run.record.test_loss:.4f}" if run else NOT_RUN,
                "-" if accuracy is None else percent(accuracy),
                percent(run.record.test_accuracy) if run else NOT_RUN,
            ]
        )
    return table


def cost_table(references: dict[str, Run]) -> PrettyTable:
    """Return what each model costs: parameters, multiply-adds an image, and time."""
    table = PrettyTable(
        [
            "Model",
            "parameters",
            "multiply-adds an image",
            "epochs",
            "seconds an epoch, original",
            "seconds an epoch, here",
            "minutes in all, here",
        ]
    )
    for setting in SETTINGS:
        original_seconds = ORIGINAL[setting][2] if setting in ORIGINAL else "-"
        if setting not in references:
            table.add_row([SETTINGS[setting].title, "", "", "", original_seconds, NOT_RUN, ""])
            continue
        record = references[setting].record
        table.add_row(
            [
                SETTINGS[setting].title,
                f"{record.architecture.parameters:,}",
                f"{record.architecture.macs:,}",
                record.run.epochs,
                original_seconds,
                f"{median(record.seconds_per_epoch):.1f}",
                f"{record.total_seconds / 60:.1f}",
            ]
        )
    table.align = "r"
    table.align["Model"] = "l"
    return table


def title_of(run: Run) -> str:
    """Return the name under which a run is shown; a model's own parameters tell it apart."""
    setting = setting_of(run)
    if setting:
        return SETTINGS[setting].title
    own = ", ".join(f"{name} {value}" for name, value in run.record.run.model_extra.items())
    return f"{run.record.title}, {own}" if own else run.record.title


def colour_of(run: Run) -> str:
    """Return the colour of a run's setting, the same in every figure."""
    settings = list(SETTINGS)
    setting = setting_of(run)
    return f"C{settings.index(setting)}" if setting else GREY


def percent(fraction: float) -> str:
    """Return a fraction as per cent with two decimals: 0.9894 is "98.94"."""
    return f"{100 * fraction:.2f}"


def show_validation_losses(references: dict[str, Run]) -> None:
    """Show the validation loss of each reference run over the epochs."""
    with figure(size=(9, 4)) as (fig, ax):
        for setting, run in references.items():
            losses = run.record.history.val_loss
            epochs = range(1, len(losses) + 1)
            label = SETTINGS[setting].title
            ax.plot(epochs, losses, marker=".", color=colour_of(run), label=label)
        ax.set_xlabel("epoch")
        ax.set_ylabel("Categorical Crossentropy Loss, validation")
        ax.set_yscale("log")
        _plain_log_ticks(ax.yaxis)
        ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        ax.grid(visible=True)
        if references:
            ax.legend()
        show(fig, "Validation loss of each model over the epochs")


def show_accuracy_against_cost(
    references: dict[str, Run], groups: dict[str, list[Run]], own: list[Run]
) -> None:
    """Show test accuracy against training time: reference runs filled, a reader's own hollow.

    ``groups`` are each setting's runs over seeds: a filled point is their mean, its bar their
    standard deviation, its time that of the reference run. The cross is train_mnist_fast,
    tried by hand on two cores of the same kind. Own runs far below the worst reference would
    squeeze all others into one line; they are counted instead.
    """
    accuracies = [100 * run.record.test_accuracy for run in references.values()]
    lowest = min(accuracies, default=0) - 1
    shown = [run for run in own if 100 * run.record.test_accuracy >= lowest]
    if len(shown) < len(own):
        print(f"{len(own) - len(shown)} of your runs are below {lowest:.1f} % and not shown.")
    with figure(size=(9, 4)) as (fig, ax):
        for setting, run in references.items():
            over_seeds = [100 * r.record.test_accuracy for r in groups.get(setting, [run])]
            n = len(over_seeds)
            ax.errorbar(
                run.record.total_seconds / 60,
                np.mean(over_seeds),
                np.std(over_seeds, ddof=1) if n > 1 else None,
                fmt="o",
                capsize=4,
                color=colour_of(run),
                label=f"{title_of(run)}, " + (f"mean of {n} runs" if n > 1 else "one run"),
            )
        for run in shown:
            ax.scatter(
                run.record.total_seconds / 60,
                100 * run.record.test_accuracy,
                s=60,
                facecolors="none",
                edgecolors=colour_of(run),
                zorder=3,
                label=f"yours: {title_of(run)}",
            )
        seconds, accuracy = TRAIN_MNIST_FAST
        ax.plot(seconds / 60, 100 * accuracy, "x", color=GREY, label="train_mnist_fast")
        ax.set_xscale("log")
        _plain_log_ticks(ax.xaxis)
        ax.margins(x=0.2, y=0.2)
        ax.set_xlabel("minutes of training, validation and, for D, evaluation")
        ax.set_ylabel("test accuracy (%)")
        ax.grid(visible=True)
        handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        if handles:  # each label once, beside the axes: points may lie close together
            ax.legend(handles.values(), handles.keys(), loc="upper left", bbox_to_anchor=(1, 1))
        show(fig, "Test accuracy of each model against its training time")


def _plain_log_ticks(axis) -> None:
    """Label a logarithmic axis at 1, 2 and 5 of each decade, in plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def show_most_missed(references: dict[str, Run], images: np.ndarray) -> None:
    """Show the ten test digits that most of the models miss, with what they took them for.

    ``images`` are the test images, (n, 28, 28), in the order of the records' predictions.
    """
    if not references:
        print("No reference run yet.")
        return
    predictions = [run.predictions() for run in references.values()]
    labels = predictions[0]["labels"]
    guesses = np.stack([arrays["predicted"] for arrays in predictions])
    misses = (guesses != labels).sum(axis=0)
    most = np.argsort(-misses, kind="stable")[:10]
    most = most[misses[most] > 0]
    if len(most) == 0:
        print("No model misses any of the test images.")
        return
    titles = [f"is {labels[i]}\n{_guesses_text(guesses[:, i], labels[i])}" for i in most]
    print(f"How many of the {len(references)} models miss each of these:", *misses[most])
    alt = "The test digits that most models miss: " + "; ".join(titles).replace("\n", ", ")
    show_digits(images[most], titles, alt)


def _guesses_text(guesses: np.ndarray, label: int) -> str:
    """Return the wrong guesses, the most frequent first: "8 ×3", and in the next line "2 ×1"."""
    wrong = Counter(int(guess) for guess in guesses if guess != label)
    return "\n".join(f"{guess} ×{count}" for guess, count in wrong.most_common())
