"""Measure training speed side by side, in rounds, and write the table and the figure.

Usage, by make bench: python benchmarks/measure.py [--models a1 a2] [--rounds 3] [--add]
       python benchmarks/measure.py --report

Every measurement has a process of its own; most are one epoch, D's are whole runs. In a round each
model is trained in each way, one after the other, so that a change of the machine's pace touches
all alike; ratios are taken within a round, and their median is shown. measurements.json keeps
machines apart, and the versions of what they ran; models measured anew take the place of their
older measurements on the same machine with the same versions, or with --add come after them. Each
round is kept as soon as it is whole.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import geometric_mean, mean, median

import matplotlib.pyplot as plt
from dask.system import CPU_COUNT

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from mnist_utils.comparison import reference_folder, reference_runs  # noqa: E402
from mnist_utils.data import load_mnist  # noqa: E402
from mnist_utils.parameters import SETTINGS  # noqa: E402
from mnist_utils.plotting import STYLE  # noqa: E402
from mnist_utils.runs import load_runs, processor, write_whole  # noqa: E402
from mnist_utils.sweep import ONE_THREAD  # noqa: E402

MODELS = ("a2", "a1", "c", "b")  # quickest first
PRECISIONS = {"float32": "float32", "mixed_bfloat16": "bfloat16"}  # and what they are called
WAYS = {
    "original": "original's code",
    "float32": "notebook, float32",
    "mixed_bfloat16": "notebook, bfloat16",
    "pytorch": "PyTorch, float32",
}
SWEEP = "side_by_side"
SWEPT = ("a2", "a1")  # for the others it would double hours
# D's budgets: the model whose ten epochs each is measured by, and the precisions.
BUDGETS = {"d-speed": ("b", ("float32", "mixed_bfloat16")), "d-accuracy": ("a1", ("float32",))}
ALL = (*MODELS, *BUDGETS)
MEASUREMENTS = HERE / "measurements.json"
BEGIN, END = "<!-- written by make bench -->\n", "<!-- end -->"


def run_one(*arguments: str, threads: dict[str, str] | None = None) -> dict:
    """Measure in a process of its own; end with its log if it fails."""
    command = [sys.executable, HERE / "one.py", *arguments]
    environment = os.environ | (threads or {})
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def run_side_by_side(model: str) -> dict:
    """Measure as many one-thread runs at a time as there are cores, as a sweep does.

    The seconds are those of one run, divided by their number: what a run costs the machine.
    """
    with ThreadPoolExecutor(CPU_COUNT) as pool:
        running = [
            pool.submit(run_one, model, "float32", threads=ONE_THREAD) for _ in range(CPU_COUNT)
        ]
        seconds = [future.result()["seconds"] for future in running]
    return {"seconds": mean(seconds) / CPU_COUNT}


def measure(models: list[str], rounds: int, add: bool = False) -> None:
    """Measure the models in all ways and rounds; keep what older runs know of the others.

    With ``add`` the models' own older rounds are kept as well.
    """
    machine = describe_machine()
    here = {"machine": machine, "rounds": {}, "budgets": {}, "around": []}
    everything = []
    for older in json.loads(MEASUREMENTS.read_text()) if MEASUREMENTS.exists() else []:
        if older["machine"] == machine:
            here = older
        else:
            everything.append(older)
    everything.append(here)

    def keep() -> None:
        write_whole(MEASUREMENTS, (json.dumps(everything, indent=1) + "\n").encode())

    precisions = ["float32"]
    if "bfloat16" in machine["processor"]:
        precisions.append("mixed_bfloat16")
    for model in models:
        kind, measure_one = (
            ("budgets", measure_budget) if model in BUDGETS else ("rounds", measure_model)
        )
        kept = here[kind].get(model, []) if add else []
        for number in range(len(kept), len(kept) + rounds):
            kept = [*kept, measure_one(model, number, precisions)]
            here[kind][model] = kept
            keep()
    if "a1" in models:
        kept = here["around"] if add else []
        for _ in range(rounds):
            kept = [*kept, measure_around()]
            here["around"] = kept
            keep()


def measure_model(model: str, number: int, precisions: list[str]) -> dict:
    """Measure a model in all ways, in the round of this number."""
    ways = ["original", *precisions, "pytorch", *([SWEEP] if model in SWEPT else [])]
    row = {"gemm": {precision: run_one("gemm", precision) for precision in precisions}}
    # Every other round goes the other way round.
    for way in ways[:: -1 if number % 2 else 1]:
        row[way] = run_side_by_side(model) if way == SWEEP else run_one(model, way)
        print(f"{model}, round {number + 1}, {way}: {row[way]['seconds']:.1f} s", flush=True)
    return row


def measure_budget(setting: str, seed: int, precisions: list[str]) -> dict:
    """Measure a budget's whole run, and beside it an epoch of the model it is measured by.

    The run is an ordinary one, its seed the round's number, and stays in runs/.
    """
    model, own = BUDGETS[setting]
    ways = [model, *(precision for precision in precisions if precision in own), "batches"]
    row = {}
    for way in ways[:: -1 if seed % 2 else 1]:
        if way == model:
            row[way] = run_one(way, "float32")
        elif way == "batches":
            row[way] = run_one(setting, way)
        else:
            row[way] = run_one(setting, way, str(seed))
        print(f"{setting}, round {seed + 1}, {way}: {row[way]['seconds']:.1f} s", flush=True)
    return row


def measure_around() -> dict:
    """Measure what A.1's notebook takes over the bare loop, and the comparison as a whole."""
    row = {f"a1 {way}": run_one("a1", way) for way in ("whole", "bare")}
    row["comparison"] = run_one("comparison", "opened")
    print(*(f"{name}: {one['seconds']:.1f} s" for name, one in row.items()), flush=True)
    return row


