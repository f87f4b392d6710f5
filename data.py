"""Shards on disk -> samples in a fixed order -> batches.

    dataset = Dataset.open(cfg)
    for batch in Loader(dataset, start_step, max_steps, global_batch, rank, world_size, B, accumulation, workers):
        for x, y in batch.micro: ...

Which samples make up step k is a pure function of (seed, k, global batch): there is no index array and no loader state
to save. The order is uniform over the whole set; the price is that every sample is a random read of about 2 KB.

    python data.py demo | download | tokenize | prepare | verify | bench
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # PYTHONSAFEPATH leaves it out
from refocused import entry  # before all others: it says what this machine lacks

COMMANDS = {
    "demo": ("a small set: the bytes of Python's own sources", "refocused.shards.demo:main"),
    "download": ("shards from a bucket, ready to be read", "refocused.bucket.download:main"),
    "tokenize": ("text files -> shards", "refocused.commands.tokenizing:main"),
    "prepare": ("foreign shards -> shards that are mapped as they are", "refocused.shards.prepare:main"),
    "verify": ("every byte against its checksum, every id against the vocabulary", "refocused.shards.verify:main"),
    "bench": ("tokens/s of the loader", "refocused.commands.loading:main"),
}


def main(argv: list[str]) -> int:
    return entry.dispatch("data.py", COMMANDS, argv)


if __name__ == "__main__":  # before the imports below, torch above all, which no command but bench needs
    sys.exit(main(sys.argv[1:]))

import hashlib
import json
import resource
import shlex
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs import KEYS, Config
from refocused.shards import notes, tokenizers
from refocused.shards.find import find_files
from refocused.shards.notes import HELD_OUT_TAIL, explain_change
from refocused.shards.shard import DataError, PackedShard, Shard


def cache_folder(cfg: Config) -> Path:
    """Where shards of cfg.data_dir lie once they are unpacked; inside cfg.cache_dir."""
    source = Path(cfg.data_dir).resolve()  # two names of one folder share a cache
    # whatever decides about an unpacked byte: runs with other ids or another end-of-text have caches of their own
    settings = [str(source), cfg.vocab_size, tokenizers.find(cfg.tokenizer).end if cfg.tokenizer else None]
    return Path(cfg.cache_dir) / f"{source.name}-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]}"


def chosen_shards(cfg: Config) -> list[str]:
    """Relative paths of the first max_files shards of cfg.data_dir, training and held-out ones together."""
    if not os.path.isdir(cfg.data_dir):
        folder = shlex.quote(cfg.data_dir)
        to = f"{folder} --tokenizer {shlex.quote(cfg.tokenizer)}" if cfg.tokenizer else folder
        own = f"`{entry.here(f'python data.py tokenize TEXTS {to}')}` makes it of your own text"
        demo = f"`{entry.here(f'python data.py demo {folder}')}` makes it, or " * (cfg.tokenizer == "byte")
        raise DataError(f"data_dir={cfg.data_dir} is no folder; {demo}{own}")
    caches = (cfg.cache_dir, cache_folder(cfg))  # unpacked copies inside data_dir are not read twice
    # sorted, so that "the first max_files" are the same ones on every node and after every restart
    paths = find_files(cfg.data_dir, cfg.tokenized_file_pattern, but=caches)
    if not paths:
        others = find_files(cfg.data_dir, "*.npz", but=caches)
        hint = f", but {len(others)} others: tokenized_file_pattern=*.npz reads {others[0]}" if others else ""
        pattern = f"no file named like tokenized_file_pattern={cfg.tokenized_file_pattern}"
        raise DataError(f"data_dir={cfg.data_dir} and its subfolders have {pattern}{hint}")
    return paths[: cfg.max_files if cfg.max_files > 0 else len(paths)]


# ---- order


def permutation(seed: int, epoch: int, n: int, positions: np.ndarray) -> np.ndarray:
    """The sample at each of the given positions (int64 [k], in [0, n)) of an epoch, int64 [k]: a bijection of [0, n).

    A Feistel network, walked along its cycle until it is back below n (Black and Rogaway, "Ciphers with arbitrary finite
    domains", 2002). Runs resume by it, so its values must never change.
    """
    # an array of shuffled indices would be state to save, and 400 MB for 51 billion tokens; this is computed for the
    # positions that are asked for, whatever came before them
    bits = max((n - 1).bit_length(), 4)  # of both halves: fewer would mix too little
    low, high = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    low_mask, high_mask = (np.uint64((1 << int(width)) - 1) for width in (low, high))
    keys = np.frombuffer(hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=64).digest(), "<u8")
    # eight keys, so eight rounds; four would do with a perfect `mix` (Luby and Rackoff 1988), and this one is cheap

    def mix(x: np.ndarray, key: np.uint64) -> np.ndarray:  # multiply, fold, multiply, keep the well-mixed upper half
        x = (x ^ key) * np.uint64(0x9E3779B97F4A7C15)
        return (x ^ (x >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(32)

    x = np.array(positions, np.uint64)
    walking = np.arange(len(x))  # indices of what is still n or more
    while len(walking):
        left, right = x[walking] >> low, x[walking] & low_mask
        for even, odd in zip(keys[::2], keys[1::2], strict=True):  # each is undone by itself: a bijection
            left ^= mix(right, even) & high_mask
            right ^= mix(left, odd) & low_mask
        x[walking] = left << low | right
        walking = walking[x[walking] >= n]  # at most about half: 2**bits is below 2 n, unless n is tiny
    return x.astype(np.int64)


def window_shift(seed: int, epoch: int, sequence_length: int) -> int:
    """By how many tokens, in [0, sequence_length), the windows of an epoch lie further on; runs resume by it."""
    # steps of the golden ratio: however many epochs there are, their cuts lie far from each other
    start = int.from_bytes(hashlib.blake2b(f"shift {seed}".encode(), digest_size=8).digest(), "little")
    return (start + epoch * (sequence_length * 618 // 1000)) % sequence_length


# ---- the set


class Dataset:
    """The shards of a folder as windows of sequence_length + 1 tokens at stride sequence_length, in a fixed order.

    Window ids: [0, num_samples) are trained on, [num_samples, num_samples + num_eval_samples) are held out.
    """

    # With shift_windows an id is that of a window plus the number of all windows times the shift of its epoch, so that
    # an id alone says where its window lies. A shard gives as many windows as without, or an epoch's length would change
    # with its shift; where the last one would reach beyond the shard's end, it lies at the end.

    def __init__(
        self, shards: list[Shard], sequence_length: int, vocab_size: int, seed: int, eval_files: int,
        shift_windows: bool = False, tokenizer: str | None = None,
    ):  # fmt: skip
        self.T, self.vocab_size, self.seed, self.shift_windows = sequence_length, vocab_size, seed, shift_windows
        self.tokenizer = tokenizer  # by its identity
        windows = [max(0, shard.num_tokens - 1) // self.T for shard in shards]  # one token more: its last target
        held = min(eval_files, len(shards)) if len(shards) > 1 else 0  # one alone gives its tail, below
        if held and held == len(shards):
            raise DataError(f"eval_files={eval_files} holds out all of {len(shards)} shards; lower it or add shards")
        # whole files: whatever sequence_length is, the same text is held out
        cut = len(shards) - held
        self.shards, self.eval_shards = shards[:cut], shards[cut:]
        # a span is a stretch of a shard whose windows have consecutive ids: there are few, however many windows
        spans = [(shard, 0, count) for shard, count in zip(shards, windows, strict=True)]
        divided = None  # the shard that has both trained and held-out windows, if there is one
        if eval_files and any(windows) and (len(shards) == 1 or not any(windows[:cut]) or not any(windows[cut:])):
            # all windows are on one side, as where the last shard is a short remainder: the last long one gives its tail
            i = max(i for i, count in enumerate(windows) if count)
            divided, tail = shards[i], max(1, round(windows[i] * HELD_OUT_TAIL))
            spans[i] = (divided, 0, windows[i] - tail)
            spans.append((divided, (windows[i] - tail) * self.T, tail))
            self.shards, self.eval_shards, cut = shards, [divided], len(shards)

        self._shards, self._begins, counts = zip(*spans, strict=True)
        # where a span's last window may begin at most: what is held out of a shard stays held out
        tails = [0 if shard is divided else (shard.num_tokens - 1) % self.T for shard in self._shards]
        self._lasts = [b + (n - 1) * self.T + t for b, n, t in zip(self._begins, counts, tails, strict=True)]
        self._first_ids = np.cumsum((0, *counts))  # an id is found by bisection: no table of windows
        self.num_samples = int(self._first_ids[cut])
        self.num_eval_samples = int(self._first_ids[-1]) - self.num_samples
        self.num_tokens = self.num_samples * self.T  # that an epoch trains on
        if not self.num_samples or (eval_files and not self.num_eval_samples):
            longest, window = max(s.num_tokens for s in shards), f"of sequence_length+1={self.T + 1} tokens"
            why = f"no shard is long enough for one window {window}: the longest of all {len(shards)} has {longest}"
            if longest > self.T:
                use, all_ = "trained on" if self.num_samples else "held out", f"all {sum(windows)} windows {window}"
                why = f"{all_} in {len(shards)} shards are {use} with eval_files={eval_files}"
            raise DataError(f"{why}; lower sequence_length or eval_files, or add data")

    @classmethod
    def open(cls, cfg: Config, folder: str | Path | None = None) -> "Dataset":
        """The set named by cfg.data_dir, read from `folder` where that holds its shards unpacked; reads headers only.

        Raises PackedShard where a shard has to be unpacked first (open_dataset does it), and DataError.
        """
        paths = chosen_shards(cfg)
        # headers alone are read, however large the shards are
        allow_open_files(len(paths))  # each shard keeps a map, and 774 of them pass the usual limit of 1,024 with room
        shards = [Shard.open(folder or cfg.data_dir, path) for path in paths]
        tokenizer = tokenizers.check_shards(shards, cfg)
        settings = (cfg.sequence_length, cfg.vocab_size, cfg.seed, cfg.eval_files, cfg.shift_windows, tokenizer)
        return cls(shards, *settings)

    @cached_property
    def manifest(self) -> list[dict[str, Any]]:
        """path, tokens, dtype and crc32 of every shard, for a checkpoint to keep."""
        return [shard.describe() for shard in dict.fromkeys((*self.shards, *self.eval_shards))]  # one may be in both

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the manifest, so over the zips' own checksums of the content; no token is read."""
        lines = "".join(f"{s['path']}\t{s['tokens']}\t{s['dtype']}\t{s['crc32']}\n" for s in self.manifest)
        return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()

    @property
    def notes(self) -> list[str]:
        """What is odd about the set and no error, a sentence each."""
        return notes.oddities(self.shards, self.eval_shards, self.T)

    def check_same(self, state: dict[str, Any], cfg: Config) -> list[str]:
        """Raise DataError unless the run of a checkpoint's state read these shards in this order, or it is allowed.

        Returns what the change means for the run that goes on, a sentence each; [] where nothing changed.
        """
        changes = explain_change(state["data"]["manifest"], self.manifest)
        # the same shards in another order, or cut elsewhere, are another run as well: each key decides about that
        for key in ("seed", "sequence_length", "eval_files", "shift_windows"):
            was = state["config"].get(key, KEYS[key].default)  # a key that is younger than the checkpoint
            if was != getattr(cfg, key):
                changes += f"\n{key} {was} -> {getattr(cfg, key)}"
        was = state["data"].get("tokenizer", state["config"].get("tokenizer"))
        if was and self.tokenizer and was != self.tokenizer:  # the same numbers would be other words
            changes += f"\ntokenizer {was} -> {self.tokenizer}"
        if changes and not cfg.allow_change:
            raise DataError(
                f"the checkpoint was trained on other data or in another order:\n{changes.strip()}\nrestore it, set "
                "allow_change=true to go on with what is there, or name another output_dir and logging_dir for a new run"
            )
        at = self.position(state["samples_seen"])
        return notes.after_change(state, at, self.shards, self.eval_shards) if changes else []

    def sample_ids(self, first: int, count: int) -> np.ndarray:
        """Window ids at the global positions [first, first + count), int64; an epoch visits every window once."""
        position = first + np.arange(count)
        epochs, positions = np.divmod(position, self.num_samples)  # one batch may span the end of an epoch
        ids = []
        for epoch in np.unique(epochs).tolist():
            shift = window_shift(self.seed, epoch, self.T) if self.shift_windows else 0
            order = permutation(self.seed, epoch, self.num_samples, positions[epochs == epoch])
            ids.append(order + shift * self._first_ids[-1])  # so an id alone says where its window lies
        return np.concatenate(ids)

    def eval_ids(self, count: int) -> np.ndarray:
        """Up to `count` held-out window ids, always the same; int64 [min(count, held out)]."""
        # evenly spaced, as neighbours may be alike; always the same, or two evaluations could not be compared
        count = min(count, self.num_eval_samples)
        return self.num_samples + np.arange(count) * self.num_eval_samples // max(count, 1)

    def blocks(self, ids: np.ndarray, B: int, rank: int, world_size: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """This rank's share of the windows with these ids: x, y, int64 [B, T]; the same number on every rank."""
        # what fills a block up is zeros whose targets, -100, do not count: a compiled model meets one shape
        for first in range(rank * B, rank * B + len(ids), B * world_size):  # collective: as many on every rank
            rows = ids[first : first + B]
            x, y = torch.zeros(B, self.T, dtype=torch.int64), torch.full((B, self.T), -100)
            if len(rows):
                x[: len(rows)], y[: len(rows)] = to_tensors(self.gather(rows))
            yield x, y

    def locate(self, ids: np.ndarray) -> list[tuple[str, int]]:
        """(relative path of the shard, offset of the window in tokens) for each id."""
        return [(shard.path, start) for shard, start in self._places(ids)]

    def _places(self, ids: np.ndarray) -> list[tuple[Shard, int]]:
        shifts, ids = np.divmod(np.asarray(ids, np.int64), self._first_ids[-1])
        assert not len(ids) or (0 <= shifts.min() and shifts.max() < self.T), "window id out of range"
        spans = np.searchsorted(self._first_ids, ids, "right") - 1
        starts = (ids - self._first_ids[spans]) * self.T + shifts
        places = zip(spans.tolist(), starts.tolist(), strict=True)
        return [(self._shards[span], min(self._begins[span] + start, self._lasts[span])) for span, start in places]

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """The windows with these ids, int64 [len(ids), T + 1]. Raises DataError, also for a token >= vocab_size."""
        places = self._places(ids)
        out = np.empty((len(places), self.T + 1), np.int64)
        distinct = {shard for shard, _ in places}
        for shard in distinct:  # a file cut short is an error here; touching its map would end the process
            shard.check_unchanged()
        for row, (shard, start) in zip(out, places, strict=True):
            row[:] = shard.stream[start : start + self.T + 1]  # one read of about 2 KB from the map
        for shard in distinct:
            shard.check_unchanged()  # again: what was read in between is now known to be the old file's
        unsigned = out.view(np.uint64)  # where a negative id is a huge one: one comparison finds both kinds
        if unsigned.max(initial=0) >= self.vocab_size:
            row, column = np.argwhere(unsigned >= self.vocab_size)[0]
            shard, start = places[row]
            raise DataError(
                f"{shard.file} has id {out[row, column]} at token {start + column}; vocab_size={self.vocab_size} "
                "allows 0 to vocab_size-1: another tokenizer's shard, or a damaged one"
            )
        return out

    def position(self, samples_seen: int) -> dict[str, Any]:
        """Where a run stands after so many samples: epoch, share of it done, files' worth read, the next sample."""
        epoch, done = divmod(samples_seen, self.num_samples)  # a pure function of the count: nothing of it is saved
        [(path, offset)] = self.locate(self.sample_ids(samples_seen, 1))
        return {
            "epoch": epoch, "epoch_fraction": done / self.num_samples,
            "files": done * len(self.shards) // self.num_samples, "next_shard": path, "next_offset": offset,
        }  # fmt: skip


def allow_open_files(count: int) -> None:
    """Raises the soft limit of open files so that `count` more fit, as far as the hard one allows."""
    # the soft limit is low for programs that use select(), which nothing here does with these files
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 1024 if hard == resource.RLIM_INFINITY else min(count + 1024, hard)
    if resource.RLIM_INFINITY != soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def open_dataset(cfg: Config) -> Dataset:
    """Dataset.open; a compressed or padded set is unpacked first, once per node and source, into cfg.cache_dir.

    Every process of a node may call this: one works, the others wait for it. Raises DataError.
    """
    try:
        return Dataset.open(cfg)  # most sets need nothing, and then nothing is written either
    except PackedShard:
        from refocused.shards import prepare  # only such a set needs it

    end = tokenizers.find(cfg.tokenizer).end if cfg.tokenizer else None
    prepare.unpack(Path(cfg.data_dir).resolve(), cache_folder(cfg), chosen_shards(cfg), cfg.vocab_size, end)
    return Dataset.open(cfg, cache_folder(cfg))


def unpack(cfg: Config) -> None:
    """Unpack what open_dataset would, for one process of a node while the others wait. Raises DataError."""
    open_dataset(cfg)


# ---- batches


@dataclass(frozen=True)
class Batch:
    step: int
    ids: np.ndarray  # int64 [global batch]: the window ids of all ranks, for the trace and for error messages
    micro: list[tuple[torch.Tensor, torch.Tensor]]  # per micro-step (x, y), int64 tensors [B, T] of this rank


def to_tensors(windows: np.ndarray, pin_memory: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows [B, T + 1] as inputs and next-token targets, int64 tensors [B, T]."""
    # the only shift by one there is: neither the model nor its loss shifts again
    pair = (torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(windows[:, 1:].copy()))
    return (pair[0].pin_memory(), pair[1].pin_memory()) if pin_memory else pair


class Loader:
    """Yields a Batch per optimizer step in [start_step, max_steps), read ahead by threads: workers + 2 steps at most."""

    def __init__(
        self, dataset: Dataset, start_step: int, max_steps: int, global_batch: int, rank: int = 0, world_size: int = 1,
        micro_batch: int = 1, accumulation: int = 1, workers: int = 1, pin_memory: bool = False,
        first_sample: int | None = None,
    ):  # fmt: skip
        assert global_batch == micro_batch * accumulation * world_size
        self.dataset, self.global_batch, self.micro_batch = dataset, global_batch, micro_batch
        # rank r takes the block [r*G/W, (r+1)*G/W) of the global batch, its micro-steps consecutive blocks of that: what a
        # step trains on does not depend on the world size, the accumulation or the number of workers
        self.rows = slice(rank * micro_batch * accumulation, (rank + 1) * micro_batch * accumulation)
        self.pin_memory = pin_memory
        self.wait_seconds = 0.0  # that the consumer spent waiting for data, in all
        # start_step does not begin at start_step * global_batch if the batch was another one earlier in the run
        first_sample = start_step * global_batch if first_sample is None else first_sample
        self._plan = self._steps_and_ids(start_step, max_steps, first_sample)
        # threads and not processes: numpy releases the GIL as it copies out of a map, and nothing has to be pickled
        self._pool = ThreadPoolExecutor(workers, "loader")
        self._ahead: deque[Future[Batch]] = deque()  # in the order of steps, whichever thread is done first
        for _ in range(workers + 2):  # every thread has one, and two wait: a slow read is not felt at once
            self._submit()

    def _steps_and_ids(self, start_step: int, max_steps: int, first_sample: int) -> Iterator[tuple[int, np.ndarray]]:
        some = max(1, 4096 // self.global_batch)  # a permutation costs about the same for one id and for thousands
        for step in range(start_step, max_steps, some):
            steps = range(step, min(step + some, max_steps))
            first = first_sample + (step - start_step) * self.global_batch
            ids = self.dataset.sample_ids(first, len(steps) * self.global_batch).reshape(len(steps), -1)
            yield from zip(steps, ids, strict=True)

    def _submit(self) -> None:
        if step_and_ids := next(self._plan, None):
            self._ahead.append(self._pool.submit(self._assemble, *step_and_ids))

    def _assemble(self, step: int, ids: np.ndarray) -> Batch:
        windows = self.dataset.gather(ids[self.rows])  # this rank's part; the ids of all go into the trace
        blocks = range(0, len(windows), self.micro_batch)
        return Batch(step, ids, [to_tensors(windows[i : i + self.micro_batch], self.pin_memory) for i in blocks])

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        if not self._ahead:
            raise StopIteration
        self.error()  # waits here, where the time is counted
        batch = self._ahead.popleft().result()  # raises here what went wrong in a thread
        self._submit()
        return batch

    def error(self) -> BaseException | None:
        """Wait for the next batch, if there is one; what keeps it from being read."""
        # asked after every step, so that all ranks agree to save and leave before one of them fails in __next__
        if not self._ahead:
            return None
        begin = time.perf_counter()
        error = self._ahead[0].exception()
        self.wait_seconds += time.perf_counter() - begin
        return error

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)  # waits for what is being read, drops the rest
        self._ahead.clear()
