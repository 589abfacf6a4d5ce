"""Measure training speed side by side, in rounds; write the table and the figure.

Usage, by make bench: python benchmarks/measure.py [--models times a1 a2] [--rounds 3]

Every measurement has a process of its own. A round of "times" trains every setting's notebook: an
epoch of the original's networks, D and E whole. A round of a model trains it for an epoch in each
way, one after the other, so that a change of the machine's pace touches all alike; ratios are
taken within a round, and their median is shown. times.json and measurements.json hold one machine
each: what is measured anew takes the place of the same model's older rounds, and on another
machine, or with other versions, all is begun anew. Each round is kept as soon as it is whole. With
--rounds 0 only the page is written.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import geometric_mean, mean, median

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from mnist_utils.headless import CPU_COUNT, THREADS  # noqa: E402
from mnist_utils.parameters import SETTINGS  # noqa: E402
from mnist_utils.plotting import figure  # noqa: E402
from mnist_utils.runs import processor, write_whole  # noqa: E402

COMPARED = ("a2", "a1", "c", "b")  # those that the original has, quickest first
TIMES_OF_ALL = "times"
PRECISIONS = {"float32": "float32", "mixed_bfloat16": "bfloat16"}  # and what they are called
WAYS = {
    "original": "original's code",
    "float32": "notebook, float32",
    "mixed_bfloat16": "notebook, bfloat16",
    "pytorch": "PyTorch, float32",
}
COLOURS = ("#7d7d7d", "tab:blue", "tab:cyan", "tab:orange")
AROUND = {"1_model_a1": "A.1's notebook besides its training", "8_comparison": "the comparison"}
SIDE = "side_by_side"
SIDE_BY_SIDE = ("a2", "a1")  # for the others it would double hours
ONE_THREAD = dict.fromkeys(THREADS, "1")
IMAGES = 3 * 60_000 + 10_000  # of an epoch: a training step costs about three passes forward
PACKAGES = {"TensorFlow": "tensorflow", "Keras": "keras", "PyTorch": "torch", "NumPy": "numpy"}
MEASUREMENTS, TIMES = HERE / "measurements.json", HERE / "times.json"
BEGIN, END = "<!-- {}: written by make bench -->\n", "<!-- end -->"

Row = dict[str, dict[str, float]]  # a model's round: of each way "seconds" and "megabytes"


def run_one(*arguments: str, threads: dict[str, str] | None = None) -> dict[str, float]:
    """Measure in a process of its own; end with its log if it fails."""
    command = [sys.executable, str(HERE / "one.py"), *arguments]
    environment = os.environ | (threads or {})
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def run_side_by_side(model: str) -> dict[str, float]:
    """Measure as many one-thread runs at a time as there are cores.

    The seconds are those of one run, divided by their number: what a run costs the machine.
    """
    with ThreadPoolExecutor(CPU_COUNT) as pool:
        runs = pool.map(lambda _: run_one(model, "float32", threads=ONE_THREAD), range(CPU_COUNT))
        return {"seconds": mean(run["seconds"] for run in runs) / CPU_COUNT}


def measure(models: list[str], rounds: int) -> None:
    """Measure the models in all ways and rounds; keep what is known of the others."""
    machine = describe_machine()
    data = json.loads(MEASUREMENTS.read_text()) if MEASUREMENTS.exists() else {}
    if models and data.get("machine") != machine:
        print("Another machine, or other versions, than those recorded: all is begun anew.")
        data = {"machine": machine, "macs": {}, "rounds": {}}
    fresh: dict[str, list] = {}
    for number in range(rounds):
        for model in models:
            row = measure_model(model, number, "bfloat16" in machine["processor"])
            data["macs"][model] = row["float32"]["macs"]
            fresh.setdefault(model, []).append({way: tidy(one) for way, one in row.items()})
            data["rounds"] |= fresh
            write(MEASUREMENTS, data)


def measure_times(rounds: int) -> None:
    """Measure the seconds of every setting's whole training, every other round backwards."""
    rows: list[dict[str, float]] = []
    for number in range(rounds):
        row = {}
        for setting in list(SETTINGS)[:: -1 if number % 2 else 1]:
            seconds = SETTINGS[setting].epochs * run_one(setting, "float32")["seconds"]
            row[setting] = round(seconds, 1)
            print(f"times, round {number + 1}, {setting}: {seconds:.1f} s", flush=True)
        rows.append(row)
        write(TIMES, {"machine": describe_machine(), "rounds": rows})


