"""Tables and figures over the records of runs; nothing here needs TensorFlow."""

from collections import Counter
from collections.abc import Iterable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox
from prettytable import PrettyTable

from mnist_utils.parameters import SETTINGS, InputError, images_trained_on
from mnist_utils.plotting import GREY, figure, show, show_digits
from mnist_utils.runs import RECORD_FILE, load_record, load_runs, read_predictions

# Test loss and test accuracy that the original reports; its run of C had a first layer of 7x7.
ORIGINAL = {"a1": (0.0433, 98.94), "a2": (0.0512, 98.53), "b": (0.0154, 99.51)}
ORIGINAL |= {"c7": (0.0361, 99.07)}
ORIGINAL_RANKING = ("b", "c7", "a1", "a2")
REFERENCE = {"batch_size": 256, "train_samples": None, "dataset": "mnist", "precision": "float32"}
COLOURS = {key: f"C{i}" for i, key in enumerate(SETTINGS)}  # the same in every figure
EPOCHS = {key: setting.epochs for key, setting in SETTINGS.items()}
NOT_RUN = "not run yet"
MOST_ROWS, MOST_POINTS, MOST_SEEDS = 40, 200, 50  # ten thousand runs stay readable, and quick
Answers = tuple[np.ndarray, dict[str, np.ndarray]]


def reference_folder() -> Path:
    """Return the folder of the committed reference runs: the package's, else the checkout's."""
    installed = Path(__file__).parent / "results"
    return installed if installed.is_dir() else installed.parents[1] / "results"


