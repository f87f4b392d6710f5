"""Sampling beside transformers.generate: `python bench.py sample`."""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

import ckpt
import sample
from configs import ConfigError
from refocused.checkpoint import folder as folders
from refocused.entry import here, positive
from refocused.run.origin import hardware


def main(argv: list[str]) -> int:
    """Greedy tokens/s after one prompt: with our cache, without any, and transformers.generate on the same weights."""
    parser = argparse.ArgumentParser(
        prog="bench.py sample", description="tokens/s of sampling, beside transformers.generate."
    )
    parser.add_argument("checkpoint", help="one of ours, or a folder of them")
    parser.add_argument("--tokens", type=positive, help="512, or as many as the model's positions, if absent")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=positive, default=3)
    options = parser.parse_args(argv)
    try:
        import transformers
    except ImportError as error:
        way = here("pip install -r requirements-dev.txt")
        raise ConfigError(f"bench.py sample needs its peer: `{way}`") from error

    source = ckpt.find(options.checkpoint)
    if source.is_hf:
        raise ConfigError(f"{source.path} is a Hugging Face folder; name one of our checkpoints")
    most = source.cfg.max_position_embeddings
    model, count = folders.load(source), options.tokens or min(512, most)
    if most < count:
        raise ConfigError(f"--tokens={count} does not fit max_position_embeddings={most}; --tokens {most} does")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        folders.write_configs(source, Path(folder), torch.float32)
        folders.write_weights(model, Path(folder), torch.float32)
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.set_num_threads(options.threads)
    prompt = torch.tensor([[source.end or 0]])

    @torch.inference_mode()
    def cached() -> list[int]:
        steps = sample.generate(model, prompt.tolist(), sample.Options(temperature=0, max_new_tokens=count))
        return [row[0] for row in steps if row[0] is not None]

    @torch.inference_mode()
    def generate() -> list[int]:
        most = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        return peer.generate(prompt, attention_mask=torch.ones_like(prompt), **most)[0, 1:].tolist()

    @torch.inference_mode()
    def recomputed() -> list[int]:
        row = prompt
        for _ in range(count):
            row = torch.cat((row, model(row)[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
        return row[0, 1:].tolist()

    ways = {"this trainer": cached, "transformers.generate": generate, "this trainer without a cache": recomputed}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    texts: dict[str, list[int]] = {}
    for _ in range(options.rounds):
        for way, run in ways.items():
            begin = time.perf_counter()
            texts[way] = run()
            seconds[way].append(time.perf_counter() - begin)
    ours = statistics.median(seconds["this trainer"])
    print(hardware())
    print(f"{source}, fp32, greedy, {count} tokens, {options.threads} thread(s), median of {options.rounds}\n")
    print("| | tokens/s | ours is faster by | same tokens |")
    print("|---|---:|---:|---|")
    for way, values in seconds.items():
        middle = statistics.median(values)
        same = "yes" if texts[way] == texts["this trainer"] else "no"
        print(f"| {way} | {count / middle:,.1f} | {middle / ours:.2f} | {same} |")
    return 0
