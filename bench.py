"""Numbers before the money is spent: this trainer beside its peers, and what a config needs and costs.

python bench.py step                                          # three sizes, all contenders, on this machine
python bench.py step --size medium --contenders ours,ours-fsdp-2 gradient_accumulation_steps=4
python bench.py plan configs/production.py --gpus 2 --gpu "RTX 4090" --search
python bench.py save                                          # what a checkpoint costs the training loop
python bench.py sample out/demo                               # tokens/s of sampling, beside transformers.generate
python bench.py report logs/demo --price 3.5                  # pictures of runs, and what their time went to
python bench.py losses logs/demo/trace.jsonl other.jsonl      # the first step in which two runs differ
python bench.py record optimizer=muon max_steps=500           # an entry of docs/records.md
"""

import sys

from refocused import entry
from refocused.measure import losses, plan, record, report, sampling, saves, steps

COMMANDS = {
    "step": ("tokens/s of a whole optimizer step, ours and the peers'", steps.main),
    "plan": ("memory, time and cost of a config without a GPU, and its fastest layout", plan.main),
    "save": ("what a checkpoint costs the training loop, at two sizes", saves.main),
    "sample": ("tokens/s of sampling, beside transformers.generate", sampling.main),
    "report": ("pictures of one or several runs, from their traces", report.main),
    "losses": ("two traces compared step by step, bit for bit", losses.main),
    "record": ("an entry of docs/records.md: three seeds, trained and evaluated by its rules", record.main),
}


def main(argv: list[str]) -> int:
    return entry.dispatch("bench.py", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
