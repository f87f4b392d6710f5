"""The "1.2B" model on 8 GPUs of 80 GB, as we would train it today: the data and tokens of production_8gpu.py.

Measured here, on the demo's 0.9M parameters (docs/training.md, docs/records.md): Muon, documents kept apart where they
are short. Measured by others at this size, their figures and not ours: what the comments below name. Belief: that all of
it adds up. Nothing here has run at this size yet.
"""

from configs.production_8gpu import *  # noqa: F403

output_dir = "checkpoints/production_muon"
logging_dir = "logs/production_muon"

# Muon for the blocks' matrices in AdamW's scale: half of AdamW's compute for the same loss up to 1.5B (Liu et al. 2025,
# arXiv:2502.16982), a quarter fewer tokens at 1.5B (modded-nanogpt, 102024_ScaleUp1B); momentum 0.95 in both
optimizer = "muon"

# 1,024 windows of 1,024 = 1.05M tokens a step: SmolLM 135M to 1.7B take 1M (huggingface/smollm, config_smollm1_135M),
# OLMo 2 1B takes 2.1M (allenai/OLMo-core, OLMo2-1B.py and OLMo2-1B-muon.py)
global_batch_size = 1024
per_device_train_batch_size = 16  # half as many gathers of the parameters as with 8; the plan says what fits
max_steps = 147_656  # times the batch: the 155 billion tokens of production_8gpu.py

# 4e-4 for both optimizers and 2,000 steps of warm-up: OLMo2-1B-muon.py
learning_rate = 4e-4
warmup_steps = 2_000

# stable, then a fifth of linear decay to zero, as SmolLM; any checkpoint becomes a finished model by a decay of its own
lr_scheduler_type = "warmup_stable_decay"
keep_every = 10_000

# a Reddit comment is shorter than a window: perplexity and downstream tasks gained at 1.3B (arXiv:2402.13991)
mask_documents = True
shift_windows = True  # three epochs: each gives a token another context; belief

save_steps = 5_000
logging_steps = 100
