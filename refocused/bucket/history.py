"""A run's trace and curves in its bucket: up behind each checkpoint, and down where a machine has none of them.

    gs://BUCKET/PREFIX/logs/trace.jsonl, logs/events.out.tfevents.*    of rank 0's logging_dir

These files only grow. An object is replaced only by a file that begins with its bytes, a file here never: what another
run or a person has put in either place stays. Training does not wait for them.
"""

import re
from pathlib import Path

from configs import Config
from refocused.bucket import gcs
from refocused.bucket.remote import Place

LOGS, TRACE = "logs", "trace.jsonl"
PATIENCE = 15.0  # seconds
NAMES = re.compile(rf"{re.escape(TRACE)}|events\.out\.tfevents\.\d{{10}}\.[^/]+(?<!\.part)")


def sizes(folder: Path) -> dict[str, int]:
    """{name: bytes} of what is in a logging_dir; a start has made an empty trace there, which is nothing yet."""
    found = {path.name: path.lstat().st_size for path in folder.glob("*") if NAMES.fullmatch(path.name)}
    return {name: size for name, size in sorted(found.items()) if size}


def send(cfg: Config) -> None:
    """What has grown since. Raises BucketError, OSError."""
    place, folder = Place.of(cfg, PATIENCE), Path(cfg.logging_dir)
    there, differ = place.objects(LOGS), []
    for name, size in sizes(folder).items():
        obj = there.get(f"{LOGS}/{name}")
        if obj and obj.size == size:
            continue
        content = (folder / name).read_bytes()
        if name == TRACE:
            content = content[: content.rfind(b"\n") + 1]  # not the line that is being written
        if obj and gcs.checksum(content[: obj.size]) != obj.crc32c:
            differ.append(name)
        elif content:
            place.bucket.create(place.name(LOGS, name), content, obj.generation if obj else 0)
    if differ:
        raise gcs.Conflict(f"{place}/{LOGS}/{differ[0]} is not how {folder / differ[0]} began; it was left as it is")


def fetch(cfg: Config) -> str:
    """Bring them into a logging_dir that has none, or only some of the same; a line to print, or ""."""
    try:
        place, folder = Place.of(cfg, PATIENCE), Path(cfg.logging_dir)
        listed = {path.rpartition("/")[2]: obj for path, obj in place.objects(LOGS).items()}
        there = {name: obj for name, obj in listed.items() if NAMES.fullmatch(name)}
        here = sizes(folder)
        if any(name not in there or there[name].size != size for name, size in here.items()):
            return ""
        missing = [name for name in there if name not in here]
        for name in missing:
            place.bucket.download(there[name], gcs.local_path(folder, name))
    except (gcs.BucketError, OSError) as error:
        return f"logs      of earlier starts stay in the bucket: {error}"
    return f"logs      {len(missing)} files of earlier starts came from {place}/{LOGS}" if missing else ""
