"""The house: which files there are, who imports whom, and what nobody may use; read from the sources.

The arrows inside the package are import-linter's (pyproject.toml); it takes the six files at the root for foreign ones.
"""

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

import bench
import ckpt
import data

# {story: the other stories that it may import}; every one may import configs and any room but measure
STORIES: dict[str, set[str]] = {
    "model": set(),  # torch alone
    "data": set(),
    "ckpt": {"model"},
    "sample": {"model", "ckpt"},
    "train": {"model", "data", "ckpt"},
    "bench": set(),  # dispatches to measure
}

# packages that a function may import, because not every run has or needs them
LATE = {
    "torch.nn.attention.varlen": "it loads torch's compiler, seconds that only CUDA needs",
    "google": "a second, and only a run with a bucket needs it",
    "refocused.bucket": "only a run with a bucket needs it",
    "refocused.checkpoint.source": "a model to start from, to sample or to export; a run that goes on reads none",
    "refocused.run.generation": "only an evaluation with sample_tokens writes a text",
    "refocused.run.hardware": "only a run on CUDA with check_hardware measures it",
    "refocused.run.speed": "only a GPU of the table has an expected speed",
    "matplotlib": "a second, and only pictures need it; not in requirements.txt",
    "tensorboard": "a second, and only rank 0 writes curves",
    "torch.utils.tensorboard": "the same",
    "tiktoken": "data of the byte tokenizer needs none",
    "tokenizers": "only a Hugging Face folder needs it; not in requirements.txt",
    "refocused.run.optimizers": "only optimizer=muon or adam_moments=bf16 uses it",
    "refocused.run.profiler": "only profile=10-12 uses it",
    "configs._others": "only a word that is no key is looked up there",
    "refocused.shards.prepare": "only a set that cannot be mapped needs it, and with it all other formats",
    "pydoc_data": "0.7 MB of text that is read as text, for the demo",
    "refocused.shards.tables": "it needs pyarrow, as only Parquet and Arrow files do; not in requirements.txt",
    "onnxruntime": "only an ONNX export needs it; not in requirements.txt",
    "transformers": "a peer of bench.py; not in requirements.txt",
    "accelerate": "a peer of bench.py; not in requirements.txt",
}
UNSAFE = r"^ *(import|from)\b.*\b(pickle|dill|cloudpickle|shelve|marshal|yaml|tarfile)\b|(?<![\w.])(eval|exec)\("
UNSAFE += r"|os\.(system|popen)\(|shell=True|allow_pickle=True|weights_only=False"
LAUNCH = r"RANK|WORLD_SIZE|LOCAL_\w+|MASTER_\w+|GROUP_\w+|TORCHELASTIC_\w+"
LAUNCH = rf"""environ(?:\.get\(|\[|\.setdefault\()"(?:{LAUNCH})"|"(?:{LAUNCH})" in os"""


def files() -> list[Path]:
    return sorted([*ROOT.glob("*.py"), *ROOT.glob("configs/*.py"), *ROOT.glob("refocused/**/*.py")])


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module, or name in a module, that an import anywhere in the tree names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: imports are absolute here"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def is_in(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def test_six_stories():
    """The Python files at the root are the six, and nothing else."""
    assert {path.stem for path in ROOT.glob("*.py")} == STORIES.keys()


def test_root_imports_point_down():
    """No story imports one that it stands below, model.py imports torch alone, and only measure's users import it."""
    wrong = []
    for story, below in STORIES.items():
        for module in imported(ast.parse((ROOT / f"{story}.py").read_text())):
            top = module.split(".")[0]
            foreign = story == "model" and top != "torch" and top not in sys.stdlib_module_names
            if (top in STORIES and top not in below) or is_in(module, "refocused.measure") or foreign:
                wrong.append(f"{story}.py imports {module}")
    for path in files():
        if path.parent != ROOT:
            allowed = STORIES.keys() if {"measure", "commands"} & {*path.parts} else {"model"}
            stories = {module.split(".")[0] for module in imported(ast.parse(path.read_text()))} & STORIES.keys()
            wrong += [f"{path.relative_to(ROOT)} imports {story}" for story in stories - allowed]
    assert wrong == []


