"""Every command that README, docs and CONTRIBUTING show, and that the program prints, runs as it stands there.

In a fresh copy of the tree with an environment in .venv, from a shell in which it is not activated, unless the text says
so. The README's own run in the default suite, all others with -m slow; what cannot run on a CPU without a network is in
LEFT_OUT, each with its reason.
"""

import ast
import fnmatch
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import shards
import torch
from conftest import LONG, ROOT, write_shards
from fakegcs import FakeGCS
from launch import GUARD
from safetensors.torch import load_file

import bench
import ckpt
import configs
import data
from configs import _others, types_of
from configs._others import OTHERS
from refocused.run.environment import free_port
from refocused.run.generation import Options

BIN = Path(sys.executable).parent
# the demo, in seconds
SHORT = "cpu_threads=1 max_steps=4 warmup_steps=1 eval_steps=4 eval_samples=8 logging_steps=2 save_steps=2"
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
PROGRAM = re.compile(
    r"(mkdir|cp|make|pip|python|torchrun|tensorboard|pytest|\./setup\.sh|\.venv/bin/\w+|[A-Z_]+=\S+ \w+) "
)

# not run here: why
LEFT_OUT = {
    r"make gpu-check": "needs a GPU; on a CPU its parts are tests of their own (test_gpu.py)",
    r"configs/production(_8gpu)?\.py.*(shard_size|/shared/|num_processes|\$run)": "needs GPUs, several machines or a bucket",
    r"launch .*(configs/production|\$run)": "needs GPUs; --show of the same is run",
    r"make (lint|test)|pytest|test_golden": "the suite itself, and its storms",
    r"bench\.py step|bench\.py losses HEAD|bench\.py losses tests": "minutes of measuring",
    r"gs://(BUCKET|my-bucket|demo)": "needs a bucket: test_bucket_recipe and test_bucket_download run them on a server",
    r"config/x\.py|convert_hf_to_gguf|launch\.py --config": "another project's command",
    r"FILE\.py": "needs a folder that Accelerate wrote (test_export.py)",
    r"^pip install|setup\.sh": "installs, from a network (test_setup.py), or looks at the machine (test_machine_check)",
    r"kill -TERM|--kills": "a storm of signals (test_resume.py)",
    r"fake.gcs|checkpoint_bucket_path": "a recipe: test_bucket_recipe",
    r"\.\.\.|\|verify\|": "a pattern, no command",
    r"FUZZ_CASES": "hours of changed inputs (test_fuzz.py)",
}
# what a placeholder stands for in the copy, which `ground` fills
MEANS = {
    "PYTHIA_FOLDER|HF_FOLDER|FOLDER": "exported/first",
    "CHECKPOINT CHECKPOINT OUT": "out/demo/*step2* out/demo/*step4* OUT",
    "CHECKPOINT": "out/demo",
    "DIR_OR_CHECKPOINT": "out/demo",
    "list DIR": "list out/demo",
    "bench DIR": "bench data/demo",
    r"CONFIG\.py": "configs/demo.py",
    "KEYS": "",
    "--gpus N --memory GB": "--gpus 2 --memory 24",
    r"out/trunk/checkpoint-epoch0-step20000-files9": "out/trunk/checkpoint-epoch0-step4-files0",
    r"\*step15000\*": "*step2-*",
    r"\*step20000\*": "*step4-*",
}


def blocks(page: str) -> list[str]:
    return re.findall(r"(?:^    .+\n)+", re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.S), re.M)


def commands(page: str) -> list[str]:
    """The commands of a page's blocks, with those of its text behind them."""
    joined = [re.sub(r"\\\n *", "", block) for block in blocks(page)]
    lines = [line.strip() for block in joined for line in block.splitlines()]
    prose = re.sub(r"(?:^    [^\n]+\n)+|```.*?```", "", (ROOT / page).read_text(), flags=re.M | re.S)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    lines = [re.sub(r"   +.*|  +# .*", "", line) for line in lines if PROGRAM.match(line)]
    named = "refocused.run.launch", "ckpt.py average", "bench.py report"  # by their names alone
    return [line for line in dict.fromkeys(lines) if not line.endswith(named)]


