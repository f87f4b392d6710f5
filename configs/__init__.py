"""The configuration: every key with its type, default and meaning, and how files and command lines set it.

    cfg, origins = configs.load(["configs/production.py", "max_steps=50000", "resume=latest"])

Precedence: dataclass default < config file < command line. Values are parsed by the declared type, never evaluated.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import os
import re
import shutil
import sys
import textwrap
import types
import typing
from dataclasses import dataclass
from pathlib import Path

from configs import _source as source
from refocused.entry import here

DEMO = Path(__file__).parent / "demo.py"


class ConfigError(ValueError):
    """A mistake in a key, a value or their combination; found before any process group or GPU is touched."""

    exit_code = 2
    same_on_all_ranks = True  # so one of them says it


@dataclass(frozen=True)
class Config:
    # model: GPT-NeoX, names as in Hugging Face's config.json
    vocab_size: int = 50257  # ids that the shards use; change it with the tokenizer
    hidden_size: int = 2048  # width of the residual stream; change it to change the model's size
    num_hidden_layers: int = 24  # blocks; change it to change the model's size
    num_attention_heads: int = 16  # heads per block; hidden_size must be a multiple of it
    intermediate_size: int = 8192  # width of the MLP, by custom 4 * hidden_size
    max_position_embeddings: int = 2048  # longest sequence the exported model promises to read
    rotary_pct: float = 0.25  # share of each head that is rotated; 1.0 for GPT-J style
    rotary_emb_base: float = 10000.0  # base of the rotary wavelengths; larger for long contexts
    use_parallel_residual: bool = True  # x + attn(x) + mlp(x); false for GPT-2's order
    hidden_act: str = "gelu"  # gelu (exact), gelu_new, gelu_fast or relu, as GPT-NeoX configs name them
    layer_norm_eps: float = 1e-5  # added to the variance in every LayerNorm
    initializer_range: float = 0.02  # standard deviation of the initial weights
    tie_word_embeddings: bool = False  # one matrix for input and output; true for small models
    attention_dropout: float = 0.0  # on attention weights; raise it when epochs repeat
    hidden_dropout: float = 0.0  # on the outputs of attention and MLP; raise it when epochs repeat

    # data: what is read and in which order
    data_dir: str = "data/demo"  # folder of shards, searched with its subfolders
    tokenized_file_pattern: str = "tokenized_cleaned_*.npz"  # name of a shard; other files are ignored
    max_files: int = -1  # number of shards to use, the first ones; -1 for all
    cache_dir: str = "data/cache"  # where compressed shards are unpacked to, once per machine; a large, fast disk
    sequence_length: int = 1024  # tokens per sample, T; at most max_position_embeddings
    tokenizer: str | None = "gpt2"  # what the shards were made with: gpt2, byte, ..., a tokenizer.json; none if unknown
    mask_documents: bool = False  # a token sees its own document only; true where they are shorter than a window
    shift_windows: bool = False  # cut windows elsewhere in every epoch; true where epochs repeat
    eval_files: int = 1  # last shards that are never trained on; with a single shard, its tail
    eval_samples: int = 256  # fixed held-out windows per evaluation; fewer for speed
    dataloader_num_workers: int = 4  # threads that read ahead; more on slow disks

    # optimisation: one optimizer step is the only clock
    max_steps: int = 25000  # optimizer steps in the whole run, resumed parts included
    per_device_train_batch_size: int = 4  # sequences per process and micro-step; what memory allows
    gradient_accumulation_steps: int = 4  # micro-steps per optimizer step
    global_batch_size: int = 0  # sequences per optimizer step; when set, accumulation is derived from it
    num_processes: int = 0  # processes the batch was chosen for; a different number is pointed out, 0 for any
    learning_rate: float = 2e-4  # peak; larger models want less
    min_learning_rate: float = 0.0  # where the decay ends; a tenth of the peak is common
    lr_scheduler_type: str = "cosine"  # cosine, linear, constant or warmup_stable_decay
    warmup_steps: int = 500  # steps of linear warm-up from zero; 0 for none
    decay_steps: int = 0  # last steps of warmup_stable_decay; 0 for a fifth of max_steps
    weight_decay: float = 0.1  # on matrices only, never on biases, norms or scalars
    optimizer: str = "adamw"  # adamw, or muon for the matrices of the blocks with AdamW for the rest
    adam_beta1: float = 0.9  # decay of the first moment; rarely changed
    adam_beta2: float = 0.95  # decay of the second moment; 0.99 and more for small batches
    adam_epsilon: float = 1e-8  # added to the root of the second moment; rarely changed
    adam_moments: str = "fp32"  # or bf16: 4 bytes per parameter less in memory, checkpoints and uploads
    max_grad_norm: float = 1.0  # global gradient norm is clipped to it; 0 for no clipping
    max_bad_steps: int = 10  # non-finite steps in a row after which the run stops, exit 65
    spikes: str = "off"  # report steps whose loss or norm jumps, with their shards, or skip: also do not apply them
    stop_after_minutes: float = 0.0  # stop then, saved, exit 75; where machines are rented by the hour, 0 for never
    skip_steps: str = ""  # steps to walk past without an update, as 1200-1210,1300; for batches known to be bad
    seed: int = 42  # weights, sample order and dropout are functions of it

    # hardware: how the work is laid out
    parallel: str = "ddp"  # ddp (whole model on each GPU) or fsdp (sharded; when memory is short)
    shard_size: int = 0  # with fsdp: processes that share one copy of the model, GPUs per node with several; 0 for all
    activation_checkpointing: str = "none"  # or activation, selective (MLPs), full: computed twice, for less memory
    cpu_offload: bool = False  # with fsdp: parameters, gradients and moments in host memory, for GPUs of 10 GB
    mixed_precision: str = "bf16"  # bf16, fp16 (older GPUs, with a gradient scaler) or no (fp32)
    compile_model: bool = True  # torch.compile each block; off to debug or for a few steps
    cpu_threads: int = 0  # threads per process on a CPU; 0 for cores / processes
    check_hardware: bool = True  # on GPUs, seconds at the start that name a slow one; off for a machine that is known
    watchdog_seconds: float = 480.0  # without a step for so long (and 20 median steps) is a hang, exit 70; 0 to debug
    max_failed_starts: int = 3  # starts in a row without a new step, then exit 78; 0 where machines vanish in minutes
    deterministic: bool = False  # bit-equal GPU kernels at some speed; on a CPU results always are

    # output: 0 means never for every *_steps key
    output_dir: str = "checkpoints"  # where checkpoints go
    logging_dir: str = "logs"  # TensorBoard files, train.log and trace.jsonl
    logging_steps: int = 250  # steps between log lines; one more at the end
    logging_seconds: float = 0.0  # seconds after which a line is logged too; for slow steps
    eval_steps: int = 0  # steps between evaluations on held-out data; one more at the end
    sample_tokens: int = 100  # length of the text that TensorBoard shows at each evaluation (not with fsdp); 0 for none
    profile: str = ""  # steps to profile, as 10-12, into logging_dir; to see where time and GPU memory go

    # checkpoints: what survives the machine
    save_steps: int = 1250  # steps between checkpoints; one more at the end and on signals
    save_seconds: float = 0.0  # seconds after which a checkpoint is saved too; for machines that vanish
    save_total_limit: int = 3  # newest checkpoints kept on disk; 0 for all
    keep_every: int = 0  # checkpoints whose step is a multiple of this are never deleted
    async_save: bool = True  # write behind training (not with cpu_offload); false to wait for the disk
    resume: str | None = None  # latest, a checkpoint's name or a path; none for a fresh run
    init_from: str | None = None  # checkpoint whose weights a fresh run starts from; to go on from another model
    allow_change: bool = False  # train on other data, tokenizer or sequences per step than the checkpoint's

    # bucket: the second home of data and checkpoints
    bucket_name: str | None = None  # Google Cloud Storage bucket, without gs://; none to stay on this machine
    checkpoint_bucket_path: str = ""  # checkpoints go below it in the bucket; one path per run, empty for no upload
    bucket_total_limit: int = 5  # newest checkpoints kept in the bucket; 0 for all
    upload_deadline_seconds: float = 600.0  # how long the end of a run waits for its last checkpoint's upload

    def __post_init__(self):
        _check(self)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def moments_fit_bf16(self) -> bool:
        """Whether bf16 resolves the change of AdamW's moments: it loses what is below 1/256 of a value."""
        return max(self.adam_beta1, self.adam_beta2) <= 0.99

    @property
    def saves_behind(self) -> bool:
        """async_save, but not where the tensors are in host memory already and their copy would need it twice."""
        return self.async_save and not self.cpu_offload

    def batch(self, world_size: int) -> tuple[int, int]:
        """(gradient accumulation steps, sequences per optimizer step over all processes).

        Raises ConfigError where global_batch_size does not divide, with the nearest sizes that do.
        """
        B, micro_step = self.per_device_train_batch_size, self.per_device_train_batch_size * world_size
        whole = self.global_batch_size or self.gradient_accumulation_steps * micro_step
        most = f"2**24 = {MOST_SEQUENCES:,}; lower global_batch_size or gradient_accumulation_steps"
        require(whole <= MOST_SEQUENCES, f"{whole:,} sequences per step are more than {most}")
        product = f"per_device_train_batch_size * processes = {B} * {world_size} = {micro_step}"
        near = _multiples(whole, micro_step)
        require(whole % micro_step == 0, f"global_batch_size={whole} is not a multiple of {product}; nearest: {near}")
        return whole // micro_step, whole