def write(path: Path, data: dict) -> None:
    write_whole(path, (json.dumps(data, indent=1) + "\n").encode())


def tidy(one: dict[str, float]) -> dict[str, float]:
    """Return what is kept of one measurement, in as many digits as mean anything."""
    digits = {"seconds": 3, "megabytes": 0, "giga_macs_per_second": 1}
    return {name: round(one[name], digits[name] or None) for name in digits if name in one}


def measure_model(model: str, number: int, with_bfloat16: bool) -> Row:
    """Measure a model in all its ways, in the round of this number."""
    precisions = list(PRECISIONS)[: 1 + with_bfloat16]
    ways = ["original", *precisions, "pytorch", *([SIDE] if model in SIDE_BY_SIDE else [])]
    row = {name: run_one(name, "around") for name in AROUND if model == "a1"}
    row |= {f"gemm_{precision}": run_one("gemm", precision) for precision in precisions}
    for way in ways[:: -1 if number % 2 else 1]:  # every other round goes the other way round
        row[way] = run_side_by_side(model) if way == SIDE else run_one(model, way)
        print(f"{model}, round {number + 1}, {way}: {row[way]['seconds']:.1f} s", flush=True)
    return row


def describe_machine() -> dict[str, str | int]:
    """Return processor, cores and versions; never a host or a user."""
    return {
        "processor": processor(),
        "cores": CPU_COUNT,
        "system": platform.system(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES.values()},
    }


def training_seconds() -> dict[str, float]:
    """Return the seconds that each setting's whole training takes, in float32."""
    rounds = json.loads(TIMES.read_text())["rounds"]
    return {setting: median(row[setting] for row in rounds) for setting in rounds[0]}


def report() -> None:
    """Write the tables into README.md, and the figure beside it."""
    data, times = json.loads(MEASUREMENTS.read_text()), json.loads(TIMES.read_text())
    rounds = {model: data["rounds"][model] for model in SETTINGS if model in data["rounds"]}
    whole = [describe(times["machine"], {len(times["rounds"])}), times_table(times["rounds"])]
    ways = [describe(data["machine"], set(map(len, rounds.values()))), table(rounds, data["macs"])]
    for name, text in AROUND.items():
        if seconds := [row[name]["seconds"] for row in rounds.get("a1", []) if name in row]:
            ways.append(f"From its kernel's start, {text} takes {median(seconds):.1f} s.")
    page = HERE / "README.md"
    text = page.read_text(encoding="utf-8")
    for name, parts in (("times", whole), ("ways", ways)):
        begin = BEGIN.format(name)
        before, rest = text.split(begin)
        text = before + begin + "\n\n".join(parts) + "\n" + rest[rest.index(END) :]
    page.write_text(text, encoding="utf-8", newline="\n")
    draw(rounds)


def describe(machine: dict[str, str | int], counts: set[int]) -> str:
    """Return on what machine, with what versions and in how many rounds it was measured."""
    rounds = f"{' or '.join(map(str, sorted(counts)))} round{'s' * (counts != {1})}"
    packages = ", ".join(f"{name} {machine[key]}" for name, key in PACKAGES.items())
    return (
        f"{machine['processor']}; {machine['cores']} cores, {machine['system']}; {packages}, "
        f"Python {machine['python']}. Medians of {rounds}."
    )


def times_table(rounds: list[dict[str, float]]) -> str:
    """Return every setting's whole training, in Markdown; its share of B's by rounds."""
    lines = [["", *(SETTINGS[setting].title for setting in rounds[0])]]
    seconds = [[row[setting] for row in rounds] for setting in rounds[0]]
    lines.append(["whole training, float32, seconds", *(cell(s, seconds_text) for s in seconds)])
    times = [[row["b"] / row[setting] for row in rounds] for setting in rounds[0]]
    lines.append(["B takes so many times as long", *(cell(t, "{:,.1f}".format) for t in times)])
    return markdown(lines)


