"""Statistics over runs, on records whose answers are known."""

import numpy as np
import pytest
from scipy import stats

from mnist_utils.parameters import SETTINGS
from mnist_utils.runs import load_run
from mnist_utils.spread import (
    difference_matrix,
    image_tests,
    over_seeds,
    own_table,
    precision_table,
    ranking_text,
    reference_sentence,
    seed_tests,
    spread_table,
)

IMAGES = 1000


class StandInRun:
    """A record made from a real one: another seed, and predictions with known errors."""

    def __init__(self, run, seed, wrong, precision="float32"):
        self.folder = run.folder
        parameters = run.record.run.model_copy(
            update={
                "epochs": 10,
                "batch_size": 256,
                "seed": seed,
                "dataset": "mnist",
                "precision": precision,
            }
        )
        self.record = run.record.model_copy(
            update={
                "run": parameters,
                "test_accuracy": 1 - len(wrong) / IMAGES,
                "test_loss": len(wrong) / 1000,
            }
        )
        self.wrong = list(wrong)

    def predictions(self):
        labels = np.zeros(IMAGES, dtype=np.uint8)
        predicted = labels.copy()
        predicted[self.wrong] = 1
        return {"labels": labels, "predicted": predicted}


@pytest.fixture
def stand_in(executed):
    return lambda setting, seed, wrong, **changed: StandInRun(
        load_run(executed(setting).run.folder), seed, wrong, **changed
    )


def test_only_runs_that_differ_in_the_seed_alone_are_put_together(stand_in, executed):
    runs = [
        stand_in("a1", 1, range(10)),
        stand_in("a1", 0, range(20)),
        stand_in("a1", 0, range(5), precision="mixed_bfloat16"),
        stand_in("c7", 0, range(3)),
        executed("a1").run,  # of two epochs, on other data
    ]
    groups = over_seeds(runs)
    assert {s: [run.record.run.seed for run in group] for s, group in groups.items()} == {
        "a1": [0, 1],
        "c7": [0],
    }
    assert list(over_seeds(runs, precision="mixed_bfloat16")) == ["a1"]


def test_the_table_shows_n_mean_deviation_and_the_interval_by_students_t(stand_in):
    errors = [10, 20, 30, 20, 20]
    runs = [stand_in("a1", seed, range(count)) for seed, count in enumerate(errors)]
    (row,) = spread_table(over_seeds(runs)).rows
    _, n, mean, interval, best, worst, loss, loss_interval, *_ = row
    accuracies = 100 - np.array(errors) / 10
    half = stats.t.ppf(0.975, df=4) * accuracies.std(ddof=1) / np.sqrt(5)
    assert (n, mean) == (5, "98.00 ± 0.71")
    assert interval == f"{98 - half:.2f} to {98 + half:.2f}"
    assert (best, worst) == ("99.00", "97.00")
    assert loss == "0.0200 ± 0.0071"
    assert loss_interval == f"{0.02 - half / 100:.4f} to {0.02 + half / 100:.4f}"


def test_one_run_has_no_spread(stand_in):
    table = spread_table(over_seeds([stand_in("a1", 0, range(10))]))
    ((_, n, mean, interval, *_),) = table.rows
    assert (n, mean, interval) == (1, "99.00", "one run: not known")
    groups = over_seeds([stand_in("a1", 0, range(10)), stand_in("a2", 0, range(20))])
    assert seed_tests(groups) == {}
    assert "n = 1: not known" in str(difference_matrix(groups, {}, {}))
    assert "one run only" in ranking_text(groups, {}, image_tests(groups))


def test_a_readers_own_runs_stand_beside_the_reference_with_their_spread(stand_in):
    own = [
        stand_in("a1", 0, range(10)),
        stand_in("a2", 3, range(40)),
        stand_in("a1", 1, range(20)),
    ]
    references = {"a1": [stand_in("a1", seed, range(n)) for seed, n in enumerate([5, 7])]}
    several, one = (row[-5:] for row in own_table(own, references).rows)
    assert several == [
        "2 seeds",
        "0.0150 ± 0.0071",
        "98.50 ± 0.71",
        "0.0060 ± 0.0014",
        "99.40 ± 0.14",
    ]
    assert one == ["3", "0.0400", "96.00", "-", "-"]
    # Made by other code cells, it is no further seed of the same.
    own[2].record = own[2].record.model_copy(update={"code_sha256": "another"})
    assert len(own_table(own, references).rows) == 3


def test_the_first_screens_sentence_has_the_spread_and_how_many_seeds(stand_in):
    runs = [stand_in("a1", seed, range(count)) for seed, count in enumerate([30, 10, 20])]
    assert reference_sentence(runs).startswith(
        "test accuracy 98.00 ± 1.00 % (mean ± standard deviation of 3 seeds); "
        "with seed 0 97.00 %, test loss 0.0300, "
    )
    assert reference_sentence(runs[:1]).startswith("test accuracy 97.00 % (one run, seed 0), ")


def test_the_first_screens_sentence_counts_the_cores_that_the_run_had(stand_in):
    run = stand_in("a1", 0, range(30))
    environment = {"cores": 8, "threads": 1}
    run.record = run.record.model_copy(update={"environment": environment})
    assert reference_sentence([run]).endswith(" in all on 1 processor core")
    del environment["threads"]  # as in the first records
    assert reference_sentence([run]).endswith(" in all on 8 processor cores")


