"""make run: papermill on real Dask workers; a notebook of a second stands in where it can."""

import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from hashlib import sha256
from threading import Thread

import nbformat
import psutil
import pytest
from conftest import ROOT, output_text, python, write_npz
from distributed import Client, Nanny
from test_data import write_idx

from mnist_utils import headless
from mnist_utils.__main__ import main, make_parser, parse_seeds, parse_values
from mnist_utils.headless import make_tasks, run_notebook, run_tasks, write_run
from mnist_utils.parameters import SETTINGS, InputError
from mnist_utils.runs import load_record, load_runs, read_predictions

PARAMETERS = """
epochs: int = 1
batch_size: int = 256
seed: int = 0
train_samples: "int or None" = None
dataset = "mnist"
precision = "float32"
results_dir: "str or None" = None
keep_model: bool = True
"""
# Saves a record as a model notebook does, but of a run that took half a second an epoch.
STAND_IN = """
import hashlib, io, json, os, time
import numpy as np
from mnist_utils.data import load_mnist
from mnist_utils.parameters import check_parameters, dataset_path

parameters = check_parameters(model, globals())
if dataset != "mnist":
    load_mnist(str(dataset_path(dataset)))
for epoch in range(epochs):
    time.sleep(0.5)
    print(f"Epoch {epoch + 1}/{epochs}: loss 0.1")
content, own = io.BytesIO(), seed + 10 * "a1 a2 d".split().index(model)
np.savez(
    content,
    probabilities=np.full((3, 10), own, "float16"),
    predicted=np.zeros(3, "uint8"),
    labels=np.zeros(3, "uint8"),
)
sha256 = hashlib.sha256(content.getvalue()).hexdigest()
one = [0.9] * epochs
folder = parameters.run_folder()
folder.mkdir(parents=True, exist_ok=True)
(folder / "predictions.npz").write_bytes(content.getvalue())
record = {
    **{"schema_version": 1, "model": model, "title": "", "run": parameters.recorded()},
    "architecture": {
        **{"conv_layers": 0, "kernel_sizes": [], "parameters": 1, "macs": 1, "digest": ""},
        **dict.fromkeys(("max_pool", "padding", "dropout", "batch_normalization"), False),
    },
    "history": dict.fromkeys(("loss", "accuracy", "val_loss", "val_accuracy"), one),
    **{"test_loss": 0.1, "test_accuracy": 0.9 + seed / 100, "seconds_per_epoch": one},
    "environment": {"cores": 1, "threads": int(os.environ["TF_NUM_INTRAOP_THREADS"])},
    "predictions": {"file": "predictions.npz", "sha256": sha256},
    "code_sha256": os.environ["MNIST_UTILS_CODE_SHA256"],
}
(folder / "metrics.json").write_text(json.dumps(record))
"""


