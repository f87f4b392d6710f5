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


def bash(line: str, folder: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    how = {"capture_output": True, "text": True, "timeout": GUARD}
    return subprocess.run(["bash", "-o", "pipefail", "-c", line], cwd=folder, env=os.environ | env, **how)


def run(body: str, redirect: str = "", **env: str) -> subprocess.CompletedProcess:
    """A command with this body, as a shell starts it."""
    code = f"import sys\nfrom refocused import entry\ndef command(argv):\n    {body}\nsys.exit(entry.run(command, []))"
    return bash(f"{shlex.join([sys.executable, '-c', code])} {redirect}", **env)


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
    done = bash(f"exec 3>&1; {{ {sys.executable} {program}; echo $? >&3; }} | true")
    code, said = ("2\n", "error: git worktree A: ") if program.endswith("A B") else ("0\n", "")
    assert done.stdout == code and done.stderr.startswith(said) and bool(done.stderr) == bool(said), done


def test_mistake_or_bug():
    """A user's mistake is one sentence and its own exit code, a package that is only needed later a line too; anything else
    is a traceback that says what it is, and 70."""
    mistake = run("from configs import ConfigError; raise ConfigError('max_steps=x is wrong')")
    assert (mistake.returncode, mistake.stderr) == (2, "error: max_steps=x is wrong\n")
    package = run("sys.modules['tiktoken'] = None; import tiktoken")
    assert package.returncode == 2
    assert package.stderr.startswith("error: tiktoken is not installed: `python -m pip install -r ")
    for bug in ("assert False", "raise ValueError('no exit code')", "import refocused.nothing"):
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


@pytest.mark.parametrize("command", COMMANDS)
def test_a_machine_without_torch(copy, command):
    """Each program where no package is installed (-S): exit 2 and one line that names the command which mends it; with an
    environment made by make or setup.sh that is the same command in it, and runs as printed, from anywhere."""
    python = shlex.quote(sys.executable)
    done = bash(f"{python} -S {command}", copy)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert done.stderr == f"error: {sys.executable} has no torch; run `./setup.sh`, which makes .venv with all of it\n"
    made = copy / ".venv/bin/python"
    made.parent.mkdir(parents=True)
    made.write_text('#!/bin/sh\nprintf "%s." "$@"\n')
    made.chmod(0o755)
    (copy / ".venv/runtime").touch()
    above = command.startswith("-m")
    program = command if above else command.replace(command.split()[0], f"'{copy}/{command.split()[0]}'", 1)
    done = bash(f"{python} -S {program}", copy if above else copy.parent)
    [line] = re.findall(r"has no torch; run `(.*)`$", done.stderr)
    again = bash(line, copy if above else copy.parent).stdout
    assert done.returncode == 2 and again == ".".join(["-S", *shlex.split(program), ""])


def test_what_an_interpreter_lacks(copy):
    """In an environment of one's own torch, Python 3.10, and Windows: exit 2 and one line with the way out."""
    venv.create(copy.parent / "mine", symlinks=True)
    for line, said in (
        ("../mine/bin/python ckpt.py list", f"run `{copy.parent}/mine/bin/python -m pip install -r requirements.txt`"),
        (
            f"{sys.executable} -c 'import sys; sys.version_info = (3, 10, 1); import data'",
            "is Python 3.10, not 3.11 to 3.13",
        ),
        (f"{sys.executable} -c 'import sys; sys.platform = \"win32\"; import train'", "on Windows inside WSL2: `wsl"),
    ):
        done = bash(line, copy)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and said in done.stderr, done


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
        assert bash(line, folder, PATH=path).stdout.strip() == printed
    (copy / ".venv").symlink_to(sys.prefix)
    line = shlex.join([".venv/bin/python", "-c", code, str(copy), "python data.py demo"])
    assert bash(line, copy, PATH=bare).stdout == ".venv/bin/python data.py demo\n"
    assert bash(f"PATH=.venv/bin; {line}", copy).stdout == "python data.py demo\n"
