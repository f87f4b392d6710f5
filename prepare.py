"""Making shards that data.py reads in place, and checking them.

    python data.py prepare SRC DST      compressed or padded .npz shards and nanoGPT's .bin files -> mapped shards
    python data.py verify DIR           every byte against its checksum, every id against the vocabulary

Nothing here trusts a file: sizes are compared with shapes before a byte is inflated, and nothing is ever unpickled.
"""

import errno
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

import data
from configs import Config
from data import DataError, Dataset, PackedShard, Shard

ALIGNMENT = 64  # of the first token in the file
BLOCK = 1 << 22  # bytes handled at once
MAX_RATIO = 200  # of inflated to deflated size of the token array
INTEGERS = ("|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8")
END_OF_TEXT = {"byte": 256, "gpt2": 50256}


class WriteError(DataError):
    """The disk did not take what was written; more of the same will not help."""


# ---- writing


def write_shard(path: Path, dtype: str, count: int, chunks: Iterable[np.ndarray], note: dict[str, Any]) -> None:
    """Writes `count` tokens, given in chunks, as a stored and aligned `input_ids`; the same bytes for the same tokens.

    The note becomes the zip's comment (JSON); it is read after the last chunk, so the chunks' producer may fill it in.
    Atomic: whoever finds the name finds the whole file, also after a crash. Raises WriteError, leaving nothing behind.
    """
    dtype = np.dtype(dtype)
    header = io.BytesIO()  # numpy pads it to a multiple of 64 bytes
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": (count,)})
    entry = zipfile.ZipInfo("input_ids.npy", (1980, 1, 1, 0, 0, 0))
    entry.external_attr = 0o644 << 16
    large = count * dtype.itemsize >= 1 << 31
    pad = -(30 + len(entry.filename) + (20 if large else 0) + 4) % ALIGNMENT
    entry.extra = b"\x35\xd9" + pad.to_bytes(2, "little") + bytes(pad)  # the field that zipalign uses

    def write(file: IO[bytes]) -> None:
        written = 0
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open(entry, "w", force_zip64=large) as member:
                member.write(header.getvalue())
                for chunk in chunks:
                    member.write(np.ascontiguousarray(chunk, dtype).data)
                    written += len(chunk)
            assert written == count, f"{path}: {written} tokens written, {count} announced"
            archive.comment = json.dumps(note, sort_keys=True).encode()

    write_atomically(path, write)


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Calls write(file) on a temporary neighbour, then fsync, rename, fsync of the folder. Raises WriteError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}; nothing is left of it") from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_note(path: Path) -> dict[str, Any] | None:
    """The note of a shard that write_shard made, None for any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            note = json.loads(archive.comment)
        return note if isinstance(note, dict) else None
    except (OSError, ValueError, zipfile.BadZipFile):
        return None


def is_intact(folder: Path, path: str) -> bool:
    """Whether the shard is there and its content agrees with its own checksum. Reads all of it."""
    try:
        for _ in checked_chunks(Shard.open(folder, path)):
            pass
        return True
    except DataError:
        return False


def checked_chunks(shard: Shard) -> Iterator[np.ndarray]:
    """The tokens of a mapped shard in blocks; DataError at the end where they do not have the member's CRC-32."""
    with open(shard.file, "rb") as file:
        member = data.token_member(data.zip_members(file, shard.file), shard.file)
        with open_member(file, member, shard.file) as stream:
            data.npy_header(stream, shard.file, member.filename)
            yield from read_blocks(stream, shard.dtype, shard.num_tokens, shard.file)


# ---- reading what is not a mapped shard


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
        wanted = min(count, per_block) * dtype.itemsize
        raw = stream.read(wanted)
        if len(raw) != wanted:
            raise DataError(f"{path} ends early: {count * dtype.itemsize - len(raw)} bytes are missing")
        count -= min(count, per_block)
        yield np.frombuffer(raw, dtype)


