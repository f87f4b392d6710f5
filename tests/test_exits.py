"""How a run ends when something goes wrong: each process leaves in time, with the right code, and the reason is seen.

Faults are made inside the ranks, by FAULTS in the child before train.main; what leaves, speaks and decides is real.
"""

import ctypes
import http.client
import http.server
import importlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from launch import GUARD, TINY, Run, on_ranks, stopped_at, train
from saves import save

import configs
import data
from configs import Config, ConfigError
from model import GPTNeoX
from refocused.bucket import gcs, start
from refocused.checkpoint import manifest, saver, selection
from refocused.run import devices, exits, failures, hardware, optim, preflight, processes, signals, strategy, watchdog
from refocused.run.preflight import CrashLoop, Starts
from refocused.shards.shard import DataError


def at_step(step: int | None, act) -> None:
    """Call act() in this rank's step, counted from 0; None for any."""
    before = optim.learning_rate

    def rate(at, cfg):
        if step in (at, None):
            act()
        return before(at, cfg)

    optim.learning_rate = rate


def fail(error: BaseException, *_) -> None:
    raise error


def hang(*_) -> None:
    time.sleep(3600)


def at_call(module, name: str, number: int, change) -> None:
    """The number-th result of module.name goes through change(result, *args)."""
    before, calls = getattr(module, name), []

    def function(*args, **kwargs):
        calls.append(before(*args, **kwargs))
        return change(calls[-1], *args) if len(calls) == number else calls[-1]

    setattr(module, name, function)


@torch.no_grad()
def flip_a_bit(_, model, *args) -> None:
    p = next(p for p in model.parameters() if p.numel() > 64)
    local = p.to_local() if hasattr(p, "to_local") else p
    local.view(-1)[5:6].view(torch.int32).bitwise_xor_(1 << 20)


def killed_at(text: str) -> None:
    """SIGKILL as soon as this rank has shown the text."""
    before = sys.stdout.write

    def write(shown: str) -> int:
        before(shown)
        sys.stdout.flush()
        if text in shown:
            os.kill(os.getpid(), signal.SIGKILL)
        return len(shown)

    sys.stdout.write = write


FAULTS = {
    # NCCL's way: a group is taken down once all ranks ask for it. gloo, all that a CPU has, does not wait
    "blocks": lambda: setattr(dist, "destroy_process_group", hang),
    "data": lambda: at_step(4, lambda: fail(DataError("shard gone.npz: it went"))),
    "now": lambda: at_step(None, lambda: fail(KeyError("no such thing"))),
    "bug": lambda: at_step(4, lambda: fail(KeyError("no such thing"))),
    "flip": lambda: at_call(strategy, "clear_gradients", 6, flip_a_bit),
    "killed": lambda: killed_at(os.environ["SHOWN"]),
    "infinite": lambda: at_call(strategy, "clip_gradients", 4, lambda found, *_: (found[0] * torch.inf, found[1])),
    "torch": lambda: setattr(preflight, "sources", lambda: "other sources"),
    "brief": lambda: setattr(processes, "EXCHANGE_SECONDS", 10),
    # the store is there before any rank; torch would look for it for ten minutes
    "storeless": lambda: (
        setattr(processes, "STORE_SECONDS", 2),
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True"),
    ),
    "elsewhere": lambda: setattr(socket, "gethostname", lambda: "other"),
    "absent": lambda: setattr(processes, "first_collective", hang),
    # in C, with the GIL, as a launch into a full queue
    "held": lambda: at_step(5, lambda: ctypes.PyDLL(None).sleep(3600)),
    "stuck": lambda: setattr(saver.Saver, "_commit", hang),
    "slow": lambda: setattr(saver.Saver, "save", hang),
    "absent-minded": lambda: setattr(strategy, "build", hang),
    "impatient": lambda: setattr(processes, "FIRST_SECONDS", 2),
    "unpacks": lambda: setattr(data, "unpack", lambda cfg: print("unpacks:", processes.progress.long_waits)),
    "no-data": lambda: at_call(data, "unpack", 1, lambda *_: fail(DataError("made up, on one node"))),
    "quick": lambda: setattr(watchdog, "LATER", 3),
    "late": lambda: setattr(failures, "report", lambda *args, say=failures.report: (time.sleep(2), say(*args))),
}


