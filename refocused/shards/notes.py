"""What is said about a set of shards: what is odd about it, and what is other than a checkpoint's run read."""

from collections.abc import Sequence
from typing import Any

from configs import KEYS
from refocused.entry import here
from refocused.shards.shard import PADDING_ARRAYS, PREPARE, ROWS, Shard, overlap_of, shares

HELD_OUT_TAIL = 0.05  # of a shard that is divided


def listed(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def oddities(trained_on: Sequence[Shard], held_out: Sequence[Shard], T: int) -> list[str]:
    """What is odd about a set of windows of T + 1 tokens and no error, a sentence each."""
    shards = list(dict.fromkeys((*trained_on, *held_out)))
    of_all, way, notes = f"of {len(shards)} shards", here(PREPARE), []
    if short := [shard.path for shard in shards if shard.num_tokens <= T]:
        notes.append(
            f"{len(short)} {of_all} have fewer than sequence_length+1={T + 1} tokens and are never read: {listed(short)}"
        )
    if len(shards) > 1 and held_out and held_out[0] in trained_on:
        notes.append(
            f"the last {HELD_OUT_TAIL:.0%} of {held_out[0].path} are held out: the last eval_files shards have no window, or "
            "all windows"
        )
    held, first, twins = {shard.path for shard in held_out}, dict[tuple[int, int, str], str](), list[str]()
    for shard in shards:
        other = first.setdefault((shard.crc32, shard.num_tokens, shard.stream.dtype.str), shard.path)
        if other != shard.path and len({shard.path, other} & held) == 1:
            twins.insert(0, f"{shard.path} = {other} (one is held out, the other is trained on)")
        elif other != shard.path:
            twins.append(f"{shard.path} = {other}")
    if twins:
        notes.append(f"{len(twins)} {of_all} are copies of others: {listed(twins)}")

    reports = [report for shard in shards if isinstance(report := shard.note.get("report"), dict)]
    counts = {key: [count for report in reports if type(count := report.get(key)) is int] for key in ROWS}
    if text := shares({key: sum(found) for key, found in counts.items()}):
        notes.append(text)
    made = ((shard, source) for shard in shards if isinstance(source := shard.note.get("source"), dict))
    if old := [shard.path for shard, source in made if "rule" not in shard.note and {*source} & {*PADDING_ARRAYS}]:
        notes.append(
            f"{len(old)} {of_all} were unpacked by an older version, which wrote a second end-of-text where a row had one, and "
            f"windows that overlap twice; `{way}` makes them anew: {listed(old)}"
        )
    rows = [shard.tokens for shard in shards if len(shard.shape) == 2]
    if found := [n for tokens in rows if (n := overlap_of(zip(tokens, tokens[1:], strict=False)))]:
        notes.append(
            f"rows of {len(found)} {of_all} begin with the last {found[0]} tokens of the row before: their texts are read "
            f"twice; `{way}` drops that"
        )
    return notes


def explain_change(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> str:
    """What distinguishes two manifests, for the reader of an error: shards added, removed and changed; '' if equal."""
    was, now = ({shard["path"]: shard for shard in manifest} for manifest in (old, new))
    changed = []
    for path in was.keys() & now.keys():
        before, after = was[path], now[path]
        if keys := [f"{key} {before[key]} -> {after[key]}" for key in before if before[key] != after[key]]:
            changed.append(f"{path} ({', '.join(keys)})")
    lines = []
    for what, paths in (("added", now.keys() - was.keys()), ("removed", was.keys() - now.keys()), ("changed", changed)):
        if paths:
            lines.append(f"{what} {len(paths)}: {listed(sorted(paths), 10)}")
    return "\n".join(lines)


def after_change(
    state: dict[str, Any], at: dict[str, Any], trained_on: Sequence[Shard], held_out: Sequence[Shard]
) -> list[str]:
    """What it means that the run of a checkpoint's state goes on with these shards, at this position of theirs."""

    def contents(shards: Sequence[Shard]) -> dict[tuple[str, int], str]:
        return {(f"{shard.crc32:08x}", shard.num_tokens): shard.path for shard in shards}

    files = state["config"].get("eval_files", KEYS["eval_files"].default)
    old = {(shard["crc32"], shard["tokens"]): shard["path"] for shard in state["data"]["manifest"]}
    held = dict([*old.items()][-files:]) if files else {}  # of a single shard, its tail
    now, held_now = contents(trained_on), contents(held_out)
    lines = [
        f"data or order are other ones: this run begins {at['epoch_fraction']:.1%} into epoch {at['epoch']} of them, and "
        "reads what comes before that only in the next epoch"
    ]
    if paths := [path for shard, path in held.items() if shard in now and shard not in held_now]:
        lines.append(f"held out before and trained on now: {listed(paths)}")
    if paths := [path for shard, path in held_now.items() if shard in old and shard not in held]:
        lines.append(f"trained on before and held out now: {listed(paths)}")
    if held.keys() != held_now.keys():
        lines.append("eval_loss before and after are of different text")
    return lines
