"""Run notebooks by papermill on Dask: models x seeds x values, on this machine or on any cluster.

A notebook travels to a worker, which runs it in a folder of its own; the executed copy, the
record, the predictions and the model travel back, and the client writes them. No file system is
shared.
"""

import ast
import asyncio
import hashlib
import itertools
import json
import logging
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import Empty, SimpleQueue
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn
from uuid import uuid4

import dask
import nbformat
from dask.system import CPU_COUNT
from distributed import Client, Future, LocalCluster, Worker, get_worker
from distributed.client import CancelledError
from distributed.comm import CommClosedError
from distributed.scheduler import KilledWorker
from filelock import FileLock, Timeout

from mnist_utils import parameters as names
from mnist_utils import runs
from mnist_utils.data import load_mnist
from mnist_utils.parameters import SETTINGS, InputError, say
from mnist_utils.runs import EXECUTED, FAILED

# About the seconds of an epoch. The smallest run first; a model that is added later, last.
COSTS = {"d": 12, "a2": 14, "a1": 17, "e": 30, "c": 90, "c7": 100, "b": 250}
COMPARISON = "8_comparison"
LOOPBACK = "127.0.0.1"
STARTS = 3  # of a kernel that dies as it starts
KERNEL_LOG = "kernel.log"  # what it writes to stderr outside cells
PACKAGES = ("mnist-notebooks", "tensorflow", "keras", "numpy")
THREADS = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS")
PATIENCE = 20.0  # seconds without a worker, until new ones are started here, or it is said
LOOK = 2.0  # seconds between two looks for new workers, and for runs that others train

Files = dict[str, bytes]  # by their names, or places
Report = Callable[[str], None]


class Task(NamedTuple):
    """One run that is wanted: a notebook, as it is now, with checked parameters."""

    name: str  # with which its lines begin, such as "a2 seed 0"
    setting: str
    notebook: nbformat.NotebookNode
    given: dict[str, Any]
    parameters: names.Parameters

    @property
    def folder(self) -> Path:
        return self.parameters.run_folder()

    @property
    def cost(self) -> float:
        """About the seconds that it takes: 10 to start, and each epoch tries all test images."""
        images = self.parameters.train_samples or names.EMBEDDED.get(self.parameters.dataset)
        share = 0.05 + (images or 60_000) / 63_000
        return 10 + COSTS.get(self.setting, 30) * self.parameters.epochs * share

    def finished_run(self) -> runs.Record | None:
        """Return the record, if there is one by these code cells and with these parameters."""
        try:
            record = runs.load_record(self.folder)
            runs.read_predictions(self.folder)
            executed = nbformat.read(self.folder / EXECUTED, 4)
        except (InputError, OSError, ValueError):
            return None
        same = record.run.model_dump() == self.parameters.recorded()
        codes = {runs.code_sha256(self.notebook), runs.code_sha256(executed), record.code_sha256}
        return record if same and len(codes) == 1 else None


class UnfitWorker(Exception):
    """Raised by a worker that must not run anything: its address, and what is wrong with it."""


def make_tasks(settings: list[str], values: dict[str, list[Any]]) -> list[Task]:
    """Return a task for each setting and combination of values, in the order of running.

    Small models come first, but the largest second, and the first seed of all before the second
    of any. Where two would make the same run there is one. Raises InputError for a bad parameter.
    """
    if unknown := sorted(set(settings) - set(SETTINGS)):
        raise InputError(f"models has {unknown[0]!r}; it must be some of {', '.join(SETTINGS)}.")
    notebooks = {setting: read_notebook(SETTINGS[setting].notebook) for setting in settings}
    values = {"seed": values.get("seed", [0]), **values}
    shown = [name for name in values if len(values[name]) > 1 and name != "seed"]
    order = sorted(set(settings), key=[*COSTS, *settings].index)
    largest = max(order, key=lambda setting: COSTS.get(setting, 0))
    order.remove(largest)
    order.insert(1, largest)  # begun last, it would run alone, beside idle cores
    tasks = [
        make_task(setting, notebooks[setting], dict(zip(values, chosen, strict=True)), shown)
        for chosen in itertools.product(*values.values())
        for setting in order
    ]
    return list({task.folder: task for task in tasks}.values())


