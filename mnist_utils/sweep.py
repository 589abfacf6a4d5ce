"""Many runs on Dask: models x seeds x parameter values, on this machine or on any cluster.

The notebook travels with the task, and the data set where it is not the embedded one; the
executed notebook, the record and the predictions travel back, and the client writes them. No
file system is shared.
"""

import asyncio
import hashlib
import itertools
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import dask
import nbformat
from dask.system import CPU_COUNT
from distributed import Client, Future, Worker, as_completed, get_worker
from distributed.client import CancelledError
from distributed.comm import CommClosedError
from distributed.scheduler import KilledWorker
from filelock import FileLock, Timeout

from mnist_utils.headless import (
    EXECUTED,
    FAILED,
    LOCK,
    Task,
    count_images,
    execute,
    first_line,
    make_task,
    without_doubles,
)
from mnist_utils.parameters import MOST_SEED, SETTINGS, InputError
from mnist_utils.plotting import format_seconds
from mnist_utils.runs import RECORD_FILE, load_run, write_whole

PACKAGES = ("mnist-notebooks", "tensorflow", "keras", "numpy")
# One thread a run: several runs side by side get more done than one run with all threads.
ONE_THREAD = {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1", "OMP_NUM_THREADS": "1"}
TASKS_A_WORKER = 4  # waiting or running at a time, so that the client's memory stays flat
CODE = "code of mnist_utils"


@dataclass(frozen=True)
class Outcome:
    """What comes back from a worker: the files of the run, and what went wrong, if anything."""

    files: dict[str, bytes]
    problem: str | None


class UnfitWorker(Exception):
    """Raised by a worker that must not run anything: its address, and what is wrong with it."""


def make_tasks(settings: list[str], seeds: Iterable[int], values: dict[str, list]) -> list[Task]:
    """Return a task for each setting, seed and combination of parameter values.

    Where two would make the same run there is one. Raises InputError for a bad parameter or an
    unknown setting.
    """
    if "seed" in values:
        raise InputError(
            "seed is no parameter of a sweep; it takes seeds by --seeds (make: SEEDS), such as 0-4."
        )
    combinations = itertools.product(*values.values())
    given = [dict(zip(values, combination, strict=True)) for combination in combinations]
    return without_doubles(
        make_task(setting, {**parameters, "seed": seed})
        for setting, parameters, seed in itertools.product(settings, given, seeds)
    )


def run_on_worker(
    notebook: str, given: dict, data: tuple[str, bytes] | None, versions: dict[str, str]
) -> Outcome:
    """Run a notebook, given as JSON, in an empty folder of the worker's, and return its files.

    ``data`` is the name and content of the data set's file, None for the embedded one;
    ``versions`` are the client's packages: a worker that joined late has not been checked, and
    raises UnfitWorker where it should have been refused.
    """
    worker = get_worker()
    if problem := unfit(versions, worker):
        raise UnfitWorker(worker.address, problem)
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)  # relative, so that no path of the worker's gets into the notebook
        os.environ.update(ONE_THREAD, PYTHONPATH=python_path())
        try:
            if data:
                Path(data[0]).write_bytes(data[1])
                given = {**given, "dataset": f"./{data[0]}"}  # "mnist" is the embedded one
            given = {**given, "results_dir": "runs"}
            problem = execute(nbformat.reads(notebook, 4), given, Path("executed"))
            kept = (Path("executed", EXECUTED), Path("executed", FAILED))
            files = {path.name: path.read_bytes() for path in kept if path.exists()}
            for path in Path("runs").glob("*/*/*"):
                if path.name == RECORD_FILE or path.suffix == ".npz":
                    files[path.name] = path.read_bytes()
        finally:
            os.chdir(before)
    return Outcome(files, problem)


def python_path() -> str:
    """Return where a kernel finds these helpers, and after them whatever its worker finds."""
    here = str(Path(__file__).parents[1])
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([here, *(place for place in given if place not in ("", here))])


def write_outcome(task: Task, outcome: Outcome) -> str | None:
    """Write a run's files, the record last; return what is wrong with the run, if anything."""
    task.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(task.folder / LOCK, timeout=0):
            return _write_locked(task, outcome)
    except Timeout:
        return f"Another process is running it in {task.folder}."