def _faulty(name: str, args: list[str]) -> int:
    for fault in os.environ.get(f"FAULT{os.environ.get('RANK', 0)}", "").split():
        FAULTS[fault]()
    return importlib.import_module(name).main(args)


@pytest.fixture
def faulty(shards, tmp_path):
    """start(*args, nproc, **environment): a run whose rank R has the faults that FAULTR names."""

    def start(*args: str, nproc: int = 2, **environment: str) -> Run:
        return Run([f"data_dir={shards}", *args], nproc, tmp_path, environment, main=_faulty)

    return start


HELD = r"(?s)(?=.*Timeout \(0:00:\d+\)!\n.*in rate)(?=.*rank 1 )"  # the stacks, and who is named
SOON = "watchdog_seconds=2 upload_deadline_seconds=1"
ENDS = {  # keys, faults of ranks 0 and 1, exit codes, what is said
    "data": ("", "blocks", "blocks data", [70, 66], "(?s)gone.npz.* rank 0 on .* lost its peers at step 4: "),
    "a bug": ("", "blocks", "blocks bug", [70, 70], "(?s)this is a bug.* rank 0 on .* lost its peers at step 4: "),
    "an infinite norm": ("save_steps=1", "", "infinite", [0, 0], "Step 4: .*grad norm=inf: not applied"),
    "a_hang with the GIL": ("watchdog_seconds=2", "", "held quick", [70, 1], HELD),
    "a_hang in the last save": (SOON, "stuck", "stuck", [70, 70], "hangs: nothing for .* s after step 10"),
    "lacks our code": ("", "", "torch", [2, 2], "ranks 1 and 0 differ in the code"),
    "lacks a first process": ("", "", "elsewhere", [2, 2], "no process of other has LOCAL_RANK=0"),
    "lacks data": ("", "no-data", "", [66, 66], "made up, on one node"),
    "lacks mapped shards": ("", "unpacks", "", [0, 0], "unpacks: 1"),  # a wait for as long as it takes
    "lacks its torchrun": ("", "storeless", "storeless", [70, 70], "the torchrun of this process is gone"),
}


@pytest.mark.parametrize("keys, fault0, fault1, codes, words", ENDS.values(), ids=ENDS)
def test_how_two_ranks_end(faulty, tmp_path, keys, fault0, fault1, codes, words):
    """One rank fails alone, though taking the group down would block; no rank applies what one finds infinite; ranks that
    no thread of Python's can end; before the loop, what one rank or node lacks. train.log has each reason, too."""
    run = faulty(*keys.split(), FAULT0=fault0, FAULT1=fault1)
    assert run.wait() == codes and re.search(words, run.text), run.text
    if (log := tmp_path / "logs/train.log").exists():
        said = [line for line in run.text.splitlines() if line.startswith("error: ") or "this is a bug" in line]
        assert [line for line in said if line not in log.read_text()] == []


ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@pytest.mark.parametrize("nproc, late", [(2, 0), (2, 1), (1, 0)])
def test_what_all_ranks_know_is_said_once(faulty, nproc, late):
    """An error that every rank raises in a group: rank 0, which serves the store, says it, whoever comes to it first.
    One process with a store waits for nobody."""
    faults = {"FAULT0": "blocks", "FAULT1": "blocks"} | {f"FAULT{late}": "blocks late"}
    run = faulty("resume=nothing", nproc=nproc, **(faults if nproc > 1 else ALONE))
    assert run.wait() == [66] * nproc and run.text.count("error: ") == 1, run.text
    assert nproc > 1 or "[c10d]" not in run.text


def test_a_first_collective_that_hangs_names_what_to_try(faulty):
    """Rank 1 has joined and takes no part: rank 0 leaves with 70 and the variables to set."""
    run = faulty(FAULT0="impatient", FAULT1="absent")
    run.ranks[0].join(GUARD)
    assert run.ranks[0].exitcode == 70 and "NCCL_P2P_DISABLE=1" in run.text and "GLOO_SOCKET_IFNAME" in run.text
    run.kill()


ANSWERS = (3, r"hangs: nothing for .* after step [\d,]+; rank 1 .* does not answer")


