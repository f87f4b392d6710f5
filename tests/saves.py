"""Checkpoints of random bytes, laid down as ckpt.py does, for tests that need no tensors; and a run that makes them.

python tests/saves.py OUTPUT_DIR PREFIX SAVES SIZE    saves SAVES times, each followed by a flush; exits 0 or 74
"""

import json
import os
import secrets
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from configs import Config
from refocused.checkpoint import manifest, selection
from refocused.files import create, digest


def shard(size: int) -> bytes:
    """A safetensors file of exactly so many bytes, of one tensor of random ones."""
    note = {"__metadata__": {"DCP_SHARDING_INFO": json.dumps({"x": {"saved_offsets": [0]}})}}
    rest = size - 8 - 200
    header = json.dumps(note | {"x": {"dtype": "U8", "shape": [rest], "data_offsets": [0, rest]}}).ljust(200).encode()
    return len(header).to_bytes(8, "little") + header + os.urandom(rest)


def save(
    output_dir: Path,
    step: int,
    size: int = 300_000,
    files: int = 3,
    at: float | None = None,
    generation: int | None = None,
    state: dict | None = None,
) -> Path:
    """A complete checkpoint of `files` data files, with `state` beside the usual; replaces one of the same name."""
    final = Path(output_dir, manifest.name(0, step, 1))
    save_id = secrets.token_hex(8)
    building = final.with_name(f".tmp-{save_id}-{final.name}")
    building.mkdir(parents=True)
    for i in range(files):
        create(building / f"shard-00000-{i:05d}.safetensors", shard(size))
    create(
        building / manifest.STATE,
        json.dumps({"step": step, "tokens": step * 512, "loss": 1.5, **(state or {})}).encode(),
    )
    entries = {path.name: digest(path) for path in building.iterdir()}
    content = {
        "format": manifest.FORMAT, "name": final.name, "save_id": save_id, "step": step,
        "generation": manifest.generation(output_dir) + 1 if generation is None else generation,
        "time": int(time.time() if at is None else at), "files": entries,
    }  # fmt: skip
    create(building / manifest.MANIFEST, manifest.encode_manifest(content))
    if final.exists():
        shutil.rmtree(final)
    os.rename(building, final)
    return final


def config(output_dir: Path, prefix: str = "run", **keys) -> Config:
    places = {"output_dir": str(output_dir), "logging_dir": f"{output_dir}-logs", "bucket_name": "bucket"}
    return Config(**{**places, "checkpoint_bucket_path": prefix, **keys})


if __name__ == "__main__":
    from refocused.bucket import sync

    folder, prefix, count, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    syncer = sync.Syncer(config(folder, prefix, bucket_total_limit=2, save_total_limit=2))
    last = max((manifest.parse(name).step for name in selection.names(folder)), default=0)
    for i in range(count):
        save(folder, last + 10 * (i + 1), size)
        syncer.flush(30)
    reached = syncer.close(30)
    print(syncer.status)
    sys.exit(0 if reached else 74)