def _write_locked(task: Task, outcome: Outcome) -> str | None:
    for name in sorted(outcome.files, key=lambda name: name == RECORD_FILE):
        write_whole(task.folder / name, outcome.files[name])
    if outcome.problem:
        place = f" Its executed copy: {task.folder / FAILED}" if FAILED in outcome.files else ""
        return outcome.problem.split(" Its executed copy:")[0] + place
    if not task.finished_run():
        return "The notebook ran, but left no record."
    # What an older run, or an older failure, of the same parameters left.
    (task.folder / FAILED).unlink(missing_ok=True)
    for older in task.folder.glob("predictions-*.npz"):
        if older.name not in outcome.files:
            older.unlink()
    return None


def run_sweep(tasks: list[Task], scheduler: str | None = None) -> list[Task]:
    """Run the tasks that are not recorded yet; return those that failed.

    ``scheduler`` is the address of a running Dask scheduler; without it a cluster is started
    here, one worker process a core, listening on the loopback address only. Raises InputError
    for a data set that cannot be trained on, when the scheduler cannot be reached or is lost, or
    when it or a worker is unfit.
    """
    wanted = [task for task in tasks if not task.finished_run()]
    print(f"{len(tasks)} runs, {len(tasks) - len(wanted)} recorded already.", flush=True)
    if not wanted:
        return []
    check_data(wanted)
    with open_client(scheduler) as client:
        check_workers(client)
        try:
            failed = _run_wanted(client, wanted)
        except (CancelledError, OSError) as error:  # the latter includes CommClosedError
            raise InputError(
                f"The connection to the scheduler was lost ({first_line(error)}). What is recorded "
                "is kept; the same command goes on from there."
            ) from None
    if failed:
        print(f"{len(failed)} of {len(wanted)} failed.", file=sys.stderr)
    return failed


def check_data(tasks: list[Task]) -> None:
    """Raise InputError for a reader's data set on which some of these tasks cannot be trained."""
    checked = {}
    for task in tasks:
        given = task.parameters
        if given.dataset != "mnist":  # of which all is known already
            key = given.dataset, given.train_samples, given.batch_size, given.model
            checked.setdefault(key, task)
    for task in checked.values():
        count_images([task])


def print_means(tasks: list[Task]) -> None:
    """Print the mean test accuracy of recorded runs, over those that differ in the seed alone."""
    from mnist_utils.spread import mean_and_deviation  # 90 MB with scipy: not for workers

    accuracies: dict[str, list[float]] = {}
    for task in tasks:
        title, own = SETTINGS[task.setting].title, SETTINGS[task.setting].own
        # What the title says is not said again.
        unsaid = (item for item in task.given.items() if item not in own.items())
        values = (f"{k} {v}" for k, v in unsaid if k not in ("seed", "results_dir"))
        accuracy = load_run(task.folder).record.test_accuracy
        accuracies.setdefault(", ".join([title, *values]), []).append(100 * accuracy)
    for name, values in accuracies.items():
        print(f"{name}: test accuracy {mean_and_deviation(values, 2)} % (n = {len(values)})")


def open_client(scheduler: str | None) -> Client:
    """Return a client of the scheduler at an address, or of a new cluster on this machine."""
    if scheduler is None:
        # By itself Dask starts a worker process for each few cores; here it is one a core.
        return Client(
            n_workers=CPU_COUNT,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
        )
    try:
        return Client(scheduler, timeout=10)
    except (OSError, TypeError, ValueError) as error:  # TypeError: tls:// without certificates
        raise InputError(
            f"scheduler is {scheduler!r} ({first_line(error)}); it must be the address of a "
            "running Dask scheduler, such as tcp://host:8786."
        ) from None


@cache  # a worker looks at every run
def package_versions() -> dict[str, str]:
    """Return the versions on which a run's numbers depend; of the helpers, a digest as well.

    Two checkouts have the same version, but perhaps not the same code. A package that is missing
    is left out.
    """
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        code.update(file.read_bytes())
    versions = {CODE: code.hexdigest()[:8]}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def difference(there: dict[str, str], here: dict[str, str]) -> str | None:
    """Return in words the first package of a worker's that is not as on the client, if any."""
    for package, wanted in here.items():
        if package not in there:
            return f"has no {package}; it must have {wanted}, as the client has"
        if there[package] != wanted:
            return f"has {package} {there[package]}; it must be {wanted}, as on the client"
    return None


def unfit(versions: dict[str, str], dask_worker: Worker) -> str | None:
    """Return in words why a worker must not run anything, if so; called on the worker.

    It has other packages than ``versions``, the client's, or several threads. A run has its
    process to itself: the working folder and the environment are the process's.
    """
    if problem := difference(package_versions(), versions):
        return problem
    threads = dask_worker.state.nthreads
    if threads > 1:
        return f"has {threads} threads; it must have one: start it with --nthreads 1"
    return None


