"""What several runs of a model say together, and whether two models differ."""

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import combinations, pairwise
from statistics import median

import numpy as np
from prettytable import PrettyTable
from scipy import stats
from statsmodels.stats.multitest import multipletests

from mnist_utils.comparison import (
    percent,
    reference_parameters,
    setting_of,
    summary_table,
    title_of,
)
from mnist_utils.parameters import SETTINGS
from mnist_utils.runs import Run

LEVEL = 0.05
ORIGINAL_RANKING = ("b", "c7", "a1", "a2")  # by the accuracies that it reports


def over_seeds(runs: Iterable[Run], precision: str = "float32") -> dict[str, list[Run]]:
    """Return each setting's runs, by seed, that differ from the reference in the seed alone.

    ``precision`` names another group, such as "mixed_bfloat16"; the two are never mixed.
    """
    groups = {}
    for run in runs:
        setting, parameters = setting_of(run), run.record.run.model_dump()
        if setting is None:
            continue
        wanted = reference_parameters(setting) | {"precision": precision}
        if all(parameters[name] == wanted[name] for name in wanted if name != "seed"):
            groups.setdefault(setting, []).append(run)
    return {
        setting: sorted(groups[setting], key=lambda run: run.record.run.seed)
        for setting in SETTINGS
        if setting in groups
    }


def spread_table(groups: dict[str, list[Run]]) -> PrettyTable:
    """Return, for each setting, n, mean and standard deviation, interval, best and worst.

    The intervals hold the means of all seeds with 95 % confidence, by Student's t; with one run
    there is neither spread nor interval, and the table says so.
    """
    table = PrettyTable(
        [
            "Model",
            "n",
            "test accuracy (%)",
            "95 % interval, accuracy",
            "best",
            "worst",
            "test loss",
            "95 % interval, loss",
            "best loss",
            "worst loss",
        ]
    )
    for setting, runs in groups.items():
        accuracies = np.array([100 * run.record.test_accuracy for run in runs])
        losses = np.array([run.record.test_loss for run in runs])
        table.add_row(
            [
                SETTINGS[setting].title,
                len(runs),
                accuracy_over_seeds(runs),
                _interval(accuracies, 2),
                f"{accuracies.max():.2f}",
                f"{accuracies.min():.2f}",
                loss_over_seeds(runs),
                _interval(losses, 4),
                f"{losses.min():.4f}",
                f"{losses.max():.4f}",
            ]
        )
    return table


def own_table(runs: Iterable[Run], groups: dict[str, list[Run]]) -> PrettyTable:
    """Return the summary table of a reader's own runs, the reference runs' results beside it.

    ``runs`` may differ in the seed and in the model's own parameters alone. Those of the same
    code that differ in the seed alone share a row, with the mean ± standard deviation.
    ``groups`` are the reference runs over seeds.
    """
    alike: dict[tuple, list[Run]] = {}
    for run in runs:
        key = title_of(run), run.record.architecture.digest, run.record.code_sha256
        alike.setdefault(key, []).append(run)
    beside = [groups.get(setting_of(same[0])) for same in alike.values()]
    table = summary_table(same[0] for same in alike.values())
    for column in ("test loss", "test accuracy (%)"):
        table.del_column(column)
    table.add_column("seed", [_seeds_text(same) for same in alike.values()])
    for name, rows in (("", alike.values()), ("reference ", beside)):
        table.add_column(f"{name}loss", [loss_over_seeds(same) if same else "-" for same in rows])
        table.add_column(
            f"{name}accuracy (%)", [accuracy_over_seeds(same) if same else "-" for same in rows]
        )
    return table


def _seeds_text(runs: list[Run]) -> str:
    seeds = sorted(run.record.run.seed for run in runs)
    return str(seeds[0]) if len(seeds) == 1 else f"{len(seeds)} seeds"


def loss_over_seeds(runs: list[Run]) -> str:
    """Return the mean test loss of runs, with its standard deviation if any."""
    return mean_and_deviation([run.record.test_loss for run in runs], 4)


def accuracy_over_seeds(runs: list[Run]) -> str:
    """Return the mean test accuracy of runs in per cent, with its standard deviation if any."""
    return mean_and_deviation([100 * run.record.test_accuracy for run in runs], 2)


