"""Foreign shards -> shards that are read in place; and checking either kind.

    python data.py prepare SRC DST      compressed or padded .npz shards and nanoGPT's .bin files -> mapped shards
    python data.py verify DIR           every byte against its checksum, every id against the vocabulary

Nothing here trusts a file: sizes are compared with shapes before a byte is inflated, and nothing is ever unpickled.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cached_property
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

import shard
from configs import Config
from data import Dataset, chosen_shards
from shard import DataError, PackedShard, Shard, WriteError

BLOCK = 1 << 22  # bytes handled at once
MAX_RATIO = 200  # of inflated to deflated size of the token array
INTEGERS = ("|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8")
END_OF_TEXT = {"byte": 256, "gpt2": 50256}


@contextmanager
def open_member(file: IO[bytes], member: zipfile.ZipInfo, path: Path) -> Iterator[IO[bytes]]:
    """A member as a stream that ends at its declared size and checks its CRC-32 there. Raises DataError."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open(member) as stream:
            yield stream
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DataError(f"{path} is damaged or ends early: {member.filename}: {error}") from error


def read_blocks(stream: IO[bytes], dtype: np.dtype, count: int, path: Path, multiple: int = 1) -> Iterator[np.ndarray]:
    """`count` items as 1-D arrays of about BLOCK bytes, each (but the last) a multiple of so many items."""
    per_block = max(1, BLOCK // (dtype.itemsize * multiple)) * multiple
    while count:
        wanted = min(count, per_block)
        raw = stream.read(wanted * dtype.itemsize)
        if len(raw) != wanted * dtype.itemsize:
            raise DataError(f"{path} ends early: {count * dtype.itemsize - len(raw)} bytes are missing")
        count -= wanted
        yield np.frombuffer(raw, dtype)


class Source:
    """A file of tokens in any of the formats, opened by its headers; its tokens are streamed block by block.

    The bucket's own format is `input_ids` [rows, width] padded on the right, with `sequence_lengths` [rows] or
    `attention_mask` [rows, width] or both. Its padding is dropped, and a row shorter than the width is followed by one
    end-of-text. Anything else (1-D, rows without padding arrays, .bin) is a stream as it is. Raises DataError.
    """

    def __init__(self, file: Path, vocab_size: int, end_of_text: int, max_ratio: float = MAX_RATIO):
        if not 0 <= end_of_text < vocab_size:
            raise DataError(f"end_of_text={end_of_text} is no id below vocab_size={vocab_size}")
        self.file, self.vocab_size, self.end_of_text, self.max_ratio = file, vocab_size, end_of_text, max_ratio
        self.out_dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        try:
            self.size = file.stat().st_size
            with open(file, "rb") as stream:
                self._look_at_bin(stream) if file.suffix == ".bin" else self._look_at_npz(stream)
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror or error}") from error

    def _look_at_bin(self, stream: IO[bytes]) -> None:
        if self.size % 2 or not self.size:
            raise DataError(f"{self.file} has {self.size} bytes; a .bin file is uint16 tokens and nothing else")
        self.members, self.shape, self.dtype, self.padded = {}, (self.size // 2,), np.dtype("<u2"), False
        crc = 0
        while block := stream.read(BLOCK):
            crc = zlib.crc32(block, crc)
        self.identity = {self.file.name: f"{crc:08x}"}

    def _look_at_npz(self, stream: IO[bytes]) -> None:
        self.members = shard.zip_members(stream, self.file)
        self.identity = zip_identity(self.members)
        self.member = shard.token_member(self.members, self.file)
        self.shape, self.dtype = self._header(stream, self.member, shard.DTYPES)
        packed = max(1, min(self.member.compress_size, self.size))
        if self.member.file_size > self.max_ratio * packed:
            raise DataError(
                f"{self.file}: {self.member.filename} claims {self.member.file_size} bytes out of {packed}, a ratio "
                f"over {self.max_ratio:g}; if that is honest padding, run `python data.py prepare` with a larger "
                "--max_ratio"
            )
        padding = [name for name in shard.PADDING_ARRAYS if name in self.members]
        self.padded = bool(padding)
        if padding and len(self.shape) == 1:
            raise DataError(f"{self.file}: {self.member.filename} has one dimension, which {padding[0]} does not fit")
        if 0 in self.shape:
            raise DataError(
                f"{self.file}: {self.member.filename} of shape {self.shape} has rows of length zero or none"
            )
        for name in padding:  # bounded by the token array's shape, so their own ratio does not matter
            shape, _ = self._header(stream, self.members[name], INTEGERS)
            if shape != (self.shape if name == "attention_mask" else self.shape[:1]):
                raise DataError(f"{self.file}: {name} has shape {shape} beside tokens of shape {self.shape}")

    def _header(self, file: IO[bytes], member: zipfile.ZipInfo, dtypes: tuple[str, ...]) -> tuple[tuple, np.dtype]:
        """Shape and dtype, once they agree with the declared size: nothing larger than that is ever inflated."""
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"{self.file}: {member.filename} is packed by method {member.compress_type}, not deflate")
        with open_member(file, member, self.file) as stream:
            shape, dtype = shard.npy_header(stream, self.file, member.filename, dtypes)
            length = stream.tell() + int(np.prod(shape, dtype=object)) * dtype.itemsize
        if length != member.file_size:
            raise DataError(
                f"{self.file}: {member.filename} claims {member.file_size} bytes; its shape {shape} and {dtype} make "
                f"{length}"
            )
        return shape, dtype

    def _blocks(self, name: str, multiple: int, dtypes: tuple[str, ...] = INTEGERS) -> Iterator[np.ndarray]:
        member = self.members[name]
        with open(self.file, "rb") as file, open_member(file, member, self.file) as stream:
            shape, dtype = shard.npy_header(stream, self.file, name, dtypes)
            yield from read_blocks(stream, dtype, int(np.prod(shape)), self.file, multiple)

    @cached_property
    def lengths(self) -> np.ndarray | None:
        """Tokens per row, int64 [rows]; None where nothing is padded."""
        if not self.padded:
            return None
        width = self.shape[1]
        if "sequence_lengths" in self.members:
            lengths = np.concatenate(list(self._blocks("sequence_lengths", 1))).astype(np.int64)
        else:
            lengths = np.concatenate(
                [(block.reshape(-1, width) != 0).sum(1) for block in self._blocks("attention_mask", width)]
            )
        if (bad := np.flatnonzero((lengths < 1) | (lengths > width))).size:
            raise DataError(f"{self.file}: row {bad[0]} has length {lengths[bad[0]]}; a row has 1 to {width} tokens")
        return lengths

    def _check_mask(self) -> None:
        """The mask is ones for each row's length, then zeros."""
        width, row = self.shape[1], 0
        for block in self._blocks("attention_mask", width):
            mask = block.reshape(-1, width) != 0
            lengths = self.lengths[row : row + len(mask)]
            wrong = (mask != (np.arange(width) < lengths[:, None])).any(1)
            if wrong.any():
                i = int(wrong.argmax())
                raise DataError(
                    f"{self.file}: row {row + i} has length {lengths[i]} and {mask[i].sum()} ones in attention_mask, "
                    f"the last at {np.flatnonzero(mask[i])[-1:]}; rows are padded on the right, and the two agree"
                )
            row += len(mask)

    @cached_property
    def count(self) -> int:
        """Tokens that come out."""
        if self.lengths is None:
            return int(np.prod(self.shape))
        return int(self.lengths.sum() + (self.lengths < self.shape[1]).sum())

    @property
    def note(self) -> dict[str, Any]:
        """What a shard made from this is recognised by."""
        return {"source": self.identity, "vocab_size": self.vocab_size, "end_of_text": self.end_of_text}

    def chunks(self, report: dict[str, Any]) -> Iterator[np.ndarray]:
        """The tokens in blocks; fills in tokens, documents, padding and largest_id. Raises DataError."""
        report |= {"tokens": self.count, "documents": 0, "padding": 0, "largest_id": 0}
        if "attention_mask" in self.members:
            self._check_mask()
        if not self.members:
            with open(self.file, "rb") as stream:
                yield from self._checked(read_blocks(stream, self.dtype, self.count, self.file), report)
        else:
            name = self.member.filename.removesuffix(".npy")
            yield from self._checked(self._blocks(name, self.shape[1] if self.padded else 1), report)

    def _checked(self, blocks: Iterator[np.ndarray], report: dict[str, Any]) -> Iterator[np.ndarray]:
        seen = 0
        for block in blocks:
            tokens = self._unpad(block, seen // self.shape[1], report) if self.padded else block
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.vocab_size:
                self._refuse(block, seen)
            report["largest_id"] = max(report["largest_id"], high)
            if not self.padded:
                report["documents"] += int((tokens == self.end_of_text).sum())
            seen += len(block)
            yield tokens

    def _unpad(self, block: np.ndarray, row: int, report: dict[str, Any]) -> np.ndarray:
        width = self.shape[1]
        block = block.reshape(-1, width)
        lengths = self.lengths[row : row + len(block)]
        rows = np.empty((len(block), width + 1), block.dtype)  # the last column is where a full row's marker would go
        rows[:, :width] = block
        rows[np.arange(len(block)), lengths] = self.end_of_text
        report["documents"] += len(block)
        report["padding"] += int(block.size - lengths.sum())
        return rows[np.arange(width + 1) < (lengths + (lengths < width))[:, None]]

    def _refuse(self, block: np.ndarray, seen: int) -> None:
        wrong = (block < 0) | (block >= self.vocab_size)
        if self.padded:  # where anything may stand
            width = self.shape[1]
            lengths = self.lengths[seen // width : (seen + len(block)) // width]
            wrong &= (np.arange(width) < lengths[:, None]).ravel()
        i = int(wrong.argmax())
        place = "row {}, column {}".format(*divmod(seen + i, self.shape[1])) if self.padded else f"token {seen + i}"
        raise DataError(
            f"{self.file} has id {block[i]} at {place}; vocab_size={self.vocab_size} allows 0 to vocab_size-1"
        )


def zip_identity(members: dict[str, zipfile.ZipInfo]) -> dict[str, str]:
    return {name: f"{member.CRC:08x}" for name, member in sorted(members.items())}


def is_intact(folder: Path, path: str) -> bool:
    """Whether this is a mapped shard whose content has the checksum that its zip directory names. Reads all of it."""
    try:
        Shard.open(folder, path)
        for _ in Source(Path(folder, path), 1 << 32, 0).chunks({}):
            pass
        return True
    except DataError:
        return False


# ---- prepare


def prepare(
    source: Path, target: Path, vocab_size: int, end_of_text: int, workers: int = 0, max_ratio: float = MAX_RATIO
) -> dict[str, int]:
    """Converts .npz and .bin files, source or all below it, to mapped shards of the same relative name below target.

    What is there already, from the same source and intact, is kept. A bad file does not stop the others; the DataError
    at the end names all of them. Returns totals: files, kept, tokens, documents, padding, largest_id.
    """
    if not 0 <= end_of_text < vocab_size:
        raise DataError(
            f"end_of_text={end_of_text} is no id below vocab_size={vocab_size}; name one with --end_of_text"
        )
    source, paths = shard.find_sources(source)
    paths = [p for p in paths if p.endswith((".npz", ".bin"))]
    if not paths:
        raise DataError(f"{source} and its subfolders have no .npz and no .bin file")
    if Path(target).resolve() == Path(source).resolve():
        raise DataError(f"{target} is the source; mapped shards need a folder of their own")
    for path in paths:
        if path.endswith(".bin") and mapped_name(path) in paths:
            raise DataError(f"{path} and {mapped_name(path)} would become one shard; rename one of them")
    with shard.locked(target):
        return convert_all(source, target, paths, vocab_size, end_of_text, workers, max_ratio)


def convert_all(
    source: Path,
    target: Path,
    paths: list[str],
    vocab_size: int,
    end_of_text: int,
    workers: int = 0,
    max_ratio: float = MAX_RATIO,
) -> dict[str, int]:
    """prepare for these paths, the target being locked."""
    shard.remove_stale(target)
    settings = {"vocab_size": vocab_size, "end_of_text": end_of_text}
    jobs = [(source / path, target, path, settings, max_ratio) for path in paths]
    return run_jobs(convert, jobs, workers, f"preparing {target}")


def convert(
    file: Path, target: Path, path: str, settings: dict[str, int], max_ratio: float = MAX_RATIO
) -> dict[str, Any]:
    """Makes target/path from file; settings are vocab_size and end_of_text. Returns the report, with kept=1 if it is there.

    target/path may be the file itself.
    """
    source = Source(file, **settings, max_ratio=max_ratio)
    path = mapped_name(path)
    old = shard.read_note(target / path)
    if old and source.note.items() <= old.items() and is_intact(target, path):
        return {**old["report"], "kept": 1}
    report: dict[str, Any] = {}
    note = {**source.note, "report": report}
    shard.write_shard(target / path, source.out_dtype, source.count, source.chunks(report), note)
    return report


def mapped_name(path: str) -> str:
    return path.removesuffix(".bin") + ".npz" if path.endswith(".bin") else path


def run_jobs(work: Callable[..., dict[str, Any]], jobs: list[tuple], workers: int, what: str) -> dict[str, int]:
    """work(*job) for each job in several processes, with a bar; the summed reports, or a DataError of all errors."""
    totals = {"files": 0, "kept": 0, "tokens": 0, "documents": 0, "padding": 0, "largest_id": 0}
    begin, errors = time.perf_counter(), []
    with process_pool(workers, len(jobs)) as pool, tqdm(total=len(jobs), desc=what, unit="file") as bar:
        for future in as_completed([pool.submit(work, *job) for job in jobs]):
            try:
                report = future.result()
            except WriteError:  # the disk is full or read-only: the others would fail alike
                pool.shutdown(cancel_futures=True)
                raise
            except DataError as error:
                errors.append(str(error))
            else:
                totals["files"] += 1
                for key, value in report.items():
                    totals[key] = max(totals[key], value) if key == "largest_id" else totals[key] + value
            bar.set_postfix_str(f"{totals['tokens'] / (time.perf_counter() - begin) / 1e6:.1f}M tok/s", refresh=False)
            bar.update()
    if errors:
        raise DataError("\n".join([f"{what}: {len(errors)} of {len(jobs)} files failed", *sorted(errors)]))
    return totals


def process_pool(workers: int, jobs: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # a fork copies other threads' locks in whatever state they are
    return ProcessPoolExecutor(min(workers or os.cpu_count() or 1, jobs), context, die_with_parent)


def die_with_parent() -> None:
    """Otherwise a pool's worker outlives a parent that was killed, and writes on beside its successor."""
    sentinel = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (wait([sentinel]), os._exit(1)), daemon=True).start()


# ---- training on a set that is not mapped


def open_or_unpack(cfg: Config) -> Dataset:
    """Dataset.open; a compressed or padded set is unpacked first, once per node and source, into cfg.cache_dir.

    Every process of a node may call this: one works, the others wait for it. Raises DataError.
    """
    try:
        return Dataset.open(cfg)
    except PackedShard:
        pass
    source, settings = Path(cfg.data_dir).resolve(), (cfg.vocab_size, END_OF_TEXT[cfg.tokenizer])
    key = hashlib.sha256(json.dumps([str(source), *settings]).encode()).hexdigest()[:12]
    cache = Path(cfg.cache_dir) / f"{source.name}-{key}"
    with shard.locked(cache):
        todo = [path for path in chosen_shards(cfg) if not is_unpacked(source / path, cache / path)]
        if todo:
            origins = (Source(source / path, *settings) for path in todo)
            needed = sum(origin.count * origin.out_dtype.itemsize for origin in origins)
            free = shutil.disk_usage(cache).free
            if needed > free:
                raise WriteError(
                    f"{len(todo)} shards of {source} unpack to {needed / 1e9:.2f} GB, {cache} has {free / 1e9:.2f} GB "
                    "free; point cache_dir at a larger disk or lower max_files"
                )
            print(
                f"unpacking {len(todo)} shards, {needed / 1e9:.2f} GB, into {cache}, once", file=sys.stderr, flush=True
            )
            convert_all(source, cache, todo, *settings)
    return Dataset.open(cfg, cache)


def is_unpacked(source: Path, target: Path) -> bool:
    """Whether target was made from this source as it is now, by the zip directories alone."""
    note = shard.read_note(target)
    if not note:
        return False
    with open(source, "rb") as file:
        return note["source"] == zip_identity(shard.zip_members(file, source))


# ---- verify


def verify(folder: Path, vocab_size: int, fast: bool = False, workers: int = 0, max_ratio: float = MAX_RATIO) -> int:
    """Prints a table of all shards below folder with what is wrong with them; returns 66 if anything is, else 0.

    Wrong: a damaged file, an id outside the vocabulary, the content of another file once more. fast: headers only.
    """
    paths = shard.find_shards(folder, "*.npz")
    if not paths:
        raise DataError(f"{folder} and its subfolders have no .npz file")
    with process_pool(workers, len(paths)) as pool:
        jobs = [pool.submit(examine, folder, path, vocab_size, fast, max_ratio) for path in paths]
        rows = [job.result() for job in tqdm(jobs, desc=f"verifying {folder}", unit="file")]
    first: dict[Any, str] = {}
    for path, row in zip(paths, rows, strict=True):
        twin = first.setdefault(row.get("content", path), path)
        if twin != path:
            row["wrong"] = f"{Path(folder, path)} has the same content as {twin}"
    longest = max(len(path) for path in paths)
    print(f"{'shard':<{longest}}  {'tokens':>14}  {'dtype':<6}  {'max id':>6}  state")
    for path, row in zip(paths, rows, strict=True):
        tokens = f"{row['tokens']:,}" if "tokens" in row else "-"
        state = row.get("wrong") or ("headers ok" if fast else "ok")
        print(f"{path:<{longest}}  {tokens:>14}  {row.get('dtype', '-'):<6}  {row.get('largest_id', '-'):>6}  {state}")
    wrong = sum("wrong" in row for row in rows)
    print(f"{len(paths)} shards, {sum(row.get('tokens', 0) for row in rows):,} tokens, {wrong} wrong")
    return DataError.exit_code if wrong else 0


def examine(folder: Path, path: str, vocab_size: int, fast: bool, max_ratio: float) -> dict[str, Any]:
    """A row of verify: tokens, dtype, largest_id, content (equal for equal arrays) and wrong, as far as it got."""
    row: dict[str, Any] = {}
    try:
        source = Source(Path(folder, path), vocab_size, 0, max_ratio)
        row |= {"tokens": source.count, "dtype": source.dtype.name}
        row["content"] = (source.member.CRC, source.shape, source.dtype.str)
        if not source.padded and source.member.compress_type == zipfile.ZIP_STORED:
            Shard.open(folder, path)
        if not fast:
            for _ in source.chunks(row):
                pass
    except DataError as error:
        row["wrong"] = str(error)
    return row
