"""Numbers before the money is spent: this trainer beside its peers, and what a config needs and costs.

python bench.py step                                          # three sizes, all contenders, on this machine
python bench.py step --size medium --contenders ours,ours-fsdp-2 gradient_accumulation_steps=4
python bench.py plan configs/production.py --gpus 2 --gpu "RTX 4090" --search
python bench.py report logs/demo --price 3.5                  # pictures of runs, and what their time went to
python bench.py losses logs/demo/trace.jsonl other.jsonl      # the first step in which two runs differ
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # PYTHONSAFEPATH leaves it out
from refocused import entry

COMMANDS = {
    "step": ("tokens/s of a whole optimizer step, ours and the peers'", "refocused.measure.steps:main"),
    "plan": ("memory, time and cost of a config without a GPU, and its fastest layout", "refocused.measure.plan:main"),
    "report": ("pictures of one or several runs, from their traces", "refocused.measure.report:main"),
    "losses": ("two traces compared step by step, bit for bit", "refocused.measure.losses:main"),
}


def main(argv: list[str]) -> int:
    return entry.dispatch("bench.py", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