def markdown(lines: list[list]) -> str:
    """Return a table in Markdown, its first column to the left and the others to the right."""
    lines = [lines[0], ["---", *["---:"] * (len(lines[0]) - 1)], *lines[1:]]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def cell(values: list[float], form: Callable[[float], str]) -> str:
    """Return the median, and where the rounds are far apart the lowest and the highest."""
    apart = f" ({form(min(values))} to {form(max(values))})"
    return form(median(values)) + apart * (max(values) > 1.1 * min(values))


def table(rounds: dict[str, list[Row]], macs: dict[str, int]) -> str:
    """Return all models in all ways, in Markdown; a way that a model has not is a dash."""
    lines = [["", *(SETTINGS[model].title for model in rounds), "geometric mean"]]

    def add(label: str, form: Callable[[float], str], of: Callable[[str, Row], float]) -> None:
        cells, medians = [], []
        for model, rows in rounds.items():
            try:
                values = [of(model, row) for row in rows]
            except KeyError:
                cells.append("–")
                continue
            medians.append(median(values))
            cells.append(cell(values, form))
        over_all = f"{geometric_mean(medians):.2f}" if "times" in label and medians else ""
        lines.append([label, *cells, over_all])

    for way, name in WAYS.items():
        add(f"seconds an epoch: {name}", seconds_text, lambda _, row, way=way: row[way]["seconds"])
    for way, to, label in (
        ("float32", "original", "float32, times as fast as the original's code"),
        ("mixed_bfloat16", "original", "bfloat16, times as fast as the original's code"),
        ("float32", "pytorch", "float32, times as fast as PyTorch"),
        (SIDE, "float32", "one-thread runs side by side, times as fast as one run"),
    ):
        add(label, "{:.2f}".format, lambda _, row, way=way, to=to: ratio(row, way, to))
    for way, name in PRECISIONS.items():

        def share(model: str, row: Row, way: str = way) -> float:
            rate = row[f"gemm_{way}"]["giga_macs_per_second"] * 1e9
            return macs[model] * IMAGES / row[way]["seconds"] / rate

        add(f"share of the GEMM rate, {name}", "{:.2f}".format, share)
    for way, name in WAYS.items():
        add(f"peak MB: {name}", "{:,.0f}".format, lambda _, row, way=way: row[way]["megabytes"])
    return markdown(lines)


def ratio(row: Row, way: str, to: str) -> float:
    """Return how many times as fast ``way`` was as ``to``, in one round."""
    return row[to]["seconds"] / row[way]["seconds"]


def seconds_text(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds < 100 else f"{seconds:,.0f}"


def draw(rounds: dict[str, list[Row]]) -> None:
    """Draw each way's speed, as a multiple of the original's code."""
    width = 0.8 / len(WAYS)
    with figure(size=(9, 3.6)) as (fig, ax):
        for place, (way, label) in enumerate(WAYS.items()):
            done = [model for model, rows in rounds.items() if all(way in row for row in rows)]
            heights = [median(ratio(row, way, "original") for row in rounds[m]) for m in done]
            centres = [list(rounds).index(m) + (place - 1.5) * width for m in done]
            bars = ax.bar(centres, heights, width * 0.92, label=label, color=COLOURS[place])
            ax.bar_label(bars, fmt="%.2f", fontsize=10)
        ax.set_xticks(range(len(rounds)), [SETTINGS[model].title for model in rounds])
        ax.set_ylabel("speed, original's code = 1")
        ax.spines[["top", "right"]].set_visible(False)
        fig.legend(loc="outside upper center", ncols=len(WAYS), frameon=False)
        fig.savefig(HERE / "speed.png", dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser()
    choices = (TIMES_OF_ALL, *COMPARED)
    parser.add_argument("--models", nargs="+", default=choices, choices=choices)
    parser.add_argument("--rounds", type=int, default=3, choices=range(100), metavar="0-99")
    options = parser.parse_args()
    if options.rounds:
        if TIMES_OF_ALL in options.models:
            measure_times(options.rounds)
        measure([model for model in options.models if model != TIMES_OF_ALL], options.rounds)
    report()


if __name__ == "__main__":
    main()
