"""Parsing, precedence, origins and the errors that name the fix."""

import dataclasses
import itertools
import re

import pytest
import torch
from conftest import ROOT

import configs
import model
from configs import Config, ConfigError, load
from configs._others import GONE, OTHERS
from refocused.run import devices, guard, optim, strategy


def test_precedence_and_origins(tmp_path):
    """Default < file < command line, each value with the file that set it, through imports; helpers' names are free,
    numpy's numbers and paths are taken, a module beside the file is found."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from math import *\nfrom os import environ\nfrom torch.nn import *\nfrom pathlib import Path\nimport numpy as np\n"
        "from configs.production import *\nfrom base_of_mine import *\n_half = 12_500\nmax_steps = ceil(sqrt(_half**2))\n"
        "from configs.demo import logging_steps, max_steps as demo_steps\n"
        "for i in range(3):\n    learning_rate = np.float64(pi / 1e4)\nwith open(__file__) as f:\n    data_dir = Path('/x')\n"
        "class _Sizes:\n    seed = 3\ndef helper():\n    pass\neval_steps, save_steps = np.int64(5), 6\n"
    )
    (tmp_path / "base_of_mine.py").write_text("from math import floor\nvocab_size = floor(64.5)\nmax_steps = 7\n")
    cfg, origins = load([str(file), "warmup_steps=1e2", "--resume=latest"])
    assert (cfg.max_steps, cfg.warmup_steps, cfg.resume, cfg.parallel) == (12_500, 100, "latest", "fsdp")
    assert (cfg.vocab_size, cfg.data_dir, cfg.eval_steps, type(cfg.learning_rate)) == (64, "/x", 5, float)
    assert origins["resume"] == "command line" and "seed" not in origins and cfg.seed == 42
    shipped, beside = str(configs.source.from_here(ROOT / "configs/production.py")), str(tmp_path / "base_of_mine.py")
    places = {"max_steps": str(file), "save_steps": str(file), "vocab_size": beside, "parallel": shipped}
    assert {key: origins[key] for key in places} == places
    assert load([])[0] == load(["configs/demo.py"])[0]


def test_values():
    """Text is parsed by the key's declared type."""
    for text, value in (
        ("max_steps=1e6", 1_000_000), ("max_steps=25_000", 25_000), ("learning_rate=3e-4", 3e-4), ("rotary_pct=1", 1.0),
        ("compile_model=FALSE", False), ("resume=none", None), ("data_dir=a=b", "a=b"), ("max_files=-1", -1),
    ):  # fmt: skip
        found = configs.parse(*text.split("=", 1))
        assert found == value and type(found) is type(value), text


MISTAKES = f"""
lr=1 | did you mean learning_rate?
--gpus 2 --max-steps 5 | --nproc_per_node=GPUS train.py CONFIG.py`\\n--max-steps 5: write max_steps=5
max_steps 5 batch_size=4 | max_steps 5: write max_steps=5\\nunknown key 'batch_size'; did you mean per_
--compile_model --resume | --compile_model: write compile_model=true\\n--resume: write resume=latest
tests | tests is no Python file
README.md | README.md is no Python file
nofile.py | in {ROOT}; a config file is Python that assigns keys, such as configs/demo.py
configs/demo.py configs/test.py | expected one config file
per_device_train_batch_size=1e9 | tokens at once are more than 2**24
global_batch_size=1e9 | 1,000,000,000 sequences per step
max_steps={5000 * "9"} | max_steps is beyond 2**53
skip_steps={5000 * "9"} | is no step or range of steps
output_dir=gs://bucket/x | A bucket is named by bucket_name=
logging_dir=a\x01b | a control character
LEARNING_RAT=1 | unknown key 'LEARNING_RAT'; did you mean learning_rate
max_steps=many | max_steps=many is no int
max_steps=1.5 | max_steps=1.5 is a float; max_steps wants int
compile_model=yes | true or false
learning_rate=nan | not a number
cpu_threads=100000 | at most 1024
watchdog_seconds=1e15 | at most 1e+06
adam_epsilon=0 | at least 1e-37
data_dir=~nobody-of-that-name/x | ~nobody-of-that-name is not known here
output_dir=$NOT_SET_HERE/x | $NOT_SET_HERE is not known here
parallel=dp | did you mean ddp
hidden_size=100 num_attention_heads=16 | nearest sizes: 96 and 112
rotary_pct=1e308 | at most 1
rotary_emb_base=0 | at least 1
parallel=fsdp cpu_offload=true mixed_precision=fp16 | scaler cannot follow; use bf16
parallel=fsdp cpu_offload=true optimizer=muon | cpu_offload=true with optimizer=muon
parallel=fsdp cpu_offload=true shard_size=2 | cpu_offload=true with shard_size=2
cpu_offload=true | needs parallel=fsdp, not ddp
sequence_length=4096 | exceeds max_position_embeddings
max_files=0 | no shard
tokenizer=none mask_documents=true | tokenizer=none does not say; name the tokenizer
max_steps=10 warmup_steps=11 | exceeds max_steps=10
min_learning_rate=1 | exceeds learning_rate
hidden_dropout=1 | below 1
adam_moments=bf16 adam_beta2=0.999 | adam_beta2=0.999: bf16 does not resolve
muon_momentum=0.9 | unknown key 'muon_momentum'; here: leave it out, Muon's momentum is 0.95
"""


