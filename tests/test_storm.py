"""The storm: a run that is killed, stopped, starved and misled at random ends as if nothing had happened.

pytest tests/test_storm.py                                    a few faults, as part of the suite
pytest -m slow -n 0 -s tests/test_storm.py --minutes 30       the long one, with --seed N the same once more

The storm plays the supervisor: it starts one command with resume=latest until that says that it is done. Of every start
it demands that no complete checkpoint is lost and that steps which are run again are the same steps.
"""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, bad_shard, small_disk, write_shards
from fakegcs import FakeGCS
from launch import GUARD, Launch, Run, last_step, stopped_at, train
from test_resume import newest, steps, tensors

from refocused.bucket import gcs, remote
from refocused.checkpoint import manifest, selection
from refocused.run.trace import goodput, sentence

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
WATCHDOG, LIMIT = 8, 3  # seconds; checkpoints kept, on the disk and in the bucket
KEYS = (
    f"resume=latest global_batch_size=8 save_steps=20 save_seconds=2 save_total_limit={LIMIT} "
    f"bucket_name=bucket bucket_total_limit={LIMIT} checkpoint_bucket_path=run watchdog_seconds={WATCHDOG} "
    "max_failed_starts=3"
).split()

# what a run survives, and what ends it, so that it is started again
SOFT = ["the clock jumps", "everything stands still", "the bucket fails", "shards are touched", "the logs are removed"]
SOFT += ["the disk of the checkpoints is full", "the disk of the logs is full"]
SOFT += ["a checkpoint cannot be read", "somebody puts files there"]
HARD = ["a rank is killed", "torchrun is killed", "everything is killed", "SIGTERM", "a rank hangs"]
HARD += ["the machine is lost", "a bit of the newest checkpoint flips", "a shard goes bad"]
LOSSES = {"the machine is lost", "a bit of the newest checkpoint flips"}
CODES = {"SIGTERM": {75, -15, 143}, "torchrun is killed": {75}, "a shard goes bad": {66}}  # besides 0, 70 and -9
WAYS = ["torch.distributed.run", "refocused.run.launch"]
MOMENTS = ["a step", "a step", "a save", "an upload", "the start"]


