"""The door of every command, in processes of their own whose streams are closed, narrow or cut off."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from conftest import ROOT
from launch import GUARD

PRINTS = "print('out: na\\u00efve \\u2603'); print('err: \\u2603', file=sys.stderr); return 0"


def run(body: str, redirect: str = "", **env: str) -> subprocess.CompletedProcess:
    """A command with this body, as a shell starts it."""
    code = f"import sys\nfrom refocused import entry\ndef command(argv):\n    {body}\nsys.exit(entry.run(command, []))"
    shell = ["bash", "-o", "pipefail", "-c", f'"$0" -c "$1" {redirect}', sys.executable, code]
    return subprocess.run(shell, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=GUARD)


def test_closed_and_ascii_streams():
    """What is printed into a closed stream is lost, and nothing else: exit 0, the other stream as it should be. Text that
    the terminal cannot show comes out escaped."""
    for redirect in ("", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"):
        out = "" if ">&-" in redirect.split() else "out: naïve \u2603\n"
        err = "" if "2>&-" in redirect else "err: \u2603\n"
        done = run(PRINTS, redirect, PYTHONUTF8="1")
        assert (done.returncode, done.stdout, done.stderr) == (0, out, err), redirect
    done = run(PRINTS, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, "out: na\\xefve \\u2603\n", "err: \\u2603\n")


@pytest.mark.parametrize("reader", ["head -0", "head -1", "head -c 3"])
def test_closed_pipe(reader):
    """A reader that has enough, before and in the middle of the text: exit 0, not a word."""
    for lines in (1, 10**6):
        done = run(f"print('one line' * {lines}, *range({lines}), sep=chr(10)); return 0", f"| {reader}")
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("program", ["bench.py --help", "bench.py losses --help", "bench.py losses A B"])
def test_a_program_into_a_closed_pipe(program):
    """A program's list of commands and a command's help end like any output; a mistake keeps its code and its words."""
    line = f'exec 3>&1; {{ "$0" {program}; echo $? >&3; }} | true'
    done = subprocess.run(["bash", "-c", line, sys.executable], cwd=ROOT, capture_output=True, text=True, timeout=GUARD)
    code, said = ("2\n", "error: git worktree A: ") if program.endswith("A B") else ("0\n", "")
    assert done.stdout == code and done.stderr.startswith(said) and bool(done.stderr) == bool(said), done


def test_mistake_or_bug():
    """A user's mistake is one sentence and its own exit code; anything else a traceback that says what it is, and 70."""
    mistake = run("from configs import ConfigError; raise ConfigError('max_steps=x is wrong')")
    assert (mistake.returncode, mistake.stderr) == (2, "error: max_steps=x is wrong\n")
    for bug in ("assert False", "raise ValueError('no exit code')", "1 / 0"):
        done = run(bug)
        assert done.returncode == 70 and "Traceback" in done.stderr and done.stderr.endswith("with the lines above\n")


COMMANDS = ["train.py", "data.py demo", "ckpt.py list out", "sample.py 'prompt=def '", "bench.py plan"]
COMMANDS += ["-m refocused.run.launch x"]


