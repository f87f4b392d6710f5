"""What the commands' argument parsers share."""

import argparse
import math


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
