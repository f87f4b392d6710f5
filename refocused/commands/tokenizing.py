"""Text on a disk or in a bucket -> shards: `python data.py tokenize`."""

import argparse
import time
from pathlib import Path

from configs import Config
from refocused import arguments
from refocused.bucket import texts
from refocused.shards import prepare, readers
from refocused.shards.find import local_path
from refocused.shards.tokenize import DEFAULT_FIELDS, local, tokenize


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="data.py tokenize", description="Text (.txt, .jsonl, .json, also compressed, .parquet, .arrow) -> shards.",
        parents=[prepare.common_arguments(SRC=place, DST=local_path)],
    )  # fmt: skip
    fields = (
        "fields of a JSON line or a row, joined (default: text); a.b is b in an object a; for Reddit: title,selftext"
    )
    parser.add_argument("--fields", type=field_names, default=DEFAULT_FIELDS, help=fields)
    split = f"what stands between documents of a .txt, such as '{readers.END_OF_TEXT}'"
    parser.add_argument("--split", default="", metavar="MARK", help=split)
    on_error = "what to do at a line that cannot be read (default: stop)"
    parser.add_argument("--on_error", choices=("stop", "skip"), default="stop", help=on_error)
    about = "tokens per shard, about (default: %(default)s)"
    parser.add_argument("--shard_tokens", type=arguments.positive, default=1 << 26, help=about)
    cache = "of a SRC in a bucket: GB of its files that are below DST at once (default: %(default)s)"
    parser.add_argument("--cache_gb", type=arguments.positive_number, default=8.0, help=cache)
    args = parser.parse_args(argv)
    begin, rules = time.perf_counter(), readers.Rules(args.fields, args.split, args.on_error == "skip")
    tokenizer = args.tokenizer or str(Config.tokenizer)
    if isinstance(args.SRC, Path):
        sources = local(args.SRC, args.DST, rules, args.workers)
    else:
        sources = texts.sources(args.SRC, args.DST, int(args.cache_gb * 1e9))
    totals = tokenize(sources, args.DST, tokenizer, rules, args.shard_tokens, args.workers)
    prepare.announce(totals, args.DST, tokenizer, args.vocab_size, begin)
    return 0


def place(text: str) -> str | Path:
    """An argument's type: gs://BUCKET/PREFIX, or a file or folder on a disk."""
    return text if text.startswith("gs://") else local_path(text)


def field_names(text: str) -> list[str]:
    if not (names := [name.strip() for name in text.split(",") if name.strip()]):
        raise argparse.ArgumentTypeError(f"{text!r} names no field")
    return names