@dataclass
class Source:
    """A file to be converted, looked at without inflating its tokens; rows only where it is padded."""

    file: Path
    settings: dict[str, Any]  # vocab_size and end_of_text
    max_ratio: float = MAX_RATIO

    def __post_init__(self):
        self.vocab_size, self.end_of_text = self.settings["vocab_size"], self.settings["end_of_text"]
        if not 0 <= self.end_of_text < self.vocab_size:
            raise DataError(f"end_of_text={self.end_of_text} is no id below vocab_size={self.vocab_size}")
        self.out_dtype = "<u2" if self.vocab_size <= 1 << 16 else "<u4"
        self.lengths = None
        try:
            self.size = self.file.stat().st_size
            if self.file.suffix == ".bin":
                self._look_at_bin()
            else:
                with open(self.file, "rb") as file:
                    self._look_at_npz(file)
        except OSError as error:
            raise DataError(f"cannot read {self.file}: {error.strerror or error}") from error

    def _look_at_bin(self) -> None:
        if self.size % 2 or not self.size:
            raise DataError(f"{self.file} has {self.size} bytes; a .bin file is uint16 tokens and nothing else")
        self.dtype, self.shape, self.member = np.dtype("<u2"), (self.size // 2,), None
        crc = 0
        with open(self.file, "rb") as file:
            while block := file.read(BLOCK):
                crc = zlib.crc32(block, crc)
        self.identity = {self.file.name: f"{crc:08x}"}

    def _look_at_npz(self, file: IO[bytes]) -> None:
        members = data.zip_members(file, self.file)
        self.member = data.token_member(members, self.file)
        self.identity = {name: f"{member.CRC:08x}" for name, member in sorted(members.items())}
        self.shape, self.dtype = self._header(file, self.member, data.DTYPES)
        packed = min(self.member.compress_size, self.size)
        if self.member.file_size > self.max_ratio * max(packed, 1):
            raise DataError(
                f"{self.file}: {self.member.filename} claims {self.member.file_size} bytes out of {packed}, a ratio over "
                f"{self.max_ratio:g}; if that is honest padding, run `python data.py prepare` with a larger --max_ratio"
            )
        padding = [members[name] for name in data.PADDING_ARRAYS if name in members]
        if len(self.shape) == 1:
            if padding:
                raise DataError(f"{self.file}: {self.member.filename} has one dimension and {padding[0].filename} exists")
            return
        rows, width = self.shape
        if not rows or not width:
            raise DataError(f"{self.file}: {self.member.filename} of shape {self.shape} holds nothing")
        for array in padding:  # sizes are bounded by the token array's shape, so their own ratio does not matter
            shape, dtype = self._header(file, array, INTEGERS)
            if shape != (self.shape if array.filename.startswith("attention_mask") else (rows,)):
                raise DataError(f"{self.file}: {array.filename} has shape {shape} beside tokens of shape {self.shape}")
        self.lengths = self._lengths(file, members)
        if (bad := np.flatnonzero((self.lengths < 1) | (self.lengths > width))).size:
            raise DataError(f"{self.file}: row {bad[0]} has length {self.lengths[bad[0]]}; rows have 1 to {width} tokens")

    def _header(self, file: IO[bytes], member: zipfile.ZipInfo, dtypes: tuple[str, ...]) -> tuple[tuple, np.dtype]:
        """Shape and dtype, after comparing them with the declared size: nothing larger is ever inflated."""
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"{self.file}: {member.filename} is packed by method {member.compress_type}, not deflate")
        with open_member(file, member, self.file) as stream:
            shape, dtype = data.npy_header(stream, self.file, member.filename, dtypes)
            length = stream.tell() + int(np.prod(shape, dtype=object)) * dtype.itemsize
        if length != member.file_size:
            raise DataError(
                f"{self.file}: {member.filename} claims {member.file_size} bytes; its shape {shape} and {dtype} "
                f"make {length}"
            )
        return shape, dtype

    def _lengths(self, file: IO[bytes], members: dict[str, zipfile.ZipInfo]) -> np.ndarray:
        """Tokens per row, int64 [rows], from sequence_lengths, else from the mask; both must agree."""
        rows, width = self.shape
        lengths = np.full(rows, width, np.int64)
        if "sequence_lengths" in members:
            lengths = np.concatenate(list(self._array(file, members["sequence_lengths"], 1))).astype(np.int64)
        if "attention_mask" in members:
            row = 0
            for block in self._array(file, members["attention_mask"], width):
                mask = block.reshape(-1, width) != 0
                found = mask.sum(1)
                expected = lengths[row : row + len(mask)] if "sequence_lengths" in members else found
                wrong = (found != expected) | (mask != (np.arange(width) < expected[:, None])).any(1)
                if wrong.any():
                    i = int(np.flatnonzero(wrong)[0])
                    raise DataError(
                        f"{self.file}: row {row + i} has {found[i]} ones in attention_mask and length {expected[i]}; "
                        "rows are padded on the right and sequence_lengths agrees with the mask"
                    )
                lengths[row : row + len(mask)] = found
                row += len(mask)
        return lengths

    def _array(self, file: IO[bytes], member: zipfile.ZipInfo, multiple: int) -> Iterator[np.ndarray]:
        with open_member(file, member, self.file) as stream:
            shape, dtype = data.npy_header(stream, self.file, member.filename, INTEGERS)
            yield from read_blocks(stream, dtype, int(np.prod(shape)), self.file, multiple)

    @property
    def count(self) -> int:
        """Tokens that come out: a row shorter than the width is followed by one end-of-text."""
        if self.lengths is None:
            return int(np.prod(self.shape))
        return int(self.lengths.sum() + (self.lengths < self.shape[1]).sum())

    @property
    def note(self) -> dict[str, Any]:
        """What a finished shard is recognised by."""
        return {"source": self.identity, "source_bytes": self.size, **self.settings}

    def chunks(self, report: dict[str, Any]) -> Iterator[np.ndarray]:
        """The tokens without padding, in blocks; fills in documents, padding and largest_id. Raises DataError."""
        report.update(documents=0, padding=0, largest_id=0)
        with open(self.file, "rb") as file:
            if self.member is None:
                blocks = read_blocks(file, self.dtype, self.shape[0], self.file)
                yield from self._checked(blocks, report)
                return
            with open_member(file, self.member, self.file) as stream:
                data.npy_header(stream, self.file, self.member.filename)
                multiple = self.shape[1] if self.lengths is not None else 1
                blocks = read_blocks(stream, self.dtype, int(np.prod(self.shape)), self.file, multiple)
                yield from self._checked(blocks, report)

    def _checked(self, blocks: Iterator[np.ndarray], report: dict[str, Any]) -> Iterator[np.ndarray]:
        seen = 0
        for block in blocks:
            tokens = block if self.lengths is None else self._unpad(block, seen // self.shape[1], report)
            if len(tokens):
                low, high = int(tokens.min()), int(tokens.max())
                if low < 0 or high >= self.vocab_size:
                    self._refuse(block, seen)
                report["largest_id"] = max(report["largest_id"], high)
            if self.lengths is None:
                report["documents"] += int((tokens == self.end_of_text).sum())
            seen += len(block)
            yield tokens

    def _unpad(self, block: np.ndarray, row: int, report: dict[str, Any]) -> np.ndarray:
        width = self.shape[1]
        block = block.reshape(-1, width)
        lengths = self.lengths[row : row + len(block)]
        rows = np.empty((len(block), width + 1), block.dtype)
        rows[:, :width] = block
        rows[np.arange(len(block)), lengths] = self.end_of_text
        report["documents"] += len(block)
        report["padding"] += int(block.size - lengths.sum())
        return rows[np.arange(width + 1) < (lengths + (lengths < width))[:, None]]

    def _refuse(self, block: np.ndarray, seen: int) -> None:
        wrong = (block < 0) | (block >= self.vocab_size)
        if self.lengths is not None:  # padding may hold anything
            width = self.shape[1]
            row = seen // width
            wrong &= (np.arange(width) < self.lengths[row : row + len(block) // width, None]).ravel()
        i = int(np.flatnonzero(wrong)[0])
        place = f"token {seen + i}" if self.lengths is None else "row {}, column {}".format(*divmod(seen + i, width))
        raise DataError(f"{self.file} has id {block[i]} at {place}; vocab_size={self.vocab_size} allows 0 to vocab_size-1")


# ---- prepare


def prepare(
    source: Path,
    target: Path,
    vocab_size: int,
    end_of_text: int,
    workers: int = 0,
    max_ratio: float = MAX_RATIO,
    paths: list[str] | None = None,
) -> dict[str, int]:
    """Converts all shards below source (or only `paths`) to mapped ones of the same relative name below target.

    What is there already, from the same source and intact, is kept. One bad file does not stop the others; DataError at
    the end names them all. Returns the totals: files, kept, tokens, documents, padding, largest_id.
    """
    if paths is None:
        if not source.is_dir():
            raise DataError(f"{source} is no folder")
        paths = [p for p in data.find_shards(source, "*") if p.endswith((".npz", ".bin"))]
        if not paths:
            raise DataError(f"{source} and its subfolders have no .npz and no .bin file")
    if target.resolve() == source.resolve():
        raise DataError(f"{target} is the source; mapped shards need a folder of their own")
    clashes = {p for p in paths if p.endswith(".bin") and mapped_name(p) in paths}
    if clashes:
        raise DataError(f"{', '.join(sorted(clashes))} would overwrite an .npz of the same name")
    settings = {"vocab_size": vocab_size, "end_of_text": end_of_text}
    jobs = [(source / path, target, mapped_name(path), settings, max_ratio) for path in paths]
    with locked(target):
        for stale in target.rglob(".*.tmp"):
            stale.unlink(missing_ok=True)
        return run_jobs(convert, jobs, workers, "preparing")


def mapped_name(path: str) -> str:
    return path.removesuffix(".bin") + ".npz" if path.endswith(".bin") else path


def convert(source: Path, target: Path, path: str, settings: dict[str, Any], max_ratio: float) -> dict[str, Any]:
    """One file of prepare, in a process of its own. Returns its report."""
    origin = Source(source, settings, max_ratio)
    old = read_note(target / path)
    if old and origin.note.items() <= old.items() and is_intact(target, path):
        return {**old["report"], "kept": 1}
    free, needed = shutil.disk_usage(target).free, origin.count * np.dtype(origin.out_dtype).itemsize
    if needed > free:
        raise WriteError(f"{target / path} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free")
    report = {"tokens": origin.count}
    write_shard(target / path, origin.out_dtype, origin.count, origin.chunks(report), {**origin.note, "report": report})
    return report


def run_jobs(work: Callable[..., dict[str, Any]], jobs: list[tuple], workers: int, what: str) -> dict[str, int]:
    """work(*job) for every job in several processes, with a bar; sums the reports, or raises DataError with all errors."""
    totals = {"files": 0, "kept": 0, "tokens": 0, "documents": 0, "padding": 0, "largest_id": 0}
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks in whatever state they are
    begin, errors = time.perf_counter(), []
    with (
        ProcessPoolExecutor(workers, context, die_with_parent) as pool,
        tqdm(total=len(jobs), desc=what, unit="file", dynamic_ncols=True) as bar,
    ):
        for future in as_completed([pool.submit(work, *job) for job in jobs]):
            try:
                report = future.result()
            except DataError as error:
                errors.append(str(error))
                if isinstance(error, WriteError):
                    pool.shutdown(wait=False, cancel_futures=True)
                    break
            else:
                totals["files"] += 1
                for key, value in report.items():
                    totals[key] = max(totals[key], value) if key == "largest_id" else totals[key] + value
            bar.set_postfix_str(f"{totals['tokens'] / (time.perf_counter() - begin) / 1e6:.1f}M tok/s")
            bar.update()
    if errors:
        raise DataError("\n".join([f"{what}: {len(errors)} of {len(jobs)} files failed", *sorted(errors)]))
    return totals


def die_with_parent() -> None:
    """A pool's worker outlives a killed parent otherwise, and writes on beside its successor."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds an exclusive lock on the folder (made if absent), waiting for whoever has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise WriteError(f"cannot use the folder {folder}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise WriteError(f"cannot lock the folder {folder}: {error.strerror}") from error
            print(f"waiting for another process that prepares {folder}", file=sys.stderr, flush=True)
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


# ---- training on a set that is not mapped


def open_or_unpack(cfg: Config) -> Dataset:
    """Dataset.open; where the set is compressed or padded, it is unpacked first, once per node, into cfg.cache_dir.

    Every process of a node may call this: one works, the others wait. Raises DataError.
    """
    try:
        return Dataset.open(cfg)
    except PackedShard:
        pass
    source, settings = Path(cfg.data_dir), {"vocab_size": cfg.vocab_size, "end_of_text": END_OF_TEXT[cfg.tokenizer]}
    key = hashlib.sha256(json.dumps([str(source.resolve()), settings], sort_keys=True).encode()).hexdigest()[:12]
    cache = Path(cfg.cache_dir) / f"{source.resolve().name}-{key}"
    paths = data.chosen_shards(cfg)
    with locked(cache.with_name(f"{cache.name}.lock")):
        todo = [path for path in paths if not is_unpacked(source / path, cache / path, settings)]
        if todo:
            needed = sum(Source(source / p, settings).count for p in todo) * (2 if cfg.vocab_size <= 1 << 16 else 4)
            cache.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(cache).free
            if needed > free:
                raise WriteError(
                    f"unpacking {len(todo)} shards of {source} needs {needed / 1e9:.2f} GB, {cache} has {free / 1e9:.2f} GB "
                    "free; point cache_dir at a larger disk or lower max_files"
                )
            print(f"unpacking {len(todo)} shards ({needed / 1e9:.2f} GB) into {cache}, once", file=sys.stderr, flush=True)
            prepare(source, cache, **settings, paths=todo)
    return Dataset.open(cfg, cache)


def is_unpacked(source: Path, target: Path, settings: dict[str, Any]) -> bool:
    """Whether target was made from this very source; compares the zip directories, reads no tokens."""
    note = read_note(target)
    if not note or settings.items() > note.items():
        return False
    with open(source, "rb") as file:
        identity = {name: f"{member.CRC:08x}" for name, member in data.zip_members(file, source).items()}
    return note["source"] == identity


# ---- verify


def verify(folder: Path, vocab_size: int, fast: bool = False, workers: int = 0, max_ratio: float = MAX_RATIO) -> int:
    """Prints a table of all shards below the folder and what is wrong with them; returns 66 if anything is, else 0.

    Wrong is: a damaged file, an id outside the vocabulary, and content that another file has too. fast: headers only.
    """
    paths = [path for path in data.find_shards(folder, "*.npz")]
    settings = {"vocab_size": vocab_size, "end_of_text": 0}
    jobs = [(folder, path, settings, fast, max_ratio) for path in paths]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers or os.cpu_count() or 1, len(jobs)), context, die_with_parent) as pool:
        findings = list(
            tqdm(pool.map(examine, *zip(*jobs, strict=True)), total=len(jobs), desc="verifying", unit="file")
        )
    first: dict[Any, str] = {}
    for path, finding in zip(paths, findings, strict=True):
        if "content" in finding:
            twin = first.setdefault(tuple(finding["content"]), path)
            if twin != path:
                finding["wrong"] = f"same content as {twin}"
    longest = max(len(path) for path in paths)
    print(f"{'shard':<{longest}}  {'tokens':>14}  {'dtype':<6}  {'max id':>6}  state")
    for path, f in zip(paths, findings, strict=True):
        tokens = f"{f['tokens']:,}" if "tokens" in f else "-"
        state = f.get("wrong") or ("ok, headers only" if fast else "ok")
        print(f"{path:<{longest}}  {tokens:>14}  {f.get('dtype', '-'):<6}  {f.get('largest_id', '-'):>6}  {state}")
    wrong = [path for path, finding in zip(paths, findings, strict=True) if "wrong" in finding]
    total = sum(finding.get("tokens", 0) for finding in findings)
    print(f"{len(paths)} shards, {total:,} tokens, {len(wrong)} wrong{': ' if wrong else ''}{', '.join(wrong)}")
    return DataError.exit_code if wrong else 0


def examine(folder: Path, path: str, settings: dict[str, Any], fast: bool, max_ratio: float) -> dict[str, Any]:
    """One row of verify: tokens, dtype, content (what identifies it), largest_id, wrong."""
    row: dict[str, Any] = {}
    try:
        source = Source(folder / path, settings, max_ratio)
        row |= {"tokens": source.count, "dtype": source.dtype.name}
        row["content"] = (source.identity[source.member.filename.removesuffix(".npy")], *source.shape, row["dtype"])
        if source.lengths is None:
            Shard.open(folder, path)
        if not fast:
            for _ in source.chunks(row):
                pass
    except PackedShard:
        pass
    except DataError as error:
        row["wrong"] = str(error)
    return row


# ---- command line


def main(argv: list[str]) -> int:
    import argparse

    import text

    parser = argparse.ArgumentParser(prog="python data.py", description="Shards: making, preparing and checking them.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, meaning: str, *paths: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=meaning, description=meaning)
        for path in paths:
            sub.add_argument(path, type=Path)
        sub.add_argument("--tokenizer", choices=END_OF_TEXT, default=Config.tokenizer, help="sets the two below")
        sub.add_argument("--vocab_size", type=int, help="ids are below it")
        sub.add_argument("--end_of_text", type=int, help="the id between documents")
        sub.add_argument("--workers", type=int, default=0, help="processes or threads; 0 for one per core")
        return sub

    sub = commands.add_parser("demo", help="a small set of bytes from Python's own sources")
    sub.add_argument("DST", type=Path, nargs="?", default=Path(Config.data_dir))
    sub = command("prepare", "compressed or padded .npz and nanoGPT .bin files -> mapped shards", "SRC", "DST")
    sub.add_argument("--max_ratio", type=float, default=MAX_RATIO, help="refuse a shard that inflates by more")
    sub = command("tokenize", "text files -> mapped shards", "SRC", "DST")
    sub.add_argument("--fields", default="text", help="of a JSON line, joined; Reddit: body, or title,selftext")
    sub.add_argument("--shard_tokens", type=int, default=1 << 26, help="tokens per shard, about")
    sub = command("verify", "every byte against its checksum, every id against the vocabulary", "DIR")
    sub.add_argument("--max_ratio", type=float, default=MAX_RATIO, help="refuse a shard that inflates by more")
    sub.add_argument("--fast", action="store_true", help="headers only")
    sub = command("bench", "tokens/s of the loader beside np.load and a memory map", "DIR")
    sub.add_argument("--sequence_length", type=int, default=Config.sequence_length)
    args = parser.parse_args(argv)

    try:
        if args.command == "demo":
            text.demo(args.DST)
            return 0
        end_of_text = END_OF_TEXT[args.tokenizer] if args.end_of_text is None else args.end_of_text
        vocab_size = args.vocab_size or END_OF_TEXT[args.tokenizer] + 1
        if args.command == "verify":
            return verify(args.DIR, vocab_size, args.fast, args.workers, args.max_ratio)
        if args.command == "bench":
            text.bench(args.DIR, vocab_size, args.sequence_length, args.workers)
            return 0
        begin = time.perf_counter()
        if args.command == "prepare":
            totals = prepare(args.SRC, args.DST, vocab_size, end_of_text, args.workers, args.max_ratio)
        else:
            fields = args.fields.split(",")
            totals = text.tokenize(args.SRC, args.DST, args.tokenizer, fields, args.shard_tokens, args.workers)
        print(
            f"{totals['files']} files ({totals['kept']} were done already), {totals['tokens']:,} tokens, "
            f"{totals['padding']:,} padding dropped, {totals['documents']:,} documents, "
            f"largest id {totals['largest_id']}, {time.perf_counter() - begin:.1f} s"
        )
        return 0
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
