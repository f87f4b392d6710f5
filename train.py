"""Pretrain GPT-NeoX: setup in one visible block, then one flat loop with one clock, the optimizer step.

torchrun --standalone --nproc_per_node=2 train.py configs/demo.py
torchrun --standalone --nproc_per_node=2 train.py configs/production.py max_steps=50000 resume=latest
python train.py --help
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import platform
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

import ckpt
import configs
import data
import export
import gcs
import guard
import parallel
import prepare
import profiler
import sync
from configs import Config
from monitor import Monitor, check_folder, complain, plan

DONE, INTERNAL, NOT_IN_BUCKET, STOPPED = 0, 70, 74, 75


class StopSignal:
    """SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask for a stop at the next step boundary; a second one exits at once.

    Until the loop has begun the next boundary can be minutes away (other nodes are waited for, blocks compiled) and
    nothing is trained that could be lost, so the process waits PATIENCE seconds for it and leaves.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    PATIENCE = 15.0  # torchrun kills its processes 30 s after it was told to stop

    def __init__(self):
        self.since, self.begun = 0.0, False
        # a thread is told of signals also while the main one sits in a collective, where no handler would run
        signals, self.wakeup = socket.socketpair()
        self.wakeup.setblocking(False)
        signal.set_wakeup_fd(self.wakeup.fileno(), warn_on_full_buffer=False)
        # under nohup a closed terminal is ignored; torchrun's is not, it passes that on and kills those that ignore it
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and "RANK" not in os.environ
        for number in self.NUMBERS:
            if not (ignored and number == signal.SIGHUP):
                signal.signal(number, lambda *_: None)
        threading.Thread(target=self.listen, args=(signals,), daemon=True, name="signals").start()

    def listen(self, signals: socket.socket) -> None:
        while True:
            impatient = self.since and not self.begun
            left = max(0.0, self.since + self.PATIENCE - time.monotonic()) if impatient else None
            if not select.select([signals], [], [], left)[0]:
                if not self.begun:
                    with contextlib.suppress(OSError):  # a closed terminal
                        os.write(2, b"stopped by a signal before the first step: what was saved before stands\n")
                    os._exit(STOPPED)
                continue
            if (number := signals.recv(1)[0]) not in self.NUMBERS:
                continue
            if not self.since:
                self.since = time.monotonic()
            elif time.monotonic() - self.since > 1.0:  # sooner, it is the same Ctrl-C passed on by torchrun
                os._exit(128 + number)


def learning_rate(step: int, cfg: Config) -> float:
    """The rate of update number `step` (from 0): linear warm-up, then cfg.lr_scheduler_type; pure, so never saved."""
    peak, floor = cfg.learning_rate, cfg.min_learning_rate
    if step < cfg.warmup_steps:
        return peak * (step + 1) / cfg.warmup_steps
    begin = cfg.warmup_steps
    if cfg.lr_scheduler_type == "warmup_stable_decay":
        begin = max(begin, cfg.max_steps - (cfg.decay_steps or cfg.max_steps // 5))
    done = min(1.0, max(0, step - begin) / max(1, cfg.max_steps - begin))
    if cfg.lr_scheduler_type == "cosine":
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))
    if cfg.lr_scheduler_type == "constant":
        return peak
    return peak + (floor - peak) * done


def dropout_seed(*numbers: int) -> int:
    """64 bits that differ for every (seed, step, micro-step, rank)."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little")


def make_optimizers(model: torch.nn.Module, cfg: Config) -> list[torch.optim.Optimizer]:
    """Fused AdamW, weight decay on matrices only; with optimizer=muon the blocks' matrices are Muon's instead.

    Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) in the scaling of Liu et al. 2025, arXiv:2502.16982,
    so that AdamW's learning rate and weight decay fit it.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    muons = [p for name, p in named if cfg.optimizer == "muon" and "layers." in name and p.dim() == 2]
    rest = [p for _, p in named if not any(p is m for m in muons)]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (cfg.adam_beta1, cfg.adam_beta2)
    optimizers = [torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, eps=cfg.adam_epsilon, fused=True)]
    if muons:
        scale = {"weight_decay": cfg.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        optimizers.append(torch.optim.Muon(muons, lr=cfg.learning_rate, **scale))
    return optimizers


def update(optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler, apply: torch.Tensor) -> None:
    """One update by every optimizer, or by none unless `apply` (a bool on the device); gradients are unscaled already."""
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.Muon):
            if apply.item():  # its kernels cannot be told to skip, so the host waits
                optimizer.step()
            continue
        # the fused kernel skips the update by itself: nobody waits for the verdict, except where parameters are in host
        # memory: it must have arrived before the host reads it, which the optimizer's own copy does not wait for
        where = optimizer.param_groups[0]["params"][0].device
        optimizer.grad_scale, optimizer.found_inf = None, (~apply).float().to(where)
        optimizer.step()
    scaler.update()


