"""Measure what a run costs a sweep's client and scheduler; write docs/many_runs.md's tables.

Usage, by make bench-sweep: python benchmarks/many_runs.py [RUNS ...]

The tasks are real: model A.2's notebook travels out; a record, predictions and an executed
notebook of the real size come back, are checked and written. Only what the worker does is left
out: it executes no notebook. The scheduler and the workers, one a core, are processes of their own.
"""

import json
import os
import sys
import tempfile
import threading
import time
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import psutil
from dask.system import CPU_COUNT
from distributed.deploy.subprocess import SubprocessCluster

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from measure import markdown, write_between_marks  # noqa: E402

from mnist_utils import sweep  # noqa: E402
from mnist_utils.comparison import reference_runs  # noqa: E402
from mnist_utils.headless import code_sha256, notebook_path, read_notebook  # noqa: E402
from mnist_utils.runs import RECORD_FILE, load_runs  # noqa: E402

WAIT = 0.001  # seconds that the stand-in takes
PAGE = ROOT / "docs/many_runs.md"
COLUMNS = {
    "make_ms": "making a task, ms",
    "task_kb": "a task in memory, KB",
    "sweep_ms": "a run, ms of the clock",
    "client_ms": "of the client's processor",
    "scheduler_ms": "of the scheduler's processor",
    "resume_ms": "looking whether it is recorded, ms",
    "disk_kb": "a run on disk, KB",
    "first_half_mb": "client's peak in the first half, MB",
    "second_half_mb": "in the second half, MB",
}
MANY = (1_000, 100_000)
CORES = (2, 100, 1_000)


def make_stand_in():
    """Return a function for the workers: the files of A.2's reference run, for any seed."""
    run = reference_runs(load_runs(ROOT / "results")[0])["a2"]
    path = notebook_path("2_model_a2")
    predictions = run.folder / run.record.predictions.file
    record = json.loads((run.folder / RECORD_FILE).read_text())
    record["code_sha256"] = code_sha256(read_notebook(path))
    outcome, wait = sweep.Outcome, WAIT

    def stand_in(notebook, given, data, versions):
        time.sleep(wait)
        record["run"]["seed"] = given.get("seed", 0)
        files = {
            "executed.ipynb": path.read_bytes(),
            predictions.name: predictions.read_bytes(),
            RECORD_FILE: json.dumps(record).encode(),
        }
        return outcome(files, None)

    return stand_in


class Memory:
    """The client's memory in bytes, looked at ten times a second."""

    def __enter__(self):
        self.samples, self._done = [], threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self):
        process = psutil.Process()
        while not self._done.wait(0.1):
            self.samples.append(process.memory_info().rss)

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()


def processor_seconds(process: psutil.Process) -> float:
    """Return the processor time that all threads of a process have taken."""
    times = process.cpu_times()
    return times.user + times.system


def measure(runs: int) -> dict:
    """Sweep over so many seeds of A.2; return milliseconds, kilobytes and megabytes."""
    with (
        tempfile.TemporaryDirectory() as results,
        open(os.devnull, "w") as nowhere,
        SubprocessCluster(
            n_workers=CPU_COUNT, threads_per_worker=1, dashboard_address=None
        ) as cluster,
    ):
        processes = {
            "client": psutil.Process(),
            "scheduler": psutil.Process(cluster.scheduler.process.pid),
        }
        wanted = (["a2"], range(runs), {"results_dir": [results]})
        tracemalloc.start()
        tasks = sweep.make_tasks(*wanted)
        task_bytes, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        before = time.perf_counter()
        tasks = sweep.make_tasks(*wanted)
        made = time.perf_counter()
        idle = {name: processor_seconds(process) for name, process in processes.items()}
        with Memory() as memory, redirect_stdout(nowhere):
            assert sweep.run_sweep(tasks, cluster.scheduler_address) == []
        swept = time.perf_counter()
        busy = {name: processor_seconds(process) for name, process in processes.items()}
        with redirect_stdout(nowhere):
            assert sweep.run_sweep(tasks) == []  # all recorded: nothing to do but look
        looked = time.perf_counter()
        assert len(load_runs(Path(results))[0]) == runs
        files = [path for path in Path(results).rglob("*") if path.is_file()]
        disk = sum(path.stat().st_size for path in files)
        middle = len(memory.samples) // 2
    return {
        "runs": runs,
        "make_ms": 1e3 * (made - before) / runs,
        "sweep_ms": 1e3 * (swept - made) / runs,
        **{f"{name}_ms": 1e3 * (busy[name] - idle[name]) / runs for name in processes},
        "resume_ms": 1e3 * (looked - swept) / runs,
        "task_kb": task_bytes / 1e3 / runs,
        "disk_kb": disk / 1e3 / runs,
        "first_half_mb": max(memory.samples[:middle]) / 1e6,
        "second_half_mb": max(memory.samples[middle:]) / 1e6,
    }


def measured_table(rows: list[dict]) -> str:
    """Return the measurements in Markdown."""
    head = ["runs", *COLUMNS.values()]
    cells = [[f"{row['runs']:,}", *(f"{row[name]:,.1f}" for name in COLUMNS)] for row in rows]
    return markdown([head, *cells])


def needs_table(last: dict) -> str:
    """Return in Markdown what many runs need, from what one costs the client and a core.

    ``last`` is a row of measure().
    """
    all_minutes = core_minutes()
    minutes, longest = mean(all_minutes), max(all_minutes)
    rows = [["", *(f"{runs:,} runs" for runs in MANY)]]

    def add(name: str, need) -> None:
        rows.append([name, *(need(runs) for runs in MANY)])

    add("core hours", lambda runs: f"{runs * minutes / 60:,.0f}")
    for cores in CORES:
        add(
            f"hours on {cores:,} cores",
            lambda runs, cores=cores: f"{max(runs * minutes / cores, longest) / 60:,.1f}",
        )
    add("minutes to hand out and write", lambda runs: f"{runs * last['sweep_ms'] / 6e4:,.1f}")
    add("minutes to find what is recorded", lambda runs: f"{runs * last['resume_ms'] / 6e4:,.1f}")
    add("GB that come back, and of disk", lambda runs: f"{runs * last['disk_kb'] / 1e6:,.1f}")
    add("MB of the client's tasks", lambda runs: f"{runs * last['task_kb'] / 1e3:,.1f}")
    busy = minutes * 60 / (last["sweep_ms"] / 1e3)
    return markdown(rows) + (
        f"\n\nA run takes {minutes:.0f} core-minutes in the mean over the settings, by the "
        f"reference runs, and {last['sweep_ms']:.0f} ms to be handed out and written, by the last "
        f"row above. So one client with one scheduler keeps about {round(busy, -3):,.0f} cores "
        f"busy. No sweep is shorter than its longest run, {longest:.0f} core-minutes."
    )


def core_minutes() -> list[float]:
    """Return what the reference run of each setting takes of one core, in minutes."""
    runs = reference_runs(load_runs(ROOT / "results")[0]).values()
    return [run.record.total_seconds / 60 * run.record.threads for run in runs]


def measure_alone(runs: int) -> dict:
    sweep.run_on_worker = make_stand_in()
    return measure(runs)


def main() -> None:
    rows = []
    for runs in map(int, sys.argv[1:] or ["200", "1000", "5000"]):
        # Each in a process of its own: memory that one has let go would hide what the next takes.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            rows.append(process.submit(measure_alone, runs).result())
        print(json.dumps(rows[-1]), flush=True)
    write_between_marks(PAGE, measured_table(rows) + "\n\n" + needs_table(rows[-1]))


if __name__ == "__main__":
    main()
