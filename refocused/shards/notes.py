"""What is said about a set of shards: what is odd about it, and what is other than a checkpoint's run read."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from configs import KEYS
from refocused.entry import here
from refocused.shards.shard import PREPARE, Shard

HELD_OUT_TAIL = 0.05  # of a shard that is divided
ROWS = ("rows", "ended", "repeats", "repeated")  # in the report of a shard that was made of a 2-D array
LEAST_OVERLAP = 32  # tokens in which two rows have to agree; fewer do so by chance
PAIRS = 64  # of rows that are looked at


def listed(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def overlap_of(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> int:
    """How many tokens each row repeats of the row before, by the first pairs of a full row and the next one; else 0.

    Tokenizers cut a long text into windows that overlap. A pair shows that where exactly one end of the first row, of
    LEAST_OVERLAP tokens or more, begins the second, and the first row does not repeat itself at that distance: a text that
    does is no sign. Of all pairs more than half have to show the same overlap.
    """
    shown: Counter[int] = Counter()
    count = 0
    for before, after in itertools.islice(pairs, PAIRS):
        count += 1
        starts = np.flatnonzero(before[1 : max(1, len(before) - LEAST_OVERLAP + 1)] == after[0]) + 1
        lengths = [n for n in (len(before) - starts).tolist() if n <= len(after) and (before[-n:] == after[:n]).all()]
        shown.update(n for n in lengths if len(lengths) == 1 and (before[:-n] != before[n:]).any())
    [(overlap, votes)] = shown.most_common(1) or [(0, 0)]
    return overlap if 2 * votes > count else 0


def shares(totals: Mapping[str, int]) -> str:
    """What was found in the rows of 2-D arrays, "" where there were none."""
    if not (rows := totals.get("rows", 0)):
        return ""
    return (
        f"of {rows:,} rows {totals['ended'] / rows:.1%} ended with end-of-text, and {totals['repeats'] / rows:.1%} began "
        f"with the end of the row before: {totals['repeated']:,} repeated tokens dropped"
    )


def oddities(trained_on: Sequence[Shard], held_out: Sequence[Shard], T: int) -> list[str]:
    """What is odd about a set of windows of T + 1 tokens and no error, a sentence each."""
    shards = list(dict.fromkeys((*trained_on, *held_out)))
    of_all, way, notes = f"of {len(shards)} shards", here(PREPARE), []
    if short := [shard.path for shard in shards if shard.num_tokens <= T]:
        notes.append(
            f"{len(short)} {of_all} have fewer than sequence_length+1={T + 1} tokens and are never read: {listed(short)}"
        )
    if len(shards) > 1 and held_out and held_out[0] in trained_on:
        why = "the last eval_files shards have no window, or all windows"
        notes.append(f"the last {HELD_OUT_TAIL:.0%} of {held_out[0].path} are held out: {why}")
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
    counts = {key: sum(n for report in reports if type(n := report.get(key)) is int) for key in ROWS}
    if text := shares(counts):
        notes.append(text)
    firsts = [shard.rows(PAIRS + 1) for shard in shards if len(shard.shape) == 2]
    if found := [n for rows in firsts if (n := overlap_of(zip(rows, rows[1:], strict=False)))]:
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
    kinds = {"added": now.keys() - was.keys(), "removed": was.keys() - now.keys(), "changed": changed}
    return "\n".join(f"{kind} {len(paths)}: {listed(sorted(paths), 10)}" for kind, paths in kinds.items() if paths)


def after_change(
    state: dict[str, Any], at: dict[str, Any], trained_on: Sequence[Shard], held_out: Sequence[Shard]
) -> list[str]:
    """What it means that the run of a checkpoint's state goes on with these shards, at this position of theirs."""
    now, held_now = (
        {(f"{shard.crc32:08x}", shard.num_tokens): shard.path for shard in shards} for shards in (trained_on, held_out)
    )
    files = state["config"].get("eval_files", KEYS["eval_files"].default)
    old = {(shard["crc32"], shard["tokens"]): shard["path"] for shard in state["data"]["manifest"]}
    held = dict([*old.items()][-files:]) if files else {}
    long = [key for key in old if key[1] > state["config"]["sequence_length"]]
    if held and long and (not held.keys() & {*long} or held.keys() >= {*long}):  # as Dataset divides its last long one
        held = {long[-1]: old[long[-1]]}
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
