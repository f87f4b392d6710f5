"""Forward and backward twice of each of several batches from one state, and Muon's update twice: whose bits differ?

python twice.py BATCHES TRUE_OR_FALSE key=value ...        # whether split-K is allowed
Prints a line of JSON: {name of a gradient or parameter: how often}.
"""

import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import torch

import configs
from refocused.run import optim, processes, strategy


def main(batches: int, split_k: bool, keys: list[str]) -> None:
    cfg, _ = configs.load(keys)
    env = processes.start(cfg)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, split_k)
    model = strategy.build(cfg, env)
    optimizers = optim.make_optimizers(model, cfg)
    named = dict(model.named_parameters())
    differ: Counter[str] = Counter()

    def gradients(seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = (cfg.per_device_train_batch_size, cfg.sequence_length)
        x = torch.randint(0, cfg.vocab_size, shape, generator=generator).to(env.device)
        with strategy.autocast(cfg, env):
            loss = model(x, x.roll(-1, 1))
        (loss / x.numel()).backward()
        found = {"gradient of " + name: p.grad for name, p in named.items()} | {"loss": loss.detach()}
        model.zero_grad(set_to_none=True)
        return found

    def compare(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
        differ.update(name for name, t in first.items() if not torch.equal(t, second[name]))

    for seed in range(batches):
        compare(gradients(seed), gradients(seed))
    start = {name: p.detach().clone() for name, p in named.items()}
    updates = []
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.state.clear()
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(start[name])
        gradients_of_all = gradients(0)
        for name, p in named.items():
            p.grad = gradients_of_all["gradient of " + name]
        apply, scaler = torch.ones((), dtype=torch.bool, device=env.device), torch.amp.GradScaler("cpu", enabled=False)
        optim.update(optimizers, scaler, apply)
        updates.append({"update of " + name: p.detach().clone() for name, p in named.items()})
        model.zero_grad(set_to_none=True)
    compare(*updates)
    print(json.dumps(differ), flush=True)
    processes.stop()


main(int(sys.argv[1]), sys.argv[2] == "true", sys.argv[3:])
