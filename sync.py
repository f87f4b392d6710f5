"""Checkpoints between a folder and a bucket: published behind training, pulled before it, pruned in both.

    gs://BUCKET/PREFIX/<checkpoint>/<save id>/<file>    data; no two saves share an object
    gs://BUCKET/PREFIX/<checkpoint>/MANIFEST.json       the local manifest, byte for byte; names the save id and files
    gs://BUCKET/PREFIX/OWNER.json                       the run that may write here, the last one that started

Data goes up first, then a LIST is compared with the manifest, then the manifest is created: it is the commit. Nothing
here is remembered between runs; what is where is read from the folder and the bucket each time.

    python ckpt.py list|verify|pull|push|prune ... gs://BUCKET/PREFIX ...
"""

import argparse
import json
import os
import re
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import gcs
import manifest as local
from configs import Config, ConfigError
from download import Bar, check_space, exclusive, in_parallel, part_size
from manifest import MANIFEST, STATE, CheckpointError

OWNER = "OWNER.json"
STREAMS = 4  # files at once; two to four streams of 16 MiB chunks do not disturb a training loop
ORPHAN_SECONDS = 86400  # unfinished uploads older than this are nobody's
SCAN_SECONDS = 1.0  # a scan that finds nothing new reads one folder
LONGEST_PAUSE = 60.0  # seconds between tries while the bucket fails


class Superseded(gcs.BucketError):
    """Another run has taken the prefix over."""


class Remote(NamedTuple):
    """A checkpoint in the bucket: its manifest is there."""

    name: str
    manifest: dict[str, Any]  # {} where it cannot be used
    content: bytes
    generation: int  # of the manifest
    problem: str  # why it is not complete; "" if it is

    @property
    def step(self) -> int:
        return local.parse(self.name).step


class Place:
    """Checkpoints below one prefix of a bucket."""

    def __init__(self, bucket: gcs.Bucket, prefix: str):
        self.bucket, self.prefix = bucket, prefix.strip("/")
        self.seen: dict[int, bytes] = {}  # manifests by their generation, which never change

    def __str__(self) -> str:
        return self.bucket.url(self.prefix).rstrip("/")

    def name(self, *parts: str) -> str:
        return "/".join(part for part in (self.prefix, *parts) if part)

    def objects(self, *parts: str) -> dict[str, gcs.Object]:
        """{name below the prefix: object}, by one LIST."""
        base = f"{self.prefix}/" if self.prefix else ""
        below = "".join(f"{part}/" for part in parts)
        return {obj.name.removeprefix(base): obj for obj in self.bucket.list(base + below)}

    def checkpoints(self, objects: dict[str, gcs.Object]) -> list[Remote]:
        """Every checkpoint whose manifest is listed, the highest step first, complete or with the problem."""
        found = []
        for path, obj in objects.items():
            name, _, file = path.partition("/")
            if file == MANIFEST and local.parse(name):
                found.append(self._remote(name, obj, objects))
        return sorted(found, key=lambda remote: (remote.step, remote.name), reverse=True)

    def _remote(self, name: str, obj: gcs.Object, objects: dict[str, gcs.Object]) -> Remote:
        if obj.generation not in self.seen:
            content, generation = self.bucket.read(obj.name) or (b"", 0)
            self.seen[generation] = content
        content = self.seen.get(obj.generation, b"")
        try:
            manifest = decode(content, name, f"{self}/{name}/{MANIFEST}")
        except CheckpointError as error:
            return Remote(name, {}, content, obj.generation, str(error))
        problem = difference(manifest, objects)
        return Remote(name, manifest, content, obj.generation, f"{self}/{name}: {problem}" if problem else "")


def decode(content: bytes, name: str, where: str) -> dict[str, Any]:
    """A manifest from a bucket, checked down to its file names; those become local paths."""
    try:
        manifest = json.loads(content)["manifest"]
        newer = manifest["format"] > local.FORMAT
        good = newer or (
            local.encode_manifest(manifest) == content
            and manifest["name"] == name
            and re.fullmatch(r"[0-9a-f]{8,64}", manifest["save_id"])
            and all("/" not in gcs.safe_name(file) and file != MANIFEST for file in manifest["files"])
            and all(entry["size"] >= 0 and entry["crc32c"] for entry in manifest["files"].values())
        )
    except gcs.BucketError as error:
        raise CheckpointError(f"{where} cannot be used: {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        good = newer = False
    if newer:
        raise CheckpointError(f"{where} has format {manifest['format']}, newer than {local.FORMAT}; update this code")
    if not good:
        raise CheckpointError(f"{where} is damaged or no manifest of {name}")
    return manifest


def difference(manifest: dict[str, Any], objects: dict[str, gcs.Object]) -> str:
    """What keeps the listed objects from being the manifest's files; "" if nothing does."""
    for file, entry in sorted(manifest["files"].items()):
        obj = objects.get(f"{manifest['name']}/{manifest['save_id']}/{file}")
        if obj is None:
            return f"{file} is missing"
        if not same(obj, entry):
            return f"{file} has {obj.size:,} bytes or a checksum other than the manifest's {entry['size']:,} bytes"
    return ""


def same(obj: gcs.Object | None, entry: dict[str, Any]) -> bool:
    return obj is not None and (obj.size, obj.crc32c) == (entry["size"], entry["crc32c"])


def retained(steps: Iterable[int], newest: int, limit: int, keep_every: int) -> set[int]:
    """The steps to keep: `newest`, the limit - 1 before it, multiples of keep_every (which do not count), later ones."""
    steps = sorted(set(steps), reverse=True)
    for_ever = {step for step in steps if step > newest or (keep_every and step % keep_every == 0)}
    counted = [step for step in steps if step not in for_ever or step == newest]
    return for_ever | set(counted[:limit] if limit else counted)


def delete(place: Place, remote: Remote, objects: dict[str, gcs.Object]) -> None:
    """Remove a checkpoint from the bucket: manifest first, so that no half of it is ever taken for one."""
    place.bucket.delete(place.name(remote.name, MANIFEST), remote.generation)
    if remote.manifest:
        delete_data(place, f"{remote.name}/{remote.manifest['save_id']}/", objects)


def delete_data(place: Place, below: str, objects: dict[str, gcs.Object]) -> None:
    for path, obj in objects.items():
        if path.startswith(below):
            place.bucket.delete(obj.name, obj.generation)


# ---- up


def publish(
    place: Place, folder: Path, throttle: gcs.Throttle | None = None, commit: bool = True, replace: bool = False
) -> bool:
    """Make the checkpoint in folder exist in the bucket; False while files of other nodes are still to come.

    Only what is not there yet is sent. Each node sends the files that it has; the one with commit=True writes the
    manifest once a LIST shows all of them with the manifest's sizes and checksums. Another complete save of the same
    name is a Conflict, or with replace=True gives way in the moment in which the manifest is replaced.
    """
    content = (folder / MANIFEST).read_bytes()
    manifest = decode(content, folder.name, str(folder / MANIFEST))
    files, data = manifest["files"], f"{folder.name}/{manifest['save_id']}"
    objects = place.objects(folder.name)
    old = next(iter(place.checkpoints(objects)), None)
    if old and old.content == content and not old.problem:
        return True
    if old and not old.problem and not replace:
        raise gcs.Conflict(f"{place}/{folder.name} is there already, from another save; it was left as it is")

    def send(file: str) -> None:
        entry = files[file]
        place.bucket.upload(place.name(data, file), folder / file, entry["size"], entry["crc32c"], throttle)

    todo = [file for file in files if not same(objects.get(f"{data}/{file}"), files[file]) and (folder / file).exists()]
    in_parallel(send, sorted(todo, key=lambda file: -files[file]["size"]), STREAMS)
    objects = place.objects(folder.name)
    if difference(manifest, objects):
        return False
    if not commit:
        return any(remote.content == content for remote in place.checkpoints(objects))
    if not old or old.content != content:
        place.bucket.create(place.name(folder.name, MANIFEST), content, old.generation if old else 0)
    if old and old.manifest and old.manifest["save_id"] != manifest["save_id"]:
        delete_data(place, f"{folder.name}/{old.manifest['save_id']}/", objects)
    return True


class Syncer:
    """A thread that publishes each complete checkpoint of output_dir, the newest first, and prunes in both places.

    It only looks at what is there, so it can be killed at any moment. It never raises into training: `status` says
    for the log line what is waiting and what failed last. One per node (its local rank 0); only the leader (rank 0)
    writes manifests and deletes. After each upload the leader prunes output_dir by save_total_limit, so a checkpoint
    leaves the disk only once a newer one is verified in the bucket: give ckpt.Saver save_total_limit=0.
    """

    def __init__(self, cfg: Config, resumed_from: str | None = None, leader: bool = True):
        self.cfg, self.leader = cfg, leader
        self.where = f"gs://{cfg.bucket_name}/{cfg.checkpoint_bucket_path.strip('/')}"
        self.output_dir = Path(cfg.output_dir)
        self.resumed_from = local.parse(resumed_from).step if resumed_from and local.parse(resumed_from) else None
        self.throttle = gcs.Throttle(cfg.upload_megabytes_per_second * 1e6)
        self.started, self.token = int(time.time()), secrets.token_hex(8)
        self.backlog = 0  # complete checkpoints that are still to be published
        self.failure: str | None = None  # why the last try failed; None once one succeeded
        self._place: Place | None = None
        self._settled: set[str] = set()  # save ids that are in the bucket, or are not to be sent
        self._changed = threading.Condition()
        self._asked = self._answered = 0  # flush() asks for a scan that starts after it was called
        self._refused = 0  # the last such scan that was refused, which waiting does not change
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="bucket", daemon=True)
        self._thread.start()

    @property
    def status(self) -> str:
        """For the log line; empty when there is nothing to say."""
        waiting = f"{self.backlog} waiting for the bucket" if self.backlog else ""
        return ", ".join(part for part in (waiting, self.failure) if part)

    def flush(self, seconds: float) -> bool:
        """Wait until every checkpoint that is complete now is in the bucket; False if it is not after so long.

        Returns early when the bucket refuses (no permission, another run took over), with the reason in `failure`.
        """
        end = time.monotonic() + seconds
        with self._changed:
            self._asked += 1
            mine = self._asked
            self._changed.notify_all()
            while max(self._answered, self._refused) < mine and time.monotonic() < end:
                self._changed.wait(end - time.monotonic())
            if self._answered < mine and not self.failure:
                self.failure = f"the upload to {self.where} was not finished after {seconds:g} s"
            return self._answered >= mine

    def close(self, seconds: float) -> bool:
        """flush(), then stop. False: the newest checkpoint is not in the bucket, `failure` says why; exit with 74."""
        done = self.flush(seconds)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        return done  # a thread that hangs on the network is a daemon: it does not hold the exit

    def _run(self) -> None:
        failures = 0
        while not self._closed:
            serving, more = self._asked, False
            try:
                more = self._scan()
                failures, self.failure = 0, None
            except Exception as error:  # whatever it is, training goes on and the log line says it
                failures += 1
                self.failure = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
                if isinstance(error, gcs.Refused | Superseded):
                    self._refused = serving
            with self._changed:
                if not failures and not more:
                    self._answered = serving
                self._changed.notify_all()
                pause = SCAN_SECONDS if self._asked > self._answered else min(SCAN_SECONDS * 2**failures, LONGEST_PAUSE)
                if not more and not self._closed and self._asked == serving:
                    self._changed.wait(pause)

    def _scan(self) -> bool:
        """Publish at most one checkpoint; True if there may be another to publish at once. Raises what went wrong."""
        if self._place is None:
            place = Place(gcs.Bucket(self.cfg.bucket_name, patience=LONGEST_PAUSE), self.cfg.checkpoint_bucket_path)
            if self.leader:
                self._take_over(place)
            self._place = place
        here = self._complete()
        waiting = [m for m in here if m["save_id"] not in self._settled]
        self.backlog = len(waiting)
        if not waiting:
            return False
        there = {r.name: r.manifest for r in self._place.checkpoints(self._place.objects()) if not r.problem}
        newest = max(here, key=lambda m: (m["time"], m["step"]))  # what was saved last, whatever its step
        keep = self._retained([m["step"] for m in [*here, *there.values()]], newest["step"])
        todo = []
        for manifest in waiting:
            other = there.get(manifest["name"], {"save_id": None, "time": 0})
            # A save of this run beats one of the same name by another; one left on this disk does only if it is newer.
            outdated = manifest["time"] < min(other["time"], self.started)
            if other["save_id"] == manifest["save_id"] or outdated or manifest["step"] not in keep:
                self._settled.add(manifest["save_id"])
            else:
                todo.append(manifest)
        self.backlog = len(todo)
        if not todo:
            return False
        manifest = max(todo, key=lambda m: (m is newest, m["step"]))
        self._check_owner()
        try:
            done = publish(self._place, self.output_dir / manifest["name"], self.throttle, self.leader, replace=True)
        except FileNotFoundError:
            return True  # it was deleted here, so it no longer waits
        if not done:
            raise gcs.BucketError(f"{self.where}/{manifest['name']} waits for files that are not on this machine")
        self._settled.add(manifest["save_id"])
        self.backlog -= 1
        if manifest is newest and self.leader:
            self._prune(manifest["name"])
        return True

    def _complete(self) -> list[dict[str, Any]]:
        """Manifests of what is complete here; on one of several nodes, of what this node has its part of."""
        found = []
        for name in local.names(self.output_dir):
            try:
                found.append(local.read_manifest(self.output_dir / name))
            except CheckpointError:
                continue  # damaged, or deleted since; it is resume that names them
        return found

    def _retained(self, steps: Iterable[int], newest: int) -> set[int]:
        return retained(steps, newest, self.cfg.bucket_total_limit, self.cfg.keep_every) | {self.resumed_from}

    def _prune(self, newest: str) -> None:
        """Delete what is older than `newest`, which is verified in the bucket, and not retained; there, then here."""
        objects = self._place.objects()
        # One that is damaged neither counts nor goes: resume names it, and `ckpt.py prune` removes it.
        good = [r for r in self._place.checkpoints(objects) if not r.problem]
        keep = self._retained([r.step for r in good], local.parse(newest).step)
        for remote in good:
            if remote.step not in keep:
                self._check_owner()
                delete(self._place, remote, objects)
        local.prune(self.output_dir, newest, self.cfg.save_total_limit, self.cfg.keep_every)

    def _take_over(self, place: Place) -> None:
        """Become the one run that writes below the prefix; also the first proof that the bucket can be written."""
        note = {"token": self.token, "host": socket.gethostname(), "pid": os.getpid(), "time": self.started}
        there = place.bucket.read(place.name(OWNER))
        place.bucket.create(place.name(OWNER), json.dumps(note).encode(), there[1] if there else 0)

    def _check_owner(self) -> None:
        if not self.leader:
            return
        content, _ = self._place.bucket.read(self._place.name(OWNER)) or (b"{}", 0)
        try:
            owner = dict(json.loads(content))
        except (ValueError, TypeError):
            owner = {}
        if owner.get("token") != self.token:
            raise Superseded(
                f"another run (host {owner.get('host')}, pid {owner.get('pid')}) took {self.where} over, so this one "
                "uploads no more; give each run its own checkpoint_bucket_path"
            )


# ---- down


class Found(NamedTuple):
    """A checkpoint that is to come down before training starts."""

    name: str
    save_id: str


def find(cfg: Config) -> Found | None:
    """What cfg.resume needs from the bucket; None if what is on disk is as good, or there is nothing anywhere.

    To be called on rank 0, before ckpt.choose. Raises ConfigError if resume is unset although the bucket has
    checkpoints, CheckpointError if the one named is nowhere, and BucketError if the bucket cannot be read.
    """
    place = Place(gcs.Bucket(cfg.bucket_name), cfg.checkpoint_bucket_path)
    there = {remote.name: remote for remote in place.checkpoints(place.objects())}
    here = local.names(cfg.output_dir)
    both = sorted({*here, *there}, key=lambda name: (local.parse(name).step, name), reverse=True)
    if cfg.resume is None:
        if there and not here:
            raise ConfigError(
                f"{place} already has {len(there)} checkpoint{'s' * (len(there) > 1)}, the last one {both[0]}; "
                "continue with resume=latest or choose another checkpoint_bucket_path"
            )
        return None
    if cfg.resume != "latest":
        if os.sep in cfg.resume:
            return None
        if cfg.resume not in both:
            raise CheckpointError(
                f"resume={cfg.resume} is neither in {cfg.output_dir} nor in {place}; there are "
                f"{', '.join(both) or 'no checkpoints'}"
            )
        both = [cfg.resume]
    problems = []
    for name in both:
        mine, remote = None, there.get(name)
        if name in here:
            try:
                mine = local.verify(Path(cfg.output_dir, name))
            except CheckpointError as error:
                problems.append(str(error))
        if remote and remote.problem:
            problems.append(remote.problem)
        elif remote and (mine is None or mine["time"] < remote.manifest["time"]):
            if problems:
                print("passed over:", *problems, sep="\n  ", file=sys.stderr)
            return Found(name, remote.manifest["save_id"])
        if mine:
            return None  # ckpt.choose names what it passes over
    if problems:
        raise CheckpointError("\n  ".join([f"resume={cfg.resume}: no checkpoint can be loaded:", *problems]))
    return None


def pull(cfg: Config, found: Found) -> Path:
    """Bring that checkpoint into output_dir; to be called on one process of each node. Returns its folder."""
    place = Place(gcs.Bucket(cfg.bucket_name), cfg.checkpoint_bucket_path)
    return fetch(place, found.name, Path(cfg.output_dir), found.save_id)


def fetch(place: Place, name: str, folder: Path, save_id: str | None = None) -> Path:
    """A checkpoint from the bucket to folder/name, complete and verified or not at all. Raises CheckpointError.

    What an interrupted call fetched is used. One of that name that is damaged or another save is replaced at the end.
    """
    objects = place.objects()
    there = {remote.name: remote for remote in place.checkpoints(objects)}
    if name not in there:
        raise CheckpointError(f"{place} has no {name}; it has {', '.join(there) or 'no checkpoints'}")
    if there[name].problem:
        raise CheckpointError(there[name].problem)
    manifest, final = there[name].manifest, folder / name
    if save_id not in (None, manifest["save_id"]):
        raise CheckpointError(f"{place}/{name} was replaced by another save in the meantime; start again")
    with exclusive(folder):
        try:
            if local.verify(final)["save_id"] == manifest["save_id"]:
                return final
        except CheckpointError:
            pass  # not here, or damaged
        coming = folder / f".pull-{manifest['save_id']}-{name}"
        for stale in folder.glob(".pull-*"):
            if stale != coming:
                shutil.rmtree(stale)
        coming.mkdir(exist_ok=True)
        todo = {f: objects[f"{name}/{manifest['save_id']}/{f}"] for f in manifest["files"] if not (coming / f).exists()}
        check_space(folder, sum(obj.size - part_size(coming / f, obj) for f, obj in todo.items()))
        with Bar(sum(obj.size for obj in todo.values()), len(todo)) as bar:

            def bring(file: str) -> None:
                place.bucket.download(todo[file], coming / file, bar.add)
                bar.count()

            in_parallel(bring, sorted(todo, key=lambda f: -todo[f].size), 2 * STREAMS)
        (coming / MANIFEST).unlink(missing_ok=True)
        local.write_file(coming / MANIFEST, there[name].content)
        local.fsync_dir(coming)
        aside = folder / f".old-{manifest['save_id']}-{name}"  # manifest.recover puts it back if we die in between
        if final.exists():
            os.rename(final, aside)
        os.rename(coming, final)
        local.fsync_dir(folder)
        if aside.exists():
            shutil.rmtree(aside)
    return final


# ---- command line, reached through ckpt.py


def main(argv: list[str]) -> int:
    """ckpt.py's commands where a bucket is involved; returns the exit code. Raises BucketError and CheckpointError."""
    parser = argparse.ArgumentParser(prog="ckpt.py", description="Checkpoints in a bucket.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (("list", "what is where"), ("verify", "the same, and compare every local byte")):
        add = commands.add_parser(command, help=text)
        add.add_argument("places", nargs="+", metavar="DIR_OR_URL")
    add = commands.add_parser("pull", help="bring a checkpoint from the bucket")
    add.add_argument("url", metavar="gs://BUCKET/PREFIX[/CHECKPOINT]", help="the highest step if none is named")
    add.add_argument("folder", metavar="DIR", type=Path)
    add = commands.add_parser("push", help="publish a checkpoint")
    add.add_argument("folder", metavar="CHECKPOINT_DIR", type=Path)
    add.add_argument("url", metavar="gs://BUCKET/PREFIX")
    add = commands.add_parser("prune", help="delete old checkpoints, damaged ones, and uploads broken off a day ago")
    add.add_argument("url", metavar="gs://BUCKET/PREFIX")
    add.add_argument("--keep", type=int, default=0, help="newest complete ones to keep; 0, the default, for all")
    add.add_argument("--keep-every", type=int, default=0, help="multiples of so many steps are kept for ever")
    args = parser.parse_args(argv)
    if args.command in ("list", "verify"):
        return show(args.places, hashes=args.command == "verify")
    place, name = open_place(args.url)
    if args.command == "pull":
        good = [remote.name for remote in place.checkpoints(place.objects()) if not remote.problem]
        if not name and not good:
            raise CheckpointError(f"{place} has no complete checkpoint")
        print(fetch(place, name or good[0], args.folder))
    elif args.command == "push":
        folder = Path(os.path.abspath(args.folder))
        local.verify(folder)
        if not publish(place, folder):
            raise gcs.BucketError(f"{place}/{folder.name}: the bucket does not show what was sent; try again")
        print(f"{place}/{folder.name}")
    else:
        for line in prune(place, args.keep, args.keep_every):
            print(line)
    return 0


def open_place(url: str) -> tuple[Place, str]:
    """(the place, the checkpoint's name or "") of gs://BUCKET/PREFIX[/CHECKPOINT]."""
    bucket, prefix = gcs.split(url)
    parent, _, last = prefix.rpartition("/")
    name = last if local.parse(last) else ""
    return Place(gcs.Bucket(bucket), parent if name else prefix), name


def prune(place: Place, keep: int, keep_every: int) -> list[str]:
    """Delete complete checkpoints that are not retained, damaged ones, and old orphans; returns what was done."""
    objects = place.objects()
    remotes = place.checkpoints(objects)
    good = [remote for remote in remotes if not remote.problem]
    kept = retained([r.step for r in good], good[0].step, keep, keep_every) if good else set()
    done = []
    for remote in remotes:
        if remote.problem and good and remote.step < good[0].step or not remote.problem and remote.step not in kept:
            delete(place, remote, objects)
            done.append(f"deleted {place}/{remote.name}")
    # Data that no manifest speaks for: of an upload that was cut off, or left by a delete that was.
    spoken_for = {(remote.name, remote.manifest.get("save_id")) for remote in remotes}
    unreadable = {remote.name for remote in remotes if not remote.manifest}
    for path, obj in objects.items():
        name, _, rest = path.partition("/")
        orphan = rest.count("/") == 1 and local.parse(name) and (name, rest.partition("/")[0]) not in spoken_for
        if orphan and name not in unreadable and time.time() - obj.updated > ORPHAN_SECONDS:
            place.bucket.delete(obj.name, obj.generation)
            done.append(f"deleted {place}/{path}, part of an upload that was never finished")
    return done


def show(places: list[str], hashes: bool) -> int:
    """Print a table of the checkpoints in folders and buckets; the exit code says whether one is damaged."""
    rows, damaged = [("name", "step", "tokens", "loss", "size", "age", "where", "")], 0
    for where in places:
        if where.startswith("gs://"):
            found = list(_remote_rows(where))
        else:
            found = list(_local_rows(Path(where), hashes))
        for name, manifest, state, problem in found:
            step = f"{local.parse(name).step:,}" if local.parse(name) else "-"
            size = sum(entry["size"] for entry in manifest["files"].values()) if manifest else None
            rows.append(
                (
                    name,
                    step,
                    f"{state['tokens']:,}" if "tokens" in state else "-",
                    f"{state['loss']:.4f}" if isinstance(state.get("loss"), float) else "-",
                    f"{size / 1e6:,.1f} MB" if size is not None else "-",
                    _age(time.time() - manifest["time"]) if manifest else "-",
                    where,
                    problem or "complete",
                )
            )
            damaged += bool(problem)
    widths = [max(len(row[i]) for row in rows) for i in range(8)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 6)), row[6].ljust(widths[6])]
        print("  ".join([*cells, row[7]]).rstrip())
    if len(rows) == 1:
        print(f"no checkpoints in {' or '.join(places)}")
    return CheckpointError.exit_code if damaged else 0


Row = tuple[str, dict[str, Any], dict[str, Any], str]  # name, manifest, state, problem


def _remote_rows(url: str) -> Iterable[Row]:
    place, only = open_place(url)
    for remote in place.checkpoints(place.objects()):
        if only in ("", remote.name):
            state = {}
            if not remote.problem:
                found = place.bucket.read(place.name(remote.name, remote.manifest["save_id"], STATE))
                state = json.loads(found[0]) if found else {}
            yield remote.name, remote.manifest, state, remote.problem


def _local_rows(folder: Path, hashes: bool) -> Iterable[Row]:
    for path in [folder / name for name in local.names(folder)] or [folder] * (folder / MANIFEST).exists():
        try:
            manifest = local.verify(path, hashes)
            yield path.name, manifest, json.loads((path / STATE).read_bytes()), ""
        except CheckpointError as error:
            yield path.name, {}, {}, str(error)


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
