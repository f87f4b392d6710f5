"""The start of every command: one sentence for a mistake, a traceback for a bug, silence for a closed pipe.

It is imported before any package that may be absent, and says which one is.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import shlex
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("torch", "numpy", "safetensors", "tqdm", "google_crc32c")  # what importing the commands takes


def from_here(path: str | Path) -> str:
    """The path of a file, from the current folder where it lies below that."""
    relative = os.path.relpath(path)
    return os.path.abspath(path) if relative.startswith(os.pardir) else relative


def near(path: str | Path) -> str:
    """The same, quoted for a shell."""
    return shlex.quote(from_here(path))


def here(command: str) -> str:
    """The command as it runs in the user's current folder.

    A program of this interpreter's environment gets its path unless PATH leads to it, a file of the root the same.
    """
    program, *words = command.split(" ")
    if program == "pip":
        program, words = "python", ["-m", "pip", *words]
    own = Path(sys.executable) if program == "python" else Path(sys.executable).with_name(program)
    found = Path(shutil.which(program) or os.devnull)
    # python is a link in every environment, so the folders have to be one, too
    if own.exists() and not (found.samefile(own) and found.parent.samefile(own.parent)):
        program = near(own)
    if not os.path.samefile(ROOT, os.curdir):
        words = [near(ROOT / word) if "/" not in word and (ROOT / word).is_file() else word for word in words]
        if any(word.startswith("refocused.") for word in words):  # a module of -m
            program = f"PYTHONPATH={near(ROOT)} {program}"
    return " ".join([program, *words])


def lacking() -> str:
    """Why no command can run with this interpreter, and the command that mends it; "" if all is there."""
    if sys.platform == "win32":
        return (
            "this runs on Linux and macOS, on Windows inside WSL2: `wsl --install`, then the same commands in its shell"
        )
    old = sys.version_info < (3, 11)
    absent = next((name for name in NEEDED if not importlib.util.find_spec(name)), None)
    if not (old or absent):
        try:
            tempfile.gettempdir()  # torch asks for one when it is imported
            return ""
        except FileNotFoundError as error:
            return f"{error.strerror}; set TMPDIR to a folder that can be written"
    what = f"is Python {sys.version_info[0]}.{sys.version_info[1]}, not 3.11 to 3.13" if old else f"has no {absent}"
    if (ROOT / ".venv/runtime").exists() and sys.prefix != str(ROOT / ".venv"):
        return f"{sys.executable} {what}; run `{near(ROOT / '.venv/bin/python')} {shlex.join(sys.orig_argv[1:])}`"
    if sys.prefix != sys.base_prefix and not old:
        return f"{sys.executable} {what}; run `{here('pip install -r requirements.txt')}`"
    setup = near(ROOT / "setup.sh") if Path.cwd() != ROOT else "./setup.sh"
    return f"{sys.executable} {what}; run `{setup}`, which makes .venv with all of it"


if why := lacking():
    print(f"error: {why}", file=sys.stderr)
    sys.exit(2)


def run(command: Callable[[list[str]], int], argv: list[str]) -> int:
    """command(argv), its exceptions as messages; returns the exit code.

    What a user can cause derives from ValueError and has an exit_code. Anything else is a bug and says so.
    """
    open_streams()
    try:
        try:
            return command(argv)
        finally:  # argparse leaves behind a --help; a closed pipe is found here and not by the interpreter on its way out
            sys.stdout.flush()
    except BrokenPipeError:  # `... | head`: who read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except Exception as error:
        code, text = explain(error)
        print(text, file=sys.stderr)
        return code


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and message: a sentence for what a user can cause, a traceback for a bug."""
    if isinstance(error, ValueError) and hasattr(error, "exit_code"):
        return error.exit_code, f"error: {error}"
    if text := absent(error):
        return 2, f"error: {text}"
    lines = "".join(traceback.format_exception(error))
    return 70, f"{lines}this is a bug, please report it with the lines above"


def absent(error: BaseException) -> str:
    """The package that an import lacked, and the command that installs it; "" of any other error."""
    if not isinstance(error, ModuleNotFoundError) or not error.name or (ROOT / error.name.split(".")[0]).exists():
        return ""
    return f"{error.name} is not installed: `{here('pip install -r requirements.txt')}`"


def open_streams() -> None:
    """A closed stream (`>&-`) leads nowhere, an ASCII one gets escapes for other letters: printing never fails."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # each open takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8", errors="backslashreplace"))
        elif mode == "w" and isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def dispatch(program: str, commands: Mapping[str, tuple[str, str]], argv: list[str]) -> int:
    """Run the command that argv[0] names; commands: {name: (what it does, "module:function")}.

    Its module is imported now, so no command loads another's.
    """
    usage = here(f"python {program}")
    lines = [f"  {name:<10} {meaning}" for name, (meaning, _) in commands.items()]
    text = "\n".join([f"usage: {usage} COMMAND ...", "", *lines, "", f"{usage} COMMAND --help says more."])

    def command(argv: list[str]) -> int:
        if argv[:1] in ([], ["-h"], ["--help"]):
            print(text)
            return 0 if argv else 2
        if argv[0] not in commands:
            print(f"{text}\n\nerror: {argv[0]!r} is no command", file=sys.stderr)
            return 2
        module, _, function = commands[argv[0]][1].partition(":")
        return getattr(importlib.import_module(module), function)(argv[1:])

    return run(command, argv)