def notebook_of(*sources):
    """Return a notebook of code cells, the parameters first, saved with a strange kernel."""
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata.tags = ["parameters"]
    kernel = {"name": "mnist", "display_name": "mnist", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout, as working folder, where stand-ins take the place of A.1, A.2 and D."""
    folder = tmp_path / "check out"
    (folder / "notebooks").mkdir(parents=True)
    (folder / "mnist_utils").symlink_to(ROOT / "mnist_utils")
    for setting in ("a1", "a2", "d"):
        write_stand_in(folder, setting)
    comparison = notebook_of("results_dir = None", "import os; os.environ['MNIST_UTILS_RESULTS']")
    nbformat.write(comparison, folder / "notebooks/8_comparison.ipynb")
    monkeypatch.chdir(folder)
    return folder


def write_stand_in(checkout, setting, last=""):
    """Write a stand-in that ends with some code of its own."""
    notebook = notebook_of(PARAMETERS, f"model = {setting!r}{STAND_IN}", last)
    nbformat.write(notebook, checkout / f"notebooks/{SETTINGS[setting].notebook}.ipynb")


def command(*models, results=None, **values):
    pairs = [text for name, value in values.items() for text in ("-p", f"{name}={value}")]
    where = ["--results-dir", results] if results else []
    return python("-m", "mnist_utils", "run", "--models", *models, *pairs, *where)


def run(*models, before=(), cwd=None, **given):
    whole = [*before, *command(*models, **given)]
    return subprocess.run(whole, cwd=cwd, capture_output=True, text=True)


def start(*models, **given):
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command(*models, **given), text=True, start_new_session=True, **pipes)


def wait_for(path):
    """Return the code that waits for a file, but not for ever."""
    return f"for _ in range(1200):\n    os.path.exists({str(path)!r}) or time.sleep(0.1)"


def wait_for_line(process, beginning):
    """Read a command's lines until one begins so."""
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(process.stderr.read())


def kernels(process):
    """Return the kernels of notebooks that run below a process."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [child] if "ipykernel_launcher" in child.cmdline() else []
    return found


def recorded(folder):
    """Return the models and seeds of the runs in a folder; none of them may be at fault."""
    frame, problems = load_runs(folder)
    assert problems == []
    return sorted(zip(frame["model"], frame["seed"], strict=True))


# A network namespace has no network, and its loopback address is down at first.
NO_NETWORK = ["unshare", "-rn"]
CAN_UNSHARE = subprocess.run([*NO_NETWORK, "true"], capture_output=True).returncode == 0
LOOPBACK_UP = """
import fcntl, os, socket, struct, sys
flags = struct.pack("16sh", b"lo", 0x41)  # up and running
fcntl.ioctl(socket.socket(), 0x8914, flags)  # SIOCSIFFLAGS
os.execvp(sys.argv[1], sys.argv[1:])
"""


def test_all_of_it_ends_in_the_table_and_a_second_call_runs_nothing(small_mnist, tmp_path):
    given = {"epochs": 2, "batch_size": 64, "dataset": small_mnist}
    given |= {"results": tmp_path, "cwd": ROOT}
    alone = [*NO_NETWORK, *python("-c", LOOPBACK_UP)] if CAN_UNSHARE else []
    first = run("a2", "d", before=alone, **given)
    assert first.returncode == 0, first.stdout + first.stderr
    assert recorded(tmp_path) == [("a2", 0), ("d", 0)]
    # Each line says whose it is, and the first to be done how long all will take.
    for name in ("d", "a2"):
        lines = re.findall(rf"^{name} seed 0: Epoch [12]/2: loss .*$", first.stdout, re.MULTILINE)
        assert len(lines) == 2
    assert len(re.findall(r"; about .* left for all$", first.stdout, re.MULTILINE)) == 1
    *_, table = first.stdout.split("\n+", 1)
    assert "| CNN A.2 " in table and "| CNN D " in table
    assert max(map(len, table.splitlines()[:-2])) <= 100
    frame, _ = load_runs(tmp_path)
    assert set(frame["threads"]) == {max(1, headless.CPU_COUNT // 2)}
    assert (tmp_path / "8_comparison/executed.ipynb").is_file()
    for folder in frame["path"]:
        names = {path.name.split("-")[0] for path in folder.iterdir()}
        assert names == {".lock", "executed.ipynb", "metrics.json", "model.keras", "predictions"}
        text = (folder / "executed.ipynb").read_text()
        assert f'dataset = \\"{small_mnist}\\"' in text
        assert "Saved the run in " in text and "/tmp/tmp" not in text  # no folder of the worker's

    times = [(folder / "metrics.json").stat().st_mtime_ns for folder in frame["path"]]
    second = run("a2", "d", **given)
    assert second.returncode == 0
    assert second.stdout.startswith("2 runs, 2 recorded already.\n+")
    assert times == [(folder / "metrics.json").stat().st_mtime_ns for folder in frame["path"]]


def test_failing_notebooks_are_named_and_the_others_go_on(checkout):
    write_stand_in(checkout, "d", "raise RuntimeError('broken')")
    write_stand_in(checkout, "a2", "os._exit(1)")
    done = run("d", "a2", "a1")
    assert done.returncode == 1
    for setting, message in (("d", "RuntimeError: broken."), ("a2", "Kernel died")):
        (line,) = re.findall(rf"^{setting} seed 0: FAILED after .*$", done.stdout, re.MULTILINE)
        assert message in line
        assert nbformat.read(line.split(" Its executed copy: ")[1], 4).cells
    assert done.stderr == "2 failed: d seed 0, a2 seed 0\n"
    # Mended and run again, it leaves nothing of the failure, nor of a process killed as it wrote.
    (folder,) = (checkout / "runs/d").iterdir()
    left = [folder / ".metrics.json.999999999.part"]
    left += [checkout / "runs/8_comparison/.executed.ipynb.999999999.part"]
    for path in left:
        path.write_text("{")
    write_stand_in(checkout, "d")
    damaged = folder.with_name(folder.name.replace("seed0", "seed1")) / "metrics.json"
    damaged.parent.mkdir()
    damaged.write_text("{")
    done = run("d", "a1")
    assert done.returncode == 0
    assert f"\nLeft out: {damaged}: Invalid JSON" in done.stdout
    assert not left[1].exists()
    names = {path.name for path in folder.iterdir()}
    assert names == {".lock", "executed.ipynb", "metrics.json", "predictions.npz"}


def test_a_bad_data_set_is_refused_before_anything_runs(small_arrays, checkout):
    tiny = small_arrays | {name: small_arrays[name][:32] for name in ("x_train", "y_train")}
    (checkout / "broken.npz").write_text("no arrays")
    shutil.copy(write_npz(checkout / "tiny.npz", tiny), "mnist-small")
    for path, message in (
        ("tiny.npz", "batch_size is 256; it must be"),
        ("./mnist-small", "batch_size is 256; it must be"),  # not the embedded one
        (checkout / "broken.npz", "broken.npz"),
    ):
        done = run("a1", "a2", dataset=path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert message in done.stderr
        assert "Epoch" not in done.stdout


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_an_interrupted_run_goes_on_where_it_stopped(sent, code, checkout):
    write_stand_in(checkout, "a1", wait_for(checkout / "go"))
    process = start("d", "a1")
    wait_for_line(process, "a1 seed 0: Epoch 1")
    while not recorded(checkout / "runs"):
        time.sleep(0.1)
    below = psutil.Process(process.pid).children(recursive=True)
    assert kernels(process)
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # as a terminal does: to the workers as well
    else:
        process.send_signal(sent)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors == "" or sent == signal.SIGKILL
    sentence = "Interrupted. What is recorded is kept; the same command goes on from there.\n"
    assert output.endswith(sentence) == (sent != signal.SIGKILL)
    assert "FAILED" not in output
    _, alive = psutil.wait_procs(below, timeout=30)
    assert alive == []
    assert recorded(checkout / "runs") == [("d", 0)]
    if sent != signal.SIGKILL:
        return  # it leaves the least behind: going on from there shows the others too
    (checkout / "go").touch()
    done = run("d", "a1")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "2 runs, 1 recorded already.")
    assert recorded(checkout / "runs") == [("a1", 0), ("d", 0)]
    # With as many threads as it would have had, though it ran alone.
    assert set(load_runs(checkout / "runs")[0]["threads"]) == {max(1, headless.CPU_COUNT // 2)}


def test_an_interruption_before_anything_runs_is_said_too(monkeypatch, capsys):
    class Slow:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "mnist_utils.headless", Slow())
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert main(["run"]) == 130
    assert "Interrupted." in capsys.readouterr().out


def test_two_commands_at_once_share_the_work(checkout):
    write_stand_in(checkout, "d", wait_for(checkout / "go"))
    first = start("d", "a1")
    wait_for_line(first, "d seed 0: Epoch 1")
    second = start("d", "a2")
    wait_for_line(second, "d seed 0: another command is training it")
    (checkout / "go").touch()
    outputs = [process.communicate(timeout=300) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    assert "d seed 0: recorded by another command\n" in outputs[1][0]
    said = outputs[0][0] + outputs[1][0]
    trained = re.findall(r"^(\w+) seed 0: test accuracy", said, re.MULTILINE)
    assert sorted(trained) == ["a1", "a2", "d"]


def test_a_worker_that_is_killed_here_is_replaced(checkout):
    process = start("d", epochs=4)
    wait_for_line(process, "d seed 0: Epoch 1")
    (kernel,) = kernels(process)
    kernel.parent().kill()
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert output.count("Epoch 1/4") == 1  # the second first epoch; the first one was read above
    psutil.wait_procs([kernel], timeout=10)
    assert recorded(checkout / "runs") == [("d", 0)]


def test_a_worker_that_dask_does_not_restart_is_replaced_too(checkout, monkeypatch):
    killed = checkout / "killed"
    once = f"import pathlib, signal; killed = pathlib.Path({str(killed)!r})\n"
    once += "if not killed.exists(): killed.touch(); os.kill(os.getppid(), signal.SIGKILL)"
    write_stand_in(checkout, "d", once)

    async def give_up(*_):  # as a Nanny does when its worker dies before it has wholly started
        pass

    monkeypatch.setattr(Nanny, "_on_worker_exit", give_up)
    monkeypatch.setattr(headless, "PATIENCE", 1)
    assert run_tasks(make_tasks(["d"], {"epochs": [1]})) == []
    assert killed.exists() and recorded(checkout / "runs") == [("d", 0)]


def test_when_nobody_reads_the_output_any_more_it_ends_quietly(checkout):
    process = start("d", epochs=60)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 141


def test_a_full_disk_is_said_and_no_truncated_copy_is_named(checkout):
    write_stand_in(checkout, "d", "print(100_000 * '.')")
    (task,) = make_tasks(["d"], {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        done = run("d")  # the worker's disk is full
        problem = write_run(task, {"failed.ipynb": bytes(100_000)}, "It broke.")  # the client's
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.returncode == 1
    (line,) = re.findall(r"^d seed 0: FAILED .*$", done.stdout, re.MULTILINE)
    for text in (line, problem):
        assert "File too large" in text
        assert "executed copy" not in text
    assert problem.startswith("It broke. ")
    names = {path.name for path in task.folder.iterdir()}  # the record was whole before
    assert names == {".lock", "metrics.json", "predictions.npz"}


def test_nothing_of_the_users_dask_or_jupyter_disturbs_a_run(checkout, monkeypatch):
    (checkout / "dask.yaml").write_text("distributed: {comm: {require-encryption: true}}")
    monkeypatch.setenv("DASK_CONFIG", str(checkout / "dask.yaml"))
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tcp://127.0.0.1:1")
    for name in ("mnist", "python3"):  # kernels that end at once
        (checkout / "jupyter/kernels" / name).mkdir(parents=True)
        text = json.dumps({"argv": ["false"], "display_name": "", "language": "python"})
        (checkout / "jupyter/kernels" / name / "kernel.json").write_text(text)
    monkeypatch.setenv("JUPYTER_PATH", str(checkout / "jupyter"))
    done = run("d")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


@pytest.mark.skipif(not CAN_UNSHARE, reason="needs a namespace")
def test_without_a_loopback_address_it_is_said_in_a_sentence(checkout):
    done = run("d", before=NO_NETWORK)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "Network is unreachable" in done.stderr


@pytest.mark.skipif(not CAN_UNSHARE, reason="needs a namespace")
def test_a_folder_that_cannot_be_written_is_said_in_a_sentence(checkout):
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o ro none "$0" && exec "$@"', "results"]
    (checkout / "results").mkdir()
    done = run("d", before=mount, results="results")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert re.match(r"results_dir is .* \(read-only file system\); it must be", done.stderr)


def test_a_command_killed_while_it_writes_a_run_leaves_the_older_one_whole(checkout):
    (task,) = make_tasks(["d"], {})
    assert run_tasks([task]) == []
    older = load_record(task.folder), read_predictions(task.folder)["probabilities"].tolist()
    write_stand_in(checkout, "d", "# changed")
    (task,) = make_tasks(["d"], {})
    files = {path.name: path.read_bytes() for path in task.folder.glob("[!.]*")}
    other = {"executed.ipynb": files["executed.ipynb"].replace(b"time.sleep", b"time.slept")}
    other["predictions-2.npz"] = predictions = files["predictions.npz"] + b"other"
    record = json.loads(files["metrics.json"]) | {"test_loss": 0.2}
    record["predictions"] = {"file": "predictions-2.npz", "sha256": sha256(predictions).hexdigest()}
    other["metrics.json"] = json.dumps(record).encode()
    script = """if True:
        import os, pathlib, pickle, signal, sys
        from mnist_utils import runs
        folder, files = pickle.load(sys.stdin.buffer)
        for count in range(1, 6):  # each file and its folder are synced, the record last
            if (child := os.fork()) == 0:
                left = iter(range(count))
                os.fsync = lambda _: next(left) + 1 < count or os.kill(os.getpid(), signal.SIGKILL)
                runs.write_files(folder, files)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL"""
    given = pickle.dumps((task.folder, other))
    subprocess.run(python("-c", script), input=given, check=True)
    assert len(list(task.folder.glob(".*.part"))) == 3
    assert load_record(task.folder) == older[0]
    assert read_predictions(task.folder)["probabilities"].tolist() == older[1]
    assert run_tasks([task]) == [] and task.finished_run()
    assert not list(task.folder.glob(".*.part"))


def test_only_a_run_by_the_same_code_with_all_its_files_counts(checkout):
    (task,) = make_tasks(["d"], {})
    assert run_tasks([task]) == []
    assert task.finished_run()
    write_stand_in(checkout, "d", "# changed")
    assert not make_tasks(["d"], {})[0].finished_run()
    record = (task.folder / "metrics.json").read_text()
    for name, content in (
        ("executed.ipynb", None),
        ("predictions.npz", None),
        ("predictions.npz", "other"),
        ("metrics.json", record.replace('"seed": 0', '"seed": 1')),
    ):
        kept = (task.folder / name).read_bytes()
        (task.folder / name).unlink()
        if content:
            (task.folder / name).write_text(content)
        assert not task.finished_run()
        (task.folder / name).write_bytes(kept)
        assert task.finished_run()


def test_a_kernel_that_dies_as_it_starts_is_started_again(tmp_path, monkeypatch, capfd):
    # As it does when another process takes the port that it was told.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib, sys\n"
        "starts = pathlib.Path(__file__).with_name('starts')\n"
        "if 'ipykernel_launcher' in sys.orig_argv:\n"
        "    with starts.open('a') as file:\n"
        "        file.write('.')\n"
        "    if starts.stat().st_size < int(os.environ['LIVES_AT']):\n"
        "        print('No port.', file=sys.stderr, flush=True)\n"
        "        os._exit(1)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    text = nbformat.writes(notebook_of("", "print('ran', cost)"))
    # What a path may hold gets to the kernel as it is.
    environment = {"LIVES_AT": "3", "cost": "$HOME '$$'"}
    code = text.replace("cost)", "__import__('os').environ['cost'])")
    files, problem = run_notebook(code, {}, environment, print, {})
    assert problem is None
    executed = nbformat.reads(files["executed.ipynb"].decode(), 4)
    assert output_text(executed) == "ran $HOME '$$'\n"
    files, problem = run_notebook(code, {}, environment | {"LIVES_AT": "7"}, print, {})
    assert problem == "Kernel died before replying to kernel_info. No port."
    assert capfd.readouterr().err == ""
    assert (tmp_path / "starts").read_text() == 6 * "."


def test_small_tasks_come_first_but_the_largest_second_and_one_seed_before_the_next(
    tmp_path, monkeypatch
):
    values = {"results_dir": [str(tmp_path)], "batch_size": [64, 256], "seed": [2, 0]}
    tasks = make_tasks(list(SETTINGS), values)
    assert len({task.folder for task in tasks}) == len(tasks) == 4 * len(SETTINGS)
    assert [task.setting for task in tasks[:7]] == ["d", "b", "a2", "a1", "e", "c", "c7"]
    assert [task.parameters.seed for task in tasks] == [2] * 14 + [0] * 14
    assert tasks[0].name == "d batch_size 64 seed 2"
    assert tasks[0].given == {"results_dir": str(tmp_path), "batch_size": 64, "seed": 2}
    monkeypatch.delitem(headless.COSTS, "a2")  # as of a model that was added
    tasks = make_tasks(list(SETTINGS), {"results_dir": [str(tmp_path)]})
    assert [task.setting for task in tasks] == ["d", "b", "a1", "e", "c", "c7", "a2"]


def test_values_of_another_setting_make_a_task_that_one_and_doubles_are_run_once(tmp_path):
    where = {"results_dir": [str(tmp_path)]}

    def settings(*models, **values):
        return [task.setting for task in make_tasks(list(models), where | values)]

    assert settings("c", first_kernel_size=[7]) == ["c7"]
    assert settings("c", first_kernel_size=[3]) == ["c"]
    assert settings("d") == ["d"]
    assert settings("c7", "c", "c7", first_kernel_size=[7, 7], seed=[0, 0]) == ["c7"]
    with pytest.raises(InputError, match="first_kernel_size is 3; for c7 it must be 7"):
        settings("c7", first_kernel_size=[3])


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("train_samples = 5000  # = 500 of each digit", 5000),
        ("train_samples: int = 5000", 5000),
        ('dataset = "a#1.npz"', "a#1.npz"),
        ("train_samples = 60_000 // 10", None),
        ("train_samples =", None),
        ("train_samples: int", None),
        ("epochs += 1", None),
    ],
)
def test_an_edited_parameters_cell_is_read_as_python_or_refused(line, found):
    notebook = notebook_of(f"{PARAMETERS}\n{line}")
    if found is None:
        with pytest.raises(InputError, match=r"^a2 has a parameters cell that cannot be read"):
            headless.read_defaults(notebook, "a2")
    else:
        assert headless.read_defaults(notebook, "a2")[re.match(r"\w+", line)[0]] == found


def values(*arguments):
    return parse_values(make_parser().parse_args(["run", *arguments]))


def test_the_command_line_is_read():
    pairs = ("epochs=2", "epochs=3", "train_samples=None", "keep_model=False", "dataset=a=b")
    found = values(*(text for pair in pairs for text in ("-p", pair)), "--results-dir", "5")
    expected = {"epochs": [2, 3], "train_samples": [None], "keep_model": [False]}
    assert found == expected | {"dataset": ["a=b"], "results_dir": ["5"]}
    assert values("--seeds", "0-2")["seed"] == values("-p", "seed=0", "-p", "seed=1")["seed"] + [2]
    for arguments, message in (
        (("-p", "results_dir=5"), "results_dir is given by --results-dir"),
        (("-p", "seed=1", "--seeds", "2"), "seed is given twice"),
        (("--workers", "0"), "workers is 0"),
    ):
        with pytest.raises(InputError, match=message):
            values(*arguments)


def test_seeds_are_read_or_refused():
    assert parse_seeds("0-4") == [0, 1, 2, 3, 4]
    assert parse_seeds("0,2,7-9,2") == [0, 2, 7, 8, 9]
    for text in ("", "-1", "a", "1-", "1.5", "0-4-5", "4-0", "4294967296"):
        with pytest.raises(InputError, match="it must be like 0-4"):
            parse_seeds(text)


def test_make_hands_its_variables_to_the_command_line(tmp_path):
    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))")
    fake.chmod(0o755)
    (linked := tmp_path / "linked").touch()  # newer, so that nothing is installed
    known = {"EPOCHS", "BATCH_SIZE", "SEEDS", "TRAIN_SAMPLES", "PRECISION", "DATASET", "MODELS"}
    known |= {"RESULTS_DIR", "SCHEDULER", "WORKERS", "KEEP_MODEL", "MAKEFLAGS"}
    environment = {name: value for name, value in os.environ.items() if name not in known}

    def arguments(target, **given):
        given |= {"BIN": tmp_path, "INSTALLED": fake, "LINKED": linked}
        command = ["make", "-s", target, *(f"{name}={value}" for name, value in given.items())]
        options = {"cwd": ROOT, "env": environment, "text": True}
        return json.loads(subprocess.check_output(command, **options).splitlines()[-1])

    assert arguments("run") == ["-m", "mnist_utils", "run"]
    path = 'it\'s a $(file) "$HOME"'
    given = {"MODELS": "a1 c", "SEEDS": "0-4", "EPOCHS": "3", "DATASET": path, "RESULTS_DIR": "5"}
    options = make_parser().parse_args(arguments("run", SCHEDULER="tcp://h:1", **given)[2:])
    assert (options.models, options.scheduler) == (["a1", "c"], "tcp://h:1")
    expected = {"epochs": [3], "dataset": [path], "results_dir": ["5"], "seed": [0, 1, 2, 3, 4]}
    assert parse_values(options) == expected
    assert "dataset=mnist-small" in arguments("quick")


# On a cluster: a scheduler and workers as processes of their own, in folders of their own.


@pytest.fixture
def cluster(checkout, tmp_path):
    """Return a function that starts a scheduler and two workers."""
    processes = []

    def start_process(kind, name, *arguments, **variables):
        (tmp_path / name).mkdir()
        where = ("--host", "127.0.0.1", "--no-dashboard")
        command = python("-m", f"distributed.cli.dask_{kind}", *arguments, *where)
        options = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
        options |= {"cwd": tmp_path / name, "env": os.environ | variables}
        processes.append(subprocess.Popen(command, **options))
        return processes[-1]

    class Cluster:
        def __init__(self, *options, workers=2, **variables):
            file = tmp_path / "scheduler.json"
            options = ("--port", "0", "--scheduler-file", file, *options)
            self.scheduler = start_process("scheduler", "scheduler", *options, **variables)
            while not file.exists() or not file.read_text().endswith("}"):
                time.sleep(0.1)
            self.address = json.loads(file.read_text())["address"]
            self.workers = [self.add_worker(str(number)) for number in range(workers)]

        def add_worker(self, name, threads=1, **variables):
            options = (self.address, "--nthreads", threads, "--no-nanny", "--name", name)
            return start_process("worker", name, *options, **variables)

    yield Cluster
    for process in processes:
        process.kill()
        process.wait()


def in_background(function):
    thread = Thread(target=function, daemon=True)
    thread.start()
    return thread


def kill_in_mid_run(worker):
    while not kernels(worker):
        time.sleep(0.05)
    worker.kill()


def test_every_run_is_recorded_once_though_a_worker_is_killed(cluster, checkout, capsys):
    there = cluster()
    tasks = make_tasks(["d"], {"seed": list(range(4))})
    killer = in_background(lambda: kill_in_mid_run(there.workers[0]))
    assert run_tasks(tasks, there.address) == []
    killer.join(timeout=10)
    assert there.workers[0].wait(timeout=10) == -signal.SIGKILL
    assert recorded(checkout / "runs") == [("d", seed) for seed in range(4)]
    assert {load_record(task.folder).environment["threads"] for task in tasks} == {1}
    assert capsys.readouterr().out.count("test accuracy") == 4
    # What is recorded is not run again, and needs no cluster.
    assert run_tasks(tasks, "tcp://127.0.0.1:1") == []
    assert capsys.readouterr().out == "4 runs, 4 recorded already.\n"


@pytest.mark.parametrize("folder", [False, True])
def test_a_data_set_travels_and_outlives_the_only_worker_that_has_it(
    folder, cluster, checkout, small_mnist, small_arrays
):
    data = checkout / "mnist"  # not the embedded one, though of its name
    if folder:
        write_idx(data, small_arrays)
    else:
        shutil.copy(small_mnist, data)
    there = cluster(workers=1)
    (worker,) = there.workers

    def take_its_place():
        kill_in_mid_run(worker)
        there.add_worker("late")

    tasks = make_tasks(["d"], {"seed": [0, 1], "dataset": ["./mnist"]})
    in_background(take_its_place)
    assert run_tasks(tasks, there.address) == []
    assert worker.wait(timeout=10) == -signal.SIGKILL
    assert recorded(checkout / "runs") == [("d", 0), ("d", 1)]
    # Nothing of the worker's folders is in what came back.
    executed = nbformat.read(tasks[0].folder / "executed.ipynb", 4)
    assert 'dataset = "./mnist"' in executed.cells[1].source


def test_a_worker_that_joins_late_gets_its_share_and_an_unfit_one_nothing(
    cluster, checkout, capsys
):
    there = cluster(workers=1)
    late = []

    def join_late():
        while not kernels(there.workers[0]):
            time.sleep(0.05)
        late.append(there.add_worker("unfit", threads=2))
        late.append(there.add_worker("late"))
        while not kernels(late[1]):
            time.sleep(0.05)
        late.append("took part")

    in_background(join_late)
    tasks = make_tasks(["d"], {"seed": list(range(6)), "epochs": [4]})
    assert run_tasks(tasks, there.address) == []
    assert late[2:] == ["took part"]
    assert recorded(checkout / "runs") == [("d", seed) for seed in range(6)]
    said = re.compile(r"^The worker tcp://\S+ has 2 threads; .* It is not used\.$", re.MULTILINE)
    assert said.search(capsys.readouterr().out)


def test_a_fit_worker_beside_an_unfit_one_may_die_and_another_take_its_place(cluster, checkout):
    there = cluster(workers=1)
    there.add_worker("unfit", threads=2)
    with Client(there.address) as client:
        client.wait_for_workers(2)

    def take_its_place():
        kill_in_mid_run(there.workers[0])
        time.sleep(2 * headless.LOOK)
        there.add_worker("late")

    in_background(take_its_place)
    assert run_tasks(make_tasks(["d"], {"seed": [0, 1]}), there.address) == []
    assert there.workers[0].wait(timeout=10) == -signal.SIGKILL
    assert recorded(checkout / "runs") == [("d", 0), ("d", 1)]


def test_where_no_worker_is_fit_it_is_said_in_a_sentence(cluster, checkout, tmp_path, monkeypatch):
    there = cluster(workers=0)
    there.add_worker("two threads", threads=2)
    tasks = make_tasks(["d"], {})
    with pytest.raises(InputError, match=r"has 2 threads; it must have one: .* --nthreads 1"):
        run_tasks(tasks, there.address)
    there.add_worker("fit")
    versions = headless.package_versions()
    for other in ({"numpy": "9.9"}, {"code of mnist_utils": "0"}):
        monkeypatch.setattr(headless, "package_versions", lambda here=other: versions | here)
        with pytest.raises(InputError, match=r"has (2 threads|numpy|code of mnist_utils)"):
            run_tasks(tasks, there.address)
    assert recorded(checkout / "runs") == []


def test_a_worker_without_the_package_is_named(cluster, checkout, tmp_path):
    hidden = tmp_path / "hidden" / "mnist_utils"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ModuleNotFoundError(\"No module 'mnist_utils'\")")
    without = {"PYTHONPATH": str(hidden.parent)}
    there = cluster(workers=0, **without)  # the scheduler does not need it
    there.add_worker("without", **without)
    with pytest.raises(InputError, match=r"cannot run the notebooks: .*; it needs this package"):
        run_tasks(make_tasks(["d"], {}), there.address)


def test_a_scheduler_that_is_lost_is_said_and_nothing_recorded_is_lost(cluster, checkout, capsys):
    there = cluster()

    def kill_when_one_is_recorded():
        while not recorded(checkout / "runs"):
            time.sleep(0.05)
        there.scheduler.kill()

    in_background(kill_when_one_is_recorded)
    with pytest.raises(InputError, match=r"connection to the scheduler was lost .* same command"):
        run_tasks(make_tasks(["d"], {"seed": list(range(20))}), there.address)
    assert 0 < len(recorded(checkout / "runs")) < 20
    assert "FAILED" not in capsys.readouterr().out


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_runs_travel_over_tls_as_the_page_says(cluster, checkout, tmp_path, monkeypatch):
    page = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    secret = tmp_path / "secret"
    secret.mkdir()
    commands = page.split("```sh\n")[1].split("```")[0]
    subprocess.run(["sh", "-e", "-c", commands], cwd=secret, check=True, capture_output=True)
    configuration = page.split("```yaml\n")[1].split("```")[0]
    (secret / "tls.yaml").write_text(configuration.replace("/path/to", str(secret)))
    monkeypatch.setenv("DASK_CONFIG", str(secret / "tls.yaml"))
    there = cluster("--protocol", "tls")
    assert there.address.startswith("tls://")
    done = run("d", "--scheduler", there.address)
    assert (done.returncode, done.stderr) == (0, "")
    assert recorded(checkout / "runs") == [("d", 0)]
    monkeypatch.delenv("DASK_CONFIG")  # without the key nobody gets in
    done = run("a1", "--scheduler", there.address)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "scheduler is 'tls://" in done.stderr


def test_a_scheduler_that_cannot_be_reached_is_named(checkout):
    with pytest.raises(InputError, match=r"scheduler is 'tcp://127\.0\.0\.1:1'.*it must be"):
        run_tasks(make_tasks(["d"], {}), "tcp://127.0.0.1:1")


def test_a_run_that_kills_its_worker_again_and_again_is_named(checkout):
    write_stand_in(checkout, "d", "import signal; os.kill(os.getppid(), signal.SIGKILL)")
    done = run("d")
    assert (done.returncode, done.stderr) == (1, "1 failed: d seed 0\n")
    assert re.search("d seed 0: FAILED .* Its worker died 4 times", done.stdout)