def test_the_image_test_is_mcnemars_exact_one_and_corrected_for_the_pairs(stand_in):
    groups = over_seeds(
        [
            stand_in("a1", 0, range(10)),
            stand_in("a2", 0, range(2, 10)),  # right on 2 more, wrong on none more
            stand_in("b", 0, range(30, 60)),  # 30 others
        ]
    )
    raw = {
        ("a1", "a2"): stats.binomtest(0, 2).pvalue,
        ("a1", "b"): stats.binomtest(10, 40).pvalue,
        ("a2", "b"): stats.binomtest(8, 38).pvalue,
    }
    # Holm: the smallest p three times, the next twice, the largest once, never falling.
    expected = {
        ("a2", "b"): 3 * raw["a2", "b"],
        ("a1", "b"): 2 * raw["a1", "b"],
        ("a1", "a2"): raw["a1", "a2"],
    }
    assert expected["a2", "b"] < expected["a1", "b"]
    assert image_tests(groups) == pytest.approx(expected)


def test_the_image_tests_of_several_seeds_are_put_together_by_the_middle_one(stand_in):
    a1 = [stand_in("a1", seed, range(count)) for seed, count in enumerate([10, 20, 30, 99])]
    # Of the three seeds that both have: 2, 8 and 30 wrong that A.1 has right too, none more.
    a2 = [
        stand_in("a2", seed, range(fewer, 10 * (seed + 1))) for seed, fewer in enumerate([2, 8, 30])
    ]
    middle = stats.binomtest(0, 8).pvalue
    groups = over_seeds([*a1, *a2])
    image_p = image_tests(groups)
    assert image_p == pytest.approx({("a1", "a2"): middle * 3 / 2})
    # Which is better is told by the runs compared: A.1's fourth is not.
    assert difference_matrix(groups, {}, image_p).rows[1][1] == "CNN A.2, p = 0.012"


def test_two_models_that_are_right_on_the_same_images_are_not_told_apart(stand_in):
    groups = over_seeds([stand_in("a1", 0, range(10)), stand_in("a2", 0, range(10))])
    assert image_tests(groups) == {("a1", "a2"): 1.0}


def test_seeds_that_contradict_each_other_show_no_better_model(stand_in):
    a1 = [stand_in("a1", seed, range(count)) for seed, count in enumerate([0, 40])]
    a2 = [stand_in("a2", seed, range(count)) for seed, count in enumerate([30, 0])]
    assert image_tests(over_seeds([*a1, *a2])) == {("a1", "a2"): 1.0}
    # Where both agree, the weaker counts.
    a2 = [stand_in("a2", seed, range(count)) for seed, count in enumerate([30, 60])]
    expected = stats.binomtest(0, 20).pvalue
    assert image_tests(over_seeds([*a1, *a2])) == pytest.approx({("a1", "a2"): expected})


def test_the_seed_test_tells_apart_what_differs_and_only_that(stand_in):
    def runs(setting, errors):
        return [stand_in(setting, seed, range(count)) for seed, count in enumerate(errors)]

    groups = over_seeds(
        runs("a1", [20, 22, 19, 21]) + runs("a2", [21, 20, 22, 20]) + runs("b", [5, 6, 4, 5])
    )
    p_values = seed_tests(groups)
    assert p_values["a1", "b"] < 0.001
    assert p_values["a1", "a2"] > 0.3
    text = str(difference_matrix(groups, p_values, image_tests(groups)))
    assert "CNN B, p < 0.001" in text
    assert "not shown, p = " in text


def test_the_ranking_is_answered_in_words(stand_in):
    order = [("b", 5), ("c7", 6), ("a2", 40), ("a1", 80)]
    runs = [stand_in(setting, 0, range(count)) for setting, count in order]
    assert set(dict(order)) < set(SETTINGS)
    groups = over_seeds(runs)
    text = ranking_text(groups, seed_tests(groups), image_tests(groups))
    assert "CNN B (99.50 %) > CNN C, 7X7 first (99.40 %) > CNN A.2 (96.00 %)" in text
    assert "CNN B over CNN C, 7X7 first: the same order here, but it may be chance." in text
    assert "CNN C, 7X7 first over CNN A.1: stands (shown over test images)." in text
    assert (
        "CNN A.1 over CNN A.2: not so here; the order is the other way round "
        "(shown over test images)." in text
    )


def test_the_precision_table_tells_a_cost_from_chance(stand_in):
    def accuracies(counts, precision):
        runs = [
            stand_in("a1", seed, range(wrong), precision=precision)
            for seed, wrong in enumerate(counts)
        ]
        return over_seeds(runs, precision)

    full = accuracies([10, 11, 12, 11, 10], "float32")
    worse = precision_table(
        full, accuracies([20, 22, 21, 20, 23], "mixed_bfloat16"), "mixed_bfloat16"
    )
    (row,) = worse.rows
    assert row[:2] == [SETTINGS["a1"].title, "5 and 5"]
    # 10.8 errors in 1,000 against 21.2; the interval as scipy gives it, the other way round.
    assert row[4] == "-1.04"
    low, high = stats.ttest_ind(
        [98.0, 97.8, 97.9, 98.0, 97.7], [99.0, 98.9, 98.8, 98.9, 99.0], equal_var=False
    ).confidence_interval(0.95)
    assert row[5] == f"{low:+.2f} to {high:+.2f}"
    assert row[6] == "a difference, p < 0.001"
    same = precision_table(
        full, accuracies([11, 10, 10, 12, 11], "mixed_bfloat16"), "mixed_bfloat16"
    )
    assert same.rows[0][6] == "no difference shown, p = 1.000"
    assert precision_table(full, {}, "mixed_bfloat16").rows == []
