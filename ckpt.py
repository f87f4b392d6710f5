"""A run's checkpoints, on disk and in the bucket alike, through two objects; and the commands that handle them.

OUTPUT_DIR/checkpoint-epoch{E}-step{S}-files{F}/
    shard-*.safetensors   parameters and optimizer state, each rank's part in files of about 1 GiB
    state.json            what train.py needs besides tensors: step, tokens, loss, config, ...
    MANIFEST.json         every file's size, CRC-32C and SHA-256; the checkpoint exists when this is valid

folder = Folder(cfg, env)               # takes output_dir
choice, source = folder.choose(log)     # verified on every node; from the bucket if need be
checkpoints = Checkpoints(folder, choice, source, tree, log)    # loads into any strategy and world size
checkpoints.save(name, state, ...)      # behind training, and behind that to the bucket
checkpoints.after_step(step, finite)    # a save counts once a step with its weights was finite
checkpoints.close(log)

python ckpt.py list | verify | pull | push | prune | export | import | average | eval
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # PYTHONSAFEPATH leaves it out
from refocused import entry  # before all others: it says what this machine lacks

BUCKET, HERE = "refocused.bucket.commands", "refocused.commands"
COMMANDS = {
    "list": ("the checkpoints of folders and buckets", f"{BUCKET}:list_command"),
    "verify": ("the same, and every byte is read and compared with its manifest", f"{BUCKET}:verify_command"),
    "pull": ("bring a checkpoint from the bucket", f"{BUCKET}:pull_command"),
    "push": ("publish a checkpoint", f"{BUCKET}:push_command"),
    "prune": ("delete old checkpoints of a bucket, damaged ones, and uploads broken off", f"{BUCKET}:prune_command"),
    "export": ("a checkpoint -> a folder that Transformers loads", f"{HERE}.export:main"),
    "import": ("a GPT-NeoX folder -> a checkpoint to start from", f"{HERE}.importing:main"),
    "average": ("the mean of several checkpoints' weights", f"{HERE}.average:main"),
    "eval": ("loss, perplexity and bits per byte on held-out windows", f"{HERE}.evaluation:main"),
}


def main(argv: list[str]) -> int:
    return entry.dispatch("ckpt.py", COMMANDS, argv)


if __name__ == "__main__":  # before the imports below, torch above all, which `list` does not need
    sys.exit(main(sys.argv[1:]))

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from configs import MODEL, Config, ConfigError, check_same_model
from refocused import files
from refocused.checkpoint import atomic, manifest, selection, tensors
from refocused.checkpoint.manifest import CheckpointError
from refocused.checkpoint.saver import Saver
from refocused.checkpoint.selection import Choice
from refocused.run import exits, processes
from refocused.run.processes import Env
from refocused.shards import tokenizers

if TYPE_CHECKING:
    from refocused.bucket.sync import Syncer
    from refocused.checkpoint.source import Source


class Folder:
    """A run's output_dir, its own until the process ends, and its place in the bucket. Collective.

    Raises ConfigError if it belongs to another run.
    """

    def __init__(self, cfg: Config, env: Env):
        self.env = env
        self.bucket: Any = None  # what a run needs of its bucket, if it has one
        if cfg.bucket_name and cfg.checkpoint_bucket_path:
            from refocused.bucket import start

            self.bucket = start
        # before anything slow: a second run in this folder ends here. Rank 0 first, so that the nodes that come behind it
        # can tell a disk that they share with it, whose lock it holds, from one that another run has
        owner = processes.on_rank_0(atomic.lock, cfg.output_dir)
        owners = processes.on_each_node(env, atomic.lock, cfg.output_dir, owner, but_rank_0=True)
        # once: if output_dir is a link that is turned in mid-run, nothing is saved or deleted where it leads then
        self.cfg = dataclasses.replace(cfg, output_dir=os.path.realpath(cfg.output_dir))
        # disks of their own are good with a bucket: it brings the parts of every checkpoint together
        if not self.bucket and (others := {*owners} - {None, owner}):
            raise ConfigError(
                f"output_dir={cfg.output_dir} is not on one disk for {owner}, and {min(others)}: each would keep a part of "
                "every checkpoint and none could load it; choose a folder on a disk that all nodes share, or set "
                "bucket_name and checkpoint_bucket_path"
            )

    def choose(self, log: Callable[[str], None]) -> tuple[Choice, "Source | None"]:
        """The checkpoint that cfg.resume means, the same on all ranks, every byte of it verified on every node.

        If there is none yet, also the model that init_from names. Raises CheckpointError, ConfigError, BucketError.
        """
        cfg, env = self.cfg, self.env
        if self.bucket and cfg.resume:
            # a machine that vanished may have left the newest save in parts, on disks and in the bucket
            log(self.bucket.bring_together(cfg, functools.partial(processes.on_each_node, env)))
        if self.bucket:
            choice = processes.on_rank_0(self.bucket.choose, cfg)  # one decides, as ranks could see different listings
        else:
            choice = processes.on_rank_0(selection.choose, cfg.output_dir, cfg.resume)
        if not choice.path:  # init_from is looked up now: minutes later the run would have been compiled in vain
            return choice, beginning(cfg.init_from, cfg) if cfg.init_from else None
        # else it is another run's, and so are its logs
        own = processes.on_rank_0(lambda: choice.path.parent == Path(cfg.output_dir))
        if own:  # rank 0's real path means nothing on a node where output_dir is another link
            choice = choice._replace(path=Path(cfg.output_dir, str(choice.name)))
        get = functools.partial(self.bucket.pull, cfg) if self.bucket and own else None
        coming = not choice.state  # from the bucket
        processes.on_each_node(env, selection.bring, choice, get, but_rank_0=not coming)  # verified there, or pulled
        if coming:  # its state is known once its files are here
            choice = choice._replace(state=processes.on_rank_0(lambda: selection.read(choice.path, []).state))
        if "data" not in choice.state:
            raise CheckpointError("the checkpoint holds imported weights only; start a run from it with init_from=PATH")
        if self.bucket and own:  # the trace comes back too: without it there is nothing to compare a replay with
            log(processes.on_rank_0(self.bucket.history.fetch, cfg))
        return choice, None


class Checkpoints:
    """What a run saves, on disk and in the bucket. Collective, but for after_step, poll, news, newest and status."""

    def __init__(
        self,
        folder: Folder,
        choice: Choice,
        source: "Source | None",
        tree: dict[str, Tensor],
        log: Callable[[str], None],
    ):
        """Fill the tree, which is saved from now on, with the checkpoint, or a fresh run's weights with the source's.

        Raises CheckpointError, ConfigError.
        """
        self.cfg, self.env, self.choice, self._tree = folder.cfg, folder.env, choice, tree
        cfg, bucket = self.cfg, folder.bucket
        if choice.path:  # in place, so that a checkpoint needs no memory besides what the run has
            tensors.load(choice.path, tree)
            processes.on_each_node(self.env, manifest.check_unchanged, choice.path)  # since it was verified
        elif source:
            log(init_from(source, cfg, tree))
        kept = 0 if bucket else cfg.save_total_limit  # with a bucket, the syncer prunes what is safe there
        # what this run saves is later than all saves that a node can see: a number, as machines' clocks differ
        there = processes.on_rank_0(bucket.generation, cfg) if bucket else 0
        here = processes.on_each_node(self.env, manifest.generation, cfg.output_dir)
        self._saver = saver = Saver(
            cfg.output_dir, async_save=cfg.saves_behind, save_total_limit=kept, keep_every=cfg.keep_every,
            generation=max(there, *(n or 0 for n in here)), more=tokenizers.own_files(cfg),
        )  # fmt: skip
        exits.at_leave.append(lambda code, _: saver.give_time(20 if code < 128 else 0))  # not at a second signal
        log(saver.reserve(tree))  # memory for the copies now, not at the first save, hours later
        self.before_update = saver.before_update  # waits until the last save no longer reads the tensors
        self._saved_at, self._step = time.monotonic(), choice.state.get("step", 0)
        self._syncer: Syncer | None = None
        if bucket and atomic.holds(cfg.output_dir):  # of nodes that share a disk, one sends what is on it
            from refocused.bucket import sync

            self._syncer = sync.Syncer(cfg, choice.name, leader=self.env.main)

    @property
    def newest(self) -> str | None:
        """Name of the last checkpoint that is complete: this run's, or the one that it began from."""
        return self._saver.last or self.choice.name

    @processes.may_take_long()
    def save(self, name: str, state: dict[str, Any], last: bool, loss_is_finite: Callable[[], bool]) -> float | None:
        """Save the tree and the state (JSON, rank 0's) as they are now; the seconds for which training stood still.

        None, and nothing is saved, if the weights do not give a finite loss. Raises ConfigError where output_dir is no
        longer this run's own.
        """
        # An update with a finite loss can ruin the weights, so a save becomes a checkpoint once after_step() has seen a
        # finite step with them. Where no step comes that could show it, loss_is_finite() is asked before: at the last
        # save, at one that is waited for, and where the save before is not confirmed yet.
        validated = last or not self.cfg.saves_behind or not self._saver.confirmed
        if validated and not loss_is_finite():  # a forward of its own: no later step shows it
            return None
        processes.on_each_node(self.env, atomic.check_lock, self.cfg.output_dir)  # another run's by now?
        if validated:
            self._saver.confirm(True)  # what the save before holds has led to weights that are good
        # the copies may still be made beside the next forward
        if (failure := self._saver.save(name, self._tree, state, validated)) and self.env.main:
            files.name_once((name, failure), failure)  # of the save before, later than poll() asked
        self._step, self._saved_at = state["step"], time.monotonic()
        return self._saver.stall_seconds

    def after_step(self, step: int, finite: bool) -> None:
        """Note how a step was, the same on all ranks: one that is finite confirms the save of a step before it."""
        # figures come a step late, so the step of the save itself may be told after it; only a later one used its weights
        if finite and step > self._step:
            self._saver.confirm(True)

    def news(self) -> str:
        """What to note in the log: the saves that have become checkpoints since this was asked last, and what went."""
        return "\n".join(files.notes.popleft() for _ in range(len(files.notes)))

    def poll(self) -> tuple[bool, bool]:
        """Of this process, without waiting: (save_seconds have passed since the last save, the last save failed)."""
        # one clock decides for all ranks, as theirs differ
        late = self.env.main and 0 < self.cfg.save_seconds < time.monotonic() - self._saved_at
        # what the bucket does not take in time need not be made: the next one waits until the last is there
        if self._syncer and self._syncer.has_pending(self._saver.last_generation):
            late = False
        # saves that take longer than save_seconds follow one another without a pause, and training waits for none
        return late and not self._saver.busy, self._saver.poll() is not None

    def wait_for_failure(self) -> str | None:
        """Why the last save failed, once all ranks know that it has."""
        return self._saver.wait()

    @property
    def status(self) -> str:
        """For the log line: what waits for the bucket, and why; empty when there is nothing to say."""
        return self._syncer.status if self._syncer else ""

    def close(self, log: Callable[[str], None]) -> tuple[str | None, str | None]:
        """Wait for the last save and its upload. (why the save failed, why it is not in the bucket), each None if well."""
        # the save first, as the upload is of what it writes
        failure, reason = self._saver.close(), None
        syncer, deadline = self._syncer, self.cfg.upload_deadline_seconds
        if syncer and syncer.backlog:
            log(f"waiting up to {deadline:g} s for the upload to {syncer.where}")
        # the machine is paid for while it waits, so there is a limit; exit code 74 then says that it was reached
        if syncer and not syncer.close(deadline):
            reason = syncer.failure or f"the upload was not finished after {deadline:g} s"
        # each node sends what is on its own disk, so each may have a reason
        return failure, "; ".join(dict.fromkeys(filter(None, processes.gather(reason)))) or None


