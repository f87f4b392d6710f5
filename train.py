"""Pretrain GPT-NeoX: setup in one visible block, then one flat loop with one clock, the optimizer step.

torchrun --standalone --nproc_per_node=2 train.py configs/demo.py
torchrun --standalone --nproc_per_node=2 train.py configs/production.py max_steps=50000 resume=latest
python train.py --help
"""

import sys

from refocused import entry  # before all others: it says what this machine lacks

# isort: split
import configs

if __name__ == "__main__" and {"--help", "-h"} & {*sys.argv}:  # before the imports below, which it does not need
    sys.exit(entry.run(configs.print_help, sys.argv[1:]))

import dataclasses
import faulthandler
import hashlib
import os
import signal
import time

import torch

import ckpt
import data
import sample
from configs import Config
from refocused.checkpoint import manifest
from refocused.checkpoint.tensors import state_tree
from refocused.measure import gpus, hardware, planner
from refocused.measure.expectation import Expectation
from refocused.run import exits, failures, guard, optim, origin, preemption, processes, profiler, room, strategy, words
from refocused.run.evaluate import evaluate, sound
from refocused.run.exits import DONE, INTERNAL, NO_DATA, NOT_FINITE, NOT_IN_BUCKET, STOPPED
from refocused.run.logs import check_folder, complain, tell
from refocused.run.monitor import Monitor
from refocused.run.signals import EARLY, StopSignal
from refocused.run.starts import Starts
from refocused.run.watchdog import Watchdog