def make_task(
    setting: str, notebook: nbformat.NotebookNode, given: dict[str, Any], shown: list[str]
) -> Task:
    """Return the task of one setting, such as "c7"; its name has the parameters ``shown``.

    Values of another setting of the same notebook make it that one: c with a first kernel of 7×7
    is c7. Raises InputError for a bad parameter.
    """
    name, own = SETTINGS[setting].notebook, SETTINGS[setting].own
    defaults = read_defaults(notebook, name)
    for key, value in given.items():
        if key not in defaults:
            raise InputError(f"{key} is not a parameter of {name}; it has {', '.join(defaults)}.")
        if own.get(key, value) not in (value, defaults[key]):
            raise InputError(f"{key} is {value!r}; for {setting} it must be {own[key]!r}.")
    wanted = {**defaults, **own, **given}
    for other in SETTINGS:
        if SETTINGS[other].notebook == name and SETTINGS[other].own.items() <= wanted.items():
            setting = other
    parameters = names.check_parameters(SETTINGS[setting].model, wanted, headless=True)
    title = " ".join([setting, *(f"{key} {wanted[key]}" for key in [*shown, "seed"])])
    # The notebook is told only what differs, so that its own defaults stay visible in it.
    given = {key: value for key, value in wanted.items() if value != defaults[key]}
    return Task(title, setting, notebook, given, parameters)


def read_notebook(name: str) -> nbformat.NotebookNode:
    """Return a notebook of the checkout; raise InputError when it is missing, or none."""
    path = names.project_folder() / "notebooks" / f"{name}.ipynb"
    if not path.is_file():
        raise InputError(f"There is no notebooks/{name}.ipynb here; run this in the checkout.")
    try:
        return nbformat.read(path, 4)
    except Exception as error:  # nbformat raises its own for each fault
        raise InputError(f"{path}: {first_line(error)}.") from None


def read_defaults(notebook: nbformat.NotebookNode, name: str) -> dict[str, Any]:
    """Return the parameters of a notebook and their defaults.

    Raises InputError for a parameters cell that holds anything but assignments of values.
    """
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    defaults = {}
    try:
        (cell,) = cells
        for line in ast.parse(cell.source).body:
            annotated = isinstance(line, ast.AnnAssign)  # name: type = value
            target: Any = line.target if annotated else line.targets[0]  # type: ignore[attr-defined]
            defaults[target.id] = ast.literal_eval(line.value)  # type: ignore[attr-defined]
        return defaults
    except (AttributeError, SyntaxError, ValueError):
        raise InputError(
            f"{name} has a parameters cell that cannot be read; there must be one, and in it "
            "nothing but lines such as epochs: int = 10."
        ) from None


def first_line(error: Any) -> str:
    """Return an error as one line, without its last full stop; of a cell's error its own name."""
    text = f"{error.ename}: {error.evalue}" if hasattr(error, "ename") else str(error)
    return (text.strip() or type(error).__name__).splitlines()[0].removesuffix(".")


def to_send(notebook: nbformat.NotebookNode) -> str:
    """Return a notebook as JSON without its outputs, nine tenths of it, that a run makes anew."""
    cells = [{**cell, "outputs": []} if "outputs" in cell else cell for cell in notebook.cells]
    return nbformat.writes(nbformat.from_dict({**notebook, "cells": cells}))


def run_notebook(
    notebook: str, given: dict[str, Any], environment: dict[str, str], report: Report, data: Files
) -> tuple[Files, str | None]:
    """Run a notebook, given as JSON, in a folder that is removed afterwards.

    ``environment`` are variables for its kernel, ``data`` files for it by their place, and
    ``report`` takes its epoch lines. Returns its files, and in a sentence what failed, if so.
    """
    from papermill.utils import chdir  # slow to import: the client starts its workers before

    # All is relative, so that no path of a worker's gets into the notebook.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, chdir(folder):
        for place, content in data.items():
            Path(place).parent.mkdir(parents=True, exist_ok=True)
            Path(place).write_bytes(content)
        problem = _execute(notebook, given, environment, report)
        files = {path.name: path.read_bytes() for path in Path("runs").glob("*/*/[!.]*")}
        with suppress(OSError, ValueError):  # on a full disk the copy is truncated, and not kept
            copy = Path(EXECUTED).read_bytes()
            json.loads(copy)
            files[FAILED if problem else EXECUTED] = copy
    return files, problem