def shorter(line: str) -> str:
    """The command with its placeholders filled in, at the smallest size that its arguments allow."""
    for word, meaning in MEANS.items():
        line = re.sub(rf"(?<![\w/]){word}(?![\w/])" if word[0].isalpha() else word, meaning, line)
    if line.startswith("make train"):
        old = re.search(r'ARGS="(.*)"', line)
        return re.sub(r' ARGS=".*"', "", line) + f' NPROC=1 ARGS="{old[1] if old else ""} {SHORT}"'
    if "train.py configs/production" in line:
        return line if "--show" in line else f"{line} --show"
    if "train.py" in line and not re.search("--show|--help", line):
        steps = " max_steps=6" if "resume" in line else ""
        return f"{line} {SHORT} mixed_precision=no{' decay_steps=1' if 'decay' in line else ''}{steps}"
    more = {"sample.py": "max_new_tokens=8", "tensorboard": "--inspect", "ckpt.py eval": "eval_samples=8"}
    more |= {"data.py bench": "--seconds 0.01"}
    return f"{line} {next((words for key, words in more.items() if key in line), '')}".strip()


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The tracked and new files, and in .venv what make would have installed there."""
    folder = tmp_path_factory.mktemp("copy")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    files = [file for file in listed.stdout.split() if (ROOT / file).exists()]
    subprocess.run(["cp", "--parents", "-r", *files, str(folder)], cwd=ROOT, check=True)
    made = folder / ".venv"
    made.mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        if (Path(sys.prefix) / name).exists():
            (made / name).symlink_to(Path(sys.prefix) / name)
    for stamp in ("runtime", "dev"):
        (made / stamp).touch()
    return folder


def run(folder: Path, line: str, activated: bool = True, code: int = 0, **env: str) -> str:
    """The line in a shell; what it says. Not activated: PATH is a plain one, without this environment."""
    rest = [part for part in os.environ["PATH"].split(os.pathsep) if Path(part) != BIN]
    path = os.pathsep.join([str(BIN), *rest] if activated else rest)
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, capture_output=True, text=True, timeout=GUARD,
        env={**os.environ, "PATH": path, **env},
    )  # fmt: skip
    assert done.returncode == code, f"{line}\n{done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def hints(said: str) -> list[str]:
    """The commands in what a program said: between backticks, and alone on a line behind a few words."""
    program = r"[^\s`]*(?:python[\d.]*|tensorboard|torchrun) "
    found = re.findall(r"`([^`\n]+)`", said) + re.findall(rf"^(?:  |.*: )({program}\S.*)$", said, re.M)
    return [line for line in found if re.match(program, line)]


def test_pages_are_found():
    """There are commands on most pages, every reason to leave one out is used, and the README has what a newcomer types."""
    found = {page: commands(page) for page in PAGES}
    assert sum(map(len, found.values())) > 80
    everything = [line for lines in found.values() for line in lines]
    assert [pattern for pattern in LEFT_OUT if not any(re.search(pattern, line) for line in everything)] == []
    assert {"make train", 'python sample.py prompt="import "', "tensorboard --logdir logs"} <= set(found["README.md"])


def named(page: str) -> Iterator[str]:
    """What the page names and is not there: links and their sections, files, modules, tests, commands, config keys."""
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    for path, _, section in (link.partition("#") for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text)):
        file = folder / path if path else ROOT / page
        titles = re.findall("^#+ (.+)", file.read_text(), re.M) if section and file.exists() else []
        anchors = {"", *(re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles)}
        yield from [f"{path}#{section}"] * (not file.exists() or section not in anchors)
    if page == "LOG.md":  # a log names what was
        return
    for path in re.findall(r"(?<![\w/.])(?:refocused|configs|tests|docs|deploy)/[\w/-]+\.\w+", text):
        yield from [path] * (not (ROOT / path).exists() and path != "configs/mine.py")  # the reader's own
    for module in re.findall(r"\brefocused(?:\.\w+)+", text):
        yield from [module] * (not list(ROOT.glob(f"{module.replace('.', '/')}*")))
    for file, name in re.findall(r"\b(test_\w+\.py)(?:::(\w+))?", text):
        path = next(ROOT.glob(f"tests/**/{file}"), None)
        yield from [f"{file}::{name}"] * (path is None or f"def {name}" not in path.read_text())
    for program, words in re.findall(r"\b(ckpt|data|bench)\.py ([a-z]+(?:\|[a-z]+)*)", text):
        known = {"ckpt": ckpt, "data": data, "bench": bench}[program].COMMANDS
        yield from (f"{program}.py {word}" for word in words.split("|") if word not in known)
    for target in re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.M):
        yield from [f"make {target}"] * (f"\n{target}:" not in (ROOT / "Makefile").read_text())
    known = {*configs.KEYS, *types_of(Options), *(OTHERS if page == "docs/migrating.md" else ())}
    for settings in re.findall(r"`((?:[a-z]\w*=[^`\s]*\s*)+)`", text):
        yield from (f"{key}=" for key in re.findall(r"(\w+)=", settings) if key not in known)


def test_pages_name_what_is_there():
    """Nothing that a page names is missing, and a link on another page leads to each of them."""
    pages = [*PAGES, "LOG.md"]
    assert [f"{page}: {missing}" for page in pages for missing in named(page)] == []
    links = {page: re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text()) for page in pages}
    led_to = {(page, os.path.relpath((ROOT / page).parent / link, ROOT)) for page in pages for link in links[page]}
    assert [page for page in pages[1:] if not any((other, page) in led_to for other in pages if other != page)] == []


def test_the_longest_tests_are_there():
    """Each name of conftest.LONG is a test's: one that got another name would be in the quick tier."""
    known = re.findall(r"^def (test_\w+)", "".join(path.read_text() for path in ROOT.glob("tests/test_*.py")), re.M)
    assert [name for name in LONG if not any(test.startswith(name.split("[")[0]) for test in known)] == []


