"""Which save came last, and which stay: by a number that only grows, never by a clock's time.

A save's generation is the highest that its run knew of, on disk and in the bucket, plus one. So one machine's clock
may be a day ahead of the next one's, and a run that went back to an earlier step still has the newest saves.
Among equals, of two machines that saved at once, the higher step is the later one.
"""

import math
from collections.abc import Iterable
from typing import Any

Manifest = dict[str, Any]


def key(manifest: Manifest) -> tuple[int, int, str]:
    """Grows from save to save."""
    return manifest["generation"], manifest["step"], manifest["name"]


def abandoned(manifests: Iterable[Manifest]) -> set[str]:
    """Names of those that a later save lies before: a run went back to an earlier step and took another way."""
    gone, lowest = set(), math.inf
    for manifest in sorted(manifests, key=key, reverse=True):
        if manifest["step"] >= lowest:
            gone.add(manifest["name"])
        lowest = min(lowest, manifest["step"])
    return gone


def newest_first(manifests: Iterable[Manifest]) -> list[Manifest]:
    """What was saved last, then what it came from; what was abandoned after all others."""
    manifests = list(manifests)
    gone = abandoned(manifests)
    return sorted(manifests, key=lambda m: (m["name"] not in gone, key(m)), reverse=True)


def retained(manifests: Iterable[Manifest], limit: int, keep_every: int) -> set[str]:
    """Names of those to keep: the first `limit` (0: all), and multiples of keep_every, which do not count."""
    ordered = newest_first(manifests)
    counted = [m["name"] for m in ordered if m is ordered[0] or not (keep_every and m["step"] % keep_every == 0)]
    surplus = set(counted[limit:]) if limit else set()
    return {m["name"] for m in ordered} - surplus
