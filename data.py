"""Shards on disk -> samples in a fixed order -> batches.

    dataset = Dataset.open(cfg)
    for batch in Loader(dataset, start_step, max_steps, global_batch, rank, world_size, B, accumulation, workers):
        for x, y in batch.micro: ...

A shard is an .npz whose token array is stored, not deflated, so a sample is one read at a known offset. Which samples
make up step k is a pure function of (seed, k, global batch): there is no index array and no loader state to save.

    python data.py demo | prepare | tokenize | verify | bench      (prepare.py)
"""

import hashlib
import os
import resource
import sys
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from configs import Config
from shard import DataError, PackedShard, Shard, find_shards

HELD_OUT_TAIL = 0.05  # of a single shard


def chosen_shards(cfg: Config) -> list[str]:
    """Relative paths of the first max_files shards of cfg.data_dir, training and held-out ones together."""
    paths = find_shards(cfg.data_dir, cfg.tokenized_file_pattern)
    return paths[: cfg.max_files if cfg.max_files > 0 else len(paths)]


# ---- order


def permutation(seed: int, epoch: int, n: int, positions: np.ndarray) -> np.ndarray:
    """The sample at each of the given positions (int64 [k], in [0, n)) of an epoch; int64 [k].

    A bijection of [0, n) keyed by (seed, epoch) and computed per position: a Feistel network over the fewest bits that
    hold n, walked along its cycle until it is back below n (Black and Rogaway, "Ciphers with arbitrary finite domains",
    2002), at most two turns on average. Runs resume by it, so its values must never change.
    """
    bits = max((n - 1).bit_length(), 4)
    low, high = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    low_mask, high_mask = (np.uint64((1 << int(width)) - 1) for width in (low, high))
    keys = np.frombuffer(hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=64).digest(), "<u8")

    def mix(x: np.ndarray, key: np.uint64) -> np.ndarray:  # multiply, fold, multiply, keep the well-mixed upper half
        x = (x ^ key) * np.uint64(0x9E3779B97F4A7C15)
        return (x ^ (x >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(32)

    x = np.array(positions, np.uint64)
    walking = np.arange(len(x))
    while len(walking):
        left, right = x[walking] >> low, x[walking] & low_mask
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            left ^= mix(right, even) & high_mask
            right ^= mix(left, odd) & low_mask
        x[walking] = left << low | right
        walking = walking[x[walking] >= n]
    return x.astype(np.int64)


# ---- the set


class Dataset:
    """The shards of a folder as windows of sequence_length + 1 tokens at stride sequence_length, in a fixed order.

    Window ids: [0, num_samples) are trained on, [num_samples, num_samples + num_eval_samples) are held out.
    """

    def __init__(self, shards: list[Shard], sequence_length: int, vocab_size: int, seed: int, eval_files: int):
        self.T, self.vocab_size, self.seed = sequence_length, vocab_size, seed
        windows = [max(0, shard.num_tokens - 1) // self.T for shard in shards]
        held = min(eval_files, len(shards)) if len(shards) > 1 else 0
        if held and held == len(shards):
            raise DataError(f"eval_files={eval_files} holds out all of {len(shards)} shards; lower it or add shards")
        self.shards, self.eval_shards = shards[: len(shards) - held], shards[len(shards) - held :]
        spans = [(shard, 0, count) for shard, count in zip(shards, windows, strict=True)]
        cut = len(self.shards)
        if len(shards) == 1 and eval_files:
            tail = max(1, round(windows[0] * HELD_OUT_TAIL))
            self.eval_shards = shards
            spans = [(shards[0], 0, max(0, windows[0] - tail)), (shards[0], (windows[0] - tail) * self.T, tail)]

        self._shards, self._begins, counts = zip(*spans, strict=True)
        self._first_ids = np.cumsum((0, *counts))
        self.num_samples = int(self._first_ids[cut])
        self.num_eval_samples = int(self._first_ids[-1]) - self.num_samples
        self.num_tokens = self.num_samples * self.T  # that an epoch trains on
        if not self.num_samples or (eval_files and not self.num_eval_samples):
            what = "held-out" if self.num_samples else "training"
            raise DataError(
                f"no {what} shard is long enough for one window of sequence_length+1={self.T + 1} tokens: the longest "
                f"of all {len(shards)} has {max(s.num_tokens for s in shards)}; lower sequence_length or eval_files, "
                "or add data"
            )

    @classmethod
    def open(cls, cfg: Config, folder: str | Path | None = None) -> "Dataset":
        """The set named by cfg.data_dir, read from `folder` where that holds its shards unpacked. Reads headers only.

        Raises PackedShard where a shard has to be unpacked first (prepare.open_or_unpack does it), and DataError.
        """
        paths = chosen_shards(cfg)
        allow_open_files(len(paths))
        shards = [Shard.open(folder or cfg.data_dir, path) for path in paths]
        return cls(shards, cfg.sequence_length, cfg.vocab_size, cfg.seed, cfg.eval_files)

    @cached_property
    def manifest(self) -> list[dict[str, Any]]:
        """path, tokens, dtype and crc32 of every shard, for a checkpoint to keep."""
        return [shard.describe() for shard in dict.fromkeys((*self.shards, *self.eval_shards))]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the manifest, so over the zips' own checksums of the content; no token is read."""
        lines = "".join(f"{s['path']}\t{s['tokens']}\t{s['dtype']}\t{s['crc32']}\n" for s in self.manifest)
        return hashlib.sha256(lines.encode()).hexdigest()

    def sample_ids(self, first: int, count: int) -> np.ndarray:
        """The window ids at the global positions [first, first + count), int64; every epoch visits every window once."""
        position = first + np.arange(count)
        epochs, positions = np.divmod(position, self.num_samples)
        return np.concatenate(
            [
                permutation(self.seed, int(epoch), self.num_samples, positions[epochs == epoch])
                for epoch in np.unique(epochs)
            ]
        )

    def eval_ids(self, count: int) -> np.ndarray:
        """Up to `count` held-out window ids, evenly spaced and always the same; int64 [min(count, held out)]."""
        count = min(count, self.num_eval_samples)
        return self.num_samples + np.arange(count) * self.num_eval_samples // max(count, 1)

    def locate(self, ids: np.ndarray) -> list[tuple[str, int]]:
        """(relative path of the shard, offset of the window in tokens) for each id."""
        return [(shard.path, start) for shard, start in self._places(ids)]

    def _places(self, ids: np.ndarray) -> list[tuple[Shard, int]]:
        ids = np.asarray(ids, np.int64)
        assert not len(ids) or (0 <= ids.min() and ids.max() < self._first_ids[-1]), "window id out of range"
        spans = np.searchsorted(self._first_ids, ids, "right") - 1
        starts = (ids - self._first_ids[spans]) * self.T
        return [(self._shards[i], self._begins[i] + start) for i, start in zip(spans.tolist(), starts.tolist())]  # noqa: B905

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """The windows with these ids, int64 [len(ids), T + 1]. Raises DataError, also for an id outside the vocabulary."""
        places = self._places(ids)
        out = np.empty((len(places), self.T + 1), np.int64)
        scratch = {shard.dtype: np.empty(self.T + 1, shard.dtype) for shard, _ in places}
        for row, (shard, start) in zip(out, places, strict=True):
            window = scratch[shard.dtype]
            shard.read_into(window, start)
            row[:] = window
        bad = out.view(np.uint64) >= self.vocab_size  # a negative id is a huge one here
        if bad.any():
            row, column = np.argwhere(bad)[0]
            shard, start = places[row]
            raise DataError(
                f"{shard.file} has id {out[row, column]} at token {start + column}; vocab_size={self.vocab_size} "
                "allows 0 to vocab_size-1: another tokenizer's shard, or a damaged one"
            )
        return out

    def position(self, samples_seen: int) -> dict[str, Any]:
        """Where a run stands after so many samples: epoch, share of it done, files' worth read, the next sample."""
        epoch, done = divmod(samples_seen, self.num_samples)
        window = permutation(self.seed, epoch, self.num_samples, np.array([done]))
        [(path, offset)] = self.locate(window)
        return {
            "epoch": epoch,
            "epoch_fraction": done / self.num_samples,
            "files": done * len(self.shards) // self.num_samples,
            "next_shard": path,
            "next_offset": offset,
        }


def allow_open_files(count: int) -> None:
    """Raises the soft limit of open files (1024 by custom) so that `count` more fit, as far as the hard one allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 1024
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def explain_change(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> str:
    """What distinguishes two manifests, for the reader of an error: shards added, removed and changed; '' if equal."""
    was, now = ({shard["path"]: shard for shard in manifest} for manifest in (old, new))
    changed = []
    for path in was.keys() & now.keys():
        keys = [f"{k} {was[path][k]} -> {now[path][k]}" for k in ("tokens", "dtype", "crc32") if was[path][k] != now[path][k]]
        changed += [f"{path} ({', '.join(keys)})"] if keys else []
    lines = []
    for what, paths in (("added", now.keys() - was.keys()), ("removed", was.keys() - now.keys()), ("changed", changed)):
        names = sorted(paths)
        if names:
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            lines.append(f"{what} {len(names)}: {', '.join(names[:10])}{more}")
    return "\n".join(lines)


# ---- batches


@dataclass(frozen=True)
class Batch:
    step: int
    ids: np.ndarray  # int64 [global batch]: the window ids of all ranks, for the trace and for error messages
    micro: list[tuple[Any, Any]]  # per micro-step (x, y), int64 tensors [B, T] of this rank


def to_tensors(windows: np.ndarray, pin_memory: bool = False) -> tuple[Any, Any]:
    """Windows [B, T + 1] as inputs and next-token targets, int64 tensors [B, T]."""
    import torch

    pair = (torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(windows[:, 1:].copy()))
    return tuple(t.pin_memory() for t in pair) if pin_memory else pair


class Loader:
    """Yields a Batch per optimizer step in [start_step, max_steps), read ahead by threads; at most workers + 2 wait.

    Rank r takes the contiguous block [r*G/W, (r+1)*G/W) of the global batch, its micro-steps consecutive blocks of that,
    so what a step trains on does not depend on the world size, the accumulation or the number of workers.
    """

    def __init__(
        self,
        dataset: Dataset,
        start_step: int,
        max_steps: int,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batch: int = 1,
        accumulation: int = 1,
        workers: int = 1,
        pin_memory: bool = False,
        first_sample: int | None = None,
    ):
        assert global_batch == micro_batch * accumulation * world_size, "global batch is not micro * accumulation * world"
        self.dataset, self.global_batch, self.micro_batch = dataset, global_batch, micro_batch
        self.rows = slice(rank * micro_batch * accumulation, (rank + 1) * micro_batch * accumulation)
        self.pin_memory = pin_memory
        self.wait_seconds = 0.0  # that the consumer spent waiting for data, in all
        self._steps = iter(range(start_step, max_steps))
        # where start_step begins: not start_step * global_batch if the batch was another one earlier in the run
        self._origin = (start_step * global_batch if first_sample is None else first_sample) - start_step * global_batch
        self._pool = ThreadPoolExecutor(workers, "loader")
        self._ahead: deque[Future[Batch]] = deque()
        for _ in range(workers + 2):
            self._submit()

    def _submit(self) -> None:
        if (step := next(self._steps, None)) is not None:
            self._ahead.append(self._pool.submit(self._assemble, step))

    def _assemble(self, step: int) -> Batch:
        ids = self.dataset.sample_ids(self._origin + step * self.global_batch, self.global_batch)
        windows = self.dataset.gather(ids[self.rows])
        blocks = range(0, len(windows), self.micro_batch)
        return Batch(step, ids, [to_tensors(windows[i : i + self.micro_batch], self.pin_memory) for i in blocks])

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        if not self._ahead:
            raise StopIteration
        begin = time.perf_counter()
        batch = self._ahead.popleft().result()  # raises here what went wrong in a thread
        self.wait_seconds += time.perf_counter() - begin
        self._submit()
        return batch

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._ahead.clear()


# ---- tokenizers


def get_tokenizer(name: str) -> Any:
    """The tiktoken.Encoding called "byte" (256 bytes and end-of-text; needs no download) or "gpt2". Raises DataError."""
    import tiktoken

    if name == "byte":
        return tiktoken.Encoding(
            name="byte",
            pat_str=r"(?s:.)",
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={"<|endoftext|>": 256},
            explicit_n_vocab=257,
        )
    if name != "gpt2":
        raise DataError(f"tokenizer={name} is unknown; there are byte and gpt2")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever its HTTP client raises
        raise DataError(
            "tiktoken cannot fetch the gpt2 vocabulary; connect once, or point TIKTOKEN_CACHE_DIR at a folder that "
            f"holds it: {type(error).__name__}: {error}"
        ) from error


if __name__ == "__main__":
    import prepare

    sys.exit(prepare.main(sys.argv[1:]))
