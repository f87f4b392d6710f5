"""How a shard is written: whole whenever it can be found."""

import io
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

from refocused import files
from refocused.shards.shard import WriteError, zip_note

ALIGNMENT = 64  # of the first token in a file that is written here


def write_shard(path: Path, dtype: np.dtype, count: int, chunks: Iterable[np.ndarray], note: dict[str, Any]) -> None:
    """Writes `count` tokens, given in chunks, as a stored and aligned `input_ids`; the same bytes for the same tokens.

    The note becomes the zip's comment (JSON); it is read after the last chunk, so the chunks' producer may fill it in.
    Atomic: whoever finds the name finds the whole file, also after a crash. Raises WriteError, leaving nothing behind.
    """
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

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, write)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {files.why(error)}; nothing is left of it") from error


def read_note(path: Path) -> dict[str, Any]:
    """The note of a shard that write_shard made, {} for any other file and for none."""
    try:
        if not path.is_file():  # a FIFO would wait for a writer
            return {}
        with open(path, "rb") as file:
            return zip_note(file)
    except OSError:
        return {}
