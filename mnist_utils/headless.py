"""Run notebooks by papermill, one process a notebook, and keep what is whole."""

import ast
import hashlib
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import nbformat
import papermill
from papermill.exceptions import PapermillExecutionError

from mnist_utils.comparison import by_parameters, own_table, reference_folder, reference_runs
from mnist_utils.data import load_mnist
from mnist_utils.parameters import (
    SETTINGS,
    TRAIN_IMAGES,
    InputError,
    Parameters,
    check_batch_size,
    check_parameters,
    project_folder,
    results_folder,
)
from mnist_utils.plotting import format_seconds
from mnist_utils.runs import CODE_VARIABLE, Run, load_run, load_runs, run_folder

SMALLEST_FIRST = ("a2", "a1", "c", "c7", "b")
COMPARISON = "6_comparison"


@dataclass(frozen=True)
class Task:
    """One run that is wanted: a setting's notebook with checked parameters."""

    setting: str
    notebook: Path
    given: dict
    parameters: Parameters
    code: str

    @property
    def folder(self) -> Path:
        return run_folder(self.parameters)

    def finished_run(self) -> Run | None:
        """Return the run if it is recorded, by these code cells and with these parameters."""
        try:
            run = load_run(self.folder)
            run.predictions()
        except InputError:
            return None
        return run if run.record.code_sha256 == self.code else None


def make_task(setting: str, given: dict) -> Task:
    """Return the task of one setting, such as "c7", with the parameters ``given``.

    Raises InputError for an unknown setting or a bad parameter.
    """
    if setting not in SETTINGS:
        raise InputError(f"models has {setting!r}; it must be some of {', '.join(SETTINGS)}.")
    name, own = SETTINGS[setting]
    notebook = notebook_path(name)
    defaults = {
        key: ast.literal_eval(parameter["default"])
        for key, parameter in papermill.inspect_notebook(str(notebook)).items()
    }
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise InputError(
            f"{unknown[0]} is not a parameter of {name}; it has {', '.join(defaults)}."
        )
    # The notebook is told only what differs, so that its own defaults stay visible in it.
    wanted = {**own, **given}
    given = {key: value for key, value in wanted.items() if value != defaults[key]}
    model = name.split("_")[-1]
    parameters = check_parameters(model, **{**defaults, **wanted})
    return Task(setting, notebook, given, parameters, code_sha256(nbformat.read(notebook, 4)))


def check_dataset(parameters: Parameters) -> None:
    """Raise InputError for a data set that no notebook could train on with these parameters."""
    (x_train, _), _ = load_mnist(parameters.dataset, parameters.train_samples, parameters.seed)
    check_batch_size(parameters.batch_size, len(x_train))


def notebook_path(name: str) -> Path:
    """Return the path of a notebook; raise InputError where there is no checkout."""
    path = project_folder() / "notebooks" / f"{name}.ipynb"
    if not path.is_file():
        raise InputError("There is no folder notebooks/ here; run this in the checkout's root.")
    return path


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
    tasks = [make_task(setting, given) for setting in settings]
    check_dataset(tasks[0].parameters)
    clock = Clock(tasks)
    failed = []
    for number, task in enumerate(tasks, 1):
        head = f"[{number}/{len(tasks)}] {task.setting}:"
        if task.finished_run():
            print(head, "recorded already, kept", flush=True)
            clock.skip(task)
            continue
        print(head, f"training; {clock.left()} for all", flush=True)
        began = time.perf_counter()
        problem = execute(task.notebook, task.given, task.folder, task.code)
        seconds = time.perf_counter() - began
        if problem is None and not task.finished_run():
            problem = "the notebook ran, but left no record"
        if problem:
            failed.append(task.setting)
            print(head, f"FAILED after {format_seconds(seconds)}: {problem}", flush=True)
            clock.skip(task)
            continue
        accuracy = task.finished_run().record.test_accuracy
        print(head, f"test accuracy {accuracy:.2%} in {format_seconds(seconds)}", flush=True)
        clock.done(task, seconds)
    failed += run_comparison(given)
    if failed:
        print(f"{len(failed)} failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run_comparison(given: dict) -> list[str]:
    """Run the comparison over the results so far and print where it is; return what failed."""
    folder = results_folder(given.get("results_dir"))
    own = {key: value for key, value in given.items() if key == "results_dir"}
    problem = execute(notebook_path(COMPARISON), own, folder / COMPARISON, "")
    if problem:
        print(f"{COMPARISON}: FAILED: {problem}", flush=True)
        return [COMPARISON]
    references = reference_runs(load_runs(reference_folder())[0])
    for title, runs in by_parameters(load_runs(folder)[0]).items():
        print(title, own_table(runs, references), sep="\n")
    print("The executed comparison:", folder / COMPARISON / "executed.ipynb", flush=True)
    return []


def execute(notebook: Path, given: dict, folder: Path, code: str) -> str | None:
    """Run one notebook by papermill; return None, or in a sentence what went wrong.

    The executed notebook is kept in ``folder``: executed.ipynb, or failed.ipynb. While it runs
    it is executing.ipynb, so a killed run leaves nothing that could be taken for a whole one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    executing = folder / "executing.ipynb"
    os.environ[CODE_VARIABLE] = code
    try:
        papermill.execute_notebook(
            notebook,
            executing,
            parameters=given,
            progress_bar=False,
            stdout_file=_EpochLines(),
            coalesce_streams=True,
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
        )
    except PapermillExecutionError as error:
        kept = executing.replace(folder / "failed.ipynb")
        return f"{_first_line(error)} Its executed copy: {kept}"
    except OSError as error:
        return f"{error.strerror}: {error.filename}"
    except RuntimeError as error:  # nbclient: the kernel died, for example for lack of memory
        if executing.exists():
            executing = executing.replace(folder / "failed.ipynb")
        return f"{str(error).splitlines()[0]}. Its executed copy: {executing}"
    finally:
        del os.environ[CODE_VARIABLE]
    executing.replace(folder / "executed.ipynb")
    (folder / "failed.ipynb").unlink(missing_ok=True)
    return None


def _first_line(error: PapermillExecutionError) -> str:
    """Return the error as one line: its type, and the first line of its message."""
    message = (error.evalue or "").strip().splitlines() or [""]
    return f"{error.ename}: {message[0]}"


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

    def __init__(self, tasks: list[Task]):
        references = reference_runs(load_runs(reference_folder())[0])
        self.expected = {task.setting: _expected_seconds(task, references) for task in tasks}
        self.spent = self.spent_expected = 0.0

    def skip(self, task: Task) -> None:
        del self.expected[task.setting]

    def done(self, task: Task, seconds: float) -> None:
        self.spent += seconds
        self.spent_expected += self.expected.pop(task.setting)

    def left(self) -> str:
        pace = self.spent / self.spent_expected if self.spent else 1
        return f"about {format_seconds(sum(self.expected.values()) * pace)} left"


def _expected_seconds(task: Task, references: dict[str, Run]) -> float:
    run = references.get(task.setting)
    an_epoch = median(run.record.seconds_per_epoch) if run else 60.0
    samples = task.parameters.train_samples or TRAIN_IMAGES
    # 10 s to start a kernel; the test images cost a third of what training on them would.
    share = (samples + 2 * 10_000 / 3) / (TRAIN_IMAGES + 10_000 / 3)
    return 10 + an_epoch * task.parameters.epochs * share