KEYS = {f.name: f for f in dataclasses.fields(Config)}
# what makes a model the same, its tensors and their function: the first group without what only training knows
TRAINED = ("max_position_embeddings", "initializer_range", "attention_dropout", "hidden_dropout")
MODEL = [key for key in list(KEYS)[: list(KEYS).index("data_dir")] if key not in TRAINED]
OPTIMIZER = ["optimizer", "adam_moments"]  # what its optimizer's tensors are
LARGEST = 1 << 53  # of a whole number: JSON readers elsewhere hold numbers as doubles
types_of = functools.cache(typing.get_type_hints)  # {key: type} of a dataclass

CHOICES = {
    "hidden_act": ("gelu", "gelu_new", "gelu_fast", "relu"),
    "lr_scheduler_type": ("cosine", "linear", "constant", "warmup_stable_decay"),
    "optimizer": ("adamw", "muon"),
    "adam_moments": ("fp32", "bf16"),
    "spikes": ("off", "report", "skip"),
    "parallel": ("ddp", "fsdp"),
    "activation_checkpointing": ("none", "activation", "selective", "full"),
    "mixed_precision": ("bf16", "fp16", "no"),
}
POSITIVE = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings "
    "sequence_length per_device_train_batch_size gradient_accumulation_steps max_bad_steps dataloader_num_workers "
    "eval_samples rotary_emb_base"
).split()
# numbers are 0 or more, but for these; epsilon: what fp32 holds, as 0 / 0 would be a weight
AT_LEAST = {"max_files": -1, "adam_epsilon": 1e-37, **dict.fromkeys(POSITIVE, 1)}
# far beyond what anybody uses, and still built or refused within seconds
AT_MOST = {
    "cpu_threads": 1024, "dataloader_num_workers": 1024, "sample_tokens": 1_000_000,
    "upload_deadline_seconds": 1e6, "watchdog_seconds": 1e6, "rotary_pct": 1,
}  # fmt: skip
BELOW_ONE = ("attention_dropout", "hidden_dropout", "adam_beta1", "adam_beta2")
MAY_BE_INFINITE = ("max_grad_norm", "save_seconds")
MOST_TOKENS, MOST_SEQUENCES = 1 << 24, 1 << 24  # per micro-step, per step
PATHS = ("data_dir", "cache_dir", "tokenizer", "output_dir", "logging_dir", "resume", "init_from")  # ~, $NAME: expanded