@pytest.mark.parametrize("line", MISTAKES.strip().splitlines(), ids=lambda line: line[:40])
def test_mistakes(line):
    """Each mistake is a ConfigError, exit code 2, that shows the value and the way out."""
    args, _, words = line.partition(" | ")
    with pytest.raises(ConfigError) as error:
        load(args.split(" "))[0].batch(1)
    assert words.replace("\\n", "\n") in str(error.value) and error.value.exit_code == 2


MISTAKES_IN_A_FILE = {  # what the error says: the file
    "bad.py:2: unknown key 'max_stepps'; did you mean max_steps or .*\n.*bad.py:3: .*lr": "seed = 1\nmax_stepps = 3\nlr = 1",
    "bad.py:1: max_steps='3' is a str": "max_steps = '3'",
    "bad.py:2: max_steps is beyond": "\nmax_steps = 10**5000",
    r"must not be negative \(max_steps from .*bad.py:1\)": "max_steps = -2",
    "learning_rate=inf must be finite": "learning_rate = 10**400",
    "bad.py:2 does not run: ZeroDivisionError": "\n1 / 0",
    "bad.py:2 does not run: SyntaxError": "seed = 1\nmax steps = 2",
    "bad.py:2 does not run: SystemExit": "import sys\nsys.exit(0)",
    "worse.py:3 does not run: ZeroDivisionError": "from worse import *",
    "bad.py:1 .*a file beside this one is imported by its name alone": "from configs.nowhere import *",
    "what class train sets is not read; max_steps is assigned at": "class train:\n    max_steps = 20\nseed = 3",
    "config is a dict and no key; keys are assigned at the top level": "config = dict(max_steps=3)",
    "assigns no key at its top level": "def main():\n    max_steps = 3",
}


@pytest.mark.parametrize("words", MISTAKES_IN_A_FILE)
def test_mistakes_in_a_file(tmp_path, words):
    """The same for a config file, with its line: unknown names, wrong types, code that does not run, keys in classes, none."""
    (tmp_path / "bad.py").write_text(MISTAKES_IN_A_FILE[words])
    (tmp_path / "worse.py").write_text("seed = 1\n\n1 / 0")
    with pytest.raises(ConfigError, match=words):
        load([str(tmp_path / "bad.py")])


def test_words_of_others():
    """The table of other trainers' words, those of the system before this one among them, has none of our keys on its left
    and names keys that exist on its right; a word of it is answered by its line."""
    before = "bf16 torch_compile num_train_epochs resume_from_checkpoint fsdp gradient_checkpointing use_wandb gpus"
    assert not OTHERS.keys() & configs.KEYS.keys() and set(before.split()) <= OTHERS.keys()
    known = {*configs.KEYS, *itertools.chain(*configs.CHOICES.values())}
    for word, ours in OTHERS.items():
        assert set(re.findall(r"\b[a-z0-9]+(?:_[a-z0-9]+)+\b", ours.split("`")[0])) <= known, word
        with pytest.raises(ConfigError, match=f"unknown key '{word}'; (here: |did you mean {ours})"):
            load([f"--{word}=1"])


