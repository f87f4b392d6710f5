"""A run's checkpoints and its bucket: published behind training, pruned in both places.

What a start takes from the bucket is in start.py. Which files make a checkpoint in a bucket, and how one comes and goes,
is in remote.py. Here, besides:

    gs://BUCKET/PREFIX/OWNER.json    the run that may write below PREFIX: the last one that started
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from configs import Config
from refocused import files
from refocused.bucket import gcs, history
from refocused.bucket.remote import Place, Remote, delete, listed, present, publish
from refocused.checkpoint import atomic, selection
from refocused.checkpoint import manifest as local

OWNER = "OWNER.json"
SCAN_SECONDS = 1.0  # a scan that finds nothing new reads one folder
LONGEST_PAUSE = 60.0  # seconds between tries while the bucket fails


class Incomplete(gcs.BucketError):
    """Another node has not sent its part of a checkpoint yet."""


class Syncer:
    """A thread that publishes each complete checkpoint of output_dir, the newest first, and prunes in both places.

    It only looks at what is there, so it can be killed at any moment. It never raises into training: `status` says what is
    waiting and what failed last. There is one per disk; only the leader, rank 0's, writes manifests and deletes in the
    bucket. After each upload of the newest both places are pruned, so ckpt.Checkpoints gives its Saver save_total_limit=0.
    A local checkpoint is deleted only after a newer one is verified in the bucket. It must be there itself, unless
    bucket_total_limit would drop it. A refused delete is said once and is no failed upload.
    """

    def __init__(self, cfg: Config, resumed_from: str | None = None, leader: bool = True):
        self.cfg, self.leader, self.resumed_from = cfg, leader, resumed_from
        self.where = f"gs://{cfg.bucket_name}/{(cfg.checkpoint_bucket_path or '').strip('/')}"
        self.output_dir = Path(cfg.output_dir)  # links on the way are resolved by ckpt.Folder
        self.token = secrets.token_hex(8)
        self.failure: str | None = None  # why the last try failed; None once one succeeded
        self.reached = 0  # the highest generation that is in the bucket, or that is not to be sent
        self._before = local.generation(cfg.output_dir)  # what is above it was saved by this run
        self._place: Place | None = None
        # save ids: those in the bucket or not to be sent, those to be sent, those that could not be sent from here
        self._settled: set[str] = set()
        self._waiting: set[str] = set()
        self._failed: set[str] = set()
        self._arrived: dict[str, Any] = {"generation": -1, "step": -1, "name": ""}  # the last save in the bucket
        self._changed = threading.Condition()
        self._asked = self._answered = 0  # flush() asks for a scan that starts after it was called
        self._refused = 0  # the last such scan that was refused, which waiting does not change
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="bucket", daemon=True)
        self._thread.start()

    @property
    def backlog(self) -> int:
        """How many complete checkpoints are still to be published."""
        return len(self._waiting)

    @property
    def status(self) -> str:
        """For the log line; empty when there is nothing to say."""
        waiting = f"{self.backlog} waiting for the bucket" if self.backlog else ""
        return ", ".join(filter(None, (waiting, self.failure)))

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
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if done:  # else it may hang on the network; as a daemon it does not hold the exit
            self._thread.join(history.PATIENCE)  # it may be sending the logs
        return done

    def _run(self) -> None:
        failures, logs_due = 0, False
        while not self._closed:
            serving, more, arrived = self._asked, False, self._arrived
            try:
                more = self._scan()
                failures, self.failure = 0, None
            except Exception as error:  # whatever it is, training goes on and the log line says it
                failures = 1 if isinstance(error, Incomplete) else failures + 1  # a part is asked for again soon
                self.failure = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
                if not self.leader and not isinstance(error, Incomplete):  # the log line is the leader's
                    files.name_once((self.token, self.failure), f"on {socket.gethostname()}: {self.failure}")
                if isinstance(error, gcs.Refused):
                    self._refused = serving
            logs_due |= self.leader and self._arrived is not arrived
            with self._changed:
                if not failures and not more:
                    self._answered = serving
                self._changed.notify_all()
            if logs_due and not more:
                try:
                    history.send(self.cfg)
                except Exception as error:  # nothing that a run can go on from is in them
                    files.name_once((self.token, "logs"), f"the logs are not in the bucket: {error}")
                logs_due = False
            with self._changed:
                pause = SCAN_SECONDS if self._asked > self._answered else min(SCAN_SECONDS * 2**failures, LONGEST_PAUSE)
                if not more and not self._closed and self._asked == serving:
                    self._changed.wait(pause)

    def _scan(self) -> bool:
        """Publish at most one checkpoint; True if there may be another to publish at once. Raises what went wrong."""
        if self._place is None:
            place = Place.of(self.cfg, LONGEST_PAUSE)
            if self.leader:
                self._take_over(place)
            self._place = place
        # With a disk for each node, whole is a save whose files here have their sizes.
        readable = local.read_manifests(self.output_dir)[0]
        here = [m for m in readable if local.is_whole(self.output_dir / m["name"], m)]
        waiting = [m for m in here if m["save_id"] not in self._settled]
        self.reached = max([m["generation"] for m in here if m not in waiting], default=self.reached)
        self._waiting = {m["save_id"] for m in waiting}
        if not waiting:
            return False
        objects = self._place.objects()
        # One that is damaged neither counts nor goes: resume names it, and `ckpt.py prune` removes it.
        good = [r for r in self._place.checkpoints(objects) if not r.problem]
        there = {r.name: r.manifest for r in good}
        arrived = [m for m in waiting if there.get(m["name"], {}).get("save_id") == m["save_id"]]
        self._arrived = max([self._arrived, *arrived], key=selection.key)
        both = {m["name"]: m for m in sorted([*there.values(), *here], key=selection.key)}  # of two of a name the later
        keep = self._retained(both.values(), max(here, key=selection.key)["name"])
        todo = [m for m in waiting if m not in arrived and m["name"] in keep and not self._outdated(m, there)]
        self._settled |= {m["save_id"] for m in waiting if m not in todo}
        self._waiting = {m["save_id"] for m in todo}
        if arrived:  # by this thread, by the leader's, or by a run that was killed before it came to this
            self._prune(self._place, good, objects)
        if not todo:
            return bool(arrived)
        self._check_owner()

        def begun(manifest: dict[str, Any]) -> int:
            """How many files of a save other nodes have sent; 0 of one that could not be sent from here."""
            others = listed(manifest, objects).keys() - present(manifest, self.output_dir)
            return 0 if manifest["save_id"] in self._failed else len(others)

        # What another node has begun comes first, or each would send parts that the others do not: then the newest.
        for manifest in sorted(todo, key=lambda m: (begun(m), selection.key(m)), reverse=True):
            mine = present(manifest, self.output_dir)
            try:
                done = publish(self._place, self.output_dir / manifest["name"], commit=self.leader, replace=True)
            except FileNotFoundError:
                return True  # it was deleted here, so it no longer waits
            except gcs.BucketError:
                self._failed.add(manifest["save_id"])
                raise
            part_sent = mine - listed(manifest, objects).keys() and len(mine) < len(manifest["files"])
            if done or part_sent:  # the next scan finds what is there now, also from other nodes
                return True
        raise Incomplete(f"{self.where}/{manifest['name']} waits for files that are not on this machine")

    def _outdated(self, manifest: dict[str, Any], there: dict[str, dict[str, Any]]) -> bool:
        """Whether a save is not to be sent because a later one is complete in the bucket: of its name, or, for a save in
        parts, any.

        A save of this run beats one of the same name by another. What an earlier run left in parts may lack one for ever;
        of this run's saves in parts, only one of its own can be the later, and those that keep_every keeps are sent all
        the same. So every node decides alike.
        """
        ours = manifest["generation"] > self._before
        later = [t for t in there.values() if selection.key(t) >= selection.key(manifest)]
        if not ours and manifest["name"] in [t["name"] for t in later]:
            return True
        whole = self.leader and len(present(manifest, self.output_dir)) == len(manifest["files"])
        if whole or ours and self.cfg.keep_every and manifest["step"] % self.cfg.keep_every == 0:
            return False
        mine = self._settled | self._waiting
        return any(not ours or t["save_id"] in mine for t in later)

    def _retained(self, manifests: Iterable[dict[str, Any]], newest: str) -> set[str]:
        keep = selection.retained(manifests, self.cfg.bucket_total_limit, self.cfg.keep_every)
        return keep | {newest, self.resumed_from or newest}

    def _prune(self, place: Place, good: list[Remote], objects: dict[str, gcs.Object]) -> None:
        """Delete what is not retained beside the last save that is verified in the bucket; there, then here."""
        newest = self._arrived["name"]
        if self.leader:
            keep = self._retained([r.manifest for r in good], newest)
            for remote in [r for r in good if r.name not in keep]:
                self._check_owner()
                try:
                    delete(place, remote, objects)
                    files.notes.append(f"deleted {self.where}/{remote.name}")
                except gcs.BucketError as error:  # no permission, a retention policy: what was to be saved is saved
                    files.name_once((self.token, "old"), f"old checkpoints stay in the bucket: {error}")
                    break
        atomic.prune(self.output_dir, newest, self.cfg.save_total_limit, self.cfg.keep_every, self._waiting)

    def _take_over(self, place: Place) -> None:
        """Become the one run that writes below the prefix; also the first proof that the bucket can be written."""
        note = {"token": self.token, "host": socket.gethostname(), "pid": os.getpid(), "time": int(time.time())}
        content, generation = place.bucket.read(place.name(OWNER)) or (b"", 0)
        if generation and not content.startswith(b'{"token": '):
            raise gcs.Refused(
                f"{place}/{OWNER} is no note of this trainer and stays; move it, or choose another checkpoint_bucket_path"
            )
        place.bucket.create(place.name(OWNER), json.dumps(note).encode(), generation)

    def _check_owner(self) -> None:
        if self.leader:
            assert self._place is not None
            content, _ = self._place.bucket.read(self._place.name(OWNER)) or (b"{}", 0)
            if (owner := json.loads(content)).get("token") != self.token:
                raise gcs.Refused(
                    f"another run (host {owner.get('host')}, pid {owner.get('pid')}) took {self.where} over, so this one "
                    "uploads no more; give each run its own checkpoint_bucket_path"
                )
