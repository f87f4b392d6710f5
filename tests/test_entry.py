"""The door of every command, in processes of their own whose streams are closed, narrow or cut off."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from launch import GUARD

PRINTS = "print('out: na\\u00efve \\u2603'); print('err: \\u2603', file=sys.stderr); return 0"


def run(body: str, redirect: str = "", **env: str) -> subprocess.CompletedProcess:
    """A command with this body, as a shell starts it."""
    code = f"import sys\nfrom refocused import entry\ndef command(argv):\n    {body}\nsys.exit(entry.run(command, []))"
    shell = ["bash", "-o", "pipefail", "-c", f'"$0" -c "$1" {redirect}', sys.executable, code]
    return subprocess.run(shell, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=GUARD)


@pytest.mark.parametrize(
    "redirect, out, err",
    [
        ("", "out: naïve \u2603\n", "err: \u2603\n"),
        (">&-", "", "err: \u2603\n"),
        ("2>&-", "out: naïve \u2603\n", ""),
        (">&- 2>&-", "", ""),
        ("<&- >&- 2>&-", "", ""),
    ],
)
def test_closed_streams(redirect, out, err):
    """What is printed into a closed stream is lost, and nothing else: exit 0, the other stream as it should be."""
    done = run(PRINTS, redirect, PYTHONUTF8="1")
    assert (done.returncode, done.stdout, done.stderr) == (0, out, err)


def test_ascii_terminal():
    """Text that the terminal cannot show comes out escaped."""
    done = run(PRINTS, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, "out: na\\xefve \\u2603\n", "err: \\u2603\n")


@pytest.mark.parametrize("reader", ["head -0", "head -1", "head -c 3"])
@pytest.mark.parametrize("lines", [1, 10**6])
def test_closed_pipe(reader, lines):
    """A reader that has enough, before and in the middle of the text: exit 0, not a word."""
    done = run(f"print('one line' * {lines}, *range({lines}), sep=chr(10)); return 0", f"| {reader}")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("program", ["bench.py --help", "bench.py losses --help", "bench.py losses A B"])
def test_a_program_into_a_closed_pipe(program):
    """A program's list of commands and a command's help end like any output; a mistake keeps its code and its words."""
    line = f'exec 3>&1; {{ "$0" {program}; echo $? >&3; }} | true'
    done = subprocess.run(["bash", "-c", line, sys.executable], cwd=ROOT, capture_output=True, text=True, timeout=GUARD)
    if program.endswith("A B"):
        assert done.stdout == "2\n" and done.stderr.startswith("error: git worktree A: ")
    else:
        assert (done.stdout, done.stderr) == ("0\n", "")


def test_mistake_or_bug():
    """A user's mistake is one sentence and its own exit code; anything else a traceback that says what it is, and 70."""
    mistake = run("from configs import ConfigError; raise ConfigError('max_steps=x is wrong')")
    assert (mistake.returncode, mistake.stderr) == (2, "error: max_steps=x is wrong\n")
    for bug in ("assert False", "raise ValueError('no exit code')", "1 / 0"):
        done = run(bug)
        assert done.returncode == 70 and "Traceback" in done.stderr and done.stderr.endswith("with the lines above\n")
