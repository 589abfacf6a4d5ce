"""Measure what a run costs the client of a sweep, with stand-ins for the training.

Usage, by make bench-sweep: python benchmarks/many_runs.py [RUNS ...]

The tasks are real: model A.2's notebook travels out; a record, predictions and an executed
notebook of the real size come back, are checked and written. Only the training itself, on the
worker, is left out.
"""

import json
import os
import sys
import tempfile
import threading
import time
from contextlib import redirect_stdout
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from mnist_utils import sweep  # noqa: E402
from mnist_utils.comparison import reference_runs  # noqa: E402
from mnist_utils.headless import code_sha256, notebook_path, read_notebook  # noqa: E402
from mnist_utils.runs import RECORD_FILE, load_runs  # noqa: E402

WAIT = 0.001  # seconds that the stand-in takes


def make_stand_in():
    """Return a function for the workers: the files of A.2's reference run, for any seed."""
    run = reference_runs(load_runs(ROOT / "results")[0])["a2"]
    path = notebook_path("2_model_a2")
    predictions = run.folder / run.record.predictions.file
    record = json.loads((run.folder / RECORD_FILE).read_text())
    record["code_sha256"] = code_sha256(read_notebook(path))
    outcome, wait = sweep.Outcome, WAIT

    def stand_in(notebook, given, data):
        time.sleep(wait)
        record["run"]["seed"] = given.get("seed", 0)
        files = {
            "executed.ipynb": path.read_bytes(),
            predictions.name: predictions.read_bytes(),
            RECORD_FILE: json.dumps(record).encode(),
        }
        return outcome(files, None, wait)

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


def measure(runs: int) -> dict:
    """Sweep over so many seeds of A.2; return seconds and bytes."""
    with tempfile.TemporaryDirectory() as results, open(os.devnull, "w") as nowhere:
        process = psutil.Process()
        before = process.memory_info().rss
        began = time.perf_counter()
        tasks = sweep.make_tasks(["a2"], range(runs), {"results_dir": [results]})
        made, after_tasks = time.perf_counter(), process.memory_info().rss
        with Memory() as memory, redirect_stdout(nowhere):
            assert sweep.run_sweep(tasks) == 0
        swept = time.perf_counter()
        with redirect_stdout(nowhere):
            assert sweep.run_sweep(tasks) == 0  # all recorded: nothing to do but look
        looked = time.perf_counter()
        assert len(load_runs(Path(results))[0]) == runs
        middle = len(memory.samples) // 2
    return {
        "runs": runs,
        "make_ms": 1e3 * (made - began) / runs,
        "sweep_ms": 1e3 * (swept - made) / runs,
        "resume_ms": 1e3 * (looked - swept) / runs,
        "task_bytes": (after_tasks - before) / runs,
        "first_half_mb": max(memory.samples[:middle]) / 1e6,
        "second_half_mb": max(memory.samples[middle:]) / 1e6,
    }


def main() -> None:
    sweep.run_on_worker = make_stand_in()
    for runs in map(int, sys.argv[1:] or ["200", "1000", "5000"]):
        print(json.dumps({name: round(value, 2) for name, value in measure(runs).items()}))


if __name__ == "__main__":
    main()
