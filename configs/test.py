"""The "1.2B" model for a first look on 2 GPUs: five files, 1,000 steps, small batches."""

from configs.production import *  # noqa: F403

output_dir = "checkpoints/test"
logging_dir = "logs/test"
max_files = 5

max_steps = 1_000
per_device_train_batch_size = 2
gradient_accumulation_steps = 2
learning_rate = 2e-4
warmup_steps = 10

save_steps = 200
logging_steps = 25
dataloader_num_workers = 2