@pytest.mark.parametrize("limit, words", [ANSWERS, (0, r"lost its peers at step [\d,]+: .*[Tt]imed out")])
def test_a_hang_is_found(faulty, limit, words):
    """Rank 1 is stopped in mid-run: rank 0 names it, after stacks, or the exchange that failed; both leave with 70."""
    run = faulty("max_steps=1000000", f"watchdog_seconds={limit}", FAULT0="brief", FAULT1="brief")
    run.wait_for("Step 50: ")
    run.signal(signal.SIGSTOP, rank=1)
    run.ranks[0].join(GUARD)
    run.signal(signal.SIGCONT, rank=1)
    assert run.wait() == [70, 70] and re.search(f"error: rank 0 on .* {words}", run.text), run.text
    assert ("Current thread 0x" in run.text) == (limit > 0)  # torch's own stacks of C++ are no dump of the threads
    assert run.text.count("sendBytes failed") <= 1  # the store's host is gone: no heartbeat after the first that fails


@pytest.mark.parametrize("slow, fault, moment", [(0, "slow", "Step 5: "), (1, "absent-minded", "resume ")])
def test_a_hang_in_what_may_take_long_is_found(faulty, slow, fault, moment):
    """A rank is slow in a save, or at the start, for longer than the watchdog's limit: the other waits. Then it is
    stopped, 0 together with the store that it serves: the other leaves with 70."""
    keys = ["max_steps=1000000", "save_steps=5", "async_save=false", "watchdog_seconds=2", "resume=latest"]
    run = faulty(*keys, **{f"FAULT{slow}": fault})
    waiting = run.ranks[1 - slow]
    run.wait_for(moment)
    waiting.join(6)
    assert waiting.is_alive(), run.text
    run.signal(signal.SIGSTOP, rank=slow)
    waiting.join(GUARD)
    run.kill()
    words = r"(after step 5|before the first step); (rank 1 .*|the store) does not answer"
    assert waiting.exitcode == 70 and re.search(words, run.text), run.text


def test_a_second_signal_ends_a_hang(faulty):
    """Rank 1 is stopped: rank 0 says that it stops after this step, and leaves at the second signal."""
    run = faulty("max_steps=1000000")
    run.wait_for("Step 5: ")
    run.signal(signal.SIGSTOP, rank=1)
    run.signal(signal.SIGTERM, rank=0)
    run.wait_for("stopping after this step")
    time.sleep(1.5)  # sooner, it would be the same signal passed on
    run.signal(signal.SIGTERM, rank=0)
    run.ranks[0].join(GUARD)
    assert run.ranks[0].exitcode == 128 + signal.SIGTERM
    run.kill()


@pytest.mark.parametrize("nproc, layout", [(2, ["parallel=ddp"]), (4, ["parallel=fsdp", "shard_size=2"])])
def test_copies_of_the_model_that_differ_are_not_saved(faulty, tmp_path, nproc, layout):
    """One bit of a weight of the last rank flips at step 4 (two calls are the warm-up's): 70 at the save of step 6."""
    run = faulty("save_steps=3", *layout, nproc=nproc, **{f"FAULT{nproc - 1}": "flip"})
    who = r"rank 1 has .*\(or rank 0 has\)" if nproc == 2 else r"ranks? [13]"
    assert run.wait() == [70] * nproc and re.search(rf"error: at step 6 {who}", run.text), run.text
    assert [manifest.step_of(name) for name in selection.names(tmp_path / "out")] == [3]


def test_starts_that_come_to_nothing_are_counted(faulty, tmp_path, shards):
    """Two runs killed before their first step and one with a bug in it: the next is refused with 78. With a change in
    the config another one runs, and its steps clear the count."""
    args = ["max_failed_starts=3", "max_steps=100000"]
    for _ in range(2):
        run = Run([f"data_dir={shards}", *args], 1, tmp_path)
        run.wait_for("^model ")
        run.kill()
    for expected, words in ((70, "this is a bug"), (78, "3 starts in a row ended without a new step, the last with")):
        run = faulty(*args, nproc=1, FAULT0="now")
        assert run.wait() == [expected] and words in run.text, run.text
    train(tmp_path, f"data_dir={shards}", "max_failed_starts=3")
    assert json.loads((tmp_path / "out" / ".starts").read_text())["failed"] == 0


