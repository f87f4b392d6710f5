"""Checkpoints: what is saved is what was there, in any layout, whatever dies, and nothing else is ever loaded."""

import builtins
import hashlib
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import small_disk
from launch import Run, on_ranks, until
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import ckpt
from configs import ConfigError
from refocused import files, locks
from refocused.checkpoint import atomic, manifest, selection, tensors
from refocused.checkpoint.saver import Saver
from refocused.checkpoint.selection import choose
from refocused.run import processes

LAYOUTS = [("one", 1), ("ddp", 2), ("fsdp", 2), ("ddp", 4), ("fsdp", 4)]


class Toy(nn.Module):
    """Tied embeddings over a vocabulary that 2 and 4 do not divide, fewer biases than ranks, one frozen layer."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.embed_in = nn.Embedding(51, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.narrow = nn.Linear(width, 3)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.embed_out = nn.Linear(width, 51, bias=False)
        self.embed_out.weight = self.embed_in.weight


def build(layout: str = "one", world: int = 1, width: int = 8) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    model = Toy(width)
    if layout == "fsdp":
        mesh = init_device_mesh("cpu", (world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif layout == "ddp":
        model = DistributedDataParallel(model)
    matrices = [p for key, p in model.named_parameters() if "blocks" in key and p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    return model, [torch.optim.AdamW(rest, fused=True), torch.optim.Muon(matrices)]


def build_tree(*args, seed: int = 0) -> dict[str, torch.Tensor]:
    model, optimizers = build(*args)
    tree = tensors.state_tree(model, *optimizers)
    fill(tree, seed)
    return tree


def fill(tree: dict[str, torch.Tensor], seed: int) -> None:
    """Values that are a function of the seed and the name, whatever the layout."""
    for key, t in tree.items():
        full = torch.rand(t.shape, generator=torch.Generator().manual_seed(seed + zlib.crc32(key.encode())))
        if isinstance(t, DTensor):
            full = distribute_tensor(full, t.device_mesh, t.placements, src_data_rank=None).to_local()
            t = t.to_local()
        t.copy_(full)


def digest(tree: dict[str, torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for key in sorted(tree):
        t = tree[key].full_tensor() if isinstance(tree[key], DTensor) else tree[key]
        sha.update(key.encode() + t.contiguous().numpy().tobytes())
    return sha.hexdigest()


def bit_flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.fixture(scope="module")
def alone():
    """A process group of one, as train.py has without torchrun."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.set_num_threads(threads)


def save(output_dir: Path, step: int, seed: int = 0, width: int = 8, **settings) -> Path:
    """One complete checkpoint of a Toy, by a process group of one."""
    tree = build_tree("one", 1, width, seed=seed)
    saver = Saver(output_dir, **settings)
    saver.save(manifest.name(0, step, 1), tree, {"step": step, "tokens": 1000 * step, "loss": 1.5})
    assert saver.close() is None
    return output_dir / manifest.name(0, step, 1)


@pytest.fixture
def two(alone, tmp_path) -> tuple[Path, Path]:
    """Checkpoints at steps 1 and 2."""
    return save(tmp_path, 1), save(tmp_path, 2)