@torch.no_grad()
def evaluate(model, dataset: data.Dataset, cfg: Config, env: parallel.Env, stop: StopSignal) -> float | None:
    """Token-weighted mean loss over the fixed held-out windows; None when a stop was asked for meanwhile."""
    B, T = cfg.per_device_train_batch_size, cfg.sequence_length
    ids = dataset.eval_ids(cfg.eval_samples)
    loss = torch.zeros((), device=env.device)
    model.eval()
    for first in range(0, len(ids), B * env.world_size):
        rows = ids[first + env.rank * B : first + (env.rank + 1) * B]
        x, y = torch.zeros(B, T, dtype=torch.int64), torch.full((B, T), -100)  # short blocks keep the compiled shape
        if len(rows):
            x[: len(rows)], y[: len(rows)] = data.to_tensors(dataset.gather(rows))
        with parallel.autocast(cfg, env):
            loss += model(x.to(env.device), y.to(env.device))
        if any(parallel.agree(stop.since > 0)):
            loss = None
            break
    model.train()
    parallel.reshard(model)
    return None if loss is None else parallel.total(loss).item() / (len(ids) * T)


def every(steps: int, step: int) -> bool:
    return steps > 0 and step % steps == 0


def describe_resume(choice: ckpt.Choice, cfg: Config, dataset: data.Dataset) -> str:
    """Which checkpoint and why, where the data continues, and what differs in the config."""
    if choice.path is None:
        return f"resume    no checkpoint in {cfg.output_dir}: a fresh run" if cfg.resume else ""
    state = choice.state
    reason = "the highest step that is complete" if cfg.resume == "latest" else "as asked"
    lines = [f"resume    {choice.path.name} ({reason}), step {state['step']:,} of {cfg.max_steps:,}"]
    lines += [f"          passed over {name}: {why}" for name, why in choice.passed_over]
    ahead = [n for n in ckpt.names(cfg.output_dir) if ckpt.parse(n).step > state["step"]]
    if ahead and cfg.resume != "latest":
        lines.append(
            f"          {ahead[0]} is ahead of it and stays: remove what is ahead, or a later resume=latest goes on there"
        )
    if cfg.init_from and cfg.init_from != state["config"].get("init_from"):
        lines.append(f"          init_from={cfg.init_from} is not used: the weights are the checkpoint's")
    at = dataset.position(state["samples_seen"])
    lines.append(
        f"          data: continues at sample {state['samples_seen']:,}, token {state['tokens']:,}, epoch {at['epoch']}, "
        f"{at['epoch_fraction']:.1%}, shard {at['next_shard']} offset {at['next_offset']:,}"
    )
    for key, old, new in configs.difference(state["config"], dataclasses.asdict(cfg)):
        if key != "resume":
            lines.append(f"          config: {key} {old} -> {new}")
    old_cfg = dataclasses.replace(cfg, **{k: v for k, v in state["config"].items() if k in configs.KEYS})
    if (was := learning_rate(state["step"], old_cfg)) != (now := learning_rate(state["step"], cfg)):
        lines.append(
            f"          schedule: a function of step and config, so the rate goes on at {now:.3g} (was {was:.3g})"
        )
    return "\n".join(lines)


