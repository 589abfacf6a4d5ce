"""Sweeps on real Dask processes; a notebook of milliseconds stands in where many runs matter."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import dask
import nbformat
import psutil
import pytest
from conftest import ROOT, output_text, python
from distributed.scheduler import KilledWorker
from filelock import FileLock

from mnist_utils.__main__ import main
from mnist_utils.headless import LOCK, Task
from mnist_utils.parameters import InputError, check_parameters
from mnist_utils.runs import load_runs
from mnist_utils.sweep import (
    Outcome,
    _write_future,
    check_workers,
    difference,
    make_tasks,
    package_versions,
    parse_seeds,
    print_means,
    python_path,
    run_sweep,
    write_outcome,
)

# Saves a record as a model notebook does, but of a run that took no time.
STAND_IN = """
import hashlib, io, json, os, pathlib, time
import numpy as np

time.sleep(seconds)
record = json.loads(template)
record["run"].update(epochs=1, seed=seed)
content = io.BytesIO()
np.savez(content, predicted=np.zeros(3, "uint8"), labels=np.zeros(3, "uint8"))
sha256 = hashlib.sha256(content.getvalue()).hexdigest()
record["predictions"] = {"file": "predictions.npz", "sha256": sha256}
record["code_sha256"] = os.environ["MNIST_UTILS_CODE_SHA256"]
folder = pathlib.Path(results_dir) / "a1" / "run"
folder.mkdir(parents=True)
(folder / "predictions.npz").write_bytes(content.getvalue())
(folder / "metrics.json").write_text(json.dumps(record))
if seed == broken:
    raise RuntimeError("broken")
"""


@pytest.fixture
def stand_ins(tmp_path):
    """Return a function that makes tasks with the stand-in, one for each seed."""
    reference = next(ROOT.glob("results/a1/*/metrics.json")).read_text()
    record = json.loads(reference)
    for values in (*record["history"].values(), record["seconds_per_epoch"]):
        del values[1:]

    def make(count, seconds=0.0, broken=None, dataset="mnist"):
        wanted = [
            check_parameters(
                "a1",
                epochs=1,
                batch_size=256,
                seed=seed,
                dataset=dataset,
                results_dir=str(tmp_path / "runs"),
            )
            for seed in range(count)
        ]
        record["run"]["dataset"] = wanted[0].dataset_name
        notebook = nbformat.v4.new_notebook()
        notebook.metadata.kernelspec = {
            "name": "python3",
            "display_name": "Python 3",
            "language": "python",
        }
        parameters = nbformat.v4.new_code_cell(
            "seed = dataset = results_dir = None\n"
            f"seconds, broken, template = {seconds}, {broken}, {json.dumps(record)!r}",
            metadata={"tags": ["parameters"]},
        )
        notebook.cells = [parameters, nbformat.v4.new_code_cell(STAND_IN)]
        return [
            Task("a1", notebook, {"seed": parameters.seed, "dataset": dataset}, parameters)
            for parameters in wanted
        ]

    return make


def start(*arguments, folder: Path, **variables) -> subprocess.Popen:
    folder.mkdir()
    return subprocess.Popen(
        python("-m", *arguments),
        cwd=folder,
        env=os.environ | variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.fixture
def cluster(tmp_path):
    """A scheduler and two workers, as processes of their own in folders of their own."""
    yield from start_cluster(tmp_path)


@pytest.fixture
def tls_cluster(tmp_path, monkeypatch):
    """The same, with the configuration that docs/many_runs.md gives for TLS."""
    page = (ROOT / "docs/many_runs.md").read_text(encoding="utf-8")
    secret = tmp_path / "secret"
    secret.mkdir()
    commands = page.split("```sh\n")[1].split("```")[0]
    subprocess.run(["sh", "-e", "-c", commands], cwd=secret, check=True, capture_output=True)
    configuration = page.split("```yaml\n")[1].split("```")[0]
    (secret / "tls.yaml").write_text(configuration.replace("/path/to", str(secret)))
    monkeypatch.setenv("DASK_CONFIG", str(secret / "tls.yaml"))
    dask.config.refresh(paths=[str(secret)])
    yield from start_cluster(tmp_path, "--protocol", "tls")
    dask.config.refresh()


@pytest.fixture
def two_thread_cluster(tmp_path):
    """The same, but a worker has two threads, as it has by itself on two cores."""
    yield from start_cluster(tmp_path, threads=2)


@pytest.fixture
def strange_cluster(tmp_path):
    """The same, but the scheduler has not this package."""
    hidden = tmp_path / "hidden" / "mnist_utils"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ModuleNotFoundError(\"No module 'mnist_utils'\")")
    yield from start_cluster(tmp_path, PYTHONPATH=str(hidden.parent))


def start_cluster(tmp_path, *options, threads=1, **variables):
    file = tmp_path / "scheduler.json"
    processes = [
        start(
            *("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", 0),
            "--no-dashboard",
            *("--scheduler-file", file, *options),
            folder=tmp_path / "scheduler",
            **variables,
        )
    ]
    deadline = time.monotonic() + 60
    while not file.exists() or not file.read_text().endswith("}"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    address = json.loads(file.read_text())["address"]
    processes += [start_worker(tmp_path, address, name, threads) for name in ("first", "second")]
    yield address, processes
    for process in processes:
        process.kill()
        process.wait()


def start_worker(tmp_path, address, name, threads=1):
    return start(
        *("distributed.cli.dask_worker", address, "--host", "127.0.0.1", "--nthreads", threads),
        *("--no-nanny", "--no-dashboard", "--name", name),
        folder=tmp_path / name,
    )


def seeds(folder):
    runs, problems = load_runs(folder)
    assert problems == []
    return sorted(run.record.run.seed for run in runs)


def kill_in_mid_run(worker: subprocess.Popen) -> None:
    """Kill a worker as soon as a notebook's kernel runs below it."""
    while not started(worker):
        time.sleep(0.05)
    worker.send_signal(signal.SIGKILL)