def _in_group(rank: int, layout: str, world: int, folder: Path, function: Callable, *args) -> None:
    """function(rank, tree, *args) in a process group of its own, whose ranks meet in the folder."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/{function.__name__}-{layout}{world}", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    function(rank, build_tree(layout, world), *args)
    dist.barrier()
    dist.destroy_process_group()


def _save(rank: int, tree: dict[str, torch.Tensor], folder: Path, async_save: bool) -> None:
    fill(tree, 7)
    saver, history = Saver(folder, async_save=async_save), [1.0]
    saver.save(manifest.name(0, 1, 1), tree, {"step": 1, "history": history})
    saver.before_update()
    fill(tree, 8)  # the save is of the values at the call, whatever happens behind it
    history.append(2.0)
    assert saver.close() is None


def _load(rank: int, tree: dict[str, torch.Tensor], folders: list[Path], expected: str) -> None:
    for folder in folders:
        fill(tree, 9)
        choice = processes.on_rank_0(choose, folder, "latest")
        assert choice.state["history"] == [1.0]
        tensors.load(choice.path, tree)
        assert digest(tree) == expected, folder


def _layouts(rank: int, folder: Path, made: dict[tuple, Path], expected: str) -> None:
    for layout, world in [(layout, world) for layout, world in LAYOUTS if rank < world]:
        _in_group(rank, layout, world, folder, _save, made[layout, world], layout != "one")
    until(lambda: len(list(folder.glob("*/*/MANIFEST.json"))) == len(LAYOUTS))
    for layout, world in [(layout, world) for layout, world in LAYOUTS if rank < world]:
        _in_group(rank, layout, world, folder, _load, [*made.values()], expected)


def test_every_layout_loads_into_every_other(tmp_path):
    """One process, DDP and FSDP2 at 2 and 4: each saves, each loads each; all parameters and moments bit for bit."""
    made = {(layout, world): tmp_path / f"{layout}{world}" for layout, world in LAYOUTS}
    on_ranks(4, _layouts, tmp_path, made, digest(build_tree(seed=7)))
    sizes = []
    for (_, world), folder in made.items():
        shards = [file["size"] for file in manifest.verify(folder / manifest.name(0, 1, 1))["files"].values()][:-1]
        sizes.append(sum(shards))
        assert len(shards) == world, "each rank writes a part"
        assert max(shards) < 1.5 * min(shards) + 1000, "the parts are about equal"
    assert max(sizes) < min(sizes) + 20_000, "replicated state is written once"


def _one_rank_fails(rank: int, tree: dict[str, torch.Tensor], folder: Path) -> None:
    processes.on_rank_0(atomic.lock, folder)
    saver = Saver(folder)
    saver.reserve(tree)
    saver.save(manifest.name(0, 1, 1), tree, {})
    assert saver.wait() is None
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    saver.save(manifest.name(0, 2, 1), tree, {})
    error = saver.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "checkpoint-epoch0-step2-files1" in error and "rank 1" in error and "File too large" in error
    dist.barrier()  # rank 0 cleans up behind the error
    assert sorted(os.listdir(folder)) == [".lock", manifest.name(0, 1, 1)], "something is left of the failed save"
    key = next(key for key in tensors.own_part(tree, 1, 2) if "weight" in key)
    kept = tensors.local_part(tree[key]).clone()
    if rank == 1:
        tensors.local_part(tree[key])[0] = float("nan")
    saver.save(manifest.name(0, 2, 1), tree, {})
    saver.before_update()
    tensors.local_part(tree[key]).copy_(kept)
    error = saver.wait()
    assert f"{key} has values that are not finite (rank 1)" in error, error
    saver.save(manifest.name(0, 2, 1), tree, {})
    assert saver.close() is None
    manifest.verify(folder / manifest.name(0, 2, 1))


def _one_node_fails(rank: int, tree: dict[str, torch.Tensor], folder: Path, fails: int) -> None:
    atomic.lock(folder)
    saver = Saver(folder)
    saver.save(manifest.name(0, 1, 1), tree, {}, validated=False)
    if rank == fails:  # a file lies where the manifest will go, before the save is confirmed on any rank
        until(lambda: list(folder.glob(".tmp-*/*.safetensors")))
        (next(folder.glob(".tmp-*")) / manifest.MANIFEST).touch()
    dist.barrier()
    saver.confirm(True)
    error = saver.close()
    assert error and "saving checkpoint-epoch0-step1-files1: FileExistsError" in error and f"(rank {fails})" in error
    assert os.listdir(folder) == [".lock"]


def _failures(rank: int, tree: dict[str, torch.Tensor], folder: Path) -> None:
    _one_rank_fails(rank, tree, folder / "disk")
    for fails in (0, 1):
        _one_node_fails(rank, tree, folder / f"node{rank}-{fails}", fails)


def test_what_fails_on_one_rank_fails_on_all(tmp_path):
    """A full disk, or a value that is not finite, of one of two ranks fails the save and nothing else. Of two nodes without
    a shared disk one cannot write its manifest: both say why, and neither keeps anything of it, or would wait for it."""
    on_ranks(2, _in_group, "fsdp", 2, tmp_path, _failures, tmp_path)


@pytest.mark.parametrize("at_once", [False, True])
def test_steps_go_on_while_a_save_is_copied(alone, tmp_path, monkeypatch, at_once):
    """A saving thread that begins late: forward and backward go on, the update waits, and the save is a clone taken at the
    call. With REFOCUSED_COPY_AT_ONCE the update waits for nothing."""
    if at_once:
        monkeypatch.setenv("REFOCUSED_COPY_AT_ONCE", "1")
    model, optimizers = build(width=64)
    tree = tensors.state_tree(model, *optimizers)
    fill(tree, 1)
    saver = Saver(tmp_path)
    saver.reserve(tree)
    for step in (1, 2):  # the second save reuses the memory of the first
        before, begins = digest(tree), threading.Event()
        saver._thread.submit(begins.wait)
        saver.save(manifest.name(0, step, 1), tree, {})
        h = model.narrow(model.blocks[1](model.blocks[0](model.embed_in.weight)))
        h.square().sum().backward()
        if not at_once:
            threading.Timer(0.2, begins.set).start()
        saver.before_update()
        for optimizer in optimizers:
            optimizer.step()
        begins.set()
        assert saver.wait() is None and digest(tree) != before
        saved = build_tree("one", 1, 64)
        tensors.load(tmp_path / manifest.name(0, step, 1), saved)
        assert digest(saved) == before
    saver.close()


def test_tree_names_do_not_depend_on_wrapping(alone):
    """Names of a compiled model's tree are those of the bare model; frozen parameters have no optimizer state, tied
    ones come once, and what creating the state made is what a first step makes."""
    model, optimizers = build()
    tree = tensors.state_tree(model, *optimizers)
    assert tree.keys() == tensors.state_tree(torch.compile(model), *optimizers).keys()
    assert "model.embed_in.weight" in tree and "model.embed_out.weight" not in tree
    assert not any(key.startswith("optim.") and "frozen" in key for key in tree)
    fresh = build()[1]
    for optimizer in fresh:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()
    for ours, theirs in zip(optimizers, fresh, strict=True):
        for mine, other in zip(ours.state.values(), theirs.state.values(), strict=True):
            assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {k: (v.shape, v.dtype) for k, v in other.items()}


def _die_at(n: int) -> None:
    """Make this process kill itself instead of performing its n-th file operation."""
    count = itertools.count(1)

    def counting(function: Callable, is_one=lambda *a: True) -> Callable:
        def call(*args, **kwargs):
            if is_one(*args) and next(count) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for operation in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "chmod"):
        setattr(os, operation, counting(getattr(os, operation)))
    io.open = builtins.open = counting(builtins.open, lambda path, mode="r", *a: mode[0] in "xwa")


def _in_child(function: Callable, *args, **settings) -> int:
    """Exit status of a forked child: 0, 1, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            function(*args, **settings)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _save_alone(folder: Path, step: int, seed: int, die_at: int = 0, file_limit: int = 0, **settings) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    tree = build_tree(seed=seed)
    saver = Saver(folder, **settings)
    _die_at(die_at)
    if file_limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills in the middle of a write
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    saver.save(manifest.name(0, step, 1), tree, {"seed": seed})
    assert saver.wait() is None


