"""Checkpoints of random bytes, laid down as ckpt.py does, for tests that need no tensors; and a run that makes them.

python tests/saves.py OUTPUT_DIR PREFIX SAVES SIZE    saves SAVES times, each followed by a flush; exits 0 or 74
"""

import json
import os
import secrets
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from configs import Config
from refocused.checkpoint import atomic, manifest, selection
from refocused.files import create, digest


def save(
    output_dir: Path,
    step: int,
    size: int = 300_000,
    files: int = 3,
    generation: int | None = None,
    state: dict | None = None,
) -> Path:
    """A complete checkpoint of `files` data files, with `state` beside the usual; replaces one of the same name."""
    final, save_id = Path(output_dir, manifest.name(0, step, 1)), secrets.token_hex(8)
    building = atomic.unfinished(final, save_id)
    building.mkdir(parents=True)
    for i in range(files):
        create(building / f"shard-00000-{i:05d}.safetensors", os.urandom(size))
    listed = {path.name: digest(path) for path in building.iterdir()}
    more = {manifest.STATE: json.dumps({"step": step, "tokens": step * 512, "loss": 1.5, **(state or {})}).encode()}
    generation = manifest.generation(output_dir) + 1 if generation is None else generation
    atomic.commit(building, final, save_id, listed, more, generation)
    return final


def config(output_dir: Path, prefix: str = "run", **keys) -> Config:
    places = {"output_dir": str(output_dir), "logging_dir": f"{output_dir}-logs", "bucket_name": "bucket"}
    return Config(**{**places, "checkpoint_bucket_path": prefix, **keys})


if __name__ == "__main__":
    from refocused.bucket import sync

    folder, prefix, count, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    syncer = sync.Syncer(config(folder, prefix, bucket_total_limit=2, save_total_limit=2))
    last = max((manifest.step_of(name) for name in selection.names(folder)), default=0)
    for i in range(count):
        save(folder, last + 10 * (i + 1), size)
        syncer.flush(30)
    reached = syncer.close(30)
    print(syncer.status)
    sys.exit(0 if reached else 74)
