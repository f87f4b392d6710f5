"""A small byte-level model on the text that every Python ships: no account, no download, about three minutes."""

vocab_size = 257  # 256 bytes and end-of-text
hidden_size = 256
num_hidden_layers = 4
num_attention_heads = 4
intermediate_size = 1024
max_position_embeddings = 512

data_dir = "data/demo"
tokenizer = "byte"
sequence_length = 256
dataloader_num_workers = 1

max_steps = 400
per_device_train_batch_size = 8
gradient_accumulation_steps = 1
learning_rate = 2e-3
min_learning_rate = 2e-4
warmup_steps = 20

output_dir = "out/demo"
logging_dir = "logs/demo"
logging_steps = 20
eval_steps = 100
eval_samples = 128
save_steps = 200
resume = "latest"  # so that the same command goes on where it was interrupted
