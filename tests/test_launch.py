"""The launcher and its environment: what it is told, what it tells its ranks, and what it says of how they ended."""

import os
import re
import shutil
import signal
import socket
import subprocess

import launch
import pytest
from launch import GUARD, Launch, stopped_at, train

from configs import ConfigError
from refocused import entry
from refocused.checkpoint import manifest, selection
from refocused.run import environment, exits, processes, signals
from refocused.run import launch as launcher

WHOLE = environment.variables(1, 4, 29500)


def test_launch_variables_are_whole():
    """With RANK each variable that is missing or makes no sense is named with its value, its rule and the way out."""
    for change, words in (
        ("RANK=", "RANK= is set and RANK is empty"),
        ("RANK=4", "RANK=4 must be a whole number from 0 to 3"),
        ("WORLD_SIZE", "RANK=1 is set and WORLD_SIZE is not"),
        ("WORLD_SIZE=2.5", "WORLD_SIZE=2.5 must be a whole number from 1 to"),
        ("WORLD_SIZE=" + "9" * 5000, "must be a whole number"),
        ("LOCAL_RANK", "LOCAL_RANK is not"),
        ("LOCAL_RANK=3", "RANK=1 cannot have LOCAL_RANK=3: .*CUDA_VISIBLE_DEVICES"),
        ("LOCAL_WORLD_SIZE=0", "LOCAL_WORLD_SIZE=0 must be a whole number from 1 to 4"),
        ("MASTER_ADDR", "MASTER_ADDR is not; torchrun sets"),
        ("MASTER_PORT=99999", "MASTER_PORT=99999 must be a whole number from 1 to 65535"),
    ):
        key, is_set, value = change.partition("=")
        with pytest.raises(ConfigError, match=words):
            environment.read({k: v for k, v in WHOLE.items() if k != key} | ({key: value} if is_set else {}))


def test_launch_variables_that_are_enough():
    """Whole, of a process for each node, and left over from another launch, which is a process alone."""
    assert environment.read(WHOLE).address == ("127.0.0.1", 29500) and environment.read(WHOLE).local_rank == 1
    bare = environment.read({k: v for k, v in WHOLE.items() if "LOCAL" not in k})
    assert (bare.rank, bare.world_size, bare.local_rank, bare.local_world_size) == (1, 4, 0, 1)
    left = environment.read({"WORLD_SIZE": "", "LOCAL_RANK": "1", "MASTER_PORT": "x", "TORCHELASTIC_RUN_ID": "a"})
    assert left == environment.Launch(left_over="WORLD_SIZE=, LOCAL_RANK=1")
    several = environment.read({**WHOLE, "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3"})
    with pytest.raises(ConfigError, match="--max-restarts=3 on 2 nodes"):
        processes.join(several, "gloo", None)


def launched(argv: list[str]) -> int:
    return entry.run(launcher.launch, argv)


SCRIPT = "import os\nprint('world', os.environ['WORLD_SIZE'], flush=True)\n'DIE' in os.environ and os._exit(1)"
NODE = "--nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:FREE"


@pytest.mark.parametrize(
    "flags, env, code, words",
    [
        ("--nproc_per_node=two", "", 2, "error: --nproc_per_node=two is no number from 1 on, gpu or cpu"),
        ("", "PET_NNODES=0", 2, "error: --nnodes=0 is no number from 1 on"),
        ("--rdzv_backend=foo", "", 2, "torchrun ended with 2: .*foo"),
        ("--master_port=TAKEN", "", 2, "torchrun ended with 2: .*choose another --master_port"),
        ("--nproc_per_node=gpu --standalone", "", 0, "there is no GPU: one process .*world 1"),
        ("--standalone", "PET_NPROC_PER_NODE=2", 0, "world 2"),
        ("--standalone", "DIE=1", 70, "launch: rank 0 ended with 70: it ended without a message; the lines above"),
        (f"{NODE} --rdzv_conf=is_host=0,read_timeout=2", "", 70, "torchrun ended with 70: no answer at the endpoint"),
        (f"{NODE} --rdzv_conf=join_timeout=2 --local_addr=127.0.0.1", "", 70, "the other nodes did not start in time"),
    ],
)
def test_faults_of_the_launcher_have_words(tmp_path, flags, env, code, words):
    """Flags that mean nothing, a port that is taken, nodes that do not come; PET_* variables and gpu without one work."""
    script, log, free = tmp_path / "script.py", tmp_path / "log", environment.free_port()
    script.write_text(SCRIPT)
    with socket.create_server(("127.0.0.1", 0)) as server:
        flags = flags.replace("TAKEN", str(server.getsockname()[1])).replace("FREE", str(free)).split()
        told = dict([env.split("=")] if env else [])
        codes = launch.join(launch.start(1, free, launched, [*flags, str(script)], env=told, streams=(log, log)))
    text = log.read_text()
    assert codes == [code] and re.search(words, text, re.S | re.M) and "Traceback" not in text, text


def test_the_reason_arrives_though_rank_0_has_not_spoken(tmp_path):
    """Rank 1 finds a mistake in the config while rank 0 still starts: its sentence is there and last, its code is ours."""
    run = Launch(tmp_path, "max_steps=-1", before="if os.environ['RANK'] == '0': time.sleep(3600)")
    assert run.process.wait(GUARD) == 2, run.text
    assert run.text.splitlines()[-1] == "launch: rank 1 ended with 2: error: max_steps=-1 must not be negative"
    assert "Traceback" not in run.text


KILLED = ("pass", "optim.learning_rate = lambda *_: os.kill(os.getpid(), signal.SIGKILL)")
FAILED = ("strategy.build = lambda *_: time.sleep(3600)", "strategy.build = lambda *_: {}['nothing']")