def _execute(
    notebook: str, given: dict[str, Any], environment: dict[str, str], report: Report
) -> str | None:
    """Execute a notebook here as executed.ipynb; return in a sentence what failed, if so.

    A kernel that dies as it starts is started again: it is told its ports before it takes them,
    and another process may be quicker.
    """
    import papermill
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    logging.getLogger("papermill").disabled = True  # what is worth saying is returned
    # The kernel finds these helpers, and after them what we find.
    places = [str(Path(__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, places)), **environment}

    class OwnKernel(AsyncKernelManager):
        """This Python's own kernel, whichever the notebook or the user's Jupyter names."""

        kernel_spec = KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            env={name: value.replace("$", "$$") for name, value in environment.items()},
        )

        async def start_kernel(self, **options: Any) -> None:  # type: ignore[override]
            # Not to the terminal: as it ends, it sometimes tells of its own closed sockets.
            with Path(KERNEL_LOG).open("wb") as log:
                await super().start_kernel(stderr=log, **options)

    def write(text: str) -> None:
        for line in text.splitlines():
            if re.match(r"Epoch +\d+/", line):  # as DynamicLossPlot writes, one an epoch
                report(line)

    for start in range(1, STARTS + 1):
        try:
            # By its path: given as an object, papermill would put all of it into the copy.
            Path(EXECUTED).write_text(notebook, encoding="utf-8")
            papermill.execute_notebook(
                EXECUTED,
                EXECUTED,
                parameters=given,
                kernel_name="python3",
                language="python",
                kernel_manager_class=OwnKernel,
                progress_bar=False,
                stdout_file=SimpleNamespace(write=write, flush=lambda: None),
                coalesce_streams=True,
                # Not that it runs over TCP, nor that it was interrupted as it ended.
                extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
            )
            break
        except Exception as error:  # an error in a cell, a dead kernel, a full disk, ...
            if "died before replying to kernel_info" not in str(error):
                return f"{first_line(error)}."
            if start == STARTS:
                said = Path(KERNEL_LOG).read_text(errors="replace").splitlines()
                return " ".join(f"{first_line(part)}." for part in [error, *said[-1:]])
    return None


def run_on_worker(
    notebook: str,
    given: dict[str, Any],
    environment: dict[str, str],
    data: Files,
    told: tuple[str, str],
    versions: dict[str, str],
) -> tuple[Files, str | None]:
    """Run a notebook on a Dask worker; ``told`` are the topic and the name of its epoch lines.

    Raises UnfitWorker where the worker has not the client's ``versions``, or several threads.
    """
    worker = get_worker()
    if problem := unfit(versions, worker):
        raise UnfitWorker(worker.address, problem)
    topic, name = told
    # On a cluster one thread, or what the worker was started with.
    threads = dict.fromkeys(THREADS, os.environ.get(THREADS[0], "1"))

    def report(line: str) -> None:
        worker.log_event(topic, f"{name}: {line}")

    return run_notebook(notebook, given, threads | environment, report, data)


@cache  # a worker looks at every run
def package_versions() -> dict[str, str]:
    """Return the versions on which a run's numbers depend; of these helpers, a digest as well.

    A package that is missing is left out.
    """
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        code.update(file.read_bytes())
    versions = {"code of mnist_utils": code.hexdigest()[:8]}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def unfit(versions: dict[str, str], dask_worker: Worker) -> str | None:
    """Return in words why a worker must not run anything, if so."""
    there = package_versions()
    for package, wanted in versions.items():
        if (found := there.get(package, "missing")) != wanted:
            return f"has {package} {found}; it must be {wanted}, as on the client"
    if (threads := dask_worker.state.nthreads) > 1:  # the working folder is the process's
        return f"has {threads} threads; it must have one: start it with --nthreads 1"
    return None