def describe_machine() -> dict[str, str | int]:
    """Return processor, cores and versions; never a host or a user."""
    from importlib.metadata import version

    packages = ("tensorflow", "keras", "torch", "numpy")
    return {
        "processor": processor(),
        "cores": CPU_COUNT,
        "system": platform.system(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def ratios(rounds: list[dict], way: str, to: str) -> list[float]:
    """Return for each round how many times as fast ``way`` was as ``to``."""
    return [row[to]["seconds"] / row[way]["seconds"] for row in rounds]


def gemm_share(model: str, rounds: list[dict], way: str) -> float:
    """Return the median share of the matrix product's rate that an epoch reached.

    A training step is counted as three forward passes: outputs, gradients of the inputs and of
    the weights. That the first layer needs no gradient of its input is left out of account.
    """
    macs = reference_runs(load_runs(reference_folder())[0])[model].record.architecture.macs
    (x_train, _), (x_test, _) = load_mnist()
    total = macs * (3 * len(x_train) + len(x_test))
    return median(
        total / row[way]["seconds"] / row["gemm"][way]["macs_per_second"] for row in rounds
    )


def report() -> None:
    """Write the tables of each machine into README.md, and the figure beside it."""
    everything = json.loads(MEASUREMENTS.read_text())
    page = "\n\n".join(part for machine in everything for part in machine_report(**machine))
    write_between_marks(HERE / "README.md", page)
    draw(everything)


def machine_report(machine: dict, rounds: dict, budgets: dict, around: list[dict]) -> list[str]:
    """Return a machine's part of the page: a heading, tables and a sentence or two."""
    rounds = in_order(rounds)
    parts = [f"## {machine['processor']}", machine_text(machine)]
    if rounds:
        parts += [speed_table(rounds), memory_table(rounds)]
    if swept := {model: done for model, done in rounds.items() if SWEEP in done[0]}:
        parts.append(sweep_table(swept))
    if "a1" in rounds and around:
        epoch = median(row["float32"]["seconds"] for row in rounds["a1"])
        parts.append(around_text(around, epoch))
    return parts + [budget_table(setting, done) for setting, done in budgets.items()]


def in_order(rounds: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Return the measured models, quickest first, in whatever order they were measured."""
    return {model: rounds[model] for model in MODELS if model in rounds}


def ways_of(rounds: dict[str, list[dict]]) -> dict[str, str]:
    """Return the ways in which these models were measured, with their labels."""
    return {way: label for way, label in WAYS.items() if all(way in r[0] for r in rounds.values())}


def write_between_marks(page: Path, content: str) -> None:
    """Put the content between the marks of a page in Markdown."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    text = before + BEGIN + content + "\n" + END + rest.split(END)[1]
    page.write_text(text, encoding="utf-8", newline="\n")


def machine_text(machine: dict) -> str:
    packages = ", ".join(
        f"{name} {machine[key]}"
        for name, key in (
            ("TensorFlow", "tensorflow"),
            ("Keras", "keras"),
            ("PyTorch", "torch"),
            ("NumPy", "numpy"),
            ("Python", "python"),
        )
    )
    return f"{machine['cores']} cores, {machine['system']}; {packages}."


def markdown(rows: list[list[str]]) -> str:
    head, *rest = rows
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rest]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def speed_table(rounds: dict[str, list[dict]]) -> str:
    """Return images a second in each way, and the ratios, in Markdown."""
    ways = ways_of(rounds)
    precisions = {way: name for way, name in PRECISIONS.items() if way in ways}
    others = {way: name for way, name in precisions.items() if way != "float32"}
    compared = {
        **{f"{name} to original": (way, "original") for way, name in precisions.items()},
        "float32 to PyTorch": ("float32", "pytorch"),
        **{f"{name} to float32": (way, "float32") for way, name in others.items()},
    }
    shares = [f"share of GEMM, {name}" for name in precisions.values()]
    rows = [["model", "rounds", *ways.values(), *compared, *shares]]
    images = len(load_mnist()[0][0])
    for model, done in rounds.items():
        rates = [f"{images / median(row[way]['seconds'] for row in done):,.0f}" for way in ways]
        cells = [spread(ratios(done, way, to)) for way, to in compared.values()]
        shares = [f"{gemm_share(model, done, way):.2f}" for way in precisions]
        rows.append([SETTINGS[model].title, str(len(done)), *rates, *cells, *shares])
    if len(rounds) == 1:
        return markdown(rows)
    means = [
        f"{geometric_mean(median(ratios(done, way, to)) for done in rounds.values()):.2f}"
        for way, to in compared.values()
    ]
    empty = [""] * len(precisions)
    rows.append(["geometric mean", "", *[""] * len(ways), *means, *empty])
    return markdown(rows)


def sweep_table(rounds: dict[str, list[dict]]) -> str:
    """Return how many runs an hour one-thread processes get done, in Markdown."""
    rows = [["model", "one-thread runs side by side, to one run with all threads"]]
    for model, done in rounds.items():
        rows.append([SETTINGS[model].title, spread(ratios(done, SWEEP, "float32"))])
    return markdown(rows)


def budget_table(setting: str, rounds: list[dict]) -> str:
    """Return the seconds of a budget's whole runs, and what share of the other model's they are."""
    other, precisions = BUDGETS[setting]
    title = SETTINGS[other].title
    rows = [
        [
            SETTINGS[setting].title,
            "rounds",
            "seconds in all",
            f"share of ten epochs of {title}",
            "peak memory, MB",
        ]
    ]
    for precision in precisions:
        if precision in rounds[0]:
            seconds = [row[precision]["seconds"] for row in rounds]
            shares = [row[precision]["seconds"] / (10 * row[other]["seconds"]) for row in rounds]
            memory = median(row[precision]["peak_megabytes"] for row in rounds)
            rows.append(
                [
                    PRECISIONS[precision],
                    str(len(rounds)),
                    spread(seconds, ".1f"),
                    spread(shares, ".2%"),
                    f"{memory:,.0f}",
                ]
            )
    epochs = [row[other]["seconds"] for row in rounds]
    memory = median(row[other]["peak_megabytes"] for row in rounds)
    text = (
        f"An epoch of {title} took {spread(epochs, '.1f')} s in the same rounds, and "
        f"{memory:,.0f} MB."
    )
    if "batches" in rounds[0]:
        batches = spread([row["batches"]["seconds"] for row in rounds], ".1f")
        text += f" An epoch's batches alone, drawn and distorted, take {batches} s."
    return f"{markdown(rows)}\n\n{text}"


def around_text(rounds: list[dict], epoch: float) -> str:
    """Return what a notebook adds around its training; ``epoch`` is the seconds of one of A.1."""
    added = [row["a1 whole"]["seconds"] - row["a1 bare"]["seconds"] for row in rounds]
    comparison = [row["comparison"]["seconds"] for row in rounds]
    memory = median(row["comparison"]["peak_megabytes"] for row in rounds)
    return (
        f"What A.1's notebook, run by papermill, adds around a training of 10 epochs: "
        f"{spread(added, '.1f')} s (n = {len(added)}), "
        f"{median(added) / (10 * epoch):.1%} of the training. `6_comparison` runs in "
        f"{spread(comparison, '.1f')} s, from the start of its kernel to the "
        f"last cell, and takes {memory:,.0f} MB."
    )


def spread(values: list[float], form: str = ".2f") -> str:
    """Return the median of some values, with the lowest and the highest if there are several."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def memory_table(rounds: dict[str, list[dict]]) -> str:
    """Return the peak memory of each process, in Markdown."""
    ways = ways_of(rounds)
    rows = [["peak memory, MB", *ways.values()]]
    for model, done in rounds.items():
        peaks = [f"{median(row[way]['peak_megabytes'] for row in done):,.0f}" for way in ways]
        rows.append([SETTINGS[model].title, *peaks])
    return markdown(rows)


def draw(everything: list[dict]) -> None:
    """Draw each way's speed, as a multiple of the original's code; a panel for each machine."""
    measured = [(m["machine"]["processor"], in_order(m["rounds"])) for m in everything]
    measured = [(title, rounds) for title, rounds in measured if rounds]
    colours = dict(zip(WAYS, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    width = 0.8 / len(WAYS)
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(
            len(measured), figsize=(9, 3.2 * len(measured)), layout="constrained", squeeze=False
        )
        for ax, (title, rounds) in zip(axes[:, 0], measured, strict=True):
            ways = ways_of(rounds)
            for place, way in enumerate(ways):
                values = [median(ratios(done, way, "original")) for done in rounds.values()]
                places = [i + (place - (len(ways) - 1) / 2) * width for i in range(len(rounds))]
                bars = ax.bar(places, values, width * 0.92, label=WAYS[way], color=colours[way])
                ax.bar_label(bars, fmt="%.2f", fontsize=9)
            ax.set_title(title)
            ax.set_xticks(range(len(rounds)), [SETTINGS[model].title for model in rounds])
            ax.set_ylabel("speed, the original's code = 1")
            ax.margins(y=0.12)
            ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
        fig.savefig(HERE / "speed.png", dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=ALL, choices=ALL)
    parser.add_argument("--rounds", type=int, default=3, choices=range(1, 100), metavar="1-99")
    parser.add_argument("--add", action="store_true", help="keep the models' older rounds too")
    parser.add_argument("--report", action="store_true", help="write the report, measure nothing")
    options = parser.parse_args()
    if not options.report:
        measure(options.models, options.rounds, options.add)
    report()


if __name__ == "__main__":
    main()