def test_starts_that_save_come_to_something(tmp_path, monkeypatch):
    """A run that went back saves below the step that it had reached: none of its kills counts. Without a save the fourth
    start is refused. What a power cut or a hand made of the file is no start that counts."""
    monkeypatch.setattr(exits, "at_leave", [])
    cfg = Config(output_dir=str(tmp_path), max_failed_starts=3)
    for step in (62, 28, 38, 48, 58):
        save(tmp_path, step, size=1000)
        Starts(cfg).write(step=62)
    good = (tmp_path / ".starts").read_text()
    no_numbers = re.sub('"failed": .*, "step": 62', '"failed": "x", "step": 1e999', good)
    for text in ("[" * 100_000, '{"of": 1}', no_numbers, "9" * 5000, "\xff", ""):
        (tmp_path / ".starts").write_text(text, encoding="latin-1")
        assert Starts(cfg).failed == 0
    Starts(cfg), Starts(cfg)
    with pytest.raises(CrashLoop, match="3 starts in a row"):
        Starts(cfg)
    for path in tmp_path.glob("checkpoint-*"):
        shutil.rmtree(path)
    save(tmp_path, 5, size=1000)  # its first save, after all of the run before were removed
    assert Starts(cfg).failed == 0

    def away(cfg) -> None:
        raise gcs.Unavailable("cannot list")

    monkeypatch.setattr(start.Place, "of", away)  # for minutes, at each start: counted, and not for ever
    monkeypatch.setattr(start, "write_starts", lambda *_: None)
    Starts(cfg, start), Starts(cfg, start)
    with pytest.raises(CrashLoop, match="3 starts in a row"):
        Starts(cfg, start)


SHOWN = {"step": "Step 4: loss", "eval": "Step 4: eval_loss", "skip": "Step 5: skipped", "bad": "all windows in"}


@pytest.mark.parametrize("moment", SHOWN)
def test_what_was_seen_is_in_the_files(faulty, tmp_path, moment):
    """Killed the moment a line is on the screen: train.log has the line, and the other file has what it speaks of."""
    faults = "killed" + " infinite" * (moment == "bad")
    run = faulty("eval_steps=4", "skip_steps=5", nproc=1, FAULT0=faults, SHOWN=SHOWN[moment])
    assert run.wait() == [-signal.SIGKILL]
    logs = tmp_path / "logs"
    assert run.text.splitlines()[-1] in (logs / "train.log").read_text()
    last = json.loads((logs / "trace.jsonl").read_text().splitlines()[-1])
    if moment == "bad":
        last = json.loads((logs / "bad-step-4.json").read_text())
    assert (last["step"], last.get("event", moment)) == (5 if moment == "skip" else 4, moment)


def test_a_gpu_that_torch_cannot_use_is_no_reason_for_the_cpu(monkeypatch, tmp_path):
    """torch built for CUDA and the device file of the one GPU that a container was lent, but no accelerator: refused with
    both versions by all that would take one, unless it is hidden."""
    for name in ("nvidia3", "nvidiactl"):
        (tmp_path / name).touch()
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 2023\n")
    monkeypatch.setattr(devices, "DEVICES", f"{tmp_path}/nvidia[0-9]*")
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for take in (lambda: devices.pick_device(0, 1), devices.any_device):
        with pytest.raises(ConfigError, match=r"nvidia3 .*built for CUDA 13.0, finds no .* GPU \(driver 535.104.05"):
            take()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.pick_device(0, 1).type == "cpu"


def test_memory_that_is_out_is_called_so():
    """In the words of each library that takes memory: the line of its error that says so, and nothing else's."""
    for kind, text, line in (
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2 GiB", 0),
        (torch.AcceleratorError, "CUDA error: out of memory\nCompile with ...", 0),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", 0),
        (dist.DistBackendError, "NCCL error in: NCCLUtils.cpp\nLast error:\nCuda failure 2 'out of memory'", 2),
        (RuntimeError, "[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory", 0),
        (MemoryError, "Unable to allocate 512 TiB", None),  # numpy's, whose traceback says more than a plan
        (RuntimeError, "mat1 and mat2 shapes cannot be multiplied", None),
        (ConfigError, "out of memory", None),
    ):
        assert failures.out_of_memory(kind(text)) == (None if line is None else text.splitlines()[line])


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator's driver pins")
def test_offload_where_nothing_can_be_pinned(capfd):
    """Tried before FSDP2 does, which would end in an error: here without an accelerator, so torch refuses."""
    assert not strategy.can_pin(GPTNeoX(configs.load(TINY)[0]), 2)
    assert re.search(r"note .* pins no 0.0 GiB, so offload copies through unpinned memory", capfd.readouterr().err)


