"""bench.py record: what it prints is what the runs gave, by the rules."""

import json
import math
import re

import pytest
from conftest import write_shards

import ckpt
from configs import ConfigError
from refocused.measure import record


def test_an_entry(tmp_path, capsys, monkeypatch):
    """Two seeds of a few steps, the mean of three checkpoints each: other losses, one line of the table, and its command.

    The same command with another sequence length is evaluated on the same windows.
    """
    data = write_shards(tmp_path / "data", shards=2, tokens=1500)
    keys = f"data_dir={data} max_steps=3 warmup_steps=1 save_steps=1 logging_steps=1 sample_tokens=0 cpu_threads=1"
    keys += " compile_model=false"
    assert record.main(["--seeds", "2", "--nproc", "1", "--average", *keys.split()]) == 0
    said = capsys.readouterr().out
    seeds = re.findall(r"seed \d: ([\d.]+) after 6,144 tokens", said)
    assert len(set(seeds)) == 2 and 3 < float(seeds[0]) < 6
    row = said.strip().splitlines()[-1]
    mean = sum(map(float, seeds)) / 2
    assert re.search(
        r"\| lowest loss \| 6,144 \| ([\d.]+) \((.+)\) \| `python bench.py record --nproc 1 --average data_dir=", row
    )
    assert abs(float(row.split("|")[4].split()[0]) - mean) < 1e-4 and ", ".join(seeds) in row
    assert "no entry: its data are not the demo's" in said
    kept = ["--keep", str(tmp_path / "kept")]
    assert record.main(["--seeds", "1", "--nproc", "1", "--to", "99", "eval_steps=2", *kept, *keys.split()]) == 0
    said = capsys.readouterr().out
    assert ckpt.find(str(tmp_path / "kept/seed-1")).is_hf
    with pytest.raises(ConfigError, match="kept/seed-1 exists"):
        record.main(kept)
    assert "4,096 tokens to 99 (4,096)\n" in said and "record --nproc 1 --to 99 eval_steps=2" in said


def test_tokens_to_a_loss(tmp_path):
    """The first evaluation that is at or below it, of three in a trace; infinite where none is."""
    evaluations = [{"event": "eval", "step": step, "loss": loss} for step, loss in ((2, 3.0), (4, 2.0), (6, 1.9))]
    lines = map(json.dumps, [{"step": 1, "loss": 1.0}, *evaluations])
    (tmp_path / "trace.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert [record.tokens_to(loss, tmp_path, 100) for loss in (2.0, 1.9, 1.8)] == [400, 600, math.inf]


@pytest.mark.parametrize(
    "settings, words",
    [
        (["--to", "2.0"], "say how often with eval_steps="),
        (["seed=7"], "seed=7 is not for an entry to set"),
        (["init_from=out/other"], "init_from"),
        (["intermediate_size=600"], "parameters are not within 1 percent of the demo's 859"),
        (["global_batch_size=6"], "global_batch_size=6 is not a multiple"),
    ],
)
def test_rules(settings, words):
    """What an entry may not do is refused before anything is trained."""
    with pytest.raises(ConfigError, match=words):
        record.main(settings)
