"""Pretrain GPT-NeoX: setup in one visible block, then one flat loop with one clock, the optimizer step.

torchrun --standalone --nproc_per_node=2 train.py configs/demo.py
torchrun --standalone --nproc_per_node=2 train.py configs/production.py max_steps=50000 resume=latest
python train.py --help
"""

import dataclasses
import hashlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import ckpt
import configs
import data
import parallel
import prepare
from configs import Config
from monitor import Monitor, plan

DONE, NOT_FINITE, INTERNAL, STOPPED = 0, 65, 70, 75


class NotFinite(ValueError):
    """Too many steps in a row whose loss or gradient norm is no number."""

    exit_code = NOT_FINITE


class StopSignal:
    """SIGTERM, SIGINT and SIGUSR1 ask for a stop at the next step boundary; a second one exits at once."""

    def __init__(self):
        self.since = 0.0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        now = time.monotonic()
        if not self.since:
            self.since = now
        elif now - self.since > 1.0:  # sooner, it is the same Ctrl-C passed on by torchrun
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


def update(optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler, finite: torch.Tensor) -> None:
    """One update by every optimizer, or by none unless `finite` (a bool on the device)."""
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.Muon):
            if finite.item():  # its kernels cannot be told to skip, so the host waits
                optimizer.step()
            continue
        if not scaler.is_enabled():  # the fused kernel skips the update by itself: nobody waits for the verdict
            optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
        scaler.step(optimizer)
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


def check_same_data(state: dict, cfg: Config, dataset: data.Dataset) -> None:
    """Raise DataError unless the checkpoint's run read these shards in this order, or allow_data_change is set."""
    changes = data.explain_change(state["data"]["manifest"], dataset.manifest)
    for key in ("seed", "sequence_length", "eval_files"):
        if state["config"][key] != getattr(cfg, key):
            changes += f"\n{key} {state['config'][key]} -> {getattr(cfg, key)}"
    if changes and not cfg.allow_data_change:
        raise data.DataError(
            f"the checkpoint was trained on other data or in another order:\n{changes}\n"
            "restore it, or set allow_data_change=true to go on with what is there now"
        )


def describe_resume(choice: ckpt.Choice, cfg: Config, dataset: data.Dataset) -> str:
    """Which checkpoint and why, where the data continues, and what differs in the config."""
    if choice.path is None:
        return f"resume    no checkpoint in {cfg.output_dir}: a fresh run" if cfg.resume else ""
    state = choice.state
    reason = "newest complete one" if cfg.resume == "latest" else "as asked"
    lines = [f"resume    {choice.path.name} ({reason}), step {state['step']:,} of {cfg.max_steps:,}"]
    lines += [f"          passed over {name}: {why}" for name, why in choice.passed_over]
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


def report_bad_step(step, loss, norm, ids, dataset, cfg: Config, env: parallel.Env, monitor: Monitor) -> None:
    """Say and write down which text made a step's figures non-finite."""
    windows = [{"shard": path, "offset": int(offset)} for path, offset in dataset.locate(ids)]
    report = Path(cfg.logging_dir, f"bad-step-{step}.json")
    first = ", ".join(f"{w['shard']} at {w['offset']}" for w in windows[:3])
    monitor.say(f"Step {step}: loss={loss}, grad norm={norm}: not applied. Read {first}, ...; all windows in {report}")
    if env.main:
        report.write_text(
            json.dumps({"step": step, "loss": str(loss), "grad_norm": str(norm), "windows": windows}, indent=1)
        )