def test_limits_leave_time_to_say_who_is_missing():
    """The watchdog has looked for the silent rank, at the latest, before an exchange's time is up; one may be behind."""
    looks = {0: ([1, 5, 3, "a"], [2, 5, 3, "a"]), 1: ([1, 4, 3, "b"], [2, 4, 3, "b"])}
    assert watchdog.who_is_missing(looks) == "rank 1 (on b, step 3) is behind"
    for cfg in (Config(), Config(watchdog_seconds=0.5), Config(watchdog_seconds=1e5)):
        period, looking = watchdog.times(cfg.watchdog_seconds)
        assert cfg.watchdog_seconds + period + looking < processes.exchange_seconds(cfg)


def test_the_flight_recorders_file_is_named(tmp_path, monkeypatch):
    """One that was written in the hang: not another rank's, nor one from before."""
    monkeypatch.setenv("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", f"{tmp_path}/trace_")
    assert watchdog.flight_recorder(1, 60) == ""
    (tmp_path / "trace_1").touch()
    assert watchdog.flight_recorder(1, 60).endswith(f"{tmp_path}/trace_1") and watchdog.flight_recorder(0, 60) == ""
    os.utime(tmp_path / "trace_1", (0, 0))
    assert watchdog.flight_recorder(1, 60) == ""


def group_timeouts(rank: int) -> None:
    cfg = Config(parallel="fsdp", shard_size=2, compile_model=False, watchdog_seconds=700.0)
    env = processes.start(cfg)
    for name in ("replicate", "shard"):
        gloo = strategy.device_mesh(cfg, env).get_group(name)._get_backend(env.device)
        assert gloo.options._timeout.total_seconds() == 1400, name
    processes.stop()  # rank 0 serves the store, which the others may still want


def test_all_groups_have_the_timeout_of_the_run():
    """The rows and columns of an HSDP mesh of four ranks: not the half an hour that torch gives them."""
    on_ranks(4, group_timeouts)


def test_left_over_variables_start_one_process(faulty, tmp_path):
    """LOCAL_RANK and WORLD_SIZE of another launch, no RANK: said, and each save is there. With RANK alone: exit 2."""
    run = faulty("save_steps=3", "save_total_limit=0", nproc=1, LOCAL_RANK="1", WORLD_SIZE="2")
    assert run.wait() == [0] and "WORLD_SIZE=2, LOCAL_RANK=1 without RANK" in run.text, run.text
    assert len(selection.names(tmp_path / "out")) == 4
    run = faulty(nproc=1, RANK="0")
    assert run.wait() == [2] and run.text.startswith("error: RANK=0 is set and WORLD_SIZE is not"), run.text


FAILS = f'#!/bin/sh\ncase "$*" in *--version*) exec {shutil.which("g++")} "$@";; esac\n'
FAILS += "echo 'x.cpp:1: fatal error: Python.h: No such file' >&2\nexit 1\n"