@pytest.fixture
def copy(tmp_path) -> Path:
    """The programs in a folder of their own, whose name has a blank."""
    folder = tmp_path / "a copy"
    folder.mkdir()
    for path in (*ROOT.glob("*.py"), ROOT / "configs", ROOT / "refocused"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    return folder


def shell(line: str, folder: Path, **env: str) -> subprocess.CompletedProcess:
    how = {"shell": True, "capture_output": True, "text": True, "timeout": GUARD}
    return subprocess.run(line, cwd=folder, env=os.environ | env, **how)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_machine_without_torch(copy, command):
    """Each program where no package is installed (-S): exit 2 and one line that names the command which mends it; with an
    environment made by make or setup.sh that is the same command in it, and runs as printed, from anywhere."""
    python = shlex.quote(sys.executable)
    done = shell(f"{python} -S {command}", copy)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert done.stderr == f"error: {sys.executable} has no torch; run `./setup.sh`, which makes .venv with all of it\n"
    made = copy / ".venv/bin/python"
    made.parent.mkdir(parents=True)
    made.write_text('#!/bin/sh\nprintf "%s." "$@"\n')
    made.chmod(0o755)
    (copy / ".venv/runtime").touch()
    above = command.startswith("-m")
    program = command if above else command.replace(command.split()[0], f"'{copy}/{command.split()[0]}'", 1)
    done = shell(f"{python} -S {program}", copy if above else copy.parent)
    [line] = re.findall(r"has no torch; run `(.*)`$", done.stderr)
    again = shell(line, copy if above else copy.parent).stdout
    assert done.returncode == 2 and again == ".".join(["-S", *shlex.split(program), ""])


def test_an_environment_without_torch(copy):
    """In an environment of one's own, and as Python 3.10: pip's line, and setup.sh's."""
    venv.create(copy.parent / "mine", symlinks=True)
    done = shell("../mine/bin/python ckpt.py list", copy)
    assert done.returncode == 2 and "has no torch; run `" in done.stderr
    [line] = re.findall("`(.*)`", done.stderr)
    assert line == f"{copy.parent}/mine/bin/python -m pip install -r requirements.txt"
    done = shell(f"{sys.executable} -S -c 'import sys; sys.version_info = (3, 10, 1); import data'", copy)
    assert done.returncode == 2 and "is Python 3.10, not 3.11 to 3.13; run `./setup.sh`" in done.stderr


def test_windows():
    """Where sys.platform says win32: one sentence that names WSL2, and exit 2."""
    code = "import sys, runpy; sys.platform = 'win32'; runpy.run_path('train.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=GUARD)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: this runs on Linux and macOS")
    assert "WSL2" in done.stderr and done.stderr.count("\n") == 1


def test_a_missing_package_in_mid_run():
    """One that is only needed later is a line too; a module of ours that is missing is a bug."""
    done = run("sys.modules['tiktoken'] = None; import tiktoken")
    assert done.returncode == 2
    assert done.stderr.startswith("error: tiktoken is not installed: `python -m pip install -r ")
    assert run("import refocused.nothing").returncode == 70


def test_commands_as_they_are_printed(copy, monkeypatch):
    """here(): programs by name where PATH finds this environment's, else by path; files of the root from another folder."""
    other = copy.parent / "bin"
    other.mkdir()
    (other / "python").write_text("#!/bin/sh\nexit 9\n")
    (other / "python").chmod(0o755)
    bare, own = f"{other}{os.pathsep}/usr/bin{os.pathsep}/bin", os.path.dirname(sys.executable)
    code = "import sys; sys.path.insert(0, sys.argv[1]); from refocused import entry; print(entry.here(sys.argv[2]))"
    active, above = f"{own}{os.pathsep}{bare}", copy.parent
    module = "python -m refocused.run.launch --standalone train.py"
    moved = "PYTHONPATH='a copy' python -m refocused.run.launch --standalone 'a copy/train.py'"
    for command, folder, path, printed in (
        ("python train.py a='b c'", copy, active, "python train.py a='b c'"),
        ("tensorboard --logdir logs", copy, active, "tensorboard --logdir logs"),
        ("python train.py configs/demo.py", copy, bare, f"{sys.executable} train.py configs/demo.py"),
        ("torchrun train.py", copy, bare, f"{own}/torchrun train.py"),
        ("pip install -r requirements.txt", copy, active, "python -m pip install -r requirements.txt"),
        ("python train.py configs/demo.py", above, active, "python 'a copy/train.py' configs/demo.py"),
        (module, copy, active, module),
        (module, above, active, moved),
        ("python data.py", other, active, f"python '{copy}/data.py'"),
    ):
        line = shlex.join([sys.executable, "-c", code, str(copy), command])
        assert shell(line, folder, PATH=path).stdout.strip() == printed
    (copy / ".venv").symlink_to(sys.prefix)
    line = shlex.join([".venv/bin/python", "-c", code, str(copy), "python data.py demo"])
    assert shell(line, copy, PATH=bare).stdout == ".venv/bin/python data.py demo\n"
    assert shell(f"PATH=.venv/bin; {line}", copy).stdout == "python data.py demo\n"