def check_workers(client: Client) -> None:
    """Raise InputError when there is no worker, or when one or the scheduler is unfit."""
    try:
        client.run_on_scheduler(package_versions)  # it reads what it hands on to the workers
    except Exception as error:
        raise InputError(
            f"The scheduler cannot hand out the notebooks: {first_line(error)}; it needs this "
            "package too."
        ) from None
    try:
        client.wait_for_workers(1, timeout=60)
    except asyncio.TimeoutError:  # another one than TimeoutError before Python 3.11
        raise InputError("The scheduler has had no worker for 60 seconds.") from None
    try:
        workers = client.run(unfit, package_versions())
    except Exception as error:
        raise InputError(
            f"A worker cannot run the notebooks: {first_line(error)}; it needs the packages that "
            "the client has."
        ) from None
    for worker, problem in workers.items():
        if problem:
            raise InputError(f"The worker {worker} {problem}.")


def _run_wanted(client: Client, wanted: list[Task]) -> list[Task]:
    """Run the tasks, few at a time, and write each as it comes back; return those that failed."""
    left, failed, done = iter(wanted), [], 0
    running: dict[Future, Task] = {}
    began = time.perf_counter()
    results = as_completed()
    versions = package_versions()
    data = {
        path: send_file(client, Path(path))
        for path in {task.parameters.dataset for task in wanted} - {"mnist"}
    }

    def submit(task: Task) -> None:
        future = client.submit(
            run_on_worker,
            to_send(task.notebook),
            task.given,
            data.get(task.parameters.dataset),
            versions,
            pure=False,  # every run is a run of its own
        )
        running[future] = task
        results.add(future)

    def fill() -> None:
        """Keep as many tasks under way as the workers, of which some may join late, have room."""
        room = TASKS_A_WORKER * max(1, len(client.nthreads()))
        for task in itertools.islice(left, max(0, room - len(running))):
            submit(task)

    fill()
    for future in results:
        task = running.pop(future)
        try:
            problem = _write_future(task, future)
        except UnfitWorker as error:
            let_go(client, *error.args)
            submit(task)
            continue
        future.release()
        done += 1
        if problem:
            failed.append(task)
        rest = (time.perf_counter() - began) / done * (len(wanted) - done)
        print(
            f"[{done}/{len(wanted)}, {len(failed)} failed, about {format_seconds(rest)} left]",
            f"{task.setting} seed {task.parameters.seed}:",
            f"FAILED: {problem}" if problem else _result(task),
            flush=True,
        )
        fill()
    return failed


def send_file(client: Client, path: Path) -> Future:
    """Return the future of a file's name and content on the cluster, for all runs to share.

    It is the result of a task: what a worker loses when it dies is made again, which Dask does
    not do for scattered data.
    """
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 TB"}):
        return client.submit(tuple, [path.name, path.read_bytes()], pure=False)


def let_go(client: Client, worker: str, problem: str) -> None:
    """Close a worker that joined late and is unfit: always idle, it would draw every run."""
    if worker in client.nthreads():
        print(f"The worker {worker} {problem}. It is closed; others run what it had.", flush=True)
        client.retire_workers([worker])


def to_send(notebook: nbformat.NotebookNode) -> str:
    """Return a notebook as JSON without its outputs, nine tenths of it, that a run makes anew."""
    cells = [{**cell, "outputs": []} if "outputs" in cell else cell for cell in notebook.cells]
    return nbformat.writes(nbformat.from_dict({**notebook, "cells": cells}))


def _result(task: Task) -> str:
    return f"test accuracy {task.finished_run().record.test_accuracy:.2%}"


def _write_future(task: Task, future: Future) -> str | None:
    """Write what a future brings; return in a sentence what went wrong, if anything."""
    try:
        return write_outcome(task, future.result())
    except KilledWorker as error:
        return (
            f"Its worker died {error.allowed_failures + 1} times while it ran, perhaps for lack of "
            "memory."
        )
    except (UnfitWorker, CancelledError, CommClosedError):  # not the run's fault
        raise
    except Exception as error:  # one run's trouble must not stop the others
        return f"{first_line(error)}."


def parse_seeds(text: str) -> list[int]:
    """Return the seeds of "0-4" or "0,2,7-9"; raise InputError for anything else."""
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last <= MOST_SEED:
            raise InputError(
                f"seeds is {text!r}; it must be like 0-4 or 0,2,7-9, from 0 to {MOST_SEED}."
            )
        seeds += range(first, last + 1)
    return list(dict.fromkeys(seeds))
