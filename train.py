"""Pretrain GPT-NeoX: setup in one visible block, then one flat loop with one clock, the optimizer step.

torchrun --standalone --nproc_per_node=2 train.py configs/demo.py
torchrun --standalone --nproc_per_node=2 train.py configs/production.py max_steps=50000 resume=latest
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # PYTHONSAFEPATH leaves it out
from refocused import entry  # before all others: it says what this machine lacks

# isort: split
import configs
from refocused.run.environment import launch, launch_or_alone

if __name__ == "__main__" and {"--help", "-h"} & {*sys.argv}:  # before the imports below, which it does not need
    sys.exit(entry.run(configs.print_help, sys.argv[1:]) if not launch_or_alone().rank else 0)

import faulthandler
import hashlib
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

import ckpt
import data
from configs import Config
from refocused.checkpoint import tensors
from refocused.run import exits, failures, guard, messages, optim, preflight, processes, strategy
from refocused.run.devices import Readback, check_compiler, precision_note
from refocused.run.evaluate import evaluate, loss_is_finite
from refocused.run.exits import DONE, STOPPED
from refocused.run.logs import Logs, check_folder, log_error
from refocused.run.monitor import LoopState, Monitor
from refocused.run.signals import EARLY, StopSignal, watch_preemption
from refocused.run.watchdog import Watchdog


class Due(NamedTuple):
    """What follows a step. All ranks have agreed on it."""

    log: bool = False
    evaluation: bool = False
    save: bool = False
    last: bool = False  # no step follows
    stop: bool = False  # a signal came to one of the ranks
    unreadable: bool = False  # one of them cannot read the next batch
    save_failed: bool = False  # the last one, which ran behind training


def due_after(
    step: int, cfg: Config, eval_steps: int, stop: StopSignal, loader: data.Loader, checkpoints, monitor: Monitor
) -> Due:
    """Collective: what one rank alone sees (a signal, a clock, an error) becomes what all of them do."""

    def every(steps: int) -> bool:
        return steps > 0 and step % steps == 0

    # a collective on the host, so that no rank waits for its device here
    flags = (*checkpoints.poll(), stop.since > 0, loader.error() is not None, monitor.line_is_late())
    late_save, save_failed, stopping, unreadable, late_line = map(bool, processes.max_over_ranks(*flags))
    at_end = step == cfg.max_steps
    # whatever ends the run, its last step is saved: nothing that was paid for is trained again
    last = at_end or stopping or unreadable
    log = every(cfg.logging_steps) or late_line or (at_end and monitor.averages)
    evaluation = every(eval_steps) or (at_end and eval_steps > 0)
    save = every(cfg.save_steps) or late_save or last
    return Due(log, evaluation, save, last, stopping, unreadable, save_failed)


def gradients(
    model: torch.nn.Module, batch: data.Batch, cfg: Config, env: processes.Env, scaler, tokens_per_step: int
) -> torch.Tensor:
    """Forward and backward of a step's micro-steps; the sum of this rank's losses, a scalar on the device."""
    loss_sum = torch.zeros((), device=env.device)  # stays there: reading it would make the host wait for the device
    for micro_step, (x, y) in enumerate(batch.micro):
        x, y = x.to(env.device, non_blocking=True), y.to(env.device, non_blocking=True)
        if cfg.hidden_dropout or cfg.attention_dropout:  # masks are a function of the step, not of history
            numbers = repr((cfg.seed, batch.step, micro_step, env.rank)).encode()
            torch.manual_seed(int.from_bytes(hashlib.blake2b(numbers, digest_size=8).digest(), "little"))
        strategy.sync_gradients(model, cfg, last=micro_step == len(batch.micro) - 1)
        with strategy.autocast(cfg, env):
            loss = model(x, y)  # summed over this micro-step's tokens
        # DDP and FSDP2 average over ranks; times world_size, that is the mean over the whole global batch
        scaler.scale(loss * (env.world_size / tokens_per_step)).backward()
        loss_sum += loss.detach()
    return loss_sum


def describe(cfg: Config, origins: dict[str, str], env: processes.Env, dataset: data.Dataset, logs: Logs) -> str:
    """Log the plan and what the command line set. Returns the plan with every key that something set."""
    notes = processes.busy_note(env.device, env.threads), precision_note(cfg, env.device)
    plan = messages.plan(cfg, env.world_size, dataset, processes.describe(env, cfg), *notes)
    settings = f"{plan}\n{configs.show_changes(cfg, origins)}"
    logs.log("\n".join([plan, *(x for x in settings.splitlines() if "[command line]" in x)]), more=settings)
    return settings


def finish(
    cfg: Config, env: processes.Env, step: int, due: Due, idle: bool, not_finite: int, loader: data.Loader,
    checkpoints: ckpt.Checkpoints, monitor: Monitor, watch: Watchdog, stop: StopSignal,
) -> int:  # fmt: skip
    """The end of a run: what it still owes, then every cause that there was, in one order. Returns the exit code."""
    watch.end()  # from here on the limit is that of a save and its upload
    error = loader.error() if due.unreadable else None
    if error and not env.main:
        log_error(f"error: {error}", cfg)  # rank 0 does not know which shard it was
    loader.close()
    failure, missing = checkpoints.close(monitor.log)  # waits for the last save and its upload
    watch.stop()  # after it: a disk that hangs would hold every GPU
    monitor.log(checkpoints.news(), screen=False)
    processes.stop()  # before the last line: what fails in it is said too
    code, text = messages.ending(
        cfg, step, checkpoints.newest, idle=idle, not_finite=not_finite, failure=failure, missing=missing,
        unreadable=str(error or "another rank could not read its data, and says why") if due.unreadable else None,
        stopped=time.monotonic() - stop.since if due.stop else None,
    )  # fmt: skip
    monitor.finish(done=code == DONE, waited=loader.wait_seconds)
    monitor.log(text, file=sys.stdout if code in (DONE, STOPPED) else sys.stderr)
    monitor.close()
    return exits.leave(code, text)


def train(
    cfg: Config, origins: dict[str, str], env: processes.Env, dataset: data.Dataset, stop: StopSignal,
    each_step: Callable[[], None] = lambda: None,
) -> int:  # fmt: skip
    """The run, on every rank alike. Returns the exit code. each_step is called after every step, for a benchmark."""
    # --- setup: first what can be refused in seconds, then what takes minutes
    preflight.check_ranks(cfg, dataset.fingerprint, dataset.tokenizer)  # ranks that differ would hang, or sum nonsense
    accumulation, global_batch = cfg.batch(env.world_size)
    tokens_per_step = global_batch * cfg.sequence_length
    eval_steps = cfg.eval_steps if dataset.num_eval_samples else 0
    folder = ckpt.Folder(cfg, env)  # takes output_dir: a second run in it ends here, before it compiles
    watch = Watchdog(cfg, env, preflight.count_start(cfg, folder.bucket))  # finds a hang in the setup
    processes.on_rank_0(check_folder, cfg.logging_dir, cfg.output_dir)
    logs = Logs(cfg.logging_dir, cfg.output_dir, env.main)
    settings = describe(cfg, origins, env, dataset, logs)
    logs.log(preflight.measure_devices(cfg, env))  # a slow GPU makes all of them wait, for hours
    choice, source = folder.choose(logs.log)
    state = LoopState.restored(choice.state)
    if choice.path:
        dataset.check_same(choice.state, cfg)
        preflight.check_same_run(choice.state, cfg, global_batch)
    preflight.check_room(cfg, env, state.step)  # a full disk hours later would cost those hours
    logs.log(messages.describe_resume(choice, cfg, dataset))

    model = strategy.build(cfg, env)  # weights are a function of (seed, parameter name), the same in any layout
    optimizers = optim.make_optimizers(model, cfg)  # after wrapping, which replaces parameters
    clips_in_kernel = optim.clips_in_kernel(cfg, env.device.type)
    scaler = torch.amp.GradScaler(env.device.type, enabled=cfg.mixed_precision == "fp16")
    logs.log("compiling, 20 to 90 s if it is new" if cfg.compile_model else "")
    compile_seconds = strategy.warm_up(model, cfg, env)  # makes gradients, so it comes before the state is loaded
    logs.log(f"ready in {compile_seconds:.1f} s of {'compilation and ' * cfg.compile_model}warm-up")
    tree = tensors.state_tree(model, *optimizers)
    checkpoints = ckpt.Checkpoints(folder, choice, source, tree, logs.log)  # fills the tree, and saves it from now on
    if state.scaler:
        scaler.load_state_dict(state.scaler)
    loader = data.Loader(
        dataset, state.step, cfg.max_steps, global_batch, env.rank, env.world_size, cfg.per_device_train_batch_size,
        accumulation, cfg.dataloader_num_workers, pin_memory=env.device.type == "cuda", first_sample=state.samples_seen,
    )  # fmt: skip
    health = guard.Guard(cfg, env.device, scaler.is_enabled(), state.spike_window)  # judges steps by those before
    skips = configs.step_ranges("skip_steps", cfg.skip_steps)
    readback, made = Readback(env.device), preflight.made_by(env)
    monitor = Monitor(cfg, env, logs, state, choice, compile_seconds, settings)

    def save(last: bool) -> bool:
        """False if nothing was saved, because the last steps or the weights do not give a finite loss."""
        if health.bad_in_a_row:
            return False
        guard.check_replicas(model, cfg, state.step)  # one copy is saved, and a wrong one would be loaded by all
        # what the next steps depend on besides tensors: without it a resumed run would judge and scale otherwise
        state.spike_window, state.scaler = health.window(), scaler.state_dict()
        name, saved = state.saved(cfg, dataset, made)
        # of a batch that was trained on: one that skip_steps names may have no finite loss with any weights
        sound = lambda: trained is None or loss_is_finite(model, *trained.micro[0], cfg, env)  # noqa: E731
        stall = checkpoints.save(name, saved, last, sound)
        if stall is not None:
            monitor.saved(state.step, name, stall)
        return stall is not None

    def evaluate_held_out() -> None:
        """A stop leaves it to the next start: the checkpoint notes that it is owed."""
        begin = time.perf_counter()
        score = evaluate(model, dataset, cfg, env, stop)
        state.evaluation_owed = score is None
        stop.pass_on(state.evaluation_owed)
        if score is not None:
            monitor.evaluated(state.step, score, begin, strategy.raw(model), cfg)

    # --- the loop: rate, micro-steps, clip, finite?, step, then whatever this step is followed by
    stop.begun = True  # from now on a signal waits for a save
    watch.begin(state.step)
    # a checkpoint's evaluation is made now, unless a run has made it since, as rank 0's trace knows
    made_since = any(processes.max_over_ranks(monitor.has_evaluation()))
    state.evaluation_owed = state.evaluation_owed and eval_steps > 0 and not made_since
    idle = state.step >= cfg.max_steps and not state.evaluation_owed
    if state.evaluation_owed:
        evaluate_held_out()
    # after a second stop no step is made, because it would leave behind the weights that are to be evaluated
    due, unsaved, trained = Due(stop=state.evaluation_owed), False, None  # the last batch that made an update
    for batch in loader if not due.stop else ():
        monitor.before_step(state.step + 1)
        lr = optim.set_rate(optimizers, state.step, cfg)
        figures = torch.empty(0)  # of a step that is skipped: all moves on but the weights
        if not any(state.step + 1 in steps for steps in skips):
            trained = batch
            loss_sum = gradients(model, batch, cfg, env, scaler, tokens_per_step)
            # only fp16 has a scale; the norm is that of the true gradients
            scaler.unscale_(optimizers[0])
            norm, divisor = strategy.clip_gradients(model, cfg.max_grad_norm, later=clips_in_kernel)
            # decided on the device before the update, so that the host does not wait for the loss
            figures, apply = health.check(state.step, loss_sum, norm.to(env.device), tokens_per_step)
            checkpoints.before_update()  # the last save may still copy what it changes
            optim.update(optimizers, scaler, apply, divisor)
            strategy.clear_gradients(model)
        state.step += 1  # the only clock: rate, samples, saves and evaluations follow from it
        state.samples_seen += global_batch
        state.tokens += tokens_per_step
        # a skipped step goes through the same queue, or the trace and the replay proof would see it too early
        readback.put((state.step, lr, batch.ids), figures)
        watch.step(state.step)  # a hang is told by 20 of these steps' median
        each_step()
        due = due_after(state.step, cfg, eval_steps, stop, loader, checkpoints, monitor)
        stop.pass_on(due.stop)
        # figures come a step late, so that the host does not wait for the device; all of them before one is acted on
        for (at, rate, ids), figure in readback.take(wait=due.log or due.evaluation or due.save or unsaved):
            if not figure:
                monitor.skipped(at, ids)
                continue
            status = health.status(*figure)
            monitor.step(at, figure, rate, ids, status, dataset.locate, due.log and at == state.step)
            checkpoints.after_step(at, finite=not health.bad_in_a_row)
        if due.log:  # after the figures, of which its mean is made
            monitor.log_line(state.step, lr, loader.wait_seconds, checkpoints.status)
        logs.log(checkpoints.news(), screen=False)  # a save becomes complete behind training, at any step
        if due.save_failed:
            logs.log(
                f"Step {state.step}: {checkpoints.wait_for_failure()}; training goes on, the checkpoint before it stands"
            )
        if health.too_many_bad_steps:  # before a save: the last good checkpoint stands
            break
        state.evaluation_owed = due.evaluation
        if due.evaluation and not due.stop:
            evaluate_held_out()
            if state.evaluation_owed:  # a stop came during the evaluation
                due = due._replace(save=True, last=True, stop=True)
        if due.last:
            monitor.prove(state.step, over=True)  # before a save that would stand on steps that differ
        if due.save or unsaved:  # one that steps without a finite loss have put off is made right after them
            unsaved = not save(due.last)
        if due.last:
            break

    # unsaved here: the last save found no finite loss. A stop among such steps is a stop, and the next start sees more
    code = STOPPED if due.stop and not health.too_many_bad_steps else exits.NOT_FINITE
    not_finite = code * (health.bad_in_a_row > 0 or unsaved)
    return finish(cfg, env, state.step, due, idle, not_finite, loader, checkpoints, monitor, watch, stop)


def show(cfg: Config, origins: dict[str, str]) -> int:
    """Print the plan and the resolved config, as far as they are known without a process group. Returns 0."""
    world = launch().world_size if launch().address else cfg.num_processes or 1
    try:
        dataset: data.Dataset | str = data.Dataset.open(cfg)
    except data.DataError as error:
        dataset = f"not opened: {error}"
    where = f"{world} process{'es' * (world > 1)}, {cfg.parallel}, {cfg.mixed_precision}"
    print(messages.plan(cfg, world, dataset, where))
    print(configs.show_changes(cfg, origins))
    return DONE


def main(argv: list[str]) -> int:
    """Parse, check what can be checked without a GPU, run; returns one of the codes of exits.py."""
    entry.open_streams()
    cfg = stop = None
    try:
        cfg, origins = configs.load([a for a in argv if a != "--show"])
        if "--show" in argv:  # under torchrun one of them prints it
            return entry.run(lambda _: show(cfg, origins), argv) if not launch().rank else DONE
        cfg.batch(launch().world_size)
        stop = StopSignal(cfg.stop_after_minutes)
        watch_preemption(stop.ask)
        env = processes.start(cfg)
        processes.on_each_node(env, check_compiler, cfg, env.device)
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
        elif cfg:
            text = failures.explain_out_of_memory(error, cfg) or text
        failures.report(error, lambda: log_error(text, cfg))
        return exits.leave(code, text, at=at, secondary=failures.lost_peers(error))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