def _recover_alone(folder: Path, die_at: int) -> None:
    _die_at(die_at)
    atomic.lock(folder)


def _crash_everywhere(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    build()  # imports what an optimizer imports, once for all children
    survived = {1: 0, 2: 0}  # by the seed of the old and of the new
    for step, settings in [(1, {}), (2, {"save_total_limit": 1})]:  # over the same name; as the next, with pruning
        for n in itertools.count(1):
            here = folder / f"{step}-{n}"
            here.mkdir(parents=True)
            assert _in_child(_save_alone, here, 1, seed=1) == 0
            died = _in_child(_save_alone, here, step, seed=2, die_at=n, **settings) == -signal.SIGKILL
            clean_ups = itertools.count(1)
            while _in_child(_recover_alone, here, next(clean_ups)) == -signal.SIGKILL:  # and in the clean-up too
                pass
            choice = choose(here, "latest")
            survived[choice.state["seed"]] += 1
            assert not choice.passed_over, choice.passed_over
            assert {n for n in os.listdir(here) if n != ".lock"} <= {manifest.name(0, 1, 1), manifest.name(0, 2, 1)}
            shutil.rmtree(here)
            if not died:
                break
        assert choice.state["seed"] == 2 and n > 12, f"only {n - 1} operations were seen"
    assert survived[1] > 10 and survived[2] > 5
    for limit in (100, 1000, 4000):  # bytes of a file
        here = folder / f"write-{limit}"
        here.mkdir()
        assert _in_child(_save_alone, here, 1, seed=1) == 0
        assert _in_child(_save_alone, here, 2, seed=2, file_limit=limit) == -signal.SIGXFSZ
        atomic.recover(here)
        assert choose(here, "latest").state["seed"] == 1 and os.listdir(here) == [manifest.name(0, 1, 1)]


def test_killed_at_every_file_operation(tmp_path):
    """SIGKILL before each file operation of a save and of the clean-up after it, and inside writes: the old or the new
    checkpoint is complete, nothing else is left."""
    on_ranks(1, _crash_everywhere, tmp_path)


def test_500_bit_flips(two):
    """Each of 500 random bit flips over all files of the newer checkpoint: found, and the older one is chosen."""
    older, newer = two
    dice = random.Random(0)
    for i in range(500):
        file = dice.choice(sorted(newer.iterdir()))
        bit = dice.randrange(8 * file.stat().st_size)
        bit_flip(file, bit)
        choice = choose(newer.parent, "latest")
        assert choice.path == older, f"flip {i}: bit {bit} of {file.name} was not noticed"
        assert [name for name, reason in choice.passed_over if str(newer) in reason] == [newer.name]
        bit_flip(file, bit)
    assert choose(newer.parent, "latest").path == newer


def _cut(folder: Path) -> None:
    os.truncate(next(folder.glob("*.safetensors")), 100)


def _newer_format(folder: Path) -> None:
    told = manifest.read_manifest(folder) | {"format": manifest.FORMAT + 1}
    (folder / manifest.MANIFEST).write_bytes(manifest.encode_manifest(told))


def _link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


DAMAGES = {
    "truncated": (_cut, "safetensors has 100 bytes instead of"),
    "missing": (lambda d: next(d.glob("*.safetensors")).unlink(), "safetensors is missing"),
    **{
        f"extra {name}": (lambda d, name=name: (d / name).touch(), f"{name} is an extra file")
        for name in ("note.json", ".metadata", "__0_0.distcp", "model.pt", "extra.safetensors")
    },
    "no state": (lambda d: (d / manifest.STATE).unlink(), "state.json is missing"),
    "link": (lambda d: _link(d / manifest.STATE, "/etc/hostname"), "state.json is not a plain file"),
    "cannot be read": (
        lambda d: _link(d / manifest.MANIFEST, manifest.MANIFEST),
        "cannot read .*MANIFEST.json: Too many",
    ),
    "no manifest": (lambda d: (d / manifest.MANIFEST).unlink(), "has no MANIFEST.json"),
    "empty manifest": (lambda d: os.truncate(d / manifest.MANIFEST, 0), "MANIFEST.json is damaged"),
    "malformed manifest": (lambda d: (d / manifest.MANIFEST).write_text("[" * 100_000), "MANIFEST.json is damaged"),
    "foreign manifest": (lambda d: (d / manifest.MANIFEST).write_text('{"manifest": []}'), "MANIFEST.json is damaged"),
    "newer format": (_newer_format, "format 2, this code reads up to 1; update"),
    "another's manifest": (
        lambda d: shutil.copy(d.with_name(manifest.name(0, 1, 1)) / manifest.MANIFEST, d),
        "holds the manifest of checkpoint-epoch0-step1-files1",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(two, damage, capsys):
    """Each kind of damage: named when asked for, passed over by latest, exit code 66 on the command line."""
    older, newer = two
    break_it, message = DAMAGES[damage]
    break_it(newer)
    with pytest.raises(ckpt.CheckpointError, match=message) as caught:
        choose(newer.parent, newer.name)
    assert f"has {newer.name}, {older.name}" in str(caught.value)
    choice = choose(newer.parent, "latest")
    assert choice.path == older and choice.passed_over[0][0] == newer.name
    assert ckpt.main(["verify", str(newer.parent)]) == 66 and re.search(message, capsys.readouterr().out)
    shutil.rmtree(older)
    shutil.copytree(newer, older, symlinks=True)
    with pytest.raises(ckpt.CheckpointError, match="no checkpoint in .* can be loaded:\n"):
        choose(newer.parent, "latest")


def test_resume_words(two, tmp_path):
    """resume as none, latest, name and path, with and without checkpoints there: the choice or the error."""
    older, newer = two
    other, empty = tmp_path / "other", tmp_path / "empty"
    save_id = manifest.read_manifest(newer)["save_id"]
    assert choose(tmp_path, "latest") == (newer, {"step": 2, "tokens": 2000, "loss": 1.5}, [], save_id)
    assert choose(tmp_path, older.name).path == choose(other, str(older)).path == older
    assert choose(other, os.path.relpath(older) + "/").state["step"] == 1
    assert choose(empty, None).path is choose(empty, "latest").path is None
    for folder, resume, words in (
        (tmp_path, None, f"already has 2 checkpoints, the last one {newer.name}; .*resume=latest"),
        (tmp_path, "checkpoint-epoch0-step3-files1", f"no such directory.* has {newer.name}, {older.name}"),
        (tmp_path, str(tmp_path), f"a folder of checkpoints; name one, {newer}, or set output_dir="),
        (tmp_path, str(tmp_path.parent), "not a complete checkpoint"),
        (empty, "any", "has no checkpoints"),
        (empty, f"{empty}/latest", "no such directory"),
    ):
        with pytest.raises(ConfigError if resume is None else ckpt.CheckpointError, match=words):
            choose(folder, resume)
    save(tmp_path, 10)
    assert choose(tmp_path, "latest").path.name == manifest.name(0, 10, 1), "steps are numbers, not text"


def test_other_model_is_named(two):
    """A checkpoint of another size: the first names and shapes that differ, and not a value changed."""
    wide, model = build_tree("one", 1, 16), build()[0]
    before, same = digest(wide), tensors.state_tree(model)
    for tree, message in (
        (wide, r"model.blocks.0.bias is \[8\] float32 there, \[16\] .* and \d+ more"),
        ({key: t for key, t in wide.items() if key != "optim.step.narrow.bias"}, "another model or optimizer"),
        (build_tree() | {"model.new.bias": torch.zeros(3)}, r"model.new.bias is absent there, \[3\] float32 here$"),
        (same | {"model.narrow.bias": torch.zeros(3).double()}, r"is \[3\] float32 there, \[3\] float64 here"),
    ):
        with pytest.raises(ckpt.CheckpointError, match=message):
            tensors.load(two[1], tree)
    assert digest(wide) == before
    tensors.load(two[1], same)  # the weights alone
    fill(tree := tensors.state_tree(build()[0]), 0)
    assert digest(same) == digest(tree)


def test_a_lock_and_its_leader(tmp_path, monkeypatch):
    """A lock is kept from all but another node of its run on the same disk: also where each node sees its own locks
    alone, and knows by what the first has written that the disk is not its own."""
    me = atomic.lock(tmp_path)
    for leader in (None, "host elsewhere, pid 1"):
        with pytest.raises(ConfigError, match=f"pid {os.getpid()}"):
            atomic.lock(tmp_path, leader)
    assert atomic.lock(tmp_path, me) == me
    monkeypatch.setattr(locks.fcntl, "flock", lambda *_: None)
    (alone := tmp_path / "alone").mkdir()
    (alone / ".lock").write_text("host first, pid 1\n")
    assert atomic.lock(alone, "host first, pid 1") == "host first, pid 1" and not atomic.holds(alone)
    assert (alone / ".lock").read_text() == "host first, pid 1\n"
    assert atomic.lock(alone, "host other, pid 1") != "host other, pid 1" and atomic.holds(alone)


def test_full_disk(alone, tmp_path):
    """A disk without room, seen before the save or filled during it: that save fails, the one before stands, the next
    is good again; a disk that is full at the start is found by lock() or check_space()."""
    with small_disk(disk := tmp_path / "disk", "4m") as mounted:
        if not mounted:
            pytest.skip("mounting needs root")
        first = save(disk, 1, width=64)
        tree = build_tree("one", 1, 256)
        saver = Saver(disk)
        saver.reserve(tree)
        filler = disk / "filler"
        filler.write_bytes(bytes(2 << 20))
        saver.save(manifest.name(0, 2, 1), tree, {})
        assert "GB free" in saver.wait()
        with pytest.raises(ConfigError, match="lower save_total_limit"):
            atomic.check_space(disk, sum(t.nbytes for t in tree.values()))
        filler.unlink()
        # the tensors fit, the state does not
        saver.save(manifest.name(0, 2, 1), tree, {"history": list(range(1 << 20))})
        assert "No space left on device" in saver.wait() and saver.wait() is None
        assert os.listdir(disk) == [first.name] and manifest.verify(first)
        saver.save(manifest.name(0, 2, 1), tree, {})
        assert saver.close() is None and manifest.verify(disk / manifest.name(0, 2, 1))
        with pytest.raises(OSError, match="No space"), open(filler, "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
            atomic.lock(disk)


def test_retention(alone, tmp_path):
    """Which checkpoints remain after each save, with a limit of 2, every 4th step kept, damage and a step back."""
    settings = {"save_total_limit": 2, "keep_every": 4}
    left = lambda: sorted(manifest.step_of(n) for n in selection.names(tmp_path))  # noqa: E731
    for step in range(1, 8):
        save(tmp_path, step, **settings)
    assert left() == [4, 6, 7]
    _cut(tmp_path / manifest.name(0, 7, 1))
    (tmp_path / manifest.name(0, 6, 1) / manifest.MANIFEST).unlink()
    save(tmp_path, 8, **settings)
    assert left() == [4, 6, 8], "what is damaged goes, what cannot be known for ours does not"
    shutil.rmtree(tmp_path / manifest.name(0, 6, 1))
    for step in (9, 10):
        save(tmp_path, step, **settings)
    save(tmp_path, 5, **settings)
    assert left() == [4, 5, 8, 10], "the new way's save is the newest, of the old way the last one is still there"
    save(tmp_path, 6, **settings)
    assert left() == [4, 5, 6, 8] and not [n for n in os.listdir(tmp_path) if n.startswith(".tmp")]


def test_going_back_is_a_branch(alone, tmp_path, capsys):
    """After a save of an earlier step: latest is that save; what lies ahead of it is listed as abandoned, passed over
    for what the new way came from, and the first to go. Equal generations go by step."""
    for step in (10, 20, 30, 40):
        path = save(tmp_path, step)
        told = {**manifest.read_manifest(path), "generation": 0}  # of machines that saved at once
        (path / manifest.MANIFEST).write_bytes(manifest.encode_manifest(told))
    saved = [manifest.name(0, step, 1) for step in (10, 20, 25, 30, 40)]
    assert selection.names(tmp_path) == [saved[4], saved[3], saved[1], saved[0]]
    newest = save(tmp_path, 25, save_total_limit=4)
    assert choose(tmp_path, "latest").path == newest
    assert selection.names(tmp_path) == [saved[i] for i in (2, 1, 0, 4)], "30 went first, 10 is what it came from"
    assert ckpt.main(["list", str(tmp_path)]) == 0
    assert [("abandoned" in line) for line in capsys.readouterr().out.splitlines()] == [0, 0, 0, 0, 1]
    _cut(newest)
    choice = choose(tmp_path, "latest")
    assert choice.path.name == saved[1] and choice.passed_over[0][0] == newest.name
    with pytest.raises(ConfigError, match=f"already has 4 checkpoints, the last one {newest.name}"):
        choose(tmp_path, None)
    assert manifest.read_manifest(save(tmp_path, 40))["generation"] == 2, "the same step again is later than both"
    assert choose(tmp_path, "latest").path.name == saved[4]


def test_links_are_unlinked_and_their_targets_untouched(alone, tmp_path):
    """A checkpoint that was moved away and linked to is loaded, replaced and pruned as any other; what it points to
    stays as it was, byte for byte. So it is with links that lie where saves leave theirs, and with the lock's."""
    out, far = tmp_path / "out", tmp_path / "far"
    for step in (1, 2, 3):
        far.mkdir(exist_ok=True)
        shutil.move(save(out, step), far)
        (out / manifest.name(0, step, 1)).symlink_to(Path("../far", manifest.name(0, step, 1)))
    (far / "note").write_text("mine")
    for entry in (".tmp-0123456789abcdef-link", ".tmp-link", ".old-0123456789ab0123-" + manifest.name(0, 9, 1)):
        (out / entry).symlink_to(far)
    (out / ".tmp-0123456789abcdef-file").touch()
    foreign = [".old-", ".old-x", ".tmp-link", ".tmp-x"]  # not names that a save gives
    for entry in foreign:
        (out / entry).mkdir(exist_ok=True)
    before = {path: path.is_file() and path.read_bytes() for path in far.rglob("*")}
    atomic.lock(out)  # cleans up
    assert choose(out, manifest.name(0, 2, 1)).state["step"] == 2
    (out / manifest.name(0, 9, 1)).unlink()  # put back: a link is a checkpoint too
    save(out, 3)
    files.notes.clear()
    save(out, 4, save_total_limit=1)
    assert f"deleted {manifest.name(0, 2, 1)} (the link alone: what it leads to stays)" in files.notes
    assert sorted(os.listdir(out)) == [".lock", *foreign, manifest.name(0, 4, 1)]
    assert {path: path.is_file() and path.read_bytes() for path in far.rglob("*")} == before
    other = tmp_path / "other"
    other.mkdir()
    (other / ".lock").symlink_to(far / "note")
    with pytest.raises(ConfigError, match=r"cannot be written: its .*\.lock is a link"):
        atomic.lock(other)
    assert (far / "note").read_text() == "mine"


def test_a_run_stops_when_its_lock_is_gone(shards, tmp_path):
    """.lock removed, or output_dir, while it trains: the next save is refused, says why, and writes nothing."""
    for what in (".lock", "."):
        folder = tmp_path / f"run{what}"
        run = Run([f"data_dir={shards}", "max_steps=1000000", "save_steps=20"], 1, folder)
        run.wait_for("Step 25: ")
        gone = folder / "out" / what
        # at once, as a save may be at work in it
        (folder / "out").rename(folder / "removed") if what == "." else gone.unlink()
        assert run.wait() == [2] and "no longer this run's own: its .lock was removed" in run.text
        assert not (folder / "out").exists() if what == "." else gone.parent.exists()


def test_a_folder_that_is_lost_during_a_save(alone, tmp_path):
    """Another run has output_dir before a save is committed: nothing appears there, and what that run writes stays."""
    final = tmp_path / manifest.name(0, 1, 1)
    atomic.lock(tmp_path)
    saver = Saver(tmp_path)
    saver.save(final.name, build_tree(), {}, validated=False)
    (tmp_path / ".lock").write_text("host other, pid 1\n")
    (theirs := atomic.unfinished(final, "ab" * 8)).mkdir()
    saver.confirm(True)
    assert "no longer this run's own" in saver.close()
    assert theirs.is_dir() and not final.exists()


def test_a_file_that_is_swapped_between_check_and_load(two):
    """Another file of the same size and times under the name of one that was verified: found after the load."""
    choice, tree = choose(two[0].parent, two[1].name), build_tree()
    tensors.load(choice.path, tree)
    manifest.check_unchanged(choice.path)
    shard = next(two[1].glob("*.safetensors"))
    times = shard.stat()
    bit_flip(shard, 8 * times.st_size - 1)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ckpt.CheckpointError, match=f"{shard.name} was changed while it was being loaded"):
        manifest.check_unchanged(choice.path)


def test_parts_cover_their_tensor_once(two):
    """A tensor that is cut into rows loads; a part missing in the middle, or over another: refused before a value changes."""
    key, shard = "model.embed_in.weight", next(two[1].glob("*.safetensors"))
    whole = load_file(shard)
    rows, tree = whole.pop(key), build_tree(seed=5)  # (51, 8)
    save_file(whole, shard)

    def load(*pieces: tuple[int, int]) -> None:
        for i, (first, last) in enumerate(pieces):
            note = {"DCP_SHARDING_INFO": json.dumps({key: {"saved_offsets": [first, 0]}})}
            save_file({key: rows[first:last].contiguous()}, two[1] / f"shard-00001-{i:05d}.safetensors", note)
        tensors.load(two[1], tree)

    load((0, 20), (20, 45), (45, 51))
    assert digest(tree) == digest(build_tree())
    fill(tree, 5)
    for middle, what in (((30, 45), "are 328 of its 408"), ((10, 35), "overlap")):
        with pytest.raises(ckpt.CheckpointError, match=f"parts of {key} {what}"):
            load((0, 20), middle, (45, 51))
        assert digest(tree) == digest(build_tree(seed=5))


def test_forged_state_and_header(two):
    """What is no state, or no safetensors header, though a manifest vouches for it: refused."""
    for state in (None, True, -1, 1e400, "", [], [[]], {"data": {}}, {"step": 2, "data": {}, "tokens": 1}):
        with pytest.raises(ckpt.CheckpointError, match="it cannot be used"):
            manifest.decode_state(json.dumps(state).encode(), "it")
    shard = next(two[1].glob("*.safetensors"))
    content, texts = shard.read_bytes(), (b"[" * 100_000, b"\xff", b"", b"[]", b'{"x": {}}')
    whole = [len(text).to_bytes(8, "little") + text + content for text in texts]
    for forged in (*whole, b"", content[:7], b"\xff" * 8 + content[8:], content[:100]):
        shard.write_bytes(forged)
        with pytest.raises(ckpt.CheckpointError, match=f"{shard.name} is damaged|another model"):
            tensors.load(two[1], build_tree())
