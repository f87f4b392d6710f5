"""How fast a set is read: the loader by itself."""

import argparse
import time

import data
from configs import Config
from refocused import arguments
from refocused.shards.find import find_files, local_path
from refocused.shards.prepare import absent
from refocused.shards.shard import DataError, Shard


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="data.py bench", description="tokens/s of the loader, its page cache warm.")
    parser.add_argument("DIR", type=local_path)
    parser.add_argument("--sequence_length", type=arguments.positive, default=Config.sequence_length)
    parser.add_argument("--workers", type=arguments.positive, default=Config.dataloader_num_workers)
    parser.add_argument("--seconds", type=arguments.positive_number, default=3.0)
    args = parser.parse_args(argv)
    paths = find_files(args.DIR, "*.npz")
    if not paths:
        raise DataError(absent(args.DIR, ".npz file", find_files(args.DIR)))
    data.allow_open_files(len(paths))
    shards = [Shard.open(args.DIR, path) for path in paths]
    dataset = data.Dataset(shards, args.sequence_length, 1 << 32, seed=0, eval_files=0)
    loader = data.Loader(dataset, 0, 1 << 40, 32, micro_batch=8, accumulation=4, workers=args.workers)
    for _ in range(64):  # so that what is read ahead is not counted
        next(loader)
    begin, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - begin) < args.seconds:
        count += len(next(loader).ids) * args.sequence_length
    loader.close()
    print(f"{count / seconds / 1e6:.1f}M tok/s by {args.workers} workers from {len(shards)} shards")
    return 0
