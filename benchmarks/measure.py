"""Measure training speed side by side, in rounds, and write the table and the figure.

Usage, by make bench: python benchmarks/measure.py [--models a1 a2] [--rounds 3] [--report]

Every measurement is one epoch in a process of its own. In a round each model is trained in each
way, one after the other, so that a change of the machine's pace touches all alike; ratios are
taken within a round, and their median is shown. Models measured anew take the place of their
older measurements in measurements.json.
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

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from mnist_utils.comparison import reference_folder, reference_runs  # noqa: E402
from mnist_utils.data import load_mnist  # noqa: E402
from mnist_utils.parameters import SETTINGS  # noqa: E402
from mnist_utils.plotting import STYLE  # noqa: E402
from mnist_utils.runs import load_runs, processor  # noqa: E402
from mnist_utils.sweep import ONE_THREAD  # noqa: E402

MODELS = ("a2", "a1", "c", "b")  # quickest first
WAYS = {
    "original": "original's code",
    "float32": "notebook, float32",
    "mixed_bfloat16": "notebook, bfloat16",
    "pytorch": "PyTorch, float32",
}
SWEEP = "side_by_side"
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
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as pool:
        running = [pool.submit(run_one, model, "float32", threads=ONE_THREAD) for _ in range(cores)]
        seconds = [future.result()["seconds"] for future in running]
    return {"seconds": mean(seconds) / cores}


def measure(models: list[str], rounds: int) -> None:
    """Measure the models in all ways and rounds; keep what older runs know of the others."""
    everything = {"machine": describe_machine(), "rounds": {}}
    if MEASUREMENTS.exists():
        older = json.loads(MEASUREMENTS.read_text())
        if older["machine"] == everything["machine"]:
            everything = older
    for model in models:
        if model in BUDGETS:
            measure_budget(model, rounds, everything)
            continue
        done = []
        for number in range(rounds):
            row = {"gemm": {way: run_one("gemm", way) for way in ("float32", "bfloat16")}}
            # Every other round goes the other way round.
            for way in [*WAYS, SWEEP][:: -1 if number % 2 else 1]:
                row[way] = run_side_by_side(model) if way == SWEEP else run_one(model, way)
                seconds = row[way]["seconds"]
                print(f"{model}, round {number + 1}, {way}: {seconds:.1f} s", flush=True)
            done.append(row)
        everything["rounds"][model] = done
        MEASUREMENTS.write_text(json.dumps(everything, indent=1) + "\n")


def measure_budget(setting: str, rounds: int, everything: dict) -> None:
    """Measure a budget's whole runs, and between them an epoch of the model it is measured by.

    A run is an ordinary one, seed by seed, and stays in runs/.
    """
    (model, precisions), done = BUDGETS[setting], []
    for seed in range(rounds):
        row = {}
        for way in [model, *precisions][:: -1 if seed % 2 else 1]:
            arguments = (way, "float32") if way == model else (setting, way, str(seed))
            row[way] = run_one(*arguments)
            print(f"{setting}, round {seed + 1}, {way}: {row[way]['seconds']:.1f} s", flush=True)
        done.append(row)
    everything["budgets"] = everything.get("budgets", {}) | {setting: done}
    MEASUREMENTS.write_text(json.dumps(everything, indent=1) + "\n")


def measure_around(rounds: int) -> None:
    """Measure what A.1's notebook takes over the bare loop, and the comparison as a whole."""
    everything = json.loads(MEASUREMENTS.read_text())
    done = []
    for _ in range(rounds):
        row = {f"a1 {way}": run_one("a1", way) for way in ("whole", "bare")}
        row["comparison"] = run_one("comparison", "opened")
        done.append(row)
        print(*(f"{name}: {one['seconds']:.1f} s" for name, one in row.items()), flush=True)
    everything["around"] = done
    MEASUREMENTS.write_text(json.dumps(everything, indent=1) + "\n")


def describe_machine() -> dict[str, str | int]:
    """Return processor, cores and versions; never a host or a user."""
    from importlib.metadata import version

    packages = ("tensorflow", "keras", "torch", "numpy")
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
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
    gemm = "bfloat16" if way == "mixed_bfloat16" else "float32"
    return median(
        total / row[way]["seconds"] / row["gemm"][gemm]["macs_per_second"] for row in rounds
    )


def report() -> None:
    """Write the tables into README.md, and the figure beside it."""
    everything = json.loads(MEASUREMENTS.read_text())
    measured = everything["rounds"]
    rounds = {model: measured[model] for model in MODELS if model in measured}
    parts = [
        machine_text(everything["machine"]),
        speed_table(rounds),
        sweep_table(rounds),
        memory_table(rounds),
    ]
    if "a1" in rounds and "around" in everything:
        epoch = median(row["float32"]["seconds"] for row in rounds["a1"])
        parts.append(around_text(everything["around"], epoch))
    parts += [budget_table(name, done) for name, done in everything.get("budgets", {}).items()]
    write_between_marks(HERE / "README.md", "\n\n".join(parts))
    draw(rounds)


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
    return f"{machine['processor']}, {machine['cores']} cores, {machine['system']}; {packages}."