def train(cfg: Config, origins: dict[str, str], dataset: data.Dataset, stop: StopSignal) -> int:
    """The run, on every rank alike; returns the exit code."""
    # --- setup
    env = parallel.start(cfg)
    guard.check_ranks(cfg, dataset)
    accumulation, global_batch = cfg.batch(env.world_size)
    tokens_per_step = global_batch * cfg.sequence_length
    owner = ckpt.agree(ckpt.lock, cfg.output_dir)
    parallel.on_each_node(env, ckpt.lock, cfg.output_dir, owner, but_rank_0=True)
    ckpt.agree(check_folder, cfg.logging_dir, cfg.output_dir)
    monitor = Monitor(cfg, env)
    settings = plan(cfg, env.world_size, dataset, parallel.describe(env, cfg))
    settings += "\n" + configs.show_changes(cfg, origins)
    monitor.say(settings)
    bucket = bool(cfg.bucket_name and cfg.checkpoint_bucket_path)
    if bucket and (found := ckpt.agree(sync.find, cfg)):  # what is newer there comes down
        parallel.on_each_node(env, sync.pull, cfg, found)
    choice = ckpt.agree(ckpt.choose, cfg.output_dir, cfg.resume)
    state = choice.state
    if choice.path:
        guard.check_same_data(state, cfg, dataset)
        parallel.on_each_node(env, sync.bring, cfg, choice.path, choice.save_id, but_rank_0=True)
    monitor.say(describe_resume(choice, cfg, dataset))

    model = parallel.build(cfg, env)
    optimizers = make_optimizers(model, cfg)
    scaler = torch.amp.GradScaler(env.device.type, enabled=cfg.mixed_precision == "fp16")
    begin = time.perf_counter()
    try:
        parallel.warm_up(model, cfg, env)
    except Exception as error:
        if not stop.since:
            raise
        # a signal to the whole process group ends the compiler too; nothing is trained yet that could be lost
        cause = type(error).__name__
        monitor.say(f"stopped while compiling ({cause}), before the first step: what was saved before stands")
        parallel.leave()
        return STOPPED
    monitor.say(f"ready in {time.perf_counter() - begin:.1f} s of compilation and warm-up")

    tree = ckpt.state_tree(model, *optimizers)
    if choice.path:
        ckpt.load(choice.path, tree)
        if scaler.is_enabled() and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
    elif cfg.init_from:
        monitor.say(export.init_from(cfg.init_from, cfg, tree))
    start = step = state.get("step", 0)
    samples_seen = state.get("samples_seen", 0)
    kept = 0 if bucket else cfg.save_total_limit  # with a bucket, the syncer prunes what is safe there
    saver = ckpt.Saver(cfg.output_dir, async_save=cfg.async_save, save_total_limit=kept, keep_every=cfg.keep_every)
    saver.reserve(tree)  # finds a full disk now instead of at the first save
    resumed_from = choice.path.name if choice.path else None
    syncer = sync.Syncer(cfg, resumed_from, leader=env.main) if bucket and env.local_rank == 0 else None
    loader = data.Loader(
        dataset, step, cfg.max_steps, global_batch, env.rank, env.world_size, cfg.per_device_train_batch_size,
        accumulation, cfg.dataloader_num_workers, pin_memory=env.device.type == "cuda", first_sample=samples_seen,
    )  # fmt: skip
    spikes = guard.Spikes(cfg, env.device, state.get("spike_window")) if cfg.spike_sigma else None
    skips = configs.step_ranges("skip_steps", cfg.skip_steps)
    profile = profiler.Profiler(cfg, env)
    readback = parallel.Readback(env.device)
    monitor.start(step, tokens_per_step, state, resumed_from, settings)
    bad_in_a_row, last_save, saved_at, stopping = 0, time.monotonic(), step, False

    def save() -> None:
        nonlocal last_save, saved_at
        at = dataset.position(samples_seen)
        name = ckpt.name(at["epoch"], step, at["files"])
        saver.save(
            name,
            tree,
            {
                "step": step,
                "samples_seen": samples_seen,
                "tokens": samples_seen * cfg.sequence_length,
                **monitor.state(),
                "scaler": scaler.state_dict(),
                "spike_window": spikes and spikes.window.tolist(),
                "data": {"fingerprint": dataset.fingerprint, "manifest": dataset.manifest, "position": at},
                "config": dataclasses.asdict(cfg),
                "run": environment(env),
            },
        )
        monitor.saved(step, name, saver.stall_seconds)
        last_save, saved_at = time.monotonic(), step

    # --- the loop: rate, micro-steps, clip, finite?, step, then whatever this step is followed by
    stop.begun = True
    model.train()
    for batch in loader:
        lr = learning_rate(step, cfg)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr
        if written := profile.at(step + 1):
            monitor.say(written)
        if any(step + 1 in steps for steps in skips):  # known to be bad: everything moves on but the weights
            monitor.skipped(step + 1, batch.ids)
        else:
            loss_sum = torch.zeros((), device=env.device)
            for micro_step, (x, y) in enumerate(batch.micro):
                x, y = x.to(env.device, non_blocking=True), y.to(env.device, non_blocking=True)
                if cfg.hidden_dropout or cfg.attention_dropout:  # masks are a function of the step, not of history
                    torch.manual_seed(dropout_seed(cfg.seed, step, micro_step, env.rank))
                parallel.sync_gradients(model, micro_step == accumulation - 1 or cfg.cpu_offload)
                with parallel.autocast(cfg, env):
                    loss = model(x, y)  # summed over this micro-step's tokens
                # DDP and FSDP2 average over ranks; times world_size, that is the mean over the whole global batch
                scaler.scale(loss * (env.world_size / tokens_per_step)).backward()
                loss_sum += loss.detach()
            scaler.unscale_(optimizers[0])
            norm = parallel.clip_gradients(model, cfg.max_grad_norm).to(env.device)
            figures = torch.stack((parallel.total(loss_sum) / tokens_per_step, norm))
            apply = figures.isfinite().all()
            if spikes:
                deviations, calm = spikes.judge(step, figures)
                figures, apply = torch.cat((figures, deviations)), apply & calm
            update(optimizers, scaler, apply)
            if every(cfg.histogram_steps, step + 1):
                monitor.histograms(step + 1, model)
            parallel.clear_gradients(model)
            readback.put((step + 1, lr, batch.ids), figures)
        step += 1
        samples_seen += global_batch

        # --- the same decisions on every rank
        late = cfg.save_seconds > 0 and env.main and time.monotonic() - last_save > cfg.save_seconds
        stopping, save_now, save_failed = parallel.agree(stop.since > 0, late, saver.poll() is not None)
        if stopping and not stop.since:  # another rank was told
            stop.since = time.monotonic()
        done = step == cfg.max_steps
        logs = every(cfg.logging_steps, step)
        evals = dataset.num_eval_samples and cfg.eval_steps and (every(cfg.eval_steps, step) or done) and not stopping
        saves = every(cfg.save_steps, step) or save_now or done or stopping

        for (at, rate, ids), (loss_at, norm_at, *deviations) in readback.take(wait=bool(logs or evals or saves)):
            finite = math.isfinite(loss_at) and (math.isfinite(norm_at) or scaler.is_enabled())  # its scale adapts
            verdict = None if finite else "not applied"
            if finite and deviations:
                verdict = spikes.verdict(deviations)
            monitor.step(at, loss_at, norm_at, rate, ids, **({"verdict": verdict} if verdict else {}))
            if verdict:
                guard.report(at, loss_at, norm_at, verdict, ids, dataset, cfg, monitor)
            bad_in_a_row = 0 if finite else bad_in_a_row + 1
            if bad_in_a_row == cfg.max_bad_steps:
                saver.close()
                monitor.close()
                raise guard.NotFinite(
                    f"{bad_in_a_row} steps in a row up to {at} were not finite and not applied (max_bad_steps); "
                    "the last checkpoint stands: lower learning_rate, or look at the shards named above"
                )
        if logs:
            monitor.line(step, lr, loader.wait_seconds, syncer.status if syncer else "")
        if save_failed:
            monitor.say(f"Step {step}: {saver.wait()}; training goes on, the checkpoint before it stands")
        if evals:
            begin = time.perf_counter()
            if (eval_loss := evaluate(model, dataset, cfg, env, stop)) is not None:
                monitor.evaluated(step, eval_loss, begin, model)
        if saves:
            save()
            if bucket and not cfg.background_upload:
                saver.join()
                if syncer and not syncer.flush(cfg.upload_deadline_seconds):
                    monitor.say(f"Step {step}: {syncer.failure}; training goes on")
        if stopping:
            break

    # --- the end
    loader.close()
    if saved_at != step:  # a stop was asked for after the last boundary
        save()
    if written := profile.close():
        monitor.say(written)
    failure = saver.close()
    if syncer and syncer.backlog:
        monitor.say(f"waiting up to {cfg.upload_deadline_seconds:g} s for the upload to {syncer.where}")
    (missing,) = parallel.agree(syncer is not None and not syncer.close(cfg.upload_deadline_seconds))
    parallel.stop()
    code = INTERNAL if failure else NOT_IN_BUCKET if missing else STOPPED if stopping else DONE
    seconds = time.monotonic() - stop.since
    words = {
        INTERNAL: f"ended at step {step:,}, but {failure}",
        NOT_IN_BUCKET: f"ended at step {step:,}, saved in {cfg.output_dir}, but not in the bucket: "
        f"{syncer and syncer.failure}",
        STOPPED: f"stopped at step {step:,} {seconds:.1f} s after the signal; resume=latest continues",
        DONE: f"done: {step:,} steps. Next: the curves with `tensorboard --logdir {cfg.logging_dir}`; more training with "
        f'max_steps={2 * max(1, step)} resume=latest behind the same command (make: ARGS="max_steps=...")',
    }
    if choice.path and start >= cfg.max_steps:
        words[DONE] = (
            f"nothing to do: {choice.path.name} is at step {start:,}, max_steps={cfg.max_steps}; raise max_steps to go on, "
            "or name another output_dir and logging_dir for another run"
        )
    monitor.say(words[code], file=sys.stdout if code in (DONE, STOPPED) else sys.stderr)
    monitor.close()
    return code