def test_advice_is_good():
    """What a refusal of rotary_pct advises is accepted, for every width of a head."""
    for width, share in itertools.product(range(1, 200), (1.0, 0.25, 0.3, 1 / 3)):
        keys = {"hidden_size": width, "num_attention_heads": 1}
        try:
            Config(**keys, rotary_pct=share)
        except ConfigError as error:
            Config(**keys, rotary_pct=float(re.search(r"as with rotary_pct=([\d.]+)", str(error))[1]))


def test_global_batch():
    """Accumulation follows from the global batch on any number of processes, or the error names the nearest sizes."""
    cfg = Config(global_batch_size=96, per_device_train_batch_size=4)
    assert [cfg.batch(w) for w in (1, 2, 8)] == [(24, 96), (12, 96), (3, 96)]
    with pytest.raises(ConfigError, match=r"global_batch_size=100 .* 4 \* 2 = 8; nearest: 96 and 104"):
        dataclasses.replace(cfg, global_batch_size=100).batch(2)


def test_the_recommended_configuration():
    """production_muon.py: the model and the tokens of production_8gpu.py, in steps of 1 to 2 million on its 8 GPUs."""
    ours, theirs = (load([f"configs/production_{name}.py"])[0] for name in ("muon", "8gpu"))
    assert [getattr(ours, key) for key in configs.MODEL] == [getattr(theirs, key) for key in configs.MODEL]
    steps = [cfg.batch(8)[1] * cfg.sequence_length for cfg in (ours, theirs)]
    tokens = [cfg.max_steps * step for cfg, step in zip((ours, theirs), steps, strict=True)]
    assert 1e6 <= steps[0] <= 2.1e6 and tokens[0] == pytest.approx(tokens[1], rel=1e-4)


THREE = {
    "test": "max_files=5 max_steps=1000 per_device_train_batch_size=2 gradient_accumulation_steps=2 save_steps=200 "
    "logging_steps=25 warmup_steps=10 learning_rate=2e-4 dataloader_num_workers=2",
    "production": "max_files=-1 max_steps=25000 per_device_train_batch_size=4 gradient_accumulation_steps=4 save_steps=1250 "
    "logging_steps=250 warmup_steps=500 learning_rate=2e-4 dataloader_num_workers=4",
    "production_8gpu": "max_files=-1 max_steps=590625 per_device_train_batch_size=8 gradient_accumulation_steps=4 "
    "save_steps=20000 logging_steps=3000 warmup_steps=11812 learning_rate=3e-4 dataloader_num_workers=6",
}
ALL_THREE = (
    "sequence_length=1024 max_grad_norm=1 mixed_precision=bf16 compile_model=true hidden_size=2048 vocab_size=50257 "
)
ALL_THREE += "num_hidden_layers=24 rotary_pct=0.25 weight_decay=0.1 logging_seconds=60 save_seconds=1800 resume=latest"


@pytest.mark.parametrize("name", THREE)
def test_the_three_configurations(name):
    """The values that users of the predecessor know, unchanged. A rented machine is never silent for longer than a minute,
    loses no more than half an hour, is evaluated, and goes on by itself."""
    file = f"configs/{name}.py"
    cfg, _ = load([file])
    assert load([file, *THREE[name].split(), *ALL_THREE.split()])[0] == cfg and cfg.eval_steps


KEYS = """
    vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings
    rotary_pct rotary_emb_base use_parallel_residual hidden_act layer_norm_eps initializer_range
    tie_word_embeddings attention_dropout hidden_dropout data_dir tokenized_file_pattern max_files cache_dir
    sequence_length tokenizer mask_documents shift_windows eval_files eval_samples dataloader_num_workers
    max_steps per_device_train_batch_size gradient_accumulation_steps global_batch_size num_processes
    learning_rate min_learning_rate lr_scheduler_type warmup_steps decay_steps weight_decay optimizer adam_beta1
    adam_beta2 adam_epsilon adam_moments max_grad_norm max_bad_steps spikes stop_after_minutes skip_steps seed
    parallel shard_size activation_checkpointing cpu_offload mixed_precision compile_model cpu_threads
    check_hardware watchdog_seconds max_failed_starts deterministic output_dir logging_dir logging_steps
    logging_seconds eval_steps sample_tokens profile save_steps save_seconds save_total_limit keep_every
    async_save resume init_from allow_change bucket_name checkpoint_bucket_path bucket_total_limit
    upload_deadline_seconds
"""


