"""Run notebooks by papermill, one process a notebook, and keep what is whole."""

import ast
import hashlib
import os
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median

import nbformat
import papermill
from filelock import FileLock, Timeout
from papermill.exceptions import PapermillExecutionError

from mnist_utils.comparison import by_parameters, reference_folder, reference_runs
from mnist_utils.data import load_mnist
from mnist_utils.parameters import (
    SETTINGS,
    InputError,
    Parameters,
    check_batch_size,
    check_parameters,
    project_folder,
    results_folder,
    trained_on,
)
from mnist_utils.plotting import format_seconds
from mnist_utils.runs import CODE_VARIABLE, Run, load_run, load_runs

# A model that is added later comes after these.
SIZES = ["d-speed", "a2", "a1", "d-accuracy", "c", "c7", "b"]
SMALLEST_FIRST = sorted(SETTINGS, key=[*SIZES, *SETTINGS].index)
COMPARISON = "6_comparison"
STARTS = 3  # of a kernel that dies as it starts
EXECUTED = "executed.ipynb"
FAILED = "failed.ipynb"
LOCK = ".lock"  # of a run's folder


@dataclass(frozen=True)
class Task:
    """One run that is wanted: a setting's notebook, as it is now, with checked parameters."""

    setting: str
    notebook: nbformat.NotebookNode
    given: dict
    parameters: Parameters

    @property
    def folder(self) -> Path:
        return self.parameters.run_folder()

    def finished_run(self) -> Run | None:
        """Return the run if it is recorded, by these code cells and with these parameters."""
        code = code_sha256(self.notebook)
        try:
            run = load_run(self.folder)
            run.predictions()
            executed = nbformat.read(self.folder / EXECUTED, 4)
        except (InputError, OSError, ValueError):
            return None
        if run.record.run.model_dump() != self.parameters.recorded():
            return None
        return run if run.record.code_sha256 == code == code_sha256(executed) else None


def make_task(setting: str, given: dict) -> Task:
    """Return the task of one setting, such as "c7", with the parameters ``given``.

    Values of another setting of the same notebook make it that one: c with a first kernel of 7×7
    is c7. Raises InputError for an unknown setting or a bad parameter.
    """
    if setting not in SETTINGS:
        raise InputError(f"models has {setting!r}; it must be some of {', '.join(SETTINGS)}.")
    name, _, own, _ = SETTINGS[setting]
    path = notebook_path(name)
    notebook, defaults = read_defaults(path, path.stat().st_mtime_ns)
    for key, value in given.items():
        if key not in defaults:
            raise InputError(f"{key} is not a parameter of {name}; it has {', '.join(defaults)}.")
        if own.get(key, value) not in (value, defaults[key]):
            raise InputError(f"{key} is {value!r}; for {setting} it must be {own[key]!r}.")
    # The notebook is told only what differs, so that its own defaults stay visible in it.
    wanted = {**own, **given}
    for other, (notebook_name, _, values, _) in SETTINGS.items():
        if notebook_name == name and values.items() <= wanted.items():
            setting = other
    given = {key: value for key, value in wanted.items() if value != defaults[key]}
    parameters = check_parameters(SETTINGS[setting].model, **{**defaults, **wanted})
    return Task(setting, notebook, given, parameters)


def without_doubles(tasks: Iterable[Task]) -> list[Task]:
    """Return the tasks, of those that would make the same run only one."""
    return list({task.folder: task for task in tasks}.values())


@lru_cache
def read_defaults(path: Path, modified: int) -> tuple[nbformat.NotebookNode, dict]:
    """Return a notebook and its parameters' defaults; a thousand tasks share one copy.

    ``modified`` is the file's time in nanoseconds: a notebook that was edited is read again.
    Papermill's inspect_notebook would pass over lines that it does not understand. Raises
    InputError for a parameters cell that holds anything but assignments of values.
    """
    notebook = read_notebook(path)
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    try:
        (cell,) = cells
        lines = ast.parse(cell.source).body
        return notebook, {line.targets[0].id: ast.literal_eval(line.value) for line in lines}
    except (AttributeError, SyntaxError, ValueError):
        raise InputError(
            f"{path.name} has a parameters cell that cannot be read; there must be one, and in it "
            "nothing but lines such as epochs = 10."
        ) from None


