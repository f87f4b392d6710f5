"""The door of every command: one sentence for a mistake, a traceback for a bug, silence for a closed pipe.

It is imported before anything that a machine may lack, and says then what is lacking.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import math
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
    """The same as a shell takes it."""
    return shlex.quote(from_here(path))


def here(command: str) -> str:
    """The command as it runs from where its reader stands.

    The first word is a program of this interpreter's environment: it gets its path unless PATH leads to it. The files at
    the root get theirs unless that is the current folder.
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
    """Why no command can run with this interpreter, and the one line that mends it; "" where nothing is in the way."""
    if sys.platform == "win32":
        return (
            "this runs on Linux and macOS, on Windows inside WSL2: `wsl --install`, then the same commands in its shell"
        )
    old = sys.version_info < (3, 11)
    absent = [name for name in NEEDED if not importlib.util.find_spec(name)]
    if not (old or absent):
        return no_temporary_folder()
    what = f"is Python {sys.version_info[0]}.{sys.version_info[1]}, not 3.11 to 3.13" if old else f"has no {absent[0]}"
    if (ROOT / ".venv/runtime").exists() and sys.prefix != str(ROOT / ".venv"):
        way = f"{near(ROOT / '.venv/bin/python')} {shlex.join(sys.orig_argv[1:])}"
    elif sys.prefix != sys.base_prefix and not old:
        way = here("pip install -r requirements.txt")
    else:
        way = f"{near(ROOT / 'setup.sh') if Path.cwd() != ROOT else './setup.sh'}`, which makes .venv with all of it"
    return f"{sys.executable} {what}; run `{way}" + "`" * ("`" not in way)


def no_temporary_folder() -> str:
    """Why torch cannot be imported, which asks for one; "" where there is one."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        return f"{error.strerror}; set TMPDIR to a folder that can be written"
    return ""


if why := lacking():
    print(f"error: {why}", file=sys.stderr)
    sys.exit(2)

Command = Callable[[list[str]], int]
Commands = Mapping[str, tuple[str, str]]  # {name: (what it does, "module:function")}


def run(command: Command, argv: list[str]) -> int:
    """command(argv) with what it raises put into words; returns the exit code.

    What a user can cause derives from ValueError and has an exit_code; anything else is a bug and says so.
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
        text = str(error) if isinstance(error, ValueError) and hasattr(error, "exit_code") else absent(error)
        if text:
            print(f"error: {text}", file=sys.stderr)
            return getattr(error, "exit_code", 2)
        traceback.print_exc()
        print("this is a bug, please report it with the lines above", file=sys.stderr)
        return 70


def absent(error: BaseException) -> str:
    """Of an import that failed for want of a package: which one, and the line that installs it; "" of any other error."""
    if not isinstance(error, ModuleNotFoundError) or not error.name or (ROOT / error.name.split(".")[0]).exists():
        return ""
    return f"{error.name} is not installed: `{here('pip install -r requirements.txt')}`"


def open_streams() -> None:
    """Streams that nothing fails on: a closed one (`>&-`) leads nowhere, an ASCII one gets escapes for other letters."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # each open takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8", errors="backslashreplace"))
        elif mode == "w" and isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def dispatch(program: str, commands: Commands, argv: list[str]) -> int:
    """The command that argv[0] names, run with the rest. Its module is imported now, so no command loads another's."""
    usage = here(f"python {program}")
    lines = [f"usage: {usage} COMMAND ...", ""]
    lines += [f"  {name:<10} {meaning}" for name, (meaning, _) in commands.items()]
    lines += ["", f"{usage} COMMAND --help says more."]

    def command(argv: list[str]) -> int:
        if argv[:1] in ([], ["-h"], ["--help"]):
            print("\n".join(lines))
            return 0 if argv else 2
        if argv[0] not in commands:
            print("\n".join(lines), f"\nerror: {argv[0]!r} is no command", file=sys.stderr)
            return 2
        module, _, function = commands[argv[0]][1].partition(":")
        return getattr(importlib.import_module(module), function)(argv[1:])

    return run(command, argv)


def positive(text: str) -> int:
    """An argument's type: a whole number of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def positive_number(text: str) -> float:
    """An argument's type: a number above 0."""
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return value


def parse_with_settings(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """The parser's arguments and, anywhere among them, key=value `settings`; argparse takes those only in one place.

    --key=value is one, too, unless it is the parser's own.
    """
    parser.add_argument("settings", nargs="*", metavar="key=value", help="configuration keys")
    options, late = parser.parse_known_args(argv)
    late = [word.removeprefix("--") if "=" in word else word for word in late]
    if unknown := [word for word in late if word.startswith("-") or "=" not in word]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.settings += late
    return options