@pytest.mark.parametrize("faults, last", [(KILLED, r"it was killed .*dmesg"), (FAILED, "this is a bug")])
def test_what_broke_first_decides(shards, tmp_path, faults, last):
    """Rank 1 is killed, or fails, while rank 0 waits for it or is stopped by torchrun: rank 1's end is code and words."""
    before = "from refocused.run import optim, signals, strategy\nsignals.StopSignal.PATIENCE = 1\n"
    before += f"exec({list(faults)!r}[int(os.environ['RANK'])])"
    run = Launch(tmp_path, f"data_dir={shards}", before=before)
    assert run.process.wait(GUARD) == 70, run.text
    assert re.search(f"launch: rank 1 ended with 70: {last}", run.text.splitlines()[-1]), run.text


def test_order_of_causes():
    """What no restart mends, then the first in time, then what only followed."""
    lost, late, first = exits.Cause(70, at=1, secondary=True), exits.Cause(75, at=3), exits.Cause(74, at=2)
    mistake = exits.Cause(65, at=9)
    assert exits.in_order([lost, late, first, mistake]) == [mistake, first, late, lost]


def test_the_launcher_knows_that_a_run_was_stopped(shards, tmp_path):
    """SIGTERM to the launcher: 75, not torchrun's 1, and our line is the last."""
    run = Launch(tmp_path, f"data_dir={shards}", "max_steps=1000000")
    run.wait_for("^Step 9: ")
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(GUARD) == 75, run.text
    last = run.text.splitlines()[-1]
    assert re.search(r"launch: rank \d of this node ended with 75: stopped at step", last), run.text
    assert "death signal" not in run.text  # torch's words about it
    assert manifest.step_of(selection.names(tmp_path / "out")[0]) == stopped_at(last)


@pytest.mark.parametrize("ends", ["torchrun", "all"])
def test_a_stop_while_a_node_unpacks(shards, tmp_path, ends):
    """torchrun is killed, or Ctrl-C reaches all and breaks what unpacks: the ranks leave with words, none of them a bug."""
    broken = tmp_path / "broken"
    before = f"""
import data
from refocused.run import signals
signals.StopSignal.PATIENCE = 2
def unpack(cfg):
    print('unpacks', flush=True)
    while not os.path.exists({str(broken)!r}):
        time.sleep(0.1)
    raise RuntimeError('a worker died')
data.unpack = unpack
"""
    run = Launch(tmp_path, f"data_dir={shards}", before=before, module="torch.distributed.run")
    run.wait_for("^unpacks")
    if ends == "torchrun":
        run.process.kill()
        run.wait_for("the torchrun of this process is gone")
    else:
        os.killpg(run.process.pid, signal.SIGINT)
        run.wait_for("stopping before the first step")
        broken.touch()
    run.until(run.gone)
    assert run.text.count(signals.EARLY) >= 2 and "bug" not in run.text, run.text


def test_orphans_leave_saved(shards, tmp_path):
    """torchrun is killed: its ranks save and leave, and the lock is free for the next run."""
    run = Launch(tmp_path, f"data_dir={shards}", "max_steps=1000000", module="torch.distributed.run")
    run.wait_for("^Step 5: ")
    run.process.kill()
    run.until(run.gone)
    assert "the torchrun of this process is gone" in run.text and stopped_at(run.text) >= 5
    train(tmp_path, f"data_dir={shards}", "resume=latest", "max_steps=10", "global_batch_size=8")


KILLED_ONCE = """
from refocused.run import optim
rate = optim.learning_rate
def killed(at, cfg):
    if at == 3 and os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
        os.kill(os.getpid(), signal.SIGKILL)
    return rate(at, cfg)
optim.learning_rate = killed
"""


def test_max_restarts(shards, tmp_path):
    """A rank is killed in step 3: the engine's second attempt goes to the end, on the store that outlived the first."""
    flags = (*launch.STANDALONE, "--max-restarts=1")
    run = Launch(tmp_path, f"data_dir={shards}", "max_steps=6", before=KILLED_ONCE, flags=flags)
    assert run.process.wait(GUARD) == 0 and run.text.count("lost its peers at step") == 1, run.text
    assert "done: 6 steps" in run.text


def without(what: str) -> list[str]:
    """The prefix of a command that lacks something of this machine."""
    read_only = "mount --bind $d $d && mount -o remount,ro,bind $d"
    temporary = f"for d in /tmp /var/tmp /usr/tmp; do test ! -e $d || {{ {read_only}; }} || exit 1; done"
    ways = {"name": ("-u", "hostname no-such-host"), "loopback": ("-n", ":"), "temporary folder": ("-m", temporary)}
    flag, change = ways[what]
    prefix = ["unshare", flag, "sh", "-c", f'{change}; exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("this machine makes no namespaces")
    return prefix


LACKS = [("name", "refocused.run.launch", 0, "done: 10 steps"), ("loopback", "", 2, "ip link set lo up")]
LACKS += [("temporary folder", "", 2, "set TMPDIR to a folder")]


@pytest.mark.parametrize("lack, module, code, words", LACKS)
def test_a_machine_that_lacks(shards, tmp_path, lack, module, code, words):
    """A name that does not resolve: two ranks run as anywhere. A loopback interface, a temporary folder: one sentence, 2."""
    run = Launch(tmp_path, f"data_dir={shards}", prefix=without(lack), module=module, cwd="/proc")
    assert run.process.wait(GUARD) == code and words in run.text and "Traceback" not in run.text, run.text