@pytest.mark.skipif(not shutil.which("g++"), reason="one of the compilers is g++ at first")
@pytest.mark.parametrize(
    "compiler, cache, words",
    [
        ("", "", r"needs a compiler, and none is found \(g\+\+\); .*apt-get install g\+\+.*compile_model=false"),
        (FAILS, "", r"torch could not compile the model: .*Python.h.*apt-get install g\+\+.*compile_model=false"),
        ("real", "file/below", r"file/below, which cannot be written: .*TORCHINDUCTOR_CACHE_DIR"),
    ],
)
def test_what_compiling_lacks_is_said(faulty, tmp_path, compiler, cache, words):
    """No compiler, one that fails, no place for what it makes: one sentence, 2 from both ranks."""
    (tmp_path / "file").touch()
    (tmp_path / "bin").mkdir()
    for name in ("git", "sh", "as", "ld"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    if compiler == "real":
        (tmp_path / "bin/g++").symlink_to(shutil.which("g++"))
    elif compiler:
        (tmp_path / "bin/g++").write_text(compiler)
        (tmp_path / "bin/g++").chmod(0o755)
    env = {"PATH": str(tmp_path / "bin"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / (cache or "cache"))}
    run = faulty("compile_model=true", **env)
    assert run.wait() == [2, 2] and re.search(words, run.text) and "Traceback" not in run.text, run.text


def test_time_that_is_up_stops_a_run(faulty, tmp_path):
    """stop_after_minutes: saved, 75, and the reason is said."""
    run = faulty("stop_after_minutes=0.1", "max_steps=1000000", "logging_steps=0")
    assert run.wait() == [75, 75] and "stop_after_minutes=0.1 have passed" in run.text, run.text
    assert manifest.step_of(selection.names(tmp_path / "out")[0]) == stopped_at(run.text)


@pytest.mark.parametrize("cloud", ["GCE_METADATA_HOST", "AWS_EC2_METADATA_SERVICE_ENDPOINT"])
def test_a_notice_of_preemption_stops_a_run(faulty, tmp_path, cloud):
    """Google's metadata server answers FALSE, and TRUE once the run is under way; AWS's wants a token and answers 404,
    and a notice: saved, 75."""
    asked, gone, aws = [], threading.Event(), cloud.startswith("AWS")

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Metadata-Flavor"] or self.headers["X-aws-ec2-metadata-token"]))
            if len(asked) > 1:
                gone.wait(GUARD)
            over = gone.is_set()
            self.answer(b"TRUE" if over else b"FALSE", 404 if aws and not over else 200)

        def do_PUT(self):
            self.answer(b"a token" if int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"]) else b"")

        def answer(self, text, code=200):
            self.send_response(code)
            self.send_header("ETag", "e1")
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"{'http://' * aws}127.0.0.1:{server.server_address[1]}"
        run = faulty("max_steps=1000000", nproc=2, **{cloud: host})
        run.wait_for("Step 3: ")
        gone.set()
        assert run.wait() == [75, 75], run.text
        server.shutdown()
    assert "being taken away" in run.text and selection.names(tmp_path / "out")
    assert {header for _, header in asked} == {"a token" if aws else "Google"}
    paths = {path.split("&last_")[0] for path, _ in asked}
    google = "/computeMetadata/v1/instance/preempted?wait_for_change=true&timeout_sec=300"
    assert paths == {"/latest/meta-data/spot/instance-action" if aws else google}
    assert aws or asked[1][0].endswith("last_etag=e1")


def test_answers_that_are_no_http_end_no_watch(monkeypatch):
    """A metadata server that is restarted answers with half of a reply: it is asked again, and the notice is seen."""
    monkeypatch.setattr(signals.time, "sleep", lambda _: None)
    answers, asked = iter([http.client.BadStatusLine("?"), http.client.IncompleteRead(b""), TimeoutError()]), []

    def notice(_):
        for error in answers:
            raise error

    signals.wait_for_notice(notice, "", asked.append)
    assert asked == ["this machine is being taken away (preempted)"]


def test_the_slow_one_is_named():
    """Rates of three GPUs, worked out by hand: one below its like, one pair below the ceiling; and a tiny measurement."""
    rows = [{"product": 700.0, "to GPU": 50.0}, {"product": 690.0, "to GPU": 20.0}, {"product": 500.0, "to GPU": 51.0}]
    names = ["rank 0", "rank 1", "rank 2"]
    assert hardware.describe(rows, names, "unknown") == [
        "product 500 to 700 TFLOP/s, to GPU 20 to 51 GB/s",
        "rank 2 is slow: product 500 TFLOP/s, the others 700",
        "rank 1 is slow: to GPU 20 GB/s, the others 51",
    ]
    _, first, *_ = hardware.describe(rows[:2], names[:2], "NVIDIA H100 80GB HBM3")
    assert first == "rank 0 is slow: product 700 TFLOP/s, such a GPU in good health 794"
    assert hardware.gpu(torch.device("cpu"), n=64)["product"] > 0