@contextmanager
def open_client(scheduler: str | None, workers: int) -> Iterator[Client]:
    """Give a client of the scheduler at an address, or of a new cluster on this machine."""
    if scheduler is None:
        # Nothing of the user's own Dask configuration, which may name a scheduler or want a key.
        dask.config.refresh(paths=[], env={})
        # Nor what Dask's event loop logs of a connection that went with a worker.
        logging.getLogger("tornado").setLevel(logging.CRITICAL)
        try:
            with socket.create_server((LOOPBACK, 0)) as server:  # Dask would try for 30 seconds
                socket.create_connection(server.getsockname(), timeout=5).close()
            cluster = LocalCluster(
                n_workers=0,
                threads_per_worker=1,
                processes=True,
                host=LOOPBACK,
                dashboard_address=f"{LOOPBACK}:0",
                silence_logs=logging.CRITICAL,
                preload="import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)",  # ours alone
            )
        except (OSError, RuntimeError) as error:  # the latter is Dask's, for any of the former
            raise InputError(
                f"Dask cannot be started here ({first_line(error.__cause__ or error)}); the "
                f"loopback address {LOOPBACK} must be up."
            ) from None
        with cluster, Client(cluster) as client:
            cluster.scale(workers)  # and do not wait for them
            yield client
        return
    try:
        client = Client(scheduler, timeout=10)
    except (OSError, TypeError, ValueError) as error:  # TypeError: tls:// without certificates
        allowed = "the address of a running Dask scheduler, such as tcp://host:8786"
        raise names.refusal("scheduler", scheduler, allowed, first_line(error)) from None
    with client:
        yield client