def empty(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


class Storm:
    """A run of `steps` steps in a folder, and what happens to it."""

    def __init__(self, folder: Path, layouts: list[str], steps: int, dice: random.Random, server: FakeGCS):
        self.folder, self.layouts, self.steps, self.dice, self.server = folder, layouts, steps, dice, server
        self.data, self.out, self.logs = write_shards(folder / "data"), folder / "out", folder / "logs"
        self.log, self.clock = folder / "storm.log", folder / "clock"
        build = ["cc", "-shared", "-fPIC", "-o", folder / "clock.so", ROOT / "tests" / "clock.c", "-ldl"]
        self.keys = [f"data_dir={self.data}", f"output_dir={self.out}", f"logging_dir={self.logs}"]
        self.keys += [f"max_steps={steps}", f"upload_deadline_seconds={GUARD}"]
        self.environment = {"STORAGE_EMULATOR_HOST": server.url, "OMP_NUM_THREADS": "1"}
        self.jump(0)
        if shutil.which("cc") and subprocess.run(build).returncode == 0:
            self.environment |= {"LD_PRELOAD": str(folder / "clock.so"), "CLOCK_OFFSET": str(self.clock)}
        self.decks: dict[str, list[str]] = {}
        self.counts: Counter[str] = Counter()
        self.kept: list[str] = []  # lines of traces that were removed
        self.blind: set[int] = set()  # steps whose lines in the trace may be missing
        self.held = 0  # the last step of what is complete somewhere
        self.damaged: set[str] = set()  # names of checkpoints that this storm has damaged
        self.theirs: dict[bytes, Path] = {}  # what somebody has put into output_dir, and where; the disk may go
        self.theirs_there: dict[str, bytes] = {}  # and into the bucket, by its name

    # --- what can be seen of the run

    def lines(self) -> list[str]:
        """Of all traces so far, each once, as some came back from the bucket; of one that is being written nothing."""
        here = self.logs / "trace.jsonl"
        whole = here.read_text().splitlines(keepends=True) if here.exists() else []
        return [*dict.fromkeys([*self.kept, *(line for line in whole if line.endswith("\n"))])]

    def there(self) -> list[str]:
        """Names of the checkpoints that are complete in the bucket, the last save first."""
        place = remote.Place(gcs.Bucket("bucket"), "run")
        return [r.name for r in place.checkpoints(place.objects()) if not r.problem]

    def ours(self) -> list[str]:
        """Names of checkpoints in output_dir, the last save first, but those that are damaged or somebody's."""
        return [name for name in selection.names(self.out) if name not in self.damaged]

    def complete(self) -> list[int]:
        """The steps of checkpoints that can be loaded, ascending, from the disk and from the bucket.

        What is not complete is absent, unless this storm has damaged it.
        """
        found = [manifest.step_of(name) for name in self.there()]
        for name in selection.names(self.out):
            try:
                found.append(manifest.verify(self.out / name)["step"])
            except manifest.CheckpointError:
                assert name in self.damaged, f"{name} is neither complete nor absent"
        return sorted(found)

    # --- what happens

    def draw(self, deck: list[str], possible: Callable[[str], bool] = lambda card: True) -> str:
        """The next card of a shuffled deck that is possible now; a deck is gone through before a card comes again."""
        cards = self.decks.setdefault(deck[0], [])
        if not any(map(possible, cards)):
            cards += self.dice.sample(deck, len(deck))
        card = next(filter(possible, cards))
        cards.remove(card)
        return card

    def wait(self, launch: Launch, moment: str) -> None:
        """Until the moment has come, or the run is over."""
        if moment == "the start":
            return time.sleep(self.dice.uniform(0.0, 8.0))
        launch.until(lambda: last_step(launch.text))
        goal = last_step(launch.text) + self.dice.randrange(1, max(2, self.steps // 8))
        launch.until(lambda: last_step(launch.text) >= goal)
        requests = len(self.server.requests)
        if moment == "a save":
            launch.until(lambda: list(self.out.glob(".tmp-*")))
        elif moment == "an upload":
            launch.until(lambda: any(method != "GET" for method, _ in self.server.requests[requests:]))

    def jump(self, days: int) -> None:
        """Set the clock of all launches, of those that run too, so many days off; the file is changed in place."""
        with self.clock.open("r+b" if self.clock.exists() else "xb") as file:
            file.write(struct.pack("q", 86400 * days))

    def disturb(self, launch: Launch, fault: str) -> None:
        """Something that the run lives through."""
        if fault == "the clock jumps":
            self.jump(self.dice.randrange(-400, 400))
        elif fault == "everything stands still":
            launch.send(signal.SIGSTOP)
            time.sleep(1.5 * WATCHDOG)
            launch.send(signal.SIGCONT)
        elif fault == "the bucket fails":
            ways = [{"status": 503}, {"status": 429}, {"reset": True}, {"lost": True}, {"cut": 1000}]
            for _ in range(self.dice.randrange(1, 5)):
                what, method = self.dice.choice(ways), self.dice.choice(["GET", "PUT|POST", "DELETE"])
                self.server.fault(method, "", times=self.dice.randrange(1, 4), **what)
        elif fault == "shards are touched":
            for shard in self.data.rglob("*.npz"):
                os.utime(shard)
        elif fault == "the logs are removed":
            self.kept = self.lines()
            empty(self.logs)
        elif fault == "a checkpoint cannot be read":
            self.hide()
        elif fault == "somebody puts files there":
            self.put_files()
        else:
            filler = (self.out if "checkpoints" in fault else self.logs) / "filler"
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                for size in (1 << 20, 4096):
                    with contextlib.suppress(OSError):
                        while True:
                            file.write(bytes(size))
            time.sleep(self.dice.uniform(0.5, 4.0))
            filler.unlink(missing_ok=True)

    def end(self, launch: Launch, fault: str) -> None:
        """Something that ends the run."""
        ranks = launch.processes(only_ranks=True)
        if fault == "a rank is killed":
            launch.send(signal.SIGKILL, self.dice.choice(ranks or [launch.process.pid]))
        elif fault == "torchrun is killed":
            launch.process.kill()
        elif fault == "SIGTERM":
            launch.process.terminate()
        elif fault == "a rank hangs":
            stopped = self.dice.choice(ranks)
            launch.send(signal.SIGSTOP, stopped)
            launch.until(lambda: set(launch.processes(only_ranks=True)) <= {stopped})
            launch.send(self.dice.choice([signal.SIGCONT, signal.SIGKILL]), stopped)
        elif fault == "a shard goes bad":
            with bad_shard(self.dice.choice(sorted(self.data.rglob("*.npz"))[:-1])):  # the last one is held out
                launch.until(launch.gone)
        else:
            launch.send(signal.SIGKILL)
        launch.until(launch.gone)
        if launch.process.returncode == 0:  # it was over before: nothing would make good what is taken now
            return
        if fault == "the machine is lost":  # its logs are on a disk that is not
            self.theirs.clear()
            empty(self.out)
        elif fault == "a bit of the newest checkpoint flips" and len(self.complete()) > 1 and self.ours():
            name = self.ours()[0]
            self.damaged.add(name)
            victim = self.dice.choice(sorted((self.out / name).iterdir()))
            data = bytearray(victim.read_bytes())
            data[self.dice.randrange(len(data))] ^= 1 << self.dice.randrange(8)
            victim.write_bytes(data)

    def hide(self) -> None:
        """For a second the newest checkpoint's manifest cannot be read. Whoever deletes it for that is found out."""
        if not (newest := next(iter(self.ours()), "")):
            return
        path, aside = self.out / newest / manifest.MANIFEST, self.out / f"manifest-{newest}"
        with contextlib.suppress(FileNotFoundError):  # pruned in the same moment
            os.rename(path, aside)
            path.symlink_to(path)  # opening it is an OSError
            time.sleep(1)
            assert path.is_symlink(), f"{newest} was deleted although nothing could be known of it"
            os.replace(aside, path)

    def put_files(self) -> None:
        """Into output_dir, beside it in the bucket, and into a checkpoint that is complete in both."""
        there = []
        with contextlib.suppress(gcs.BucketError):  # what was listed is pruned in the same moment
            there = self.there()
        if not there:  # beside nothing of ours they would be another system's place, which is refused
            return
        number = len(self.theirs_there)
        old, note = f"checkpoint-epoch0-step{number}-files9", f"notes-{number}.txt"
        both = [name for name in self.ours() if name in there[1:]][-1:]  # one that a prune would take
        self.damaged |= {old, *both}
        (self.out / old).mkdir()
        for path in (note, f"{old}/model.safetensors", *(f"{name}/inside-{number}.txt" for name in both)):
            data = os.urandom(99)
            with contextlib.suppress(FileNotFoundError):  # the checkpoint was pruned in the same moment
                (self.out / path).write_bytes(data)
                self.theirs[data] = path
        for path in (f"run/{note}", f"run/{old}/optimizer_0/__0_0.distcp", f"run/logs/{note}"):
            self.theirs_there[path] = self.server.put(path, os.urandom(99)).data

    def start(self, layout: str, way: str) -> Launch:
        """The run in a layout, by torchrun, by refocused.run.launch, or of one process by neither."""
        strategy, world = layout.split()
        keys = [*KEYS, *self.keys, f"parallel={strategy}", f"per_device_train_batch_size={8 // int(world)}"]
        flags, way = ("--standalone", f"--nproc_per_node={world}"), way if world != "1" else ""
        with self.log.open("a") as log:
            log.write(f"\n=== {layout}, {way or 'python'}\n")
        return Launch(self.folder, *keys, flags=flags, module=way, log=self.log, **self.environment)

    def play(self, faults: int) -> None:
        """Start it until it is done; `faults` of the starts end in a fault."""
        started = True  # the last one came to its first step: else the crash-loop guard is right to count
        struck = 0
        for start in itertools.count():
            assert start < 3 * faults + 20, "it does not get anywhere"
            known, hit = len(self.lines()), []
            layout, way = self.draw(self.layouts), self.draw(WAYS)
            launch = self.start(layout, way)
            if struck < faults:
                moment = self.draw(MOMENTS, lambda moment, started=started: started or moment != "the start")
                started = moment != "the start"
                self.wait(launch, moment)
                for _ in range(self.dice.randrange(3) if started and not launch.over() else 0):
                    hit.append(self.draw(SOFT, self.possible))
                    self.disturb(launch, hit[-1])
                if not launch.over():
                    may_hang = started and launch.module
                    hit.append(self.draw(HARD, lambda fault, may=may_hang: fault != "a rank hangs" or may))
                    struck += 1
                    self.end(launch, hit[-1])
            launch.until(launch.gone)
            self.server.faults.clear()
            self.counts.update(hit, starts=1)
            code = launch.process.returncode
            print(f"  {layout}, {launch.module}: {', '.join(hit) or 'nothing'}; exit code {code}", flush=True)
            self.judge(launch, hit, known)
            if code == 0:  # done, now or, killed before it could say so, the time before
                return

    def possible(self, fault: str) -> bool:
        """Without a compiler the clock does not jump; without root there are no small disks."""
        if "clock" in fault:
            return "LD_PRELOAD" in self.environment
        return "disk" not in fault or os.path.ismount(self.out)

    def judge(self, launch: Launch, hit: list[str], known: int) -> None:
        """What must hold after each start."""
        text, code, before = launch.text, launch.process.returncode, self.held
        said = f"after {hit or 'nothing'}, exit code {code}:\n{text[-20000:]}"
        assert "this is a bug" not in text, said
        assert len(self.layouts) > 1 or "not the same run" not in text, said
        for line in map(json.loads, self.lines()[known:]):
            if line.get("event") in ("start", "resume"):
                assert line["step"] >= before, f"step {before} was complete, it began from {line['step']} {said}"
        if any("logs" in fault for fault in hit):
            self.blind |= set(range(before, last_step(text) + 2))
        self.counts["replays, identical"] += len(re.findall(r"replayed (\d+) steps, \1 identical", text))
        self.held = max(self.complete(), default=0)
        assert self.held >= before or LOSSES & set(hit), f"step {before} was complete, now {self.held} is {said}"
        if launch.module != "torch.distributed.run":  # which turns every code into 1
            assert code in {0, 70, -9} | CODES.get(hit[-1] if hit else "", set()), said
        if hit == ["SIGTERM"] and "stopped at step" in text:
            assert self.held == stopped_at(text), said


def compare(storm: Storm, calm: Path) -> None:
    """The samples of every step are those of an undisturbed run; with one layout, so is every bit."""
    expected, found = steps(calm), {}
    for line in map(json.loads, storm.lines()):
        if "event" not in line:
            bits = tuple(line[key] for key in ("loss_hex", "grad_norm_hex", "lr_hex", "samples"))
            assert bits[3] == expected[line["step"]][3], line
            assert found.setdefault(line["step"], bits) == bits or len(storm.layouts) > 1, line
    assert set(range(1, storm.steps + 1)) - set(found) <= storm.blind
    last = storm.out / next(name for name in selection.names(storm.out) if manifest.step_of(name) == storm.steps)
    state = manifest.read(last)[1]
    assert (state["step"], state["samples_seen"]) == (storm.steps, 8 * storm.steps)
    if len(storm.layouts) == 1:
        assert all(expected[step] == bits for step, bits in found.items())
        a, b = tensors(newest(calm)), tensors(last)
        assert [name for name in a if not (a[name] == b[name]).all()] == []
    assert storm.complete()[-1] == storm.steps and len(storm.ours()) <= LIMIT
    here = {path.read_bytes() for path in storm.out.rglob("*") if path.is_file()}
    assert [path for data, path in storm.theirs.items() if data not in here] == []
    assert {path: storm.server.data(path) for path in storm.theirs_there} == storm.theirs_there
    there = [name for name in storm.server.names("run/") if name.endswith(manifest.MANIFEST)]
    assert f"run/{last.name}/{manifest.MANIFEST}" in there and len(there) <= LIMIT + 1, there
    assert not [p for p in storm.out.iterdir() if p.name.startswith((".tmp-", ".old-", ".pull-"))]
    assert storm.server.violations == []


def weather(folder: Path, layouts: list[str], length: int, faults: int, seed: int, monkeypatch) -> tuple[Storm, dict]:
    """One run in a storm, compared with a calm one; the storm, and where its time went."""
    print(f"seed {seed}")
    with FakeGCS() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        folder.mkdir()
        storm = Storm(folder, layouts, length, random.Random(seed), server)
        strategy, world = layouts[0].split()
        keys = [f"data_dir={storm.data}", f"max_steps={length}", f"parallel={strategy}", "global_batch_size=8"]
        train(folder / "calm", *keys, f"per_device_train_batch_size={8 // int(world)}", nproc=int(world))
        # of 90 MB, as a pull leaves 64 MiB
        with small_disk(storm.out, "90m"), small_disk(storm.logs, "90m"):
            begin = time.monotonic()
            storm.play(faults)
            paid = time.monotonic() - begin
            compare(storm, folder / "calm")
            clocks = (line for line in map(json.loads, storm.lines()) if line.get("event") == "clock")
            seconds = goodput(clocks)
    seconds["gap_seconds"] += paid - seconds["paid_seconds"]  # by a clock that does not jump
    return storm, seconds | {"paid_seconds": paid}


def test_one_layout(tmp_path, monkeypatch):
    """Two processes; the seed brings a jumping clock, removed logs, SIGTERM and a damaged checkpoint: the same bits."""
    weather(tmp_path / "storm", ["ddp 2"], 160, 2, 2488, monkeypatch)


def test_many_layouts(tmp_path, monkeypatch):
    """Every start has another world size and strategy, and two faults: the same samples."""
    weather(tmp_path / "storm", ["ddp 1", "fsdp 2", "ddp 2"], 120, 2, 3640, monkeypatch)


@pytest.mark.slow
def test_the_long_storm(tmp_path, monkeypatch, pytestconfig):
    """The same for --minutes, run after run; prints what happened and what became of the time."""
    seed = pytestconfig.getoption("seed") or time.time_ns()
    end = time.monotonic() + 60 * pytestconfig.getoption("minutes")
    counts, seconds = Counter(), Counter()
    for number, layouts in enumerate(itertools.cycle([["ddp 2"], ["ddp 1", "fsdp 2", "ddp 2"], ["fsdp 2"], ["ddp 1"]])):
        storm, spent = weather(tmp_path / f"{number}", layouts, 300, 8, seed + number, monkeypatch)
        counts.update(storm.counts, runs=1)
        seconds.update(spent)
        print(f"{layouts}: as if nothing had happened; {dict(storm.counts)}")
        shutil.rmtree(tmp_path / f"{number}")
        if time.monotonic() > end:
            break
    print(*(f"{count:5} {what}" for what, count in counts.most_common() if count), sentence(seconds), sep="\n")


@pytest.mark.slow
def test_nothing_grows(shards, tmp_path, server, capsys):
    """3,000 steps, a save after every ten, each to the bucket: memory, descriptors, threads and files of rank 0, by the
    medians of steps 300 to 900 and of the last 600."""
    (tmp_path / "tmp").mkdir()
    keys = [f"data_dir={shards}", "max_steps=3000", "save_steps=10", "bucket_name=bucket", "bucket_total_limit=3"]
    environment = {"STORAGE_EMULATOR_HOST": server.url, "TMPDIR": str(tmp_path / "tmp")}
    run = Run([*keys, "checkpoint_bucket_path=run"], 2, tmp_path, environment)
    process, seen = Path(f"/proc/{run.ranks[0].pid}"), []
    for step in range(300, 2990, 10):
        run.wait_for(rf"Step {step}: ")
        with contextlib.suppress(OSError):  # a file that goes while it is counted
            status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
            files = sum(len(found) for _, _, found in os.walk(tmp_path))
            mib = int(status["VmRSS"].split()[0]) / 1024
            seen.append((mib, len(os.listdir(process / "fd")), int(status["Threads"]), files))
    assert run.wait() == [0, 0] and len(server.commits) > 10, run.text
    assert not list((tmp_path / "tmp").iterdir())
    parts = (zip(*part, strict=True) for part in (seen[:60], seen[-60:]))
    first, last = ([statistics.median(column) for column in part] for part in parts)
    said = f"MiB, descriptors, threads, files: {first}, at the end {last}; {len(server.commits)} came to the bucket"
    with capsys.disabled():
        print(f"\n{said}")
    assert last[0] < 1.03 * first[0] + 5 and all(b <= a + 2 for a, b in zip(first[1:], last[1:], strict=True)), said
