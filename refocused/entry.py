"""The door of every command: one sentence for a mistake, a traceback for a bug, silence for a closed pipe."""

import argparse
import io
import os
import sys
import traceback
from collections.abc import Callable, Mapping

Command = Callable[[list[str]], int]


def run(command: Command, argv: list[str]) -> int:
    """command(argv) with what it raises put into words; returns the exit code.

    What a user can cause derives from ValueError and has an exit_code; anything else is a bug and says so.
    """
    open_streams()
    try:
        try:
            code = command(argv)
        except SystemExit:  # argparse's, behind a --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # a closed pipe is found here and not by the interpreter on its way out
        return code
    except BrokenPipeError:  # `... | head`: who read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, ValueError) and hasattr(error, "exit_code"):
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        traceback.print_exc()
        print("this is a bug, please report it with the lines above", file=sys.stderr)
        return 70


def open_streams() -> None:
    """Streams that nothing fails on: a closed one (`>&-`) leads nowhere, an ASCII one gets escapes for other letters."""
    while (nowhere := os.open(os.devnull, os.O_RDWR)) < 3:  # takes the lowest free number: no file of ours may get it
        os.set_inheritable(nowhere, True)
    os.close(nowhere)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def dispatch(program: str, commands: Mapping[str, tuple[str, Command]], argv: list[str]) -> int:
    """The command that argv[0] names, run with the rest; commands: {name: (what it does, function)}."""
    lines = [f"usage: python {program} COMMAND ...", ""]
    lines += [f"  {name:<10} {meaning}" for name, (meaning, _) in commands.items()]
    lines += ["", f"python {program} COMMAND --help says more."]

    def command(argv: list[str]) -> int:
        if argv[:1] in ([], ["-h"], ["--help"]):
            print("\n".join(lines))
            return 0 if argv else 2
        if argv[0] not in commands:
            print("\n".join(lines), f"\nerror: {argv[0]!r} is no command", file=sys.stderr)
            return 2
        return commands[argv[0]][1](argv[1:])

    return run(command, argv)


def positive(text: str) -> int:
    """An argument's type: a whole number of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def parse_with_settings(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """The parser's arguments and, anywhere among them, key=value `settings`; argparse takes those only in one place."""
    parser.add_argument("settings", nargs="*", metavar="key=value", help="configuration keys")
    options, late = parser.parse_known_args(argv)
    if unknown := [word for word in late if word.startswith("-") or "=" not in word]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.settings += late
    return options