def started(process: subprocess.Popen) -> bool:
    """Is a notebook's kernel running below this process?"""
    children = psutil.Process(process.pid).children(recursive=True)
    try:
        return any("ipykernel_launcher" in child.cmdline() for child in children)
    except psutil.NoSuchProcess:  # it just ended
        return False


def test_every_run_is_recorded_once_though_a_worker_is_killed(cluster, stand_ins, tmp_path, capsys):
    address, (_, first, _) = cluster
    tasks = stand_ins(6, seconds=1)
    killer = Thread(target=kill_in_mid_run, args=(first,), daemon=True)
    killer.start()
    assert run_sweep(tasks, address) == []
    killer.join(timeout=10)
    assert first.wait(timeout=10) == -signal.SIGKILL
    assert seeds(tmp_path / "runs") == list(range(6))
    assert all(task.finished_run() for task in tasks)
    assert capsys.readouterr().out.count("test accuracy") == 6
    # What is recorded is not run again, and needs no cluster.
    assert run_sweep(tasks, "tcp://127.0.0.1:1") == []
    assert capsys.readouterr().out == "6 runs, 6 recorded already.\n"


def test_a_run_that_fails_is_named_and_the_others_are_recorded(stand_ins, tmp_path, capsys):
    tasks = stand_ins(3, broken=1)
    assert run_sweep(tasks) == [tasks[1]]
    output = capsys.readouterr()
    (line,) = [line for line in output.out.splitlines() if "FAILED" in line]
    assert "a1 seed 1: FAILED: RuntimeError: broken. Its executed copy: " in line
    assert Path(line.split("executed copy: ")[1]).is_file()
    assert str(tmp_path) in line
    assert "1 of 3 failed." in output.err
    assert all(task.finished_run() for task in (tasks[0], tasks[2]))
    assert not tasks[1].finished_run()
    # Mended and run again, it leaves nothing of the failure.
    assert run_sweep(stand_ins(3)) == []
    assert sorted(path.name for path in tasks[1].folder.glob("[!.]*")) == [
        "executed.ipynb",
        "metrics.json",
        "predictions.npz",
    ]


