"""The "1.2B" model (1.414 billion parameters) on 2 GPUs of 24 GB: 819 million tokens."""

num_processes = 2
parallel = "fsdp"  # parameters, gradients and moments of 1.4 billion do not fit twice into 24 GB
activation_checkpointing = "selective"  # without it the plan needs 23.7 GiB of the 23.6 that such a card has

data_dir = "data/tokenized"
output_dir = "checkpoints/production"
logging_dir = "logs/production"
max_files = -1

max_steps = 25_000
per_device_train_batch_size = 4
gradient_accumulation_steps = 4
learning_rate = 2e-4
weight_decay = 0.1
warmup_steps = 500

save_steps = 1250
save_seconds = 1800  # what a machine that vanishes may cost
eval_steps = 500
resume = "latest"  # the same command goes on after an interruption
logging_steps = 250
logging_seconds = 60
dataloader_num_workers = 4