def environment(env: parallel.Env) -> dict:
    """What a checkpoint remembers of the place it was made in."""
    commit = None
    with contextlib.suppress(OSError):  # no git here
        ask = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
        git = subprocess.run(ask, cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = git.stdout.strip() or None
    return {
        "git_commit": commit,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(env.device.type),
        "world_size": env.world_size,
    }


def main(argv: list[str]) -> int:
    """Parse, check what can be checked without a GPU, run; returns the exit code of DESIGN."""
    leader = os.environ.get("RANK", "0") == "0"
    try:
        show, usage = "--show" in argv, "--help" in argv or "-h" in argv
        if show or usage:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--show | head` ends as any other filter does
        if usage:
            print(configs.help_text())
            return DONE
        cfg, origins = configs.load([a for a in argv if a != "--show"])
        world = parallel.world_size() if "WORLD_SIZE" in os.environ or not show else cfg.num_processes or 1
        cfg.batch(world)
        if show:
            try:
                dataset = data.Dataset.open(cfg)
            except data.DataError as error:
                dataset = f"not opened: {error}"
            print(
                plan(cfg, world, dataset, f"{world} process{'es' * (world > 1)}, {cfg.parallel}, {cfg.mixed_precision}")
            )
            print(configs.show_changes(cfg, origins))
            return DONE
        dataset = prepare.open_or_unpack(cfg)
    except ValueError as error:  # the same on every rank, so one of them says it
        if leader:
            print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", INTERNAL)
    try:
        return train(cfg, origins, dataset, StopSignal())
    except ValueError as error:
        parallel.leave()
        if not hasattr(error, "exit_code"):
            raise
        shared = configs.ConfigError | ckpt.CheckpointError | gcs.BucketError | guard.NotFinite  # raised on every rank
        if leader or not isinstance(error, shared):
            complain(cfg, f"error: {error}")
        return error.exit_code
    except RuntimeError as error:
        if not profiler.is_out_of_memory(error):
            raise
        why = profiler.explain_out_of_memory(error, cfg, world) if leader else f"out of memory: {error}"
        complain(cfg, f"error: {why}")
        return INTERNAL


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