def test_real_models_travel_to_a_worker_and_back(small_mnist, tmp_path):
    # A file of this name is not the embedded data set.
    data = shutil.copy(small_mnist, tmp_path / "mnist")
    # D also reads what was measured of its steps, from the folder of the reference runs.
    command = python(
        *("-m", "mnist_utils", "sweep", "--models", "a2", "d-speed", "--seeds", "1"),
        *("-p", "epochs=1", "-p", "batch_size=64", "-p", f"dataset={data}"),
        *("--results-dir", tmp_path / "runs"),
    )
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    runs, problems = load_runs(tmp_path / "runs")
    assert problems == []
    assert [run.record.model for run in runs] == ["a2", "d"]
    for run in runs:
        assert run.record.run.seed == 1
        assert run.record.run.dataset.startswith("mnist-")
        assert run.record.environment["threads"] == 1
        # Nothing of the worker's folders is in what came back.
        outputs = output_text(nbformat.read(run.folder / "executed.ipynb", 4))
        assert f"Saved the run in runs/{run.record.model}/" in outputs
    assert "[2/2, 0 failed, about 0.0 s left] " in done.stdout
    for title, run in zip(("CNN A.2", "CNN D, speed"), runs, strict=True):
        given = f"epochs 1, batch_size 64, dataset {data}"
        accuracy = f"{100 * run.record.test_accuracy:.2f}"
        assert f"{title}, {given}: test accuracy {accuracy} % (n = 1)\n" in done.stdout


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_a_sweep_runs_over_tls_as_the_page_says(tls_cluster, stand_ins, tmp_path):
    address, _ = tls_cluster
    assert address.startswith("tls://")
    tasks = stand_ins(2)
    nothing = {"distributed.comm.tls.ca-file": None, "distributed.comm.tls.client.cert": None}
    refused = pytest.raises(InputError, match="scheduler is 'tls://")
    with dask.config.set(nothing), refused:
        run_sweep(tasks, address)  # without the key nobody gets in
    assert run_sweep(tasks, address) == []
    assert seeds(tmp_path / "runs") == [0, 1]


def test_data_that_cannot_be_trained_on_is_refused_before_anything_runs(stand_ins, tmp_path):
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"no arrays")
    with pytest.raises(InputError, match=r"broken\.npz"):
        run_sweep(stand_ins(2, dataset=str(broken)))


def test_a_scheduler_that_cannot_be_reached_is_named(stand_ins):
    with pytest.raises(InputError, match=r"scheduler is 'tcp://127\.0\.0\.1:1'.*it must be"):
        run_sweep(stand_ins(1), "tcp://127.0.0.1:1")


def test_a_worker_with_other_packages_is_named(cluster, stand_ins, monkeypatch):
    address, _ = cluster
    here = {"mnist-notebooks": "9.9", "tensorflow": "1", "keras": "1", "numpy": "1"}
    monkeypatch.setattr("mnist_utils.sweep.package_versions", lambda: here)
    with pytest.raises(InputError, match=r"has mnist-notebooks 0\.1\.0; it must be 9\.9"):
        run_sweep(stand_ins(1), address)


def test_a_scheduler_without_the_package_is_named(strange_cluster, stand_ins):
    address, _ = strange_cluster
    sentence = "The scheduler cannot hand out the notebooks: .*; it needs this package too"
    with pytest.raises(InputError, match=sentence):
        run_sweep(stand_ins(1), address)


def test_a_scheduler_that_is_lost_is_said_and_nothing_recorded_is_lost(
    cluster, stand_ins, tmp_path, capsys
):
    address, processes = cluster

    def kill_when_one_is_recorded():
        while not seeds(tmp_path / "runs"):
            time.sleep(0.05)
        processes[0].kill()

    Thread(target=kill_when_one_is_recorded, daemon=True).start()
    with pytest.raises(InputError, match=r"connection to the scheduler was lost .* same command"):
        run_sweep(stand_ins(20, seconds=1), address)
    assert 0 < len(seeds(tmp_path / "runs")) < 20
    assert "FAILED" not in capsys.readouterr().out