def reference_rows(runs: pd.DataFrame, own: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return the headless runs that differ from the reference in nothing but the seed, by seed.

    Where a setting has none in ``runs``, a reader's ``own`` stand in, with titles that say so:
    those of the code that ran last.
    """
    epochs = runs["setting"].map(EPOCHS)
    alike = (runs["epochs"] == epochs) & (runs["trained_epochs"] == epochs)
    alike &= runs["by_hand"] == False  # noqa: E712 (an empty column has no logic)
    for name, value in REFERENCE.items():
        alike &= runs[name].isna() if value is None else runs[name] == value
    rows = runs[alike].sort_values("seed")
    if own is None:
        return rows
    mine = reference_rows(own)
    mine = mine[~mine["setting"].isin(rows["setting"])]
    written = mine["path"].map(lambda folder: (folder / RECORD_FILE).stat().st_mtime_ns)
    newest = mine.loc[written.sort_values().index].groupby("setting")["code_sha256"].last()
    mine = mine[mine["code_sha256"] == mine["setting"].map(newest)]
    return pd.concat([rows, mine.assign(title=mine["title"] + ", yours")]) if len(mine) else rows


def _means(runs: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Return a row a group: means, accuracy in per cent, cost in 10¹² multiply-adds."""
    numbers = {"test_accuracy": "accuracy", "test_loss": "loss", "multiply_adds": "cost"}
    runs = runs.astype(dict.fromkeys([*numbers, "seconds"], float)).rename(columns=numbers)
    runs["accuracy"] *= 100
    runs["cost"] /= 1e12
    how = dict.fromkeys(("accuracy", "loss", "seconds", "cost"), "mean")
    how |= dict.fromkeys(("title", "path", "seed", "parameters"), "first")
    columns = {name: (name, way) for name, way in how.items()}
    groups = runs.groupby(keys, sort=False, dropna=False)
    return groups.agg(**columns, n=("seed", "size"), sd=("accuracy", "std")).reset_index()


def _of_settings(runs: pd.DataFrame) -> dict[str, Any]:
    """Return each setting's means, in the order of SETTINGS; None for one without a run."""
    rows = {row.setting: row for row in _means(runs, ["setting"]).itertuples()}
    return {setting: rows.get(setting) for setting in SETTINGS}


def _accuracy(row: Any) -> str:
    """Return the mean, and the standard deviation if there are several runs."""
    return f"{row.accuracy:.2f}" + (f" ± {row.sd:.2f}" if row.n > 1 else "")


def show_reference(*settings: str) -> None:
    """Show what settings, such as "a2", reach and cost by their reference runs."""
    runs = reference_rows(load_runs(reference_folder())[0])
    if runs["setting"].isin(settings).any():
        display(results_table(runs, settings))
    else:
        print("Not run yet.")


def results_table(runs: pd.DataFrame, settings: Iterable[str] = SETTINGS) -> PrettyTable:
    """Return how large each setting's model is, what its training costs, and what it reaches."""
    names = ["parameters", "training cost (10¹² multiply-adds)"]
    names += ["test accuracy (%), mean ± sd (n)", "test loss"]
    table, found = PrettyTable(["Model", *names], align="r"), _of_settings(runs)
    for setting in settings:
        cells, row = ["", "", NOT_RUN, ""], found[setting]
        if row:
            cost = "-" if np.isnan(row.cost) else f"{row.cost:,.2f}"
            cells = [f"{row.parameters:,}", cost, f"{_accuracy(row)} ({row.n})", f"{row.loss:.4f}"]
        table.add_row([row.title if row else SETTINGS[setting].title, *cells])
    table.align["Model"] = "l"
    return table


def kernel_text(sizes: list[list[int]]) -> str:
    """Return kernel sizes in the original's words: "3X3 for 4th and 6th layer 2X2 for rest"."""
    names = [f"{height}X{width}" for height, width in sizes]
    if len(set(names)) < 2:
        return f"{names[0]} for all" if names else "-"
    rest = Counter(names).most_common(1)[0][0]
    parts = []
    for name in dict.fromkeys(names):
        places = [i for i, other in enumerate(names, 1) if other == name]
        ordinals = [f"{i}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(i, 'th') }" for i in places]
        parts += [f"{name} for {' and '.join(ordinals)} layer"] if name != rest else []
    return " ".join([*parts, f"{rest} for rest"])


def summary_table(runs: pd.DataFrame) -> PrettyTable:
    """Return the original's table with its nine columns: the means over each setting's runs.

    A setting without a run has a row that says so, and which command runs it.
    """
    names = ["Convolution Layers", "Kernel Size", "Max pool", "Padding", "Dropout"]
    names += ["Batch Normalization", "test loss", "test accuracy (%)"]
    table = PrettyTable(["Model", *names], title="Epoch : 10 and Batch Size : 256")
    for setting, row in _of_settings(runs).items():
        cells: list = [*[""] * 6, NOT_RUN, f"make run MODELS={setting}"]
        if row:
            built = load_record(row.path).architecture
            flags = built.max_pool, built.padding, built.dropout, built.batch_normalization
            words = ["Yes" if flag else "No" for flag in flags]
            cells = [built.conv_layers, kernel_text(built.kernel_sizes), *words]
            cells += [f"{row.loss:.4f}", f"{row.accuracy:.2f}"]
        table.add_row([row.title if row else SETTINGS[setting].title, *cells])
    return table


def reported_table(runs: pd.DataFrame) -> PrettyTable:
    """Return the figures that the original reports beside the means of the reference runs.

    The last column is the 95 % prediction interval of one more run's accuracy, by Student's t.
    """
    from scipy import special  # slow to import, and no model's notebook needs it

    names = ["loss, original", "loss, here", "accuracy (%), original", "accuracy (%), here"]
    table, found = PrettyTable(["Model", *names, "one more run, 95 %"]), _of_settings(runs)
    for setting, (loss, accuracy) in ORIGINAL.items():
        row, here = found[setting], [NOT_RUN] * 3
        if row:
            half = special.stdtrit(row.n - 1, 0.975) * row.sd * np.sqrt(1 + 1 / row.n)
            more = f"{row.accuracy:.2f} ± {half:.2f}" if row.n > 1 else "-"
            here = [f"{row.loss:.4f}", _accuracy(row), more]
        title = SETTINGS[setting].title
        table.add_row([title, f"{loss:.4f}", here[0], f"{accuracy:.2f}", *here[1:]])
    return table


def show_learning(runs: pd.DataFrame) -> None:
    """Show the validation error over the epochs, a line a setting: the mean over its runs.

    Dashed are the lines of those that validate on training images kept back.
    """
    with figure(size=(9, 5.2)) as (fig, ax):
        names: list[tuple] = []
        points: list[tuple] = []
        for setting, title in runs.groupby("setting")["title"].first().items():
            shares = runs["val_accuracy"][runs["setting"] == setting].tolist()
            errors = 100 - 100 * np.array(shares, float).mean(axis=0)
            errors[errors <= 0] = np.nan  # a logarithmic axis has no place for it
            kept_back = images_trained_on(SETTINGS[setting].model, 60) < 60
            epochs, style = range(1, len(errors) + 1), "--" if kept_back else "-"
            ax.plot(epochs, errors, style, marker=".", color=COLOURS[setting])
            points += zip(epochs, errors, errors, strict=True)
            names.append((epochs[-1], errors[-1], title, COLOURS[setting]))
        last = max((x for x, *_ in points), default=8)
        ax.set_xlim(0.7, 1.25 * last)  # leaves room for the names
        ticks = MaxNLocator(10, integer=True).tick_values(1, last)
        ax.set_xticks([tick for tick in ticks if 1 <= tick <= last])
        ax.set(xlabel="epoch", ylabel="validation error (%)", yscale="log")
        _finish(ax, ax.yaxis, names, points, sides=(8,))
        show(fig, "Validation error of each model over the epochs")


def show_accuracy_against_cost(references: pd.DataFrame, own: pd.DataFrame) -> None:
    """Show test accuracy against the cost of training; a reader's own runs are hollow.

    A filled point is the mean over a setting's runs, its bar their standard deviation. Own runs
    that are far worse would squeeze all others into one line; they are counted instead.
    """
    found, groups = filter(None, _of_settings(references).values()), _own_groups(own, references)
    rows = [(row, (None, 6, "")) for row in found]
    lowest = min((row.accuracy for row, _ in rows), default=1) - 1
    drawn = groups[(groups["accuracy"] >= lowest) & groups["cost"].notna()][:MOST_POINTS]
    mine = "none", 8, "yours: " if len(drawn) <= 8 else ""
    with figure(size=(9, 4.5)) as (fig, ax):
        names: list[tuple] = []
        points: list[tuple] = []
        for row, (fill, size, whose) in rows + [(row, mine) for row in drawn.itertuples()]:
            sd, colour = row.sd if row.n > 1 and not fill else 0.0, COLOURS.get(row.setting, GREY)
            style = {"markersize": size, "markerfacecolor": fill, "color": colour}
            ax.errorbar(row.cost, row.accuracy, sd or None, fmt="o", capsize=4, **style)
            points.append((row.cost, row.accuracy - sd, row.accuracy + sd))
            if whose or not fill:
                names.append((row.cost, row.accuracy, whose + row.title, colour))
        ax.margins(x=0.15, y=0.15)
        ax.set(xlabel="multiply-adds of the training (10¹²)", ylabel="test accuracy (%)")
        ax.set_xscale("log")
        _finish(ax, ax.xaxis, names, points, sides=(8, -8))
        show(fig, "Test accuracy of each model against the multiply-adds of its training")
    if hidden := len(own) - drawn["n"].sum():
        print(f"{hidden:,} of your runs are not drawn: of unknown cost, worse than {lowest:.1f} %,")
        print(f"or not among the {MOST_POINTS} best.")


def _finish(ax: Any, log_axis: Any, names: list, points: list, sides: Iterable[int]) -> None:
    """Label the axes plainly, and write names where they hide neither each other nor points.

    A name is (x, y, text, colour), a point (x, lowest y, highest y); ``sides`` are steps from x.
    """
    log_axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    log_axis.set_major_formatter("{x:g}")
    log_axis.set_minor_locator(NullLocator())
    ax.grid(visible=True)
    ax.figure.draw_without_rendering()  # settles where the axes lie
    corners = [ax.transData.transform([(x, low), (x, high)]) for x, low, high in points]
    taken = [Bbox(pair).padded(4) for pair in corners if np.isfinite(pair).all()]
    places = [(side, up) for up in (0, -12, -24, -36, 12, 24, 36) for side in sides]
    for x, y, text, colour in sorted(names, key=lambda name: -name[1]):  # from the top
        note = ax.annotate(text, (x, y), (0, 0), textcoords="offset points", va="center")
        note.set(in_layout=False, fontsize=10, color=colour)
        for side, up in places:
            note.xyann = side, up
            note.set_horizontalalignment("left" if side > 0 else "right")
            box = note.get_window_extent()
            inside = ax.bbox.x0 < box.x0 and box.x1 < ax.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def read_answers(references: pd.DataFrame) -> Answers:
    """Return the true digits (n,), and what the runs of each setting took them for (runs, n).

    Runs whose predictions are damaged are named and left out, and so is what is beyond the first
    MOST_SEEDS runs of a setting.
    """
    found = []
    if references["setting"].value_counts().gt(MOST_SEEDS).any():
        print(f"Of each model the first {MOST_SEEDS} runs count here.")
    for row in references.groupby("setting").head(MOST_SEEDS).itertuples():
        try:
            arrays = read_predictions(row.path)
            found.append((row, arrays["labels"], arrays["predicted"]))
        except InputError as error:
            print("Left out:", error)
    usual = Counter(labels.tobytes() for _, labels, _ in found).most_common(1)
    guesses: dict[str, list[np.ndarray]] = {setting: [] for setting in SETTINGS}
    for row, labels, predicted in found:
        share = np.mean(predicted == labels)
        if labels.tobytes() == usual[0][0] and abs(share - row.test_accuracy) < 0.001:
            guesses[row.setting].append(predicted)
        else:
            print(f"Left out: {row.path}: its predictions do not fit the test set or its accuracy.")
    labels = np.frombuffer(usual[0][0] if usual else b"", np.uint8)
    return labels, {s: np.stack(several) for s, several in guesses.items() if several}


def show_most_missed(answers: Answers, images: np.ndarray) -> None:
    """Show the ten test digits that most models' first runs miss, with what they took them for.

    ``images`` are the test images (n, 28, 28), in the order of the predictions.
    """
    labels, firsts = answers[0], [runs[0] for runs in answers[1].values()]
    misses = sum((guesses != labels).astype(int) for guesses in firsts) if firsts else labels
    most = np.argsort(-misses, kind="stable")[:10]
    most = most[misses[most] > 0]
    if len(most) == 0:
        print("No model misses any of the test images." if firsts else "No reference run yet.")
        return
    titles = []
    for i in most:
        wrong = Counter(int(guesses[i]) for guesses in firsts if guesses[i] != labels[i])
        lines = [f"{guess} ×{count}" for guess, count in wrong.most_common()]
        titles.append("\n".join([f"is {labels[i]}", *lines]))
    print(f"How many of the {len(firsts)} models miss each of these:", *misses[most])
    left_out = (misses == misses[most[-1]]).sum() - (misses[most] == misses[most[-1]]).sum()
    if left_out:
        print(f"As many models miss {left_out} more.")
    alt = "The test digits that most models miss: " + "; ".join(titles).replace("\n", ", ")
    show_digits(images[most], titles, alt)


def difference(
    a: np.ndarray, b: np.ndarray, shares_a: np.ndarray, shares_b: np.ndarray
) -> tuple[float, float, float]:
    """Return the difference of two mean accuracies, the half-width of its 95 % interval, and p.

    ``a`` and ``b`` are accuracies over seeds, ``shares_a`` and ``shares_b`` (images,) how often
    each model is right on each test image. Interval and p are over other seeds and other images
    together; degrees of freedom by Welch and Satterthwaite. With one run of either both are NaN.
    """
    points = float(np.mean(a) - np.mean(b))
    if min(len(a), len(b)) < 2:
        return points, np.nan, np.nan
    from scipy import special  # slow to import, and no model's notebook needs it

    several = a, b, shares_a - shares_b
    parts = np.array([np.var(values, ddof=1) / len(values) for values in several])
    deviation = np.sqrt(parts.sum())
    if deviation == 0:
        return points, 0.0, float(points == 0)
    freedom = parts.sum() ** 2 / sum(parts**2 / [len(values) - 1 for values in several])
    p = 2 * special.stdtr(freedom, -abs(points) / deviation)  # Student's t
    return points, float(special.stdtrit(freedom, 0.975) * deviation), float(p)


def differences(answers: Answers) -> pd.DataFrame:
    """Return all pairs of settings, the better first: points and half in %, and p by Holm."""
    right = {setting: 100.0 * (guesses == answers[0]) for setting, guesses in answers[1].items()}
    best = sorted(right, key=lambda setting: -right[setting].mean())
    rows = []
    for a, b in combinations(best, 2):
        over_seeds = [right[s].mean(axis=1) for s in (a, b)]
        rows.append((a, b, *difference(*over_seeds, *(right[s].mean(axis=0) for s in (a, b)))))
    pairs = pd.DataFrame(rows, columns=["better", "other", "points", "half", "p"])
    return pairs.assign(p=holm(pairs["p"]))


def holm(p: pd.Series) -> pd.Series:
    """Return p enlarged for their number by Holm's method; one that is NaN stays and is no test."""
    ordered = p.dropna().sort_values()
    enlarged = (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1)
    return enlarged.reindex(p.index)


def _p_text(p: float) -> str:
    return "n = 1" if np.isnan(p) else f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"


def differences_table(pairs: pd.DataFrame) -> PrettyTable:
    """Return each pair's difference with its interval, p by Holm, and whether it is shown."""
    names = ["better", "than", "difference (points)", "p (Holm)", "shown?"]
    table = PrettyTable(names, align="l")
    for a, b, points, half, p in pairs.itertuples(index=False):
        known = not np.isnan(p)
        shown = "yes" if p < 0.05 else "no" if known else "not known"
        text = f"{points:+.2f} ± {half:.2f}" if known else f"{points:+.2f}"
        table.add_row([SETTINGS[a].title, SETTINGS[b].title, text, _p_text(p), shown])
    return table


def ranking_text(pairs: pd.DataFrame) -> str:
    """Return in words whether the original's ranking, B > C > A.1 > A.2, stands."""
    titles = [SETTINGS[setting].title for setting in ORIGINAL_RANKING]
    lines = ["The original's ranking: " + " > ".join(titles) + "."]
    for pair, (better, other) in zip(pairwise(ORIGINAL_RANKING), pairwise(titles), strict=True):
        verdict = NOT_RUN
        for row in pairs[pairs["better"].isin(pair) & pairs["other"].isin(pair)].itertuples():
            chance = "" if row.p < 0.05 else ", but it may be chance"
            verdict = "the other way round here" + chance
            if row.better == pair[0]:
                verdict = "the same order here" + chance if chance else "stands"
            verdict += f" ({_p_text(row.p)})"
        lines.append(f"{better} over {other}: {verdict}.")
    return "\n".join(lines)


def _own_groups(own: pd.DataFrame, references: pd.DataFrame) -> pd.DataFrame:
    """Return the means of own runs that differ in the seed alone, each model's best first.

    By which code a run was made by hand is not known: each is a group of its own. ``rank`` is the
    group's place among those of its title, which says where layers or code are not those of the
    references.
    """
    changed = np.zeros(len(own), bool)
    for name in ("digest", "code_sha256"):  # the latter is not known of a run by hand
        known = references.groupby("setting")[name].agg(set).to_dict()
        pairs = zip(own["setting"], own[name], strict=True)
        other = [not pd.isna(one) and one not in known.get(s, {one}) for s, one in pairs]
        changed |= np.array(other, bool)
    code = own["code_sha256"].where(~own["by_hand"].astype(bool), own["path"].map(str))
    title = own["title"].where(~changed, own["title"] + ", changed")
    own = own.assign(title=title, code_sha256=code)
    keys = ["setting", "digest", "code_sha256", "by_hand", "epochs", "trained_epochs", *REFERENCE]
    groups = _means(own, keys)
    rank = groups.groupby("title")["accuracy"].rank(ascending=False, method="first")
    return groups.assign(rank=rank).sort_values("rank", kind="stable")


def own_table(own: pd.DataFrame, references: pd.DataFrame) -> PrettyTable:
    """Return a reader's own runs, the reference beside them; at most 100 columns wide.

    Runs of the same code that differ in the seed alone share a row. Of very many, each model's
    best are shown, and the others counted.
    """
    names = ["Model", "differs in", "loss", "accuracy (%)", "reference", "seconds"]
    groups, found = _own_groups(own, references), _of_settings(references)
    table = PrettyTable(names, align="r")
    table.align.update({"Model": "l", "differs in": "l"})
    table.max_width.update({"Model": 18, "differs in": 24})
    for row in groups[:MOST_ROWS].sort_values(["title", "rank"]).itertuples():
        wanted = REFERENCE | {"epochs": EPOCHS.get(row.setting, 10)}
        given = {k: v for k in wanted if not pd.isna(v := getattr(row, k)) and v != wanted[k]}
        # pandas makes a column with whole numbers and None one of floats
        differs = [f"{k} {int(v) if isinstance(v, float) else v}" for k, v in given.items()]
        if row.trained_epochs < row.epochs:
            differs.append(f"stopped after {row.trained_epochs}")
        differs += ["by hand"] * row.by_hand + [f"seed {row.seed}"] * (row.n == 1)
        accuracy = _accuracy(row) + (f" ({row.n})" if row.n > 1 else "")
        reference = _accuracy(beside) if (beside := found.get(row.setting)) else "-"
        cells = [f"{row.loss:.4f}", accuracy, reference, f"{row.seconds:.0f}"]
        table.add_row([row.title, ", ".join(differs), *cells])
    if len(groups) > MOST_ROWS:
        table.add_row([f"and {len(groups) - MOST_ROWS:,} more", *[""] * 5])
    return table