def markdown(rows: list[list[str]]) -> str:
    head, *rest = rows
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rest]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def speed_table(rounds: dict[str, list[dict]]) -> str:
    """Return images a second in each way, and the ratios, in Markdown."""
    compared = [("float32", "original"), ("mixed_bfloat16", "original"), ("float32", "pytorch")]
    rows = [
        [
            "model",
            "rounds",
            *WAYS.values(),
            "float32 to original",
            "bfloat16 to original",
            "float32 to PyTorch",
            "share of GEMM, float32",
            "share of GEMM, bfloat16",
        ]
    ]
    images = len(load_mnist()[0][0])
    for model, done in rounds.items():
        rates = [f"{images / median(row[way]['seconds'] for row in done):,.0f}" for way in WAYS]
        cells = [spread(ratios(done, way, to)) for way, to in compared]
        shares = [f"{gemm_share(model, done, way):.2f}" for way in ("float32", "mixed_bfloat16")]
        rows.append([SETTINGS[model].title, str(len(done)), *rates, *cells, *shares])
    means = [
        f"{geometric_mean(median(ratios(done, way, to)) for done in rounds.values()):.2f}"
        for way, to in compared
    ]
    rows.append(["geometric mean", "", "", "", "", "", *means, "", ""])
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
        [SETTINGS[setting].title, "rounds", "seconds in all", f"share of ten epochs of {title}"]
    ]
    for precision in precisions:
        seconds = [row[precision]["seconds"] for row in rounds]
        shares = [row[precision]["seconds"] / (10 * row[other]["seconds"]) for row in rounds]
        rows.append(
            [
                precision,
                str(len(rounds)),
                spread(seconds, ".1f"),
                spread(shares, ".2%"),
            ]
        )
    epochs = [row[other]["seconds"] for row in rounds]
    return f"{markdown(rows)}\n\nAn epoch of {title}, in seconds: {spread(epochs, '.1f')}."


def around_text(rounds: list[dict], epoch: float) -> str:
    """Return what a notebook adds around its training; ``epoch`` is the seconds of one of A.1."""
    added = [row["a1 whole"]["seconds"] - row["a1 bare"]["seconds"] for row in rounds]
    comparison = [row["comparison"]["seconds"] for row in rounds]
    memory = median(row["comparison"]["peak_megabytes"] for row in rounds)
    return (
        f"What A.1's notebook, run by papermill, adds around a training of 10 epochs: "
        f"{median(added):.1f} s (n = {len(added)}, {min(added):.1f} to {max(added):.1f}), "
        f"{median(added) / (10 * epoch):.1%} of the training. `6_comparison` runs in "
        f"{median(comparison):.1f} s ({min(comparison):.1f} to {max(comparison):.1f}), from the "
        f"start of its kernel to the last cell, and takes {memory:,.0f} MB."
    )


def spread(values: list[float], form: str = ".2f") -> str:
    """Return the median of some values, with the lowest and the highest if there are several."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def memory_table(rounds: dict[str, list[dict]]) -> str:
    """Return the peak memory of each process, in Markdown."""
    rows = [["peak memory, MB", *WAYS.values()]]
    for model, done in rounds.items():
        peaks = [f"{median(row[way]['peak_megabytes'] for row in done):,.0f}" for way in WAYS]
        rows.append([SETTINGS[model].title, *peaks])
    return markdown(rows)


def draw(rounds: dict[str, list[dict]]) -> None:
    """Draw each way's speed, as a multiple of the original's code, for each model."""
    with plt.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(9, 3.6), layout="constrained")
        width = 0.8 / len(WAYS)
        for place, (way, label) in enumerate(WAYS.items()):
            values = [median(ratios(done, way, "original")) for done in rounds.values()]
            places = [i + (place - (len(WAYS) - 1) / 2) * width for i in range(len(rounds))]
            bars = ax.bar(places, values, width * 0.92, label=label)
            ax.bar_label(bars, fmt="%.2f", fontsize=9)
        ax.set_xticks(range(len(rounds)), [SETTINGS[model].title for model in rounds])
        ax.set_ylabel("speed, the original's code = 1")
        ax.margins(y=0.12)
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
        fig.savefig(HERE / "speed.png", dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=ALL, choices=ALL)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="write the report, measure nothing")
    options = parser.parse_args()
    if not options.report:
        measure(options.models, options.rounds)
        if "a1" in options.models:
            measure_around(options.rounds)
    report()


if __name__ == "__main__":
    main()