def test_five_minutes(copy):
    """`make train` in a shell that knows no environment, a few steps; then what it printed at its end, there; then the
    README's next lines."""
    said = run(copy, shorter("make train"), activated=False)
    sample, board = hints(said.split("Next:")[1])
    assert sample == ".venv/bin/python sample.py resume=out/demo" and board == ".venv/bin/tensorboard --logdir logs"
    run(copy, f"{sample} max_new_tokens=8", activated=False)
    assert "loss/train" in run(copy, f"{board} --inspect", activated=False)
    sampled = next(line for line in commands("README.md") if "sample.py" in line)
    run(copy, f"source .venv/bin/activate && {shorter(sampled)}", activated=False)


def test_real_runs(copy):
    """The README's commands on production configs, as far as they go without a GPU: the plan, and one print of it from
    two processes."""
    for line in commands("README.md"):
        if "configs/production" in line:
            out = run(copy, f"{line} --show" if "launch" in line else shorter(line))
            assert out.count("model     GPT-NeoX, 24 layers") == 1, out
            if "bench.py plan" in line:
                assert "fits: " in out if "--gpus" in line else "the smallest known kind that it fits" in out


def test_machine_check(copy):
    """All is well where the pinned torch is, and another one is named."""
    pinned = re.search(r"^torch==(\S+)", (ROOT / "requirements.txt").read_text(), re.M)[1]
    ours = torch.__version__.partition("+")[0]
    said = run(copy, "./setup.sh --check", code=int(ours != pinned))
    assert (f"torch {ours}, wanted {pinned}" in said) == (ours != pinned)
    assert "nproc_per_node=2 train.py configs/demo.py" in run(copy, "make -n train NPROC=2", activated=False)
    assert ".venv/bin/python -m pytest" in run(copy, "make -n test", activated=False)