def test_no_import_is_hidden_in_a_function():
    """Imports stand at the top, but for packages that are optional or slow, each with its reason in LATE."""
    wrong = []
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                late = [module for module in imported(node) if not any(is_in(module, package) for package in LATE)]
                wrong += [f"{path.relative_to(ROOT)}:{node.lineno} imports {module}" for module in late]
    assert wrong == []


FILES, LINES = 39, 7331


def test_what_a_run_stands_on():
    """`import train` loads so many files and lines of ours at most: what someone reads before trusting a run."""
    code = "import sys, train; print(*(getattr(module, '__file__', 0) for module in sys.modules.values()), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {*map(str, files())} & {*done.stdout.splitlines()}
    lines = sum(len(Path(path).read_text().splitlines()) for path in loaded)
    assert len(loaded) <= FILES and lines <= LINES, f"{len(loaded)} files, {lines} lines"


HELP = [f"{program}.py --help" for program in ("train", "ckpt", "bench")]


@pytest.mark.parametrize("line", ["ckpt.py list EMPTY", "data.py demo EMPTY/demo", *HELP])
def test_without_torch(line, tmp_path):
    """What looks at files, or only says how to call a program, does not load torch: it answers at once."""
    argv = line.replace("EMPTY", str(tmp_path)).split()
    code = "import atexit, os, runpy, sys; atexit.register(lambda: 'torch' in sys.modules and os._exit(9)); "
    code += f"sys.argv = {argv}; sys.path.insert(0, ''); runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout


@pytest.mark.parametrize("program", ["train", "data", "ckpt", "sample", "bench"])
def test_a_safe_path_is_enough(program, tmp_path):
    """With PYTHONSAFEPATH, and from another folder, Python does not put a program's folder on its path."""
    env = os.environ | {"PYTHONSAFEPATH": "1"}
    argv = [sys.executable, ROOT / f"{program}.py", "--help"]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_every_command_is_there():
    """Commands are named by module and function, and imported when called: each name leads to a function."""
    for program in (bench, ckpt, data):
        for _, place in program.COMMANDS.values():
            module, _, function = place.partition(":")
            assert callable(getattr(importlib.import_module(module), function)), place


def found(pattern: str) -> dict[str, list[str]]:
    """{file: the lines that have it}."""
    lines = {path: [x for x in path.read_text().splitlines() if re.search(pattern, x)] for path in files()}
    return {str(path.relative_to(ROOT)): there for path, there in lines.items() if there}


def test_one_place_reads_the_launch_environment():
    """refocused/run/environment.py; others may only hand the variables on to a process that they start."""
    assert found(LAUNCH).keys() <= {"refocused/run/environment.py"}


def test_one_file_speaks_to_the_cloud():
    """refocused/bucket/gcs.py, wherever the import stands."""
    assert [*found(r"^\s*(import|from) google\b")] == ["refocused/bucket/gcs.py"]


def test_runs_without_googles_packages():
    """Nothing that trains needs google-cloud-storage; without the checksum's package there is a sentence."""
    code = "import sys; sys.modules['google'] = None; import train, ckpt, data, sample, bench"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    code = "from importlib import util; find = util.find_spec; "
    code += "util.find_spec = lambda name: name != 'google_crc32c' and find(name); import ckpt"
    lacking = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert lacking.returncode == 2 and "has no google_crc32c; run " in lacking.stderr


def test_nothing_runs_what_it_reads():
    """No pickle, eval, exec, shell, yaml or tar anywhere: data never becomes code. Config files are the exception."""
    [(file, lines)] = found(UNSAFE).items()
    assert file == "configs/__init__.py" and len(lines) == 1 and "exec(" in lines[0], lines