def require(rule: object, message: str) -> None:
    if not rule:
        raise ConfigError(message)


def _check(cfg: Config) -> None:
    """Every rule that needs no data, no device and no process group: first each key's own, then those of several."""
    for key, kind in types_of(Config).items():
        value = getattr(cfg, key)
        if isinstance(value, str):
            hidden = re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", value)
            require(not hidden, f"{key}={value!r:.80} has a control character; leave it out")
        elif kind is not bool and value is not None:
            least, most = AT_LEAST.get(key, 0), AT_MOST.get(key, math.inf)
            require(key in MAY_BE_INFINITE or math.isfinite(value), f"{key}={value} must be finite")
            require(value >= least, f"{key}={value} must {f'be at least {least:g}' if least else 'not be negative'}")
            require(value < 1 or key not in BELOW_ONE, f"{key}={value} must be below 1")
            require(value <= most, f"{key}={value} must be at most {most:g}")
    for key, choices in CHOICES.items():
        value = getattr(cfg, key)
        require(value in choices, f"{key}={value!r} is none of {', '.join(choices)}{nearest(value, choices)}")
    for key in PATHS:
        value, default = getattr(cfg, key), getattr(Config, key)
        require(value != "", f"{key}= names nothing; its default is {key}={default or 'none'}")
        require(
            key in ("resume", "init_from") or not re.match(r"\w{2,}:/", value or ""),
            f"{key}={value} is no path of this machine. A bucket is named by bucket_name=, where checkpoints go in it by "
            "checkpoint_bucket_path=; `data.py download` and `ckpt.py pull` fetch from one",
        )
    wrong = cfg.bucket_name is not None and bucket_problem(cfg.bucket_name)
    require(not wrong, f"bucket_name={cfg.bucket_name!r:.200} {wrong}; none stands for no bucket")
    wrong = prefix_problem(cfg.checkpoint_bucket_path)
    require(not wrong, f"checkpoint_bucket_path={cfg.checkpoint_bucket_path!r:.200} {wrong}; write it as runs/one")
    step_ranges("skip_steps", cfg.skip_steps)
    one = len(step_ranges("profile", cfg.profile)) <= 1
    require(one, f"profile={cfg.profile} must be one range of steps, as 10-12")

    D, H, T, B = cfg.hidden_size, cfg.num_attention_heads, cfg.sequence_length, cfg.per_device_train_batch_size
    near = _multiples(D, H)
    require(D % H == 0, f"hidden_size={D} is not a multiple of num_attention_heads={H}; nearest sizes: {near}")
    head, rotary = cfg.head_dim, int(cfg.head_dim * cfg.rotary_pct)
    even = min(rotary // 2 * 2 or 2, head // 2 * 2)
    share = f"{min(1, (even + 0.5) / head):.4g}"  # half a dimension more, so that it survives the rounding
    steps, decay = cfg.max_steps, cfg.decay_steps if cfg.lr_scheduler_type == "warmup_stable_decay" else 0
    ramps = f"warmup_steps={cfg.warmup_steps}{f' + decay_steps={decay}' if decay else ''}"
    rate, lowest = cfg.learning_rate, cfg.min_learning_rate
    betas = f"adam_beta1={cfg.adam_beta1} adam_beta2={cfg.adam_beta2}"
    offload, fsdp, fp16 = cfg.cpu_offload, cfg.parallel == "fsdp", cfg.mixed_precision == "fp16"
    muon, size, longest = cfg.optimizer == "muon", cfg.shard_size, cfg.max_position_embeddings
    needs = f"needs parallel=fsdp, not {cfg.parallel}"
    for message, refused in {
        f"rotary_pct={cfg.rotary_pct} rotates {rotary} of {head} dimensions per head; it must be an even number, as with "
        f"rotary_pct={share}": rotary % 2,
        f"sequence_length={T} exceeds max_position_embeddings={longest}; lower it or raise the latter": T > longest,
        f"per_device_train_batch_size={B} * sequence_length={T} tokens at once are more than 2**24 = {MOST_TOKENS:,}; "
        "larger batches come from gradient_accumulation_steps or global_batch_size": B * T > MOST_TOKENS,
        "max_files=0 leaves no shard to train on; use -1 for all or a positive number": cfg.max_files == 0,
        f"min_learning_rate={lowest:g} exceeds learning_rate={rate:g}": lowest > rate,
        f"{ramps} exceeds max_steps={steps}: the peak learning rate is never reached; try warmup_steps={steps // 20}": 0
        < steps
        < cfg.warmup_steps + decay,
        f"adam_moments=bf16 with {betas}: bf16 does not resolve the change of a moment that decays more slowly than by "
        "0.99; lower the beta or use adam_moments=fp32": cfg.adam_moments == "bf16" and not cfg.moments_fit_bf16,
        "mask_documents=true needs the id of end-of-text, which tokenizer=none does not say; name the "
        "tokenizer": cfg.mask_documents and cfg.tokenizer is None,
        f"cpu_offload=true {needs}: only sharded parameters can live in host memory": offload and not fsdp,
        f"shard_size={size} {needs}: ddp keeps a whole copy in each process": size and not fsdp,
        "cpu_offload=true with mixed_precision=fp16: its scaler cannot follow; use bf16": offload and fp16,
        "cpu_offload=true with optimizer=muon has never been tried; leave one of them out": offload and muon,
        f"cpu_offload=true with shard_size={size} has never been tried; leave one of them out": offload and size,
        "optimizer=muon knows no gradient scaler, as mixed_precision=fp16 needs; use bf16": fp16 and muon,
    }.items():
        require(not refused, message)


def _multiples(n: int, of: int) -> str:
    """The multiples nearest to n, from one on."""
    return f"{n // of * of} and {n // of * of + of}" if n >= of else f"{of}"


def bucket_problem(name: str) -> str:
    """Why no bucket can have this name, or ""."""
    if re.fullmatch(r"[a-z0-9](?!.*\.\.)[a-z0-9._-]{1,220}[a-z0-9]", name):
        return ""
    if "/" in name:
        return "has a gs:// or a slash; write the name alone"
    return "is no bucket's name: that has 3 or more of a-z, 0-9, -, _ and ., with a letter or digit at both ends"


def prefix_problem(path: str) -> str:
    """Why nothing is to be written below this path of a bucket, or ""; empty for the bucket itself."""
    wrong = path and {"", ".", ".."} & {*path.removesuffix("/").split("/")} or path.startswith("gs:")
    if wrong or not path.isprintable() or len(path.encode(errors="replace")) > 700:
        return "has a gs://, a control character, a part that is empty or . or .., or more than 700 bytes"
    return ""


def step_ranges(key: str, text: str) -> list[range]:
    """ "1200-1210,1300" as ranges that include both ends; steps are counted from 1, as the log lines do."""
    found = []
    for part in filter(None, text.replace(" ", "").split(",")):
        match = re.fullmatch(r"(\d{1,15})(?:-(\d{1,15}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        way = "is no step or range of steps; write 1200 or 1200-1210"
        require(1 <= first <= last, f"{key}={text:.80}: {part:.80} {way}")
        found.append(range(first, last + 1))
    return found


def load(argv: list[str]) -> tuple[Config, dict[str, str]]:
    """Config from a command line: at most one config file (configs/demo.py if none), then key=value or --key=value.

    Returns the config and, for each key that something set, what set it. Raises ConfigError.
    """
    path, mistakes = _config_file([a for a in argv if not is_setting(a)])
    values, places = ({}, {}) if mistakes else read_file(path)
    origins = {key: place.rpartition(":")[0] for key, place in places.items()}
    for arg in filter(is_setting, argv):
        key, text = arg.removeprefix("--").split("=", 1)
        try:
            values[key], origins[key] = parse(key, text), "command line"
        except ConfigError as error:
            mistakes.append(str(error))
    require(not mistakes, "\n".join(mistakes))
    try:
        return Config(**values), origins
    except ConfigError as error:
        named = [key for key, origin in origins.items() if origin != "command line" and f"{key}=" in str(error)]
        where = " and ".join(f"{key} from {places[key]}" for key in named)
        raise ConfigError(f"{error}{f' ({where})' if where else ''}") from None


def is_setting(arg: str) -> bool:
    """Whether a word of the command line is key=value, and not a config file, whose name may have a = too."""
    key = arg.removeprefix("--").split("=")[0]
    return "=" in arg and (key in KEYS or not (arg.endswith(".py") and Path(arg).is_file()))


def _config_file(words: list[str]) -> tuple[Path, list[str]]:
    """The config file among a command line's words that set nothing, and what is wrong with the others.

    A relative path is looked for in the current folder and beside configs/. Raises ConfigError where there is no file.
    """
    mistakes, files = [], []
    while words:
        word, *words = words
        key = word.lstrip("-").replace("-", "_")
        if not (word.startswith("-") or key in KEYS or _theirs(key)):
            files.append(word)
            continue
        value = words.pop(0) if words and not words[0].startswith("-") and not words[0].endswith(".py") else ""
        try:
            ours = theirs if (theirs := _theirs(key)) in KEYS else _known(key)
            usual = "true" if types_of(Config)[ours] is bool else "latest" if ours == "resume" else "VALUE"
            mistakes.append(f"{word} {value}".strip() + f": write {ours}={value or usual}")
        except ConfigError as error:
            mistakes.append(str(error))
    if len(files) > 1:
        mistakes.append(f"expected one config file and key=value settings, got {' '.join(files)}")
    path = Path(files[0]) if files else DEMO
    path = path if path.exists() else DEMO.parent.parent / path
    if not mistakes and not (path.is_file() and path.suffix == ".py"):
        shipped = ", ".join(f"configs/{file.name}" for file in sorted(DEMO.parent.glob("[!_]*.py")))
        what = f"{files[0]} is no Python file"
        if not path.exists():
            folders = dict.fromkeys((Path.cwd(), DEMO.parent.parent))
            what = f"no config file {files[0]} in {' or '.join(map(str, folders))}"
        raise ConfigError(f"{what}; a config file is Python that assigns keys, such as {shipped}")
    return path, mistakes


def read_file(path: Path) -> tuple[dict[str, typing.Any], dict[str, str]]:
    """The keys that a Python config file assigns, run in a namespace of its own, and the file:line that set each.

    Other names are free if they begin with _ or are imported, a loop's, or of a module, function or class.
    """
    space: dict[str, typing.Any] = {"__file__": str(path), "__name__": path.stem}
    before = sys.path[:]
    try:
        sys.path.append(str(path.parent.absolute()))  # a module beside it is found
        exec(compile(path.read_bytes(), str(path), "exec"), space)  # bytes: UTF-8 whatever the locale
        places = source.assigned(path, KEYS.keys())
    except (Exception, SystemExit) as error:
        way = "; a file beside this one is imported by its name alone, as `from base import *`"
        where = f"{source.line_of(error, path)} does not run: {type(error).__name__}: {error}"
        raise ConfigError(where + way * isinstance(error, ImportError)) from error
    finally:
        sys.path[:] = before
    of_keys = {str(path), *(place.rpartition(":")[0] for name, place in places.items() if name in KEYS)}
    found, mistakes = {}, []
    for name, value in space.items():
        place = places.get(name, f"{path}:?" if name in KEYS else "")
        if name.startswith("_"):
            continue
        if (
            isinstance(value, type)
            and value.__module__ == path.stem
            and (lost := [k for k in vars(value) if k in KEYS])
        ):
            way = f"{lost[0]} is assigned at the top level of the file"
            mistakes.append(f"{path}: what class {name} sets is not read; {way}")
        kinds = types.ModuleType | types.FunctionType | types.BuiltinFunctionType | type
        if isinstance(value, kinds) or place.rpartition(":")[0] not in of_keys:
            continue
        try:
            require(
                name in KEYS or isinstance(value, str | int | float | None),
                f"{name} is a {type(value).__name__} and no key; keys are assigned at the top level of the file, and a "
                "helper's name begins with _",
            )
            found[name] = convert(_known(name, file=True), value)
        except ConfigError as error:
            mistakes.append(f"{place}: {error}")
    require(not mistakes, "\n".join(mistakes))
    require(found, f"{path} assigns no key at its top level, as max_steps = 25_000 does; nothing else of it is read")
    return found, {key: places.get(key, f"{path}:?") for key in found}


def _known(key: str, owner: type = Config, file: bool = False) -> str:
    """The key, if there is one of this name. Raises ConfigError with what to write instead."""
    if key in types_of(owner):
        return key
    if owner is Config and (ours := _theirs(key)):
        raise ConfigError(f"unknown key {key!r}; {f'did you mean {ours}?' if ours in KEYS else f'here: {ours}'}")
    way = "a helper's name begins with _" if file else f"`{here('python train.py --help')}` lists them"
    raise ConfigError(f"unknown key {key!r:.80}{nearest(key, types_of(owner))}; {way}")


def _theirs(word: str) -> str | None:
    """What to write here for a word of another trainer, if it is one."""
    from configs._others import OTHERS

    ours = OTHERS.get(word.lower().replace("-", "_"))
    return ours and re.sub("`(python .+?)`", lambda match: f"`{here(match[1])}`", ours)


def nearest(word: str, words: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word).lower(), list(words), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def type_name(key: str, owner: type = Config) -> str:
    kind, optional = _kind(key, owner)
    return kind.__name__ + " | none" * optional


def _kind(key: str, owner: type) -> tuple[type, bool]:
    """The type of a key, and whether it may be None as well."""
    kind = types_of(owner)[key]
    inner = [k for k in typing.get_args(kind) or (kind,) if k is not type(None)]
    return inner[0], inner != [kind]


def convert(key: str, value: typing.Any, owner: type = Config) -> typing.Any:
    """A Python value as the key's declared type; integral floats are good ints, paths good texts. Raises ConfigError."""
    kind, optional = _kind(key, owner)
    if optional and value is None:
        return None
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a scalar of numpy or torch
        value = value.item()
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    whole = type(value) is int
    require(
        kind is float or not whole or abs(value) <= LARGEST,
        f"{key} is beyond 2**53 = {LARGEST}: no count or seed is so large",
    )
    if kind is float and whole:
        value = float(value) if abs(value) < 1e300 else math.inf
    wanted = f"{key}={value!r:.80} is a {type(value).__name__}; {key} wants {type_name(key, owner)}"
    require(type(value) is kind, wanted)
    require(value == value, f"{key}={value} is not a number")
    return expand(key, value) if owner is Config and key in PATHS else value


def expand(key: str, path: str) -> str:
    """The path with ~ and $NAME replaced, as a shell would. Raises ConfigError where they mean nothing."""
    found = os.path.expandvars(os.path.expanduser(path))
    if unknown := re.search(r"^~[^/]*|\$(\w+|\{\w+\})", found):
        raise ConfigError(f"{key}={path}: {unknown[0]} is not known here; write the folder out")
    return found


def parse(key: str, text: str, owner: type = Config) -> typing.Any:
    """A command line's text as the type that the dataclass declares: 1e6, 25_000 are good ints; true/false; none."""
    kind, optional = _kind(_known(key, owner), owner)
    word = text.strip().lower()
    if word == "none" and optional:
        return None
    try:
        value = (
            text if kind is str
            else {"true": True, "false": False}[word] if kind is bool
            else int(word[:4000]) if kind is int and re.fullmatch(r"[+-]?[\d_]+", word)
            else float(word)
        )  # fmt: skip
    except (KeyError, ValueError):
        hint = f"{' (true or false)' * (kind is bool)}; its default is {getattr(owner, key)}"
        raise ConfigError(f"{key}={text:.80} is no {type_name(key, owner)}{hint}") from None
    return convert(key, value, owner)


def difference(old: dict[str, typing.Any], new: dict[str, typing.Any]) -> list[tuple[str, typing.Any, typing.Any]]:
    """(key, old value, new value) for each key whose value differs, in the order of Config; an absent one is its default."""
    both = [(key, old.get(key, field.default), new.get(key, field.default)) for key, field in KEYS.items()]
    return [(key, was, now) for key, was, now in both if was != now]


def check_same_model(
    what: str, theirs: dict[str, typing.Any], cfg: Config, keys: list[str], way: str = "go on with {needed}"
) -> None:
    """Raise ConfigError unless `what`, made with the config `theirs`, has the values of cfg for these keys."""
    was = {key: theirs.get(key, KEYS[key].default) for key in keys}
    if changes := [(key, old, getattr(cfg, key)) for key, old in was.items() if old != getattr(cfg, key)]:
        listed = ", ".join(f"{key} {old} -> {new}" for key, old, new in changes)
        needed = " ".join(f"{key}={old}" for key, old, _ in changes)
        raise ConfigError(f"{what} is of another model or optimizer: {listed}; {way.format(needed=needed)}")


def removed(old: dict[str, typing.Any]) -> list[tuple[str, typing.Any, str]]:
    """(key, its value, what to write instead) for each removed key that a checkpoint's config had changed."""
    from configs._others import GONE, OTHERS

    return [(k, old[k], OTHERS[k]) for k, was in GONE.items() if k in old and str(old[k]).lower() != was]


def describe(owner: type = Config) -> list[tuple[str, list[tuple[str, str]]]]:
    """[(group, [(key, meaning)])] read from the comments of a dataclass, their only owner."""
    groups: list[tuple[str, list[tuple[str, str]]]] = []
    for line in inspect.getsource(owner).splitlines():
        if match := re.fullmatch(r"    # (.+)", line):
            groups.append((match[1], []))
        elif match := re.fullmatch(r"    (\w+): .+?  # (.+)", line):
            groups[-1][1].append((match[1], match[2]))
    return groups


def print_help(argv: list[str]) -> int:
    """train.py --help; returns the exit code."""
    print(
        f"usage: {here('python train.py [CONFIG.py] [key=value ...] [--show]')}\n"
        f"       {here('torchrun --standalone --nproc_per_node=N train.py [CONFIG.py] [key=value ...]')}\n\n"
        "  CONFIG.py   Python that assigns the keys below; configs/demo.py if absent\n"
        "  --show      print the resolved config and the plan of the run, and exit",
        *key_table(), sep="\n",
    )  # fmt: skip
    return 0


def key_table(owner: type = Config) -> list[str]:
    """Name, default, meaning and type of each key of a dataclass under the names of their groups, as wide as the terminal."""
    lines, column, width = [], 44, max(80, shutil.get_terminal_size((128, 24)).columns)
    for group, keys in describe(owner):
        lines += ["", group]
        for key, meaning in keys:
            default = getattr(owner, key)
            shown = str(default).lower() if default is None or isinstance(default, bool) else default
            text = f"{f'  {key} = {shown} ':<{column}}{meaning} ({type_name(key, owner)})"
            lines += textwrap.wrap(text, width - 1, subsequent_indent=" " * column)
    return lines


def show_changes(cfg: Config, origins: dict[str, str]) -> str:
    """The keys that something set, with value, origin and, where it differs, the default."""
    set_by = [(key, getattr(cfg, key), KEYS[key].default, origin) for key, origin in origins.items()]
    return "\n".join(f"  {k} = {new}  [{by}]" + f"  (default {was})" * (new != was) for k, new, was, by in set_by)