def test_a_worker_with_several_threads_is_refused(two_thread_cluster, stand_ins):
    address, _ = two_thread_cluster
    with pytest.raises(InputError, match=r"has 2 threads; it must have one: .* --nthreads 1"):
        run_sweep(stand_ins(1), address)


def test_a_worker_that_joins_late_gets_its_share(cluster, stand_ins, tmp_path, monkeypatch):
    monkeypatch.setattr("mnist_utils.sweep.TASKS_A_WORKER", 1)
    address, processes = cluster
    took_part = []

    def join_late():
        while not any(map(started, processes)):
            time.sleep(0.05)
        processes.append(start_worker(tmp_path, address, "late"))
        while not all(map(started, processes[1:])):  # all three at the same time
            time.sleep(0.05)
        took_part.append("late")

    Thread(target=join_late, daemon=True).start()
    assert run_sweep(stand_ins(12, seconds=3), address) == []
    assert took_part
    assert seeds(tmp_path / "runs") == list(range(12))


def test_an_unfit_worker_that_joins_late_is_let_go(
    cluster, stand_ins, tmp_path, capsys, monkeypatch
):
    address, processes = cluster

    def check_and_join(client):
        check_workers(client)
        processes.append(start_worker(tmp_path, address, "late", threads=2))
        client.wait_for_workers(3)

    monkeypatch.setattr("mnist_utils.sweep.check_workers", check_and_join)
    assert run_sweep(stand_ins(6), address) == []
    assert seeds(tmp_path / "runs") == list(range(6))
    assert processes[3].wait(timeout=60) == 0
    sentence = r"^The worker tcp://\S+ has 2 threads; it must have one: .* It is closed"
    assert re.search(sentence, capsys.readouterr().out, re.MULTILINE)


def test_a_data_set_outlives_the_only_worker_that_has_it(cluster, stand_ins, small_mnist, tmp_path):
    address, processes = cluster
    processes[2].kill()
    processes[2].wait()

    def take_its_place():
        kill_in_mid_run(processes[1])
        processes.append(start_worker(tmp_path, address, "late"))

    Thread(target=take_its_place, daemon=True).start()
    assert run_sweep(stand_ins(3, seconds=1, dataset=str(small_mnist)), address) == []
    assert processes[1].wait(timeout=10) == -signal.SIGKILL
    assert seeds(tmp_path / "runs") == [0, 1, 2]


def test_a_run_that_another_process_is_running_is_left_alone(stand_ins):
    (task,) = stand_ins(1)
    with FileLock(task.folder / LOCK):
        problem = write_outcome(task, Outcome({"metrics.json": b"{}"}, None))
    assert problem == f"Another process is running it in {task.folder}."
    assert not (task.folder / "metrics.json").exists()


def test_a_worker_that_dies_again_and_again_is_said_in_a_sentence():
    class Dead:
        def result(self):
            raise KilledWorker("run", None, allowed_failures=2)

    problem = _write_future(None, Dead())
    assert problem == "Its worker died 3 times while it ran, perhaps for lack of memory."