def beginning(place: str, cfg: Config) -> "Source":
    """The checkpoint at `place`, for a run to start from. Collective. Raises ConfigError where it is another function's."""
    # the same shapes can be another function, as with another activation or rotary base: configs are compared, not tensors
    source = processes.on_rank_0(find, place)
    check_same_model(f"init_from={place}", vars(source.cfg), cfg, MODEL)
    # ids of another tokenizer are other words: the embeddings would have to be learned again
    if not cfg.allow_change and processes.on_rank_0(tokenizers.differ, source.cfg.tokenizer, cfg.tokenizer):
        raise ConfigError(
            f"init_from={place} was trained with another tokenizer than tokenizer={cfg.tokenizer}; set tokenizer="
            f"{source.cfg.tokenizer}, and make shards with it (data.py tokenize); allow_change=true does without"
        )
    return source


def init_from(source: "Source", cfg: Config, tree: dict[str, Tensor]) -> str:
    """Start a fresh run's weights from what beginning() has found. Collective. Returns a line to print."""
    # the `model.` part of the tree alone: moments belong to the schedule that made them
    tensors.load(source.path, {key: t for key, t in tree.items() if key.startswith("model.")})
    processes.on_rank_0(manifest.check_unchanged, source.path)  # since it was verified
    guess = f"; its tokenizer is not known, taken for tokenizer={cfg.tokenizer}" * (source.cfg.tokenizer is None)
    return f"init      {source}: weights only, the optimizer starts fresh at step 0{guess}"


def find(place: str) -> "Source":
    """The checkpoint at a path, the newest of a folder of them, or one at a gs:// place, which comes to out/pulled.

    It is verified. Raises CheckpointError, BucketError, and ConfigError for a Hugging Face folder.
    """
    from refocused.checkpoint.source import source_at  # a run that goes on needs neither this nor the bucket's files

    if place.startswith("gs://"):  # to a folder of its own: nothing in output_dir is another run's
        from refocused.bucket.remote import pull

        return source_at(pull(place))
    return source_at(place)