def test_every_key_is_explained_once():
    """The keys are those of the list above: a new one is a decision that a reviewer sees here. The comments of Config are
    the help: each key has exactly one, in a group, and no other key appears. What a removed one says names keys."""
    explained = [key for _, keys in configs.describe() for key, _ in keys]
    assert explained == list(configs.KEYS) == KEYS.split() and len(explained) <= 78
    assert configs.removed(GONE | {"compile_model": False, "seed": 3}) == []
    changed = {"muon_momentum": 0.9, "spike_sigma": 6.0, "background_upload": True}
    assert [key for key, _, _ in configs.removed(changed)] == ["muon_momentum", "spike_sigma"]


@pytest.mark.parametrize("key", sorted(configs.CHOICES))
def test_choices_have_one_owner(key):
    """A choice that only the list of choices had would fail where it is used."""
    cfg = load(["configs/demo.py", "spikes=report"])[0]
    object.__setattr__(cfg, key, "new")
    with pytest.raises((KeyError, NotImplementedError)):
        optim.make_optimizers(model.GPTNeoX(cfg), cfg)
        optim.learning_rate(cfg.warmup_steps + 1, cfg)
        _ = devices.DTYPES[cfg.mixed_precision], strategy.SHARDED[cfg.parallel]
        guard.Spikes(cfg, torch.device("cpu"), None)


def test_what_must_be_finite():
    """Every float key refuses infinity, also as 1e400 and as an integer that no float holds, but for those whose infinity
    means "never" or "no limit"; none takes NaN."""
    floats = [key for key, kind in configs.types_of(Config).items() if kind is float]
    assert set(configs.MAY_BE_INFINITE) < set(floats) and len(floats) > 10
    for key in floats:
        for value in ("inf", "1e400", "1" + 400 * "0"):
            if key in configs.MAY_BE_INFINITE:
                assert getattr(load([f"{key}={value}"])[0], key) == float("inf")
            else:
                with pytest.raises(ConfigError, match=key):
                    load([f"{key}={value}"])
        with pytest.raises(ConfigError, match=key):
            Config(**{key: float("nan")})


def test_paths_are_expanded_and_never_empty(tmp_path, monkeypatch):
    """~, $HOME and ${HOME} in every path key, from a file and from the command line; an empty path is refused."""
    monkeypatch.setenv("HOME", "/home/someone")
    assert {key for key in configs.KEYS if key.endswith("_dir")} < set(configs.PATHS)
    for key in configs.PATHS:
        for text in ("~/x", "$HOME/x", "${HOME}/x"):
            (tmp_path / "mine.py").write_text(f"{key} = {text!r}")
            for given in (f"{key}={text}", str(tmp_path / "mine.py")):
                assert getattr(load([given])[0], key) == "/home/someone/x"
        assert getattr(load([f"{key}=a~b$"])[0], key) == "a~b$"
        with pytest.raises(ConfigError, match=f"{key}= names nothing"):
            load([f"{key}="])


def test_config_files_are_found(tmp_path, monkeypatch):
    """configs/ from another folder; a path with a = in it, which is no setting; one of the user's own comes first."""
    monkeypatch.chdir(tmp_path)
    assert load(["configs/test.py"])[0] == load([str(ROOT / "configs" / "test.py")])[0]
    (tmp_path / "lr=1e-4").mkdir()
    (tmp_path / "lr=1e-4" / "seed=3.py").write_text("max_steps = 777")
    for name in ("lr=1e-4/seed=3.py", f"{tmp_path}/lr=1e-4/seed=3.py"):
        assert load([name, "warmup_steps=7"])[0].max_steps == 777
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "test.py").write_text("max_steps = 778")
    assert load(["configs/test.py"])[0].max_steps == 778