def test_bucket_recipe(copy):
    """The server from PyPI, a run that publishes and a listing, as one block of a shell."""
    [recipe] = [block for block in blocks("docs/bucket.md") if "fake_gcs_server" in block]
    script = "\n".join(["trap 'kill %1' EXIT", *(line.strip() for line in recipe.splitlines()[1:])])  # without pip's
    script = script.replace("4443", str(free_port())).replace("demo.py", "demo.py cpu_threads=1")
    run(copy, "python data.py demo")
    shell = subprocess.Popen(
        ["bash", "-e", "-c", script], cwd=copy, env={**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
        text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        out, _ = shell.communicate(timeout=GUARD)
    finally:
        os.killpg(shell.pid, signal.SIGKILL)  # the server is a child of the child that the script stops
    assert re.search(r"checkpoint-epoch0-step20-files0 .* complete", out), out


def test_bucket_download(copy):
    """The download of shards, from a bucket server."""
    seed = write_shards(copy / "seed", tokens=5000)
    with FakeGCS(buckets=("my-bucket",)) as server:
        for path in seed.rglob("*.npz"):
            server.put(f"tokens/{path.relative_to(seed)}", path.read_bytes(), bucket="my-bucket")
        [line] = [line for line in commands("docs/bucket.md") if "download gs://" in line]
        run(copy, line, STORAGE_EMULATOR_HOST=server.url)
    assert len(list((copy / "data/tokenized").rglob("*.npz"))) == len(list(seed.rglob("*.npz")))


@pytest.fixture(scope="module")
def ground(copy) -> Path:
    """The copy with what the pages' placeholders mean: the demo's set and a run, an exported model, texts and arrays."""
    run(copy, "python data.py demo")
    run(copy, f"python train.py configs/demo.py {SHORT} mixed_precision=no")
    run(copy, "python ckpt.py export out/demo exported/first --dtype fp32")
    for folder in ("SRC", "TEXTS", "texts", "home/stories"):
        (copy / folder).mkdir(parents=True)
        (copy / folder / "a.txt").write_text("Once upon a time there was a text, and it was long enough.\n" * 400)
    np.savez_compressed(copy / "SRC/a.npz", input_ids=np.arange(50000, dtype=np.int32)[None])
    np.arange(50000, dtype=np.uint16).tofile(copy / "SRC/b.bin")
    (copy / "pickled").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(copy / "exported/first" / name, copy / "pickled")
    torch.save(load_file(copy / "exported/first/model.safetensors"), copy / "pickled/pytorch_model.bin")
    return copy


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> str:
    """A folder in which tiktoken finds GPT-2's vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("vocabulary")
        shards.use_gpt2(folder, patch)
        return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/cloud.md"])  # test_deploy.py runs that one
def test_every_command_of_a_page(ground, page, gpt2):
    """In the order of the page, activated, at tiny sizes; each ends well. What OUT and DST name is made anew."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    for text in code:
        if "from configs.demo import" in text:
            (ground / "configs/mine.py").write_text(text)
    for line in commands(page):
        if any(re.search(pattern, line) for pattern in LEFT_OUT):
            continue
        for name in ("OUT", "DST"):
            shutil.rmtree(ground / name, ignore_errors=True)
        line = shorter(line)
        if made := re.search(r"ckpt\.py (?:import|export) \S+ (?:--torch )?(\S+)", line):  # a page before has made it
            subprocess.run(["rm", "-rf", made[1]], cwd=ground, check=True)
        run(ground, line, HOME=str(ground / "home"), TIKTOKEN_CACHE_DIR=gpt2)
    for text in code:
        run(ground, shlex.join(["python", "-c", text]))


# what makes a program print each of its hints: (the command as the source has it, what provokes it, its exit code)
PROVOKED = [
    ("python train.py --help", "python train.py hidden_sizes=3", 2),
    ("python sample.py --help", "python sample.py temprature=1", 2),
    ("python ckpt.py import * OUT", "python train.py init_from=exported/first output_dir=out/a logging_dir=logs/a", 2),
    ("python ckpt.py import * OUT", "python ckpt.py average exported/first exported/first OUT2", 2),
    ("python data.py demo *", "python train.py data_dir=data/none", 66),
    ("python data.py tokenize TEXTS *", "python train.py configs/production.py data_dir=data/none2", 66),
    ("python data.py tokenize TEXTS SHARDS --tokenizer *", "python ckpt.py import exported/first OUT3", 0),
    (
        "python data.py tokenize SRC DST --tokenizer *",
        "python train.py data_dir=data/demo tokenizer=gpt2 vocab_size=50257",
        66,
    ),
    ("python data.py * SRC DST", "python data.py verify TEXTS", 66),
    ("python data.py prepare SRC DST", "python train.py data_dir=SRC tokenized_file_pattern=b.bin", 66),
    ("python train.py configs/demo.py *", "python data.py tokenize TEXTS data/texts --tokenizer byte", 0),
    ("python -c", "python ckpt.py import pickled OUT2", 66),
]
NOT_PROVOKED = {  # why
    "pip install *": "needs a network",
    "hf download *": "the same",
    "python *": "a usage line, shown by test_entry.py",
    "python train.py [[]*": "a usage line",
    "torchrun *": "a usage line",
    "python sample.py": "the head of sample.py --help",
    "python sample.py resume=*": "the end of a run: test_five_minutes",
    "tensorboard --logdir *": "the end of a run: test_five_minutes",
    "python bench.py plan CONFIG.py": "needs a GPU that is out of memory (test_monitor.py)",
}


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for path in [*ROOT.glob("*.py"), *ROOT.glob("configs/*.py"), *ROOT.glob("refocused/**/*.py")]:
        yield path, ast.parse(path.read_text())


def templates() -> Iterator[str]:
    """The commands that the programs print: what entry.here() is called with, a star for what is filled in."""
    for _, tree in sources():
        names = {
            target.id: node.value
            for node in tree.body if isinstance(node, ast.Assign)
            for target in node.targets if isinstance(target, ast.Name)
        }  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("here", "entry.here"):
                text = names.get(node.args[0].id) if isinstance(node.args[0], ast.Name) else node.args[0]
                # others are another file's, or other programs' in prepare.WAYS
                if isinstance(text, ast.Constant | ast.JoinedStr):
                    parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                    yield "".join(part.value if isinstance(part, ast.Constant) else "*" for part in parts)


def test_every_hint_is_known():
    """What the programs print as a command is provoked and run below, or says why not; and nothing else prints one."""
    known, found = {template for template, _, _ in PROVOKED}, set(templates())
    assert known <= found
    assert [t for t in found - known if not any(fnmatch.fnmatchcase(t, pattern) for pattern in NOT_PROVOKED)] == []
    wild = re.compile(r"(`|: )(python|torchrun|tensorboard|pip) (\w+\.py|install|-m) ")
    for path, tree in sources():
        heads = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.FunctionDef | ast.ClassDef)]
        documents = {ast.get_docstring(n, clean=False) for n in heads} | {_others.TABLE}  # here() has what it says
        texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        assert [text for text in texts if wild.search(text) and text not in documents] == [], path


@pytest.mark.slow
@pytest.mark.parametrize("template, command, code", PROVOKED, ids=[command for _, command, _ in PROVOKED])
def test_hints_run_as_printed(ground, gpt2, template, command, code):
    """Each hint, provoked in a shell without the environment, and run there as it was printed."""
    for made in ("OUT", "OUT3", "DST", "NEW", "SHARDS"):
        shutil.rmtree(ground / made, ignore_errors=True)
    said = run(ground, f".venv/bin/{command}", activated=False, code=code, TIKTOKEN_CACHE_DIR=gpt2)
    pattern = re.escape(template.removeprefix("python ")).replace(r"\*", ".*")
    [hint] = [line for line in hints(said) if re.search(pattern, line)]
    assert hint.startswith(".venv/bin/")
    if " train.py configs" in hint:
        hint += f" {SHORT}"
    run(ground, hint, activated=False, TIKTOKEN_CACHE_DIR=gpt2)