def run_tasks(
    tasks: list[Task], scheduler: str | None = None, workers: int | None = None
) -> list[Task]:
    """Run the tasks that are not recorded yet; return those that failed.

    ``scheduler`` is the address of a running Dask scheduler; without it a cluster is started
    here, of ``workers`` processes. Raises InputError for a data set that cannot be trained on,
    when the scheduler cannot be reached or is lost, and when no worker is fit.
    """
    wanted = [task for task in tasks if not task.finished_run()]
    say(f"{len(tasks)} run{'s' * (len(tasks) > 1)}, {len(tasks) - len(wanted)} recorded already.")
    if not wanted:
        return []
    own = {task.parameters.dataset for task in wanted} - set(names.EMBEDDED)
    images = {dataset: len(load_mnist(dataset)[0][0]) for dataset in own}
    for task in wanted:
        names.check_counts(task.parameters, images.get(task.parameters.dataset))
    # Several runs side by side get more done than one with all cores; a GPU is for one alone.
    gpu = any(map(os.path.exists, ("/dev/nvidia0", "/dev/kfd", "/dev/dxg")))
    sharing = workers or min(len(tasks), 1 if gpu else CPU_COUNT)
    # Of all tasks, not of those still to be run: threads change numbers, as another seed does.
    threads = max(1, CPU_COUNT // sharing)
    workers = min(len(wanted), sharing)
    with open_client(scheduler, workers) as client:
        try:
            return _Runner(client, wanted, None if scheduler else workers, threads).run()
        except (CancelledError, OSError) as error:  # the latter includes CommClosedError
            raise InputError(
                f"The connection to the scheduler was lost ({first_line(error)}). What is recorded "
                "is kept; the same command goes on from there."
            ) from None


class _Runner:
    """Hands the tasks out, one a worker, and writes each run as it comes back."""

    def __init__(self, client: Client, tasks: list[Task], workers: int | None, threads: int):
        """``workers`` is the size of the cluster on this machine, None for any other cluster.

        ``threads`` are those of each run on this machine.
        """
        self.client, self.workers, self.threads = client, workers, threads
        self.waiting = {task.folder: task for task in tasks}
        self.running: dict[Any, tuple[Task, FileLock, float]] = {}
        self.failed: list[Task] = []
        self.elsewhere: set[str] = set()  # the names of runs that another command trains
        self.unfit: dict[str, str] = {}  # workers, and what is wrong with them
        self.sent: dict[Path, Future] = {}  # data sets
        self.seconds = self.cost = 0.0  # of the runs that are done
        self.seen = time.monotonic()  # when there was a worker, and a fit one
        self.topic = f"mnist_utils {uuid4()}"
        self.events: SimpleQueue[Future | str] = SimpleQueue()
        client.subscribe_topic(self.topic, lambda event: self.events.put(event[1]))

    def run(self) -> list[Task]:
        """Run all tasks; return those that failed."""
        if self.workers:
            self.fill()
        self.check_workers()
        while self.waiting or self.running:
            with suppress(Empty):
                event = self.events.get(timeout=LOOK)
                if isinstance(event, str):
                    say(event)
                    continue
                self.finish(event)
            self.fill()
            if self.workers:
                self.replace_workers()
        return self.failed

    def replace_workers(self) -> None:
        """Start new workers here when all are gone.

        Dask restarts a worker that dies, but not one that dies before its start is wholly done.
        """
        if self.client.nthreads():
            self.seen = time.monotonic()
        elif time.monotonic() - self.seen > PATIENCE and (cluster := self.client.cluster):
            cluster.scale(0)
            cluster.scale(self.workers)
            self.seen = time.monotonic()

    def check_workers(self) -> None:
        """Wait for a worker, and look which of another cluster's are unfit."""
        try:
            self.client.wait_for_workers(1, timeout=60)
        except asyncio.TimeoutError:  # another one than TimeoutError before Python 3.11
            raise InputError("The scheduler has had no worker for 60 seconds.") from None
        if self.workers:
            return
        try:
            found = self.client.run(unfit, package_versions())
        except Exception as error:
            raise InputError(
                f"A worker cannot run the notebooks: {first_line(error)}; it needs this package."
            ) from None
        for worker, problem in found.items():
            if problem:
                self.leave_out(worker, problem)
        if all(found.values()):
            self.refuse()
        self.fill()

    def refuse(self) -> NoReturn:
        raise InputError("The worker {} {}.".format(*next(iter(self.unfit.items()))))

    def leave_out(self, worker: str, problem: str) -> None:
        if worker not in self.unfit:
            say(f"The worker {worker} {problem}. It is not used.")
        self.unfit[worker] = problem

    def fill(self) -> None:
        """Give each free worker a task, but none that another command is training."""
        here = self.client.nthreads()
        fit = [worker for worker in here if worker not in self.unfit]
        if self.unfit and here and not fit:  # perhaps one is being restarted
            if time.monotonic() - self.seen > PATIENCE:
                self.refuse()
            return
        if self.unfit:
            self.seen = time.monotonic()
        for task in list(self.waiting.values()):
            if len(self.running) >= (self.workers or len(fit) or 1):
                break
            lock = FileLock(task.folder / runs.LOCK, timeout=0)  # it goes with its process
            try:
                lock.acquire()
            except Timeout:
                if task.name not in self.elsewhere:
                    say(f"{task.name}: another command is training it")
                self.elsewhere.add(task.name)
                continue
            except OSError as error:
                self.failed.append(task)
                say(f"{task.name}: FAILED: {first_line(error)}.")
            else:
                if task.finished_run():
                    say(f"{task.name}: recorded by another command")
                    lock.release()
                else:
                    self.submit(task, lock, fit if self.unfit and fit else None)
            del self.waiting[task.folder]

    def submit(self, task: Task, lock: FileLock, workers: list[str] | None) -> None:
        """Send a task, whose folder is locked, to one of these workers, or to any."""
        code = runs.code_sha256(task.notebook)
        environment = {names.CODE_VARIABLE: code, names.RESULTS_VARIABLE: "runs"}
        data: Files | Future = {}
        if self.workers:
            environment |= dict.fromkeys(THREADS, str(self.threads))
        if task.parameters.dataset not in names.EMBEDDED:
            path = names.dataset_path(task.parameters.dataset).resolve()
            environment[names.DATASET_VARIABLE] = str(path)
            if not self.workers:  # which may have another file system
                environment[names.DATASET_VARIABLE] = f"data/{path.name}"
                data = self.sent[path] = self.sent.get(path) or send_files(self.client, path)
        future = self.client.submit(
            run_on_worker,
            to_send(task.notebook),
            task.given,
            environment,
            data,
            (self.topic, task.name),
            package_versions(),
            workers=workers,
            allow_other_workers=workers is not None,  # these may go, and others come
            pure=False,  # every run is a run of its own
        )
        self.running[future.key] = task, lock, time.monotonic()
        future.add_done_callback(self.events.put)

    def finish(self, future: Future) -> None:
        """Write what a run brings, and say how it went."""
        from mnist_utils.plotting import format_seconds  # with Matplotlib: slow to import

        task, lock, began = self.running.pop(future.key)
        seconds = time.monotonic() - began
        try:
            problem = write_run(task, *future.result())
        except UnfitWorker as error:  # another runs it
            self.leave_out(*error.args)
            self.waiting = {task.folder: task, **self.waiting}
            return
        except KilledWorker as error:
            times = error.allowed_failures + 1
            problem = f"Its worker died {times} times, perhaps for lack of memory."
        except (CancelledError, CommClosedError):  # not the run's fault
            raise
        except Exception as error:  # one run's trouble must not stop the others
            problem = f"{first_line(error)}."
        finally:
            lock.release()
        if problem:
            self.failed.append(task)
            say(f"{task.name}: FAILED after {format_seconds(seconds)}: {problem}")
            return
        accuracy = f"test accuracy {runs.load_record(task.folder).test_accuracy:.2%}"
        left = self.left(task, seconds)
        rest = f"; about {format_seconds(left)} left for all" if left else ""
        say(f"{task.name}: {accuracy} in {format_seconds(seconds)}{rest}")

    def left(self, done: Task, seconds: float) -> float:
        """Return about how many seconds all will take, at the pace of the runs that are done."""
        self.seconds, self.cost = self.seconds + seconds, self.cost + done.cost
        pace, now = self.seconds / self.cost, time.monotonic()
        rests = [
            max(1.0, task.cost * pace - now + began) for task, _, began in self.running.values()
        ]
        side_by_side = 1 + len(rests)
        rests += [task.cost * pace for task in self.waiting.values()]
        return max(sum(rests) / side_by_side, *rests, 0)


def send_files(client: Client, path: Path) -> Future:
    """Return the future of a data set's files, by their place, for all runs to share.

    It is the result of a task: what a worker loses when it dies is made again, which Dask does
    not do for scattered data.
    """
    files = names.idx_files(path) if path.is_dir() else [path]
    content = {f"data/{file.relative_to(path.parent)}": file.read_bytes() for file in files}
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 TB"}):
        return client.submit(dict, content, pure=False)


def write_run(task: Task, files: Files, problem: str | None) -> str | None:
    """Write a run's files; return in a sentence what is wrong with the run, if anything."""
    if problem := write_executed(task.folder, files, problem):
        return problem
    return None if task.finished_run() else "The notebook ran, but left no record."


def write_executed(folder: Path, files: Files, problem: str | None) -> str | None:
    """Write what a notebook left; return its problem, if any, with what is to be said of it."""
    try:
        runs.write_files(folder, files)
    except OSError as error:
        return " ".join(filter(None, [problem, f"It cannot be written: {first_line(error)}."]))
    return f"{problem} Its executed copy: {folder / FAILED}" if FAILED in files else problem


def run_all(
    tasks: list[Task], results_dir: str | None, scheduler: str | None, workers: int | None
) -> int:
    """Run tasks, all in ``results_dir``, and then the comparison; print the table of own runs.

    Returns the exit code. Raises InputError as run_tasks does.
    """
    failed = [task.name for task in run_tasks(tasks, scheduler, workers)]
    results = names.results_folder(results_dir).resolve()
    if problem := run_comparison(results, {"results_dir": results_dir} if results_dir else {}):
        say(f"{COMPARISON}: FAILED: {problem}")
        failed.append(COMPARISON)
    from mnist_utils.comparison import own_table, reference_folder, reference_rows  # slow as well

    own, problems = runs.load_runs(results)
    if len(own):
        say(own_table(own, reference_rows(runs.load_runs(reference_folder())[0])))
    for left_out in problems:
        say("Left out:", left_out)
    if not problem:
        say("The executed comparison:", results / COMPARISON / EXECUTED)
    if failed:
        print(f"{len(failed)} failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run_comparison(results: Path, given: dict[str, Any]) -> str | None:
    """Execute the comparison of a results folder; return in a sentence what failed, if so."""
    notebook, folder = to_send(read_notebook(COMPARISON)), results / COMPARISON
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / runs.LOCK):  # another command's end is waited for
            environment = {names.RESULTS_VARIABLE: str(results)}
            return write_executed(folder, *run_notebook(notebook, given, environment, say, {}))
    except OSError as error:
        return f"{first_line(error)}."
