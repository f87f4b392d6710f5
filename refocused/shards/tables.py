"""The rows of Parquet and Arrow files as records, in batches of bounded memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import compute, parquet, types

from refocused.shards.readers import BadRecord
from refocused.shards.shard import DataError

USUAL = ("content", "raw_content", "body", "document")  # what a text's column is called, where it is not text
ROWS, BYTES = 1024, 8 << 20  # in a batch at most; bytes by a row group's average
TEXT = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)


def rows(path: Path, fields: list[str], begin: int) -> Iterator[dict[str, Any]]:
    """{field: its value} for each row from `begin` on; a dot leads into a nested field. Raises DataError, BadRecord."""
    where, at = "", 0
    try:
        wanted, groups = opened(path, fields)
        for group, (count, batches) in enumerate(groups):
            where = f", row group {group}"
            if at + count <= begin:
                at += count
                continue
            for part in (batch.slice(i, ROWS) for batch in batches for i in range(0, batch.num_rows, ROWS)):
                found = [column(part, name) for name in wanted.values()]
                for array in found:
                    array.validate(full=True)  # of a damaged file offsets may lead anywhere in memory
                values = [array.to_pylist() for array in found]
                for row in zip(*values, strict=True):
                    at += 1
                    if at > begin:
                        yield dict(zip(wanted, row, strict=True))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}{where}: {str(error).partition(chr(10))[0]}") from error


def opened(path: Path, fields: list[str]) -> tuple[dict[str, str], Iterator[tuple[int, Any]]]:
    """{field: the column that it is}, and (number of rows, its record batches) of each row group."""
    if path.suffix.lower() == ".parquet":
        # without a buffer, a whole row group is read
        file = parquet.ParquetFile(path, buffer_size=1 << 20, page_checksum_verification=True)
        wanted = columns(file.schema_arrow, fields)

        def read(i: int) -> tuple[int, Any]:
            group = file.metadata.row_group(i)
            size = max(1, min(ROWS, BYTES * group.num_rows // max(1, group.total_byte_size)))
            return group.num_rows, file.iter_batches(size, [i], [*wanted.values()])

        return wanted, map(read, range(file.num_row_groups))
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = map(reader.get_batch, range(reader.num_record_batches))
    except pa.ArrowInvalid:  # a stream, without a footer, as `datasets` writes them
        batches = reader = pa.ipc.open_stream(pa.memory_map(str(path)))
    return columns(reader.schema, fields), ((batch.num_rows, [batch]) for batch in batches)


def columns(schema: pa.Schema, fields: list[str]) -> dict[str, str]:
    """{field: the column that it is}, of those that the file has. Raises BadRecord where there is none, or one is no text."""
    found = {}
    for field, name in [(name, name) for name in fields] + [("text", name) for name in USUAL if fields == ["text"]]:
        if field in found:
            continue
        try:
            kind = column(schema.empty_table(), name).type
        except (KeyError, pa.ArrowException):
            continue
        found[field] = name
        if not any(is_text(kind.value_type if types.is_dictionary(kind) else kind) for is_text in TEXT):
            raise BadRecord(f"its column {name} is {kind}, no text")
    if not found:
        raise BadRecord(f"no column {', '.join(fields)} (--fields) but {', '.join(schema.names)}")
    return found


def column(table: Any, name: str) -> Any:
    """A column of a table or batch, or a field in one. Raises KeyError or ArrowException where there is none."""
    if name in table.schema.names:
        return table.column(name)
    top, *rest = name.split(".")
    return compute.struct_field(table.column(top), rest)
