"""A small byte-level model on the text that every Python ships: no account, no download, about three minutes."""

vocab_size = 257  # 256 bytes and end-of-text
hidden_size = 128
num_hidden_layers = 4
num_attention_heads = 2
intermediate_size = 512
max_position_embeddings = 256
rotary_pct = 1.0
initializer_range = 0.05  # with the full rotary above, 0.1 nats better after 200 steps than 0.02 and 0.25

data_dir = "data/demo"
tokenizer = "byte"
sequence_length = 256
dataloader_num_workers = 1

max_steps = 1500
per_device_train_batch_size = 4  # with fewer, the overhead of a step shows
global_batch_size = 8  # the same run on one process or two
learning_rate = 5e-3  # a model this small bears it
lr_scheduler_type = "linear"
warmup_steps = 60

compile_model = False  # compiling takes longer than it saves here, and would need a C++ compiler

output_dir = "out/demo"
logging_dir = "logs/demo"
logging_steps = 50
eval_steps = 500
eval_samples = 256
save_steps = 500
resume = "latest"  # so that the same command goes on where it was interrupted