def test_a_kernel_finds_these_helpers_and_what_its_worker_finds(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/of/the/worker")
    assert python_path() == f"{ROOT}:/of/the/worker"
    monkeypatch.setenv("PYTHONPATH", python_path())
    assert python_path() == f"{ROOT}:/of/the/worker"


def test_checkouts_of_the_same_version_but_other_code_are_told_apart(monkeypatch, tmp_path):
    here = package_versions()
    copy = shutil.copytree(ROOT / "mnist_utils", tmp_path / "mnist_utils")
    (copy / "plotting.py").write_text((copy / "plotting.py").read_text() + "# changed\n")
    monkeypatch.setattr("mnist_utils.sweep.__file__", str(copy / "sweep.py"))
    there = package_versions.__wrapped__()
    assert difference(there, here).startswith("has code of mnist_utils ")
    assert difference(here, here) is None


def test_a_worker_without_tensorflow_is_told(monkeypatch):
    here = package_versions()
    monkeypatch.setattr("mnist_utils.sweep.PACKAGES", ("mnist-notebooks", "no-such-package"))
    there = package_versions.__wrapped__()
    wanted = here["tensorflow"]
    assert difference(there, here) == (
        f"has no tensorflow; it must have {wanted}, as the client has"
    )


def test_tasks_are_models_times_seeds_times_values(tmp_path):
    tasks = make_tasks(["a1", "a2"], [0, 1], {"epochs": [1, 2], "results_dir": [str(tmp_path)]})
    assert len({task.folder for task in tasks}) == len(tasks) == 8


def test_the_same_run_asked_for_twice_is_one_task(tmp_path):
    values = {"first_kernel_size": [7, 7], "results_dir": [str(tmp_path)]}
    assert len(make_tasks(["c7", "c7"], [0, 0], values)) == 1


def run_of_accuracy(folder: Path) -> SimpleNamespace:
    """Stands in for load_run: 98 % with seed 0, 99 % with seed 1."""
    accuracy = {"seed0": 0.98, "seed1": 0.99}[folder.name.split("-")[-1]]
    return SimpleNamespace(record=SimpleNamespace(test_accuracy=accuracy))


def test_means_are_taken_over_runs_that_differ_in_the_seed_alone(tmp_path, monkeypatch, capsys):
    values = {"first_kernel_size": [2, 3], "results_dir": [str(tmp_path)]}
    tasks = make_tasks(["c"], [0, 1], values)
    tasks += make_tasks(["c7"], [0], {"results_dir": [str(tmp_path)]})
    monkeypatch.setattr("mnist_utils.sweep.load_run", run_of_accuracy)
    print_means(tasks)
    assert capsys.readouterr().out.splitlines() == [
        "CNN C: test accuracy 98.50 ± 0.71 % (n = 2)",
        "CNN C, first_kernel_size 3: test accuracy 98.50 ± 0.71 % (n = 2)",
        "CNN C, 7X7 first: test accuracy 98.00 % (n = 1)",
    ]


def test_the_command_ends_with_1_and_leaves_out_of_the_means_what_failed(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("mnist_utils.sweep.load_run", run_of_accuracy)
    command = ["sweep", "--models", "a2", "--seeds", "0-1", "--results-dir", str(tmp_path)]
    for failed, code, mean in (
        (slice(0), 0, "98.50 ± 0.71 % (n = 2)"),
        (slice(1), 1, "99.00 % (n = 1)"),
    ):
        monkeypatch.setattr("mnist_utils.sweep.run_sweep", lambda tasks, _, f=failed: tasks[f])
        assert main(command) == code
        assert capsys.readouterr().out == f"CNN A.2: test accuracy {mean}\n"


def test_a_seed_given_as_a_parameter_is_refused():
    with pytest.raises(InputError, match="it takes seeds by --seeds"):
        make_tasks(["a1"], [0], {"seed": [3]})


@pytest.mark.parametrize(
    ("text", "expected"), [("0-4", [0, 1, 2, 3, 4]), ("3", [3]), ("0,2,7-9", [0, 2, 7, 8, 9])]
)
def test_seeds_are_read(text, expected):
    assert parse_seeds(text) == expected


@pytest.mark.parametrize("text", ["", "-1", "a", "1-", "1.5", "0-4-5", "4-0", "4294967296"])
def test_bad_seeds_are_refused(text):
    with pytest.raises(InputError, match="it must be like 0-4"):
        parse_seeds(text)


def test_an_interrupt_ends_the_sweep_and_its_workers(small_mnist, tmp_path):
    process = subprocess.Popen(
        python(
            *("-m", "mnist_utils", "sweep", "--models", "a2", "--seeds", "0-9"),
            *("-p", "epochs=100", "-p", "batch_size=64", "-p", f"dataset={small_mnist}"),
            *("--results-dir", tmp_path / "runs"),
        ),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not started(process) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert started(process)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers as well
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, output + errors
    assert "Interrupted. What is recorded is kept" in output
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []
