"""A run's checkpoints and its bucket: published behind training, pruned in both places.

What a start takes from the bucket is in start.py. Which files make a checkpoint in a bucket, and how one comes and goes,
is in remote.py. Here, besides:

    gs://BUCKET/PREFIX/OWNER.json    the run that may write below PREFIX: the last one that started
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from configs import Config
from refocused.bucket import gcs, history
from refocused.bucket.remote import Place, delete, publish
from refocused.checkpoint import atomic, selection
from refocused.checkpoint import manifest as local

OWNER = "OWNER.json"
SCAN_SECONDS = 1.0  # a scan that finds nothing new reads one folder
LONGEST_PAUSE = 60.0  # seconds between tries while the bucket fails


def open_place(cfg: Config, patience: float = 300.0) -> Place:
    assert cfg.bucket_name and cfg.checkpoint_bucket_path
    return Place(gcs.Bucket(cfg.bucket_name, patience), cfg.checkpoint_bucket_path)


class Superseded(gcs.BucketError):
    """Another run has taken the prefix over."""


class Incomplete(gcs.BucketError):
    """Another node has not sent its part of a checkpoint yet."""


class Syncer:
    """A thread that publishes each complete checkpoint of output_dir, the newest first, and prunes in both places.

    It only looks at what is there, so it can be killed at any moment. It never raises into training: `status` says
    for the log line what is waiting and what failed last. One per disk (of a node's local rank 0); only the leader, rank 0,
    writes manifests and deletes in the bucket. After each upload of the newest both places are pruned: a checkpoint leaves
    a disk only once a newer one is verified in the bucket, and it too unless bucket_total_limit would not keep it there.
    So give ckpt.Saver save_total_limit=0. A refused delete is said once and is no failed upload.
    """

    def __init__(self, cfg: Config, resumed_from: str | None = None, leader: bool = True):
        self.cfg, self.leader = cfg, leader
        assert cfg.checkpoint_bucket_path
        self.where = f"gs://{cfg.bucket_name}/{cfg.checkpoint_bucket_path.strip('/')}"
        self.output_dir = Path(os.path.realpath(cfg.output_dir))  # once: a link may be turned to another run's folder
        self.resumed_from = resumed_from
        self._before = local.generation(cfg.output_dir)  # what is above it was saved by this run
        self.started, self.token = int(time.time()), secrets.token_hex(8)
        self.backlog = 0  # complete checkpoints that are still to be published
        self.failure: str | None = None  # why the last try failed; None once one succeeded
        self.reached = 0  # the highest generation that is in the bucket, or that is not to be sent
        self._place: Place | None = None
        self._settled: set[str] = set()  # save ids that are in the bucket, or are not to be sent
        self._waiting: set[str] = set()  # save ids that are to be sent and are not there yet
        self._failed: set[str] = set()  # save ids that could not be sent from here
        self._arrived: dict[str, Any] = {
            "generation": -1,
            "step": -1,
            "name": "",
        }  # manifest of the last save that is in the bucket
        self._notices: list[str] = []  # what is no failed upload and is said once
        self._noticed: set[str] = set()
        self._logs_due = False  # a checkpoint came to the bucket since the logs did
        self._changed = threading.Condition()
        self._asked = self._answered = 0  # flush() asks for a scan that starts after it was called
        self._refused = 0  # the last such scan that was refused, which waiting does not change
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="bucket", daemon=True)
        self._thread.start()

    @property
    def status(self) -> str:
        """For the log line; empty when there is nothing to say. What is said once is gone from the next."""
        waiting = f"{self.backlog} waiting for the bucket" if self.backlog else ""
        notices, self._notices = self._notices, []
        return ", ".join(part for part in (waiting, self.failure, *notices) if part)

    def _note(self, what: str, error: Exception) -> None:
        if what not in self._noticed:
            self._noticed.add(what)
            self._notices.append(f"{what}: {error}")

    def has_pending(self, generation: int) -> bool:
        """Whether that save is on its way to a bucket which takes what it is sent."""
        return self.reached < generation and not self.failure

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
        end = time.monotonic() + history.PATIENCE
        with self._changed:
            while done and self._logs_due and time.monotonic() < end:
                self._changed.wait(end - time.monotonic())
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
                before, waits = self.failure, isinstance(error, Incomplete)
                failures = 1 if waits else failures + 1  # soon mended: asked again at once
                self.failure = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
                if not self.leader and not waits and self.failure != before:  # the log line is the leader's
                    with contextlib.suppress(OSError, ValueError):  # a closed terminal, a full disk
                        print(f"on {socket.gethostname()}: {self.failure}", file=sys.stderr, flush=True)
                if isinstance(error, gcs.Refused | Superseded):
                    self._refused = serving
            with self._changed:
                if not failures and not more:
                    self._answered = serving
                self._changed.notify_all()
            if self._logs_due and not more:
                self._send_logs()
            with self._changed:
                pause = SCAN_SECONDS if self._asked > self._answered else min(SCAN_SECONDS * 2**failures, LONGEST_PAUSE)
                if not more and not self._closed and self._asked == serving:
                    self._changed.wait(pause)

    def _send_logs(self) -> None:
        try:
            history.send(open_place(self.cfg, history.PATIENCE), Path(self.cfg.logging_dir))
        except Exception as error:  # nothing that a run can go on from is in them
            self._note("the logs are not in the bucket", error)
        with self._changed:
            self._logs_due = False
            self._changed.notify_all()

    def _scan(self) -> bool:
        """Publish at most one checkpoint; True if there may be another to publish at once. Raises what went wrong."""
        if self._place is None:
            place = open_place(self.cfg, patience=LONGEST_PAUSE)
            if self.leader:
                self._take_over(place)
            self._place = place
        here = self._complete()
        waiting = [m for m in here if m["save_id"] not in self._settled]
        self.reached = max([m.get("generation", 0) for m in here if m not in waiting], default=self.reached)
        self.backlog, self._waiting = len(waiting), {m["save_id"] for m in waiting}
        if not waiting:
            return False
        objects = self._place.objects()
        there = {r.name: r.manifest for r in self._place.checkpoints(objects) if not r.problem}
        newest = max(here, key=selection.key)
        both = {m["name"]: m for m in sorted([*there.values(), *here], key=selection.key)}  # of two of a name the later
        keep = self._retained(both.values(), newest["name"])
        todo, before = [], self._arrived
        for manifest in waiting:
            other = there.get(manifest["name"])
            # A save of this run beats one of the same name by another; one left on this disk does only if it is later.
            ours = manifest.get("generation", 0) > self._before
            outdated = other is not None and not ours and selection.key(other) >= selection.key(manifest)
            outdated |= self._overtaken(manifest, ours, there.values())
            arrived = other is not None and other["save_id"] == manifest["save_id"]
            if arrived:
                self._arrived = max(self._arrived, manifest, key=selection.key)
            if arrived or outdated or manifest["name"] not in keep:
                self._settled.add(manifest["save_id"])
            else:
                todo.append(manifest)
        self.backlog, self._waiting = len(todo), {m["save_id"] for m in todo}
        if self._arrived is not before:  # by the leader's hand, or by a run that was killed before it came to this
            self._prune()
        if not todo:
            return False
        self._check_owner()
        # What another node has begun comes first, or each would send parts that the others do not: then the newest.
        for manifest in sorted(todo, key=lambda m: (self._begun(m, objects), selection.key(m)), reverse=True):
            mine = present(manifest, self.output_dir)
            sends = mine - sent(manifest, objects)
            try:
                done = publish(self._place, self.output_dir / manifest["name"], commit=self.leader, replace=True)
            except FileNotFoundError:
                return True  # it was deleted here, so it no longer waits
            except gcs.BucketError:
                self._failed.add(manifest["save_id"])
                raise
            if done:
                self._settle(manifest)
                return True
            if sends and len(mine) < len(manifest["files"]):
                return True  # a part went up: look what the others have sent since
        raise Incomplete(f"{self.where}/{manifest['name']} waits for files that are not on this machine")

    def _overtaken(self, manifest: dict[str, Any], ours: bool, there: Iterable[dict[str, Any]]) -> bool:
        """Whether a save in parts is given up, by the same rule on every node: a newer one is complete in the bucket.

        What an earlier run left may lack a part for ever. Of this run's saves, only one of its own can be the newer, and
        those that keep_every keeps are sent all the same.
        """
        if self.leader and len(present(manifest, self.output_dir)) == len(manifest["files"]):
            return False  # not in parts
        if ours and self.cfg.keep_every and manifest["step"] % self.cfg.keep_every == 0:
            return False
        mine = self._settled | self._waiting
        newer = (t for t in there if selection.key(t) > selection.key(manifest))
        return any(not ours or t["save_id"] in mine for t in newer)

    def _settle(self, manifest: dict[str, Any]) -> None:
        """Note that a checkpoint is in the bucket; with it there, older ones may go."""
        self._settled.add(manifest["save_id"])
        self.reached = max(self.reached, manifest.get("generation", 0))
        self._waiting.discard(manifest["save_id"])
        self.backlog = len(self._waiting)
        self._arrived, self._logs_due = max(self._arrived, manifest, key=selection.key), self.leader
        self._prune()

    def _begun(self, manifest: dict[str, Any], objects: dict[str, gcs.Object]) -> int:
        """How many files of a save other nodes have sent; 0 of one that could not be sent from here."""
        return (
            0
            if manifest["save_id"] in self._failed
            else len(sent(manifest, objects) - present(manifest, self.output_dir))
        )

    def _complete(self) -> list[dict[str, Any]]:
        """Manifests of what is complete here; on one of several nodes, of what this node has its part of."""
        return [m for m in local.read_manifests(self.output_dir)[0] if local.is_whole(self.output_dir / m["name"], m)]

    def _retained(self, manifests: Iterable[dict[str, Any]], newest: str) -> set[str]:
        keep = selection.retained(manifests, self.cfg.bucket_total_limit, self.cfg.keep_every)
        return keep | {newest, self.resumed_from or newest}

    def _prune(self) -> None:
        """Delete what is not retained beside the last save that is verified in the bucket; there, then here."""
        newest = self._arrived["name"]
        if self.leader:
            self._prune_there(newest)
        atomic.prune(self.output_dir, newest, self.cfg.save_total_limit, self.cfg.keep_every, self._waiting)

    def _prune_there(self, newest: str) -> None:
        assert self._place is not None
        objects = self._place.objects()
        # One that is damaged neither counts nor goes: resume names it, and `ckpt.py prune` removes it.
        good = [r for r in self._place.checkpoints(objects) if not r.problem]
        keep = self._retained([r.manifest for r in good], newest)
        for remote in good:
            if remote.name not in keep:
                self._check_owner()
                try:
                    delete(self._place, remote, objects)
                    atomic.deleted.append(f"{self.where}/{remote.name}")
                except gcs.BucketError as error:  # no permission, a retention policy: what was to be saved is saved
                    self._note("old checkpoints stay in the bucket", error)
                    break

    def _take_over(self, place: Place) -> None:
        """Become the one run that writes below the prefix; also the first proof that the bucket can be written."""
        note = {"token": self.token, "host": socket.gethostname(), "pid": os.getpid(), "time": self.started}
        there = place.bucket.read(place.name(OWNER))
        if there and not owner_of(there[0]):
            raise gcs.Refused(
                f"{place}/{OWNER} is no note of this trainer and stays; move it, or choose another checkpoint_bucket_path"
            )
        place.bucket.create(place.name(OWNER), json.dumps(note).encode(), there[1] if there else 0)

    def _check_owner(self) -> None:
        if not self.leader:
            return
        assert self._place is not None
        content, _ = self._place.bucket.read(self._place.name(OWNER)) or (b"{}", 0)
        owner = owner_of(content)
        if owner.get("token") != self.token:
            raise Superseded(
                f"another run (host {owner.get('host')}, pid {owner.get('pid')}) took {self.where} over, so this one "
                "uploads no more; give each run its own checkpoint_bucket_path"
            )


def owner_of(content: bytes) -> dict[str, Any]:
    """What an OWNER.json says; {} if no run wrote it."""
    try:
        owner = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) and isinstance(owner.get("token"), str) else {}


def present(manifest: dict[str, Any], output_dir: Path) -> set[str]:
    """The files of that save that are on this disk."""
    return {file for file in manifest["files"] if (output_dir / manifest["name"] / file).exists()}


def sent(manifest: dict[str, Any], objects: dict[str, gcs.Object]) -> set[str]:
    """The files of that save that are listed in the bucket."""
    return {file for file in manifest["files"] if f"{manifest['name']}/{manifest['save_id']}/{file}" in objects}
