"""A checkout as users have it: an odd name, renamed, offline, cloned by a Git that writes CRLF."""

import os
import shutil
import subprocess

import pytest
from conftest import ROOT, make_environment


@pytest.fixture
def checkout(tmp_path):
    """A copy with an odd name and an environment that holds all that it needs, but not itself."""
    folder = tmp_path / 'it\'s a $(shell) "place"'
    ignored = shutil.ignore_patterns("__pycache__", ".*_cache", ".venv", ".git", "runs", "site")
    shutil.copytree(ROOT, folder, ignore=ignored)
    make_environment(folder / ".venv")
    with (folder / "requirements.txt").open() as file:
        stamp = subprocess.run(["cksum"], stdin=file, capture_output=True, text=True, check=True)
    (folder / ".venv" / f"installed-{stamp.stdout.replace(' ', '').strip()}").touch()
    return folder


def make(folder, *arguments):
    # Without an index every package that pip wants is one too many.
    variables = {"PIP_USER": "1", "PIP_NO_INDEX": "1", "MAKEFLAGS": ""}
    done = subprocess.run(
        ["make", *arguments], cwd=folder, env=os.environ | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_once_set_up_make_needs_no_registry_wherever_the_checkout_lies(checkout):
    def helpers(folder):
        command = [".venv/bin/python", "-c", "import mnist_utils; print(mnist_utils.__path__[0])"]
        there = {"cwd": folder / "notebooks", "capture_output": True, "text": True, "check": True}
        return subprocess.run([folder / command[0], *command[1:]], **there).stdout.strip()

    make(checkout, "setup")
    assert helpers(checkout) == str(checkout / "mnist_utils")
    make(checkout, "links", "REPO=somebody/digits")  # changes pyproject.toml
    (checkout / "requirements.txt").touch()
    assert "pip" not in make(checkout, "-n", "run", "validate", "html")
    renamed = checkout.rename(checkout.with_name("renamed"))
    make(renamed, "setup")
    assert helpers(renamed) == str(renamed / "mnist_utils")


def test_a_git_that_writes_crlf_leaves_the_line_ends(tmp_path):
    clone = tmp_path / "clone"
    git = ["git", "-c", "core.autocrlf=true", "clone", "-q", ROOT, clone]
    subprocess.run(git, check=True)
    patterns = ("Makefile", "*.ipynb", "*.py", "*.js", "*.json", "*.txt")
    files = [path for pattern in patterns for path in clone.rglob(pattern)]
    assert len(files) > 50
    assert [path for path in files if b"\r\n" in path.read_bytes()] == []
