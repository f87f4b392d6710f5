"""Words of nanoGPT, Hugging Face, litgpt, Megatron and GPT-NeoX -> what to write here; docs/migrating.md says more."""

TABLE = """
batch_size micro_batch_size train_batch_size -> per_device_train_batch_size
grad_accum_steps accumulate_grad_batches -> gradient_accumulation_steps, or global_batch_size
block_size seq_len seq_length max_seq_len -> sequence_length
n_layer n_layers num_layers -> num_hidden_layers
n_head n_heads num_heads -> num_attention_heads
n_embd dim d_model -> hidden_size, with intermediate_size usually 4 times it
ffn_hidden_size d_ff -> intermediate_size
dropout -> hidden_dropout and attention_dropout
rope_theta -> rotary_emb_base
lr max_lr -> learning_rate
min_lr -> min_learning_rate, an absolute rate
betas beta1 beta2 -> adam_beta1 and adam_beta2
grad_clip clip_grad gradient_clipping -> max_grad_norm
max_iters train_iters num_iterations lr_decay_iters -> max_steps, where the decay ends as well
epochs num_train_epochs max_epochs -> max_steps; `train.py CONFIG.py --show` prints the epochs that it comes to
warmup_iters warmup_ratio -> warmup_steps, a number of steps
scheduler lr_scheduler decay_lr lr_decay_style -> lr_scheduler_type=cosine, linear, constant or warmup_stable_decay
eval_interval -> eval_steps
eval_iters -> eval_samples, a number of windows
log_interval -> logging_steps
save_interval checkpoint_interval -> save_steps
out_dir save_dir -> output_dir
wandb wandb_log wandb_project report_to -> leave it out, curves and logs go to logging_dir and nothing is sent anywhere
dataset data_path -> data_dir, a folder of shards; `python data.py --help` says how to make them
num_workers -> dataloader_num_workers
resume_from_checkpoint load -> resume=latest, a checkpoint's name or its path
model model_name_or_path -> init_from=OUT, after `python ckpt.py import FOLDER OUT`
bf16 fp16 dtype precision -> mixed_precision=bf16, fp16 or no
compile torch_compile -> compile_model=true or false
fsdp deepspeed zero_stage -> parallel=fsdp
gradient_checkpointing -> activation_checkpointing=selective or full
gpus devices nproc_per_node -> `python -m refocused.run.launch --standalone --nproc_per_node=GPUS train.py CONFIG.py`
device -> leave it out, the visible GPUs are taken (CUDA_VISIBLE_DEVICES)
config config_file -> the file alone, as `train.py configs/production.py`
"""

OTHERS: dict[str, str] = {}
for _line in TABLE.strip().splitlines():
    _names, _, _ours = _line.partition(" -> ")
    OTHERS |= dict.fromkeys(_names.split(), _ours)