def reference_sentence(runs: list[Run]) -> str:
    """Return what a setting reached and cost, as the notebooks' first screens say it.

    ``runs`` are its runs over seeds; the first is the reference run, which the notebook shows.
    """
    record = runs[0].record
    accuracy = f"{accuracy_over_seeds(runs)} %"
    if len(runs) > 1:
        accuracy += f" (mean ± standard deviation of {len(runs)} seeds); with seed 0 "
        accuracy += f"{percent(record.test_accuracy)} %"
    else:
        accuracy += " (one run, seed 0)"
    seconds = record.total_seconds
    total = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    return (
        f"test accuracy {accuracy}, test loss {record.test_loss:.4f}, "
        f"{median(record.seconds_per_epoch):.0f} s an epoch and {total} in all on "
        f"{record.threads} processor core{'s' if record.threads > 1 else ''}"
    )


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """Return the mean, and the standard deviation if there are several values."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def _interval(values: np.ndarray, digits: int) -> str:
    if len(values) == 1:
        return "one run: not known"
    if values.std() == 0:
        return "no spread"
    low, high = stats.ttest_1samp(values, 0).confidence_interval(1 - LEVEL)
    return f"{low:.{digits}f} to {high:.{digits}f}"


def seed_tests(groups: dict[str, list[Run]]) -> dict[tuple[str, str], float]:
    """Return for each pair of settings how likely such a difference of means is by chance.

    Welch's t-test over the accuracies of the seeds, for settings with two runs or more, by
    scipy; corrected for the number of pairs by Holm's method.
    """
    several = [setting for setting, runs in groups.items() if len(runs) > 1]
    p_values = {}
    for first, second in combinations(several, 2):
        accuracies = [[run.record.test_accuracy for run in groups[s]] for s in (first, second)]
        p_values[first, second] = stats.ttest_ind(*accuracies, equal_var=False).pvalue
    return _corrected(p_values)


def image_tests(groups: dict[str, list[Run]]) -> dict[tuple[str, str], float]:
    """Return for each pair of settings how likely it is that chance alone tells them apart.

    The exact McNemar test over the test images that one model gets right and the other wrong,
    for the two runs of each seed that both have, by scipy; the seeds' answers put together by
    their middle one, and corrected for the number of pairs by Holm's method.
    """
    seeds = {setting: {run.record.run.seed: run for run in groups[setting]} for setting in groups}

    @cache  # a run takes part in several pairs
    def right(setting: str, seed: int) -> np.ndarray:
        arrays = seeds[setting][seed].predictions()
        return arrays["predicted"] == arrays["labels"]

    p_values = {}
    for first, second in combinations(groups, 2):
        # For each seed, how many images the first alone gets right, and the second alone.
        counts = [
            (
                np.sum(right(first, seed) > right(second, seed)),
                np.sum(right(first, seed) < right(second, seed)),
            )
            for seed in seeds[first]
            if seed in seeds[second]
        ]
        if counts:
            p_values[first, second] = _two_sided(counts)
    return _corrected(p_values)


def _two_sided(counts: list[tuple[int, int]]) -> float:
    """Return the p of several McNemar tests together, for the model that is better in the mean.

    It is doubled, for it could have been the other. Seeds that contradict each other so show
    neither, and for one seed it is the usual exact p.
    """
    first, second = np.sum(counts, axis=0)
    better = 0 if first >= second else 1
    p_values = [
        # Two that are right on the same images say nothing.
        stats.binomtest(pair[better], sum(pair), alternative="greater").pvalue if any(pair) else 1.0
        for pair in counts
    ]
    return min(1.0, 2 * _middle(p_values))


def _middle(p_values: list[float]) -> float:
    """Return one p for n tests of the same question: the middle p, of rank k, times n / k.

    Of an even number it is the upper of the middle two, so that more than half of the tests have
    to agree. By Markov's inequality, at least k of n tests reach the level a k / n with a chance
    of at most a, however they depend on each other (Rüger 1978; Vovk and Wang 2020, arXiv
    1212.4966). Those on the same test images do, and scipy's combine_pvalues wants them
    independent.
    """
    n = len(p_values)
    rank = n // 2 + 1
    return sorted(p_values)[rank - 1] * n / rank


def _corrected(p_values: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    if not p_values:
        return {}
    corrected = multipletests(list(p_values.values()), method="holm")[1]
    return dict(zip(p_values, map(float, corrected), strict=True))


def precision_table(
    groups: dict[str, list[Run]], others: dict[str, list[Run]], precision: str
) -> PrettyTable:
    """Return, for each setting that has runs of both, what another precision does to accuracy.

    ``groups`` are the float32 runs, ``others`` those in ``precision``. The interval is that of
    the difference of the means, by Welch's t-test; p is corrected by Holm's method.
    """
    both = [s for s in groups if len(groups[s]) > 1 and len(others.get(s, [])) > 1]
    columns = [f"accuracy (%), {name}" for name in ("float32", precision)]
    table = PrettyTable(["Model", "n", *columns, "difference", "95 % interval", "verdict"])
    tests, rows = {}, {}
    for setting in both:
        accuracies = [
            np.array([100 * run.record.test_accuracy for run in runs])
            for runs in (groups[setting], others[setting])
        ]
        test = stats.ttest_ind(*reversed(accuracies), equal_var=False)
        low, high = test.confidence_interval(1 - LEVEL)
        tests[setting, precision] = test.pvalue
        rows[setting] = [
            SETTINGS[setting].title,
            " and ".join(str(len(values)) for values in accuracies),
            *(mean_and_deviation(values, 2) for values in accuracies),
            f"{accuracies[1].mean() - accuracies[0].mean():+.2f}",
            f"{low:+.2f} to {high:+.2f}",
        ]
    for (setting, _), p in _corrected(tests).items():
        verdict = "a difference" if p < LEVEL else "no difference shown"
        table.add_row([*rows[setting], f"{verdict}, {_p_text(p)}"])
    return table


def difference_matrix(
    groups: dict[str, list[Run]],
    seed_p: dict[tuple[str, str], float],
    image_p: dict[tuple[str, str], float],
) -> PrettyTable:
    """Return a matrix of all pairs: over seeds above the diagonal, over images below it.

    A cell says which model is better, or that no difference is shown, and the corrected p, as
    seed_tests and image_tests return them.
    """
    table = PrettyTable(["", *(SETTINGS[setting].title for setting in groups)])
    order = list(groups)
    for row, first in enumerate(order):
        cells = []
        for column, second in enumerate(order):
            if row == column:
                cells.append(f"n = {len(groups[first])}")
            elif column > row:
                cells.append(_verdict(groups, first, second, seed_p.get((first, second))))
            else:
                common = _with_common_seeds(groups, second, first)
                cells.append(_verdict(common, second, first, image_p.get((second, first))))
        table.add_row([SETTINGS[first].title, *cells])
    return table


def _with_common_seeds(groups, *settings) -> dict[str, list[Run]]:
    """Return the runs of these settings whose seed each of them has."""
    seeds = set.intersection(*({run.record.run.seed for run in groups[s]} for s in settings))
    return {s: [run for run in groups[s] if run.record.run.seed in seeds] for s in settings}


def _verdict(groups, first, second, p) -> str:
    """Return the better of two settings in the mean, if the test shows one."""
    if p is None:
        return "n = 1: not known"
    if p >= LEVEL:
        return f"not shown, {_p_text(p)}"
    better = max(first, second, key=lambda setting: mean_accuracy(groups[setting]))
    return f"{SETTINGS[better].title}, {_p_text(p)}"


def _p_text(p: float) -> str:
    return f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"


def mean_accuracy(runs: list[Run]) -> float:
    """Return the mean test accuracy of runs, a fraction."""
    return float(np.mean([run.record.test_accuracy for run in runs]))


def ranking_text(
    groups: dict[str, list[Run]],
    seed_p: dict[tuple[str, str], float],
    image_p: dict[tuple[str, str], float],
) -> str:
    """Return in words whether the original's ranking, B > C > A.1 > A.2, stands.

    ``seed_p`` and ``image_p`` are what seed_tests and image_tests return.
    """
    ranking = [setting for setting in ORIGINAL_RANKING if setting in groups]
    here = sorted(ranking, key=lambda setting: -mean_accuracy(groups[setting]))
    lines = [
        "The original's ranking: "
        + " > ".join(SETTINGS[setting].title for setting in ORIGINAL_RANKING)
        + ".",
        "Here, by mean test accuracy: "
        + " > ".join(f"{SETTINGS[s].title} ({percent(mean_accuracy(groups[s]))} %)" for s in here)
        + ".",
    ]
    for better, worse in pairwise(ranking):
        pair = tuple(sorted((better, worse), key=list(groups).index))
        tests = {"seeds": seed_p.get(pair), "test images": image_p.get(pair)}
        if all(p is None for p in tests.values()):
            continue
        shown = [over for over, p in tests.items() if p is not None and p < LEVEL]
        line = f"{SETTINGS[better].title} over {SETTINGS[worse].title}: "
        if mean_accuracy(groups[better]) <= mean_accuracy(groups[worse]):
            line += "not so here; the order is the other way round"
            line += f" (shown over {' and '.join(shown)})." if shown else ", which may be chance."
        elif shown:
            line += f"stands (shown over {' and '.join(shown)})."
        else:
            line += "the same order here, but it may be chance."
        lines.append(line)
    if any(len(runs) == 1 for runs in groups.values()):
        lines.append("Some models have one run only: what another seed would give is not known.")
    return "\n".join(lines)