def notebook_path(name: str) -> Path:
    """Return the path of a notebook; raise InputError where there is no checkout."""
    path = project_folder() / "notebooks" / f"{name}.ipynb"
    if not path.is_file():
        raise InputError(f"There is no notebooks/{name}.ipynb here; run this in the checkout.")
    return path


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """Return a notebook; raise InputError when it is none."""
    try:
        return nbformat.read(path, 4)
    except Exception as error:  # nbformat raises its own for each fault
        raise InputError(f"{path}: {first_line(error)}.") from None


def code_sha256(notebook: nbformat.NotebookNode) -> str:
    """Return the SHA-256 of the code cells that a run's numbers come from.

    Left out are the cells that hold the parameters (the record has their values) and the one
    that fetches the helpers.
    """
    not_code = {"parameters", "injected-parameters", "setup"}
    sources = [
        cell.source.strip()
        for cell in notebook.cells
        if cell.cell_type == "code" and not not_code.intersection(cell.metadata.get("tags", []))
    ]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def run_all(settings: list[str], given: dict) -> int:
    """Run the notebooks of these settings and then the comparison; return the exit code.

    What is recorded is kept, a notebook that fails is named and the others go on. Raises
    InputError for a bad parameter, before anything runs.
    """
    tasks = without_doubles(make_task(setting, given) for setting in settings)
    clock = Clock(tasks, count_images(tasks))
    if given:
        shown = ", ".join(f"{name}={value}" for name, value in given.items())
        print(f"Parameters: {shown}; the others as in the notebooks.", flush=True)
    failed = []
    for number, task in enumerate(tasks, 1):
        head = f"[{number}/{len(tasks)}] {task.setting}:"
        if task.finished_run():
            print(head, "recorded already, kept", flush=True)
            clock.skip(task)
            continue
        print(head, f"training; {clock.left()} for all", flush=True)
        began = time.perf_counter()
        problem = execute(task.notebook, task.given, task.folder)
        seconds = time.perf_counter() - began
        run = task.finished_run()
        if problem or not run:
            problem = problem or "The notebook ran, but left no record."
            failed.append(task.setting)
            print(head, f"FAILED after {format_seconds(seconds)}: {problem}", flush=True)
            clock.skip(task)
            continue
        accuracy = run.record.test_accuracy
        print(head, f"test accuracy {accuracy:.2%} in {format_seconds(seconds)}", flush=True)
        clock.done(task, seconds)
    failed += run_comparison(given)
    if failed:
        print(f"{len(failed)} failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def count_images(tasks: list[Task]) -> int:
    """Return the number of training images; raise InputError for data that cannot be trained on.

    All tasks have the same data.
    """
    given = tasks[0].parameters
    (x_train, _), _ = load_mnist(given.dataset, given.train_samples, given.seed)
    for task in tasks:
        check_batch_size(given.batch_size, trained_on(task.parameters.model, len(x_train)))
    return len(x_train)


def run_comparison(given: dict) -> list[str]:
    """Run the comparison over the results so far, print its table; return what failed."""
    results = results_folder(given.get("results_dir"))
    own = {key: value for key, value in given.items() if key == "results_dir"}
    problem = execute(read_notebook(notebook_path(COMPARISON)), own, results / COMPARISON)
    if problem:
        print(f"{COMPARISON}: FAILED: {problem}", flush=True)
        return [COMPARISON]
    # With it come scipy and statsmodels: 90 MB that a sweep's workers need not hold.
    from mnist_utils.spread import over_seeds, own_table

    references = over_seeds(load_runs(reference_folder())[0])
    runs, problems = load_runs(results)
    for title, group in by_parameters(runs).items():
        print(title, own_table(group, references), sep="\n")
    print(*(f"Left out: {problem}\n" for problem in problems), sep="", end="")
    print("The executed comparison:", results / COMPARISON / EXECUTED, flush=True)
    return []


def execute(notebook: nbformat.NotebookNode, given: dict, folder: Path) -> str | None:
    """Run a notebook by papermill; return None, or in a sentence what went wrong.

    The executed copy is kept in ``folder``: executed.ipynb, or failed.ipynb. While it runs it is
    executing.ipynb, so a killed run leaves nothing that could be taken for a whole one.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The lock goes with its process, however that ends.
        with FileLock(folder / LOCK, timeout=0):
            return _execute_locked(notebook, given, folder)
    except Timeout:
        return f"Another process is running it in {folder}."
    except OSError as error:
        return f"{first_line(error)}."


def _execute_locked(notebook: nbformat.NotebookNode, given: dict, folder: Path) -> str | None:
    executing, executed, failed = (folder / name for name in ("executing.ipynb", EXECUTED, FAILED))
    executed.unlink(missing_ok=True)
    os.environ[CODE_VARIABLE] = code_sha256(notebook)
    try:
        _execute_by_papermill(notebook, given, executing)
    except Exception as error:  # an error in a cell, a dead kernel, a full disk, ...
        if not executing.exists():
            return f"{first_line(error)}."
        executing.replace(failed)
        return f"{first_line(error)}. Its executed copy: {failed}"
    finally:
        del os.environ[CODE_VARIABLE]
    executing.replace(executed)
    failed.unlink(missing_ok=True)
    return None


def _execute_by_papermill(notebook: nbformat.NotebookNode, given: dict, path: Path) -> None:
    """Write and execute a notebook; start its kernel again if that dies as it starts.

    A kernel is told its ports before it takes them, so that another process may be quicker.
    """
    for start in range(1, STARTS + 1):
        # By its path: given as an object, papermill would put all of it into the copy's metadata.
        nbformat.write(notebook, path)
        try:
            papermill.execute_notebook(
                path,
                path,
                parameters=given,
                progress_bar=False,
                stdout_file=_EpochLines(),
                coalesce_streams=True,
                # Not that it runs over TCP, nor that it was interrupted as it ended.
                extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
            )
            return
        except RuntimeError as error:
            if start == STARTS or "died before replying to kernel_info" not in str(error):
                raise


def first_line(error: Exception) -> str:
    """Return an error as one line, without its last full stop."""
    if isinstance(error, PapermillExecutionError):
        text = f"{error.ename}: {error.evalue}"
    else:
        text = str(error) or type(error).__name__
    return text.strip().splitlines()[0].removesuffix(".")


class _EpochLines:
    """A file that prints only the lines that DynamicLossPlot writes, one an epoch."""

    def write(self, text: str) -> None:
        for line in text.splitlines():
            if re.match(r"Epoch +\d+/", line):
                print("   ", line, flush=True)

    def flush(self) -> None:
        pass


class Clock:
    """Tell the time left, from the reference runs' times and how long runs take here."""

    def __init__(self, tasks: list[Task], images: int):
        references = reference_runs(load_runs(reference_folder())[0])
        self.expected = {
            task.setting: _expected_seconds(task, images, references) for task in tasks
        }
        self.spent = self.spent_expected = 0.0

    def skip(self, task: Task) -> None:
        del self.expected[task.setting]

    def done(self, task: Task, seconds: float) -> None:
        self.spent += seconds
        self.spent_expected += self.expected.pop(task.setting)

    def left(self) -> str:
        pace = self.spent / self.spent_expected if self.spent else 1
        return f"about {format_seconds(sum(self.expected.values()) * pace)} left"


def _expected_seconds(task: Task, images: int, references: dict[str, Run]) -> float:
    run = references.get(task.setting)
    an_epoch = median(run.record.seconds_per_epoch) if run else 60.0
    # 10 s to start a kernel. An epoch also goes once through the 10,000 test images, and the end
    # twice more; forward alone costs a third of training.
    epochs, a_pass = task.parameters.epochs, 10_000 / 3
    share = (epochs * (images + a_pass) + 2 * a_pass) / (60_000 + a_pass)
    return 10 + an_epoch * share
