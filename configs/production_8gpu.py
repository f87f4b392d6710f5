"""The "1.2B" model on 8 GPUs of 80 GB: three epochs of 51 billion tokens."""

from configs.production import *  # noqa: F403

num_processes = 8
activation_checkpointing = "none"  # 80 GB hold everything

output_dir = "checkpoints/production_8gpu"
logging_dir = "logs/production_8gpu"

max_steps = 590_625
per_device_train_batch_size = 8
gradient_accumulation_steps = 4
learning_rate = 3e-4
warmup_steps = 11_812

save_steps = 20_000
logging_steps = 3_000
dataloader_num_workers = 6