def train(cfg: Config, origins: dict[str, str], dataset: data.Dataset, stop: StopSignal) -> int:
    """The run, on every rank alike; returns the exit code."""
    # --- setup
    env = parallel.start(cfg)
    accumulation, global_batch = cfg.batch(env.world_size)
    tokens_per_step = global_batch * cfg.sequence_length
    say = print if env.main else lambda *_, **__: None
    say(plan(cfg, env.world_size, dataset, parallel.describe(env, cfg)))
    say(configs.show_changes(cfg, origins), flush=True)
    ckpt.agree(ckpt.lock, cfg.output_dir)
    choice = ckpt.agree(ckpt.choose, cfg.output_dir, cfg.resume)
    state = choice.state
    if choice.path:
        check_same_data(state, cfg, dataset)
    say(describe_resume(choice, cfg, dataset), flush=True)

    model = parallel.build(cfg, env)
    optimizers = make_optimizers(model, cfg)
    scaler = torch.amp.GradScaler(env.device.type, enabled=cfg.mixed_precision == "fp16")
    begin = time.perf_counter()
    parallel.warm_up(model, cfg, env)
    say(f"ready in {time.perf_counter() - begin:.1f} s of compilation and warm-up", flush=True)

    tree = ckpt.state_tree(model, *optimizers)
    if choice.path:
        ckpt.load(choice.path, tree)
        if scaler.is_enabled() and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
    step, samples_seen = state.get("step", 0), state.get("samples_seen", 0)
    saver = ckpt.Saver(
        cfg.output_dir, async_save=cfg.async_save, save_total_limit=cfg.save_total_limit, keep_every=cfg.keep_every
    )
    saver.reserve(tree)  # finds a full disk now instead of at the first save
    loader = data.Loader(
        dataset, step, cfg.max_steps, global_batch, env.rank, env.world_size, cfg.per_device_train_batch_size,
        accumulation, cfg.dataloader_num_workers, pin_memory=env.device.type == "cuda", first_sample=samples_seen,
    )  # fmt: skip
    monitor = Monitor(cfg, env, step, tokens_per_step, state)
    readback = parallel.Readback(env.device)
    bad_in_a_row, last_save, saved_at, stopping = 0, time.monotonic(), step, False

    def save() -> None:
        nonlocal last_save, saved_at
        at = dataset.position(samples_seen)
        saver.save(
            ckpt.name(at["epoch"], step, at["files"]),
            tree,
            {
                "step": step,
                "samples_seen": samples_seen,
                "tokens": samples_seen * cfg.sequence_length,
                **monitor.state(),
                "scaler": scaler.state_dict(),
                "data": {"fingerprint": dataset.fingerprint, "manifest": dataset.manifest, "position": at},
                "config": dataclasses.asdict(cfg),
                "run": environment(env),
            },
        )
        last_save, saved_at = time.monotonic(), step

    # --- the loop: rate, micro-steps, clip, finite?, step, then whatever this step is followed by
    model.train()
    for batch in loader:
        lr = learning_rate(step, cfg)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr
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
        loss = parallel.total(loss_sum) / tokens_per_step
        update(optimizers, scaler, loss.isfinite() & norm.isfinite())
        model.zero_grad(set_to_none=True)
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

        readback.put((step, lr, batch.ids), torch.stack((loss, norm)))
        for (at, rate, ids), (loss_at, norm_at) in readback.take(wait=bool(logs or evals or saves)):
            if proof := monitor.step(at, loss_at, norm_at, rate, ids):
                monitor.say(proof)
                if cfg.deterministic and monitor.trace.first_difference:
                    raise RuntimeError("deterministic=true, but " + proof)
            finite = math.isfinite(loss_at) and (math.isfinite(norm_at) or scaler.is_enabled())  # its scale adapts
            bad_in_a_row = 0 if finite else bad_in_a_row + 1
            if not finite:
                report_bad_step(at, loss_at, norm_at, ids, dataset, cfg, env, monitor)
            if bad_in_a_row == cfg.max_bad_steps:
                saver.close()
                raise NotFinite(
                    f"{bad_in_a_row} steps in a row up to {at} were not finite and not applied (max_bad_steps); "
                    "the last checkpoint stands: lower learning_rate, or look at the shards named above"
                )
        if logs:
            monitor.line(step, lr, norm_at, loader.wait_seconds, saver.stall_seconds)
        if save_failed:
            monitor.say(f"Step {step}: {saver.wait()}; training goes on, the checkpoint before it stands")
        if evals:
            begin = time.perf_counter()
            if (eval_loss := evaluate(model, dataset, cfg, env, stop)) is not None:
                monitor.evaluated(step, eval_loss, time.perf_counter() - begin)
        if saves:
            save()
        if stopping:
            break

    # --- the end
    loader.close()
    if saved_at != step:  # a stop was asked for after the last boundary
        save()
    failure = saver.close()
    monitor.close()
    parallel.stop()
    if failure:
        say(f"stopped at step {step:,}: {failure}", file=sys.stderr, flush=True)
        return INTERNAL
    if stopping:
        say(f"stopped at step {step:,} {time.monotonic() - stop.since:.1f} s after the signal; resume=latest continues")
        return STOPPED
    say(
        f"done: {step:,} steps. Next: the curves with `tensorboard --logdir {cfg.logging_dir}`; more training with the "
        f"same command, max_steps={2 * max(1, cfg.max_steps)} and resume=latest"
    )
    return DONE


def environment(env: parallel.Env) -> dict:
    """What a checkpoint remembers of the place it was made in."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return {
        "git_commit": git.stdout.strip() or None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(env.device.type),
        "world_size": env.world_size,
    }


def main(argv: list[str]) -> int:
    """Parse, check what can be checked without a GPU, run; returns the exit code of DESIGN."""
    leader = os.environ.get("RANK", "0") == "0"
    try:
        if "--help" in argv or "-h" in argv:
            print(configs.help_text())
            return DONE
        show = "--show" in argv
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
        if not hasattr(error, "exit_code"):
            raise
        if leader or not isinstance(error, configs.ConfigError | ckpt.CheckpointError | NotFinite):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