def dropout_seed(*numbers: int) -> int:
    """64 bits that differ for every (seed, step, micro-step, rank)."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little")


def every(steps: int, step: int) -> bool:
    return steps > 0 and step % steps == 0


def train(cfg: Config, origins: dict[str, str], env: processes.Env, dataset: data.Dataset, stop: StopSignal) -> int:
    """The run, on every rank alike; returns the exit code."""
    # --- setup
    guard.check_ranks(cfg, dataset.fingerprint, dataset.tokenizer)
    accumulation, global_batch = cfg.batch(env.world_size)
    tokens_per_step = global_batch * cfg.sequence_length
    checkpoints = ckpt.Checkpoints(cfg, env)
    watch = Watchdog(cfg, env, processes.on_rank_0(Starts, cfg))
    processes.on_rank_0(check_folder, cfg.logging_dir, cfg.output_dir)
    monitor = Monitor(cfg, env, gpus.peak_flops(env.device_name))
    monitor.plan(
        words.plan(cfg, env.world_size, dataset, processes.describe(env, cfg), processes.busy(env)),
        configs.show_changes(cfg, origins),
    )
    monitor.expectation = Expectation(cfg, env).seconds
    if cfg.check_hardware and env.device.type == "cuda":
        monitor.sniffed = hardware.sniff(cfg, env)
        monitor.say(monitor.sniffed)
    choice = checkpoints.choose()
    state = choice.state
    if choice.path:
        dataset.check_same(state, cfg)
        guard.check_same_batch(state, cfg, global_batch)
        guard.check_same_model(state, cfg)
    room.check(cfg, env, state.get("step", 0))
    monitor.say(words.describe_resume(choice, cfg, dataset))

    model = strategy.build(cfg, env)
    optimizers = optim.make_optimizers(model, cfg)
    scaler = torch.amp.GradScaler(env.device.type, enabled=cfg.mixed_precision == "fp16")
    begin = time.perf_counter()
    if cfg.compile_model:
        monitor.say("compiling, 20 to 90 s if it is new")
    strategy.warm_up(model, cfg, env)
    monitor.ready(time.perf_counter() - begin)
    monitor.say(checkpoints.load(state_tree(model, *optimizers)))
    if scaler.is_enabled() and state.get("scaler"):
        scaler.load_state_dict(state["scaler"])

    step = saved_at = state.get("step", 0)
    samples_seen, tokens_seen = state.get("samples_seen", 0), state.get("tokens", 0)
    loader = data.Loader(
        dataset, step, cfg.max_steps, global_batch, env.rank, env.world_size, cfg.per_device_train_batch_size,
        accumulation, cfg.dataloader_num_workers, pin_memory=env.device.type == "cuda", first_sample=samples_seen,
    )  # fmt: skip
    judge = guard.Guard(cfg, env.device, scaler, state)
    skips = configs.step_ranges("skip_steps", cfg.skip_steps)
    profile = profiler.Profiler(cfg, env)
    readback = processes.Readback(env.device)
    made = origin.of_run(env)
    monitor.start(step, tokens_per_step, state, choice.name)
    stopping = unreadable = overdue = False

    def save(proven: bool) -> None:
        nonlocal saved_at
        guard.check_replicas(model, cfg, step)
        if proven:  # and with it what an earlier save holds
            checkpoints.settle(True)
        at = dataset.position(samples_seen)
        name = manifest.name(at["epoch"], step, at["files"])
        trained = {
            "step": step,
            "samples_seen": samples_seen,
            "tokens": tokens_seen,
            "global_batch": global_batch,
            **monitor.state(),
            **judge.state(),
            "data": {
                "fingerprint": dataset.fingerprint,
                "manifest": dataset.manifest,
                "tokenizer": dataset.tokenizer,
                "position": at,
            },
            "config": dataclasses.asdict(cfg),
            "run": made,
        }
        monitor.saved(step, name, checkpoints.save(name, trained, proven))
        saved_at = step

    # --- the loop: rate, micro-steps, clip, finite?, step, then whatever this step is followed by
    stop.begun = True
    watch.begin(step)
    model.train()
    for batch in loader:
        lr = optim.set_rate(optimizers, step, cfg)
        monitor.say(profile.at(step + 1))
        if any(step + 1 in steps for steps in skips):  # known to be bad: everything moves on but the weights
            monitor.skipped(step + 1, batch.ids)
        else:
            loss_sum = torch.zeros((), device=env.device)
            for micro_step, (x, y) in enumerate(batch.micro):
                x, y = x.to(env.device, non_blocking=True), y.to(env.device, non_blocking=True)
                if cfg.hidden_dropout or cfg.attention_dropout:  # masks are a function of the step, not of history
                    torch.manual_seed(dropout_seed(cfg.seed, step, micro_step, env.rank))
                strategy.sync_gradients(model, cfg, last=micro_step == accumulation - 1)
                with strategy.autocast(cfg, env):
                    loss = model(x, y)  # summed over this micro-step's tokens
                # DDP and FSDP2 average over ranks; times world_size, that is the mean over the whole global batch
                scaler.scale(loss * (env.world_size / tokens_per_step)).backward()
                loss_sum += loss.detach()
            scaler.unscale_(optimizers[0])
            norm, divisor = strategy.clip_gradients(model, cfg.max_grad_norm, later=optim.clips(optimizers))
            figures, apply = judge.judge(step, loss_sum, norm.to(env.device), tokens_per_step)
            optim.update(optimizers, scaler, apply, divisor)
            monitor.histograms(step + 1, model)
            strategy.clear_gradients(model)
            readback.put((step + 1, lr, batch.ids), figures)
        step, samples_seen, tokens_seen = step + 1, samples_seen + global_batch, tokens_seen + tokens_per_step
        watch.step(step)
        # --- the same decisions on every rank
        flags = (*checkpoints.poll(), stop.since > 0, loader.error() is not None, monitor.overdue())
        late, save_failed, stopping, unreadable, silent = map(bool, processes.agree(*flags))
        stop.pass_on(stopping)
        at_end = step == cfg.max_steps
        last = at_end or stopping or unreadable
        logs = every(cfg.logging_steps, step) or silent or (at_end and cfg.logging_steps > 0)
        evals = (every(cfg.eval_steps, step) or at_end and cfg.eval_steps) and dataset.num_eval_samples and not stopping
        saves = every(cfg.save_steps, step) or late or last
        for (at, rate, ids), (loss_at, norm_at, *more) in readback.take(wait=bool(logs or evals or saves)):
            verdict = judge.verdict(loss_at, norm_at, *more)
            monitor.step(at, loss_at, norm_at, rate, ids, verdict, dataset.locate, logs and at == step)
            if at > saved_at and not judge.bad_in_a_row:
                checkpoints.settle(True)
        if logs:
            monitor.line(step, lr, loader.wait_seconds, checkpoints.status)
        if save_failed:
            monitor.say(f"Step {step}: {checkpoints.failure()}; training goes on, the checkpoint before it stands")
        if judge.gives_up:
            break
        if evals:
            begin = time.perf_counter()
            if (held_out := evaluate(model, dataset, cfg, env, stop)) is not None:
                monitor.evaluated(step, held_out, begin, lambda: sample.open_ended(strategy.raw(model), cfg))
        if saves or overdue:
            proven = last or checkpoints.cannot_wait  # no step comes that would show whether these weights are good
            judge.bad_in_a_row += proven and not sound(model, *batch.micro[0], cfg, env)
            overdue = judge.bad_in_a_row > 0  # nothing is saved in a streak that is not finite, but right after it
            if not overdue:
                save(proven)
        if every(cfg.check_replicas_steps, step):
            guard.check_replicas(model, cfg, step)
        if stopping or unreadable:
            break

    # --- the end
    watch.stop()
    bad = judge.bad_in_a_row > 0
    trouble = loader.error() if unreadable else None
    if trouble and not env.main:
        complain(cfg, f"error: {trouble}")
    loader.close()
    monitor.say(profile.close())
    failure, missing = checkpoints.close(monitor.say)
    processes.stop()
    code = STOPPED if stopping else NO_DATA if unreadable else NOT_FINITE if bad else DONE
    code = INTERNAL if failure and not bad else NOT_IN_BUCKET if missing else code
    ended = words.Ended(code, step, checkpoints.newest, failure, missing, trouble, time.monotonic() - stop.since)
    monitor.say(monitor.goodput())
    text = words.farewell(ended, choice, cfg)
    monitor.say(text, file=sys.stdout if code in (DONE, STOPPED) else sys.stderr)
    monitor.close()
    return exits.leave(code, text)


def show(cfg: Config, origins: dict[str, str]) -> int:
    """Print the plan and the resolved config, as far as they are known without a process group."""
    world = processes.world_size() if "WORLD_SIZE" in os.environ else cfg.num_processes or 1
    try:
        dataset: data.Dataset | str = data.Dataset.open(cfg)
    except data.DataError as error:
        dataset = f"not opened: {error}"
    where = f"{world} process{'es' * (world > 1)}, {cfg.parallel}, {cfg.mixed_precision}"
    print(words.plan(cfg, world, dataset, where))
    print(configs.show_changes(cfg, origins))
    return DONE


def main(argv: list[str]) -> int:
    """Parse, check what can be checked without a GPU, run; returns the exit code of DESIGN."""
    entry.open_streams()
    if "--show" in argv:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--show | head` ends as any other filter does
        if int(os.environ.get("RANK", 0)):
            return DONE  # under torchrun one of them prints it
    cfg = stop = None
    try:
        cfg, origins = configs.load([a for a in argv if a != "--show"])
        if "--show" in argv:
            return show(cfg, origins)
        cfg.batch(processes.world_size())
        stop = StopSignal(cfg.stop_after_minutes)
        preemption.watch(stop.ask)
        env = processes.start(cfg)
        processes.on_each_node(env, data.unpack, cfg)
        dataset = data.open_dataset(cfg)
        faulthandler.enable()  # a shard cut short between check and read is a SIGBUS, which this names
        return train(cfg, origins, env, dataset, stop)
    except SystemExit:
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        at = time.time()
        code, text = failures.explain(error)
        if stop and stop.since and not stop.begun:  # a signal to the process group ends compilers and unpackers too
            code, text = STOPPED, EARLY
        elif cfg and (lack := profiler.out_of_memory(error)):
            text = f"error: out of memory: {lack}"
            if failures.first("explain"):  # it takes seconds and a process
                text += "\n" + planner.explain_out_of_memory(cfg, processes.world_size())
        failures.say(error, lambda: complain(cfg, text) if cfg else tell(text))
        return exits.leave(code, text, at=at, followed=failures.lost_peers(error))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
