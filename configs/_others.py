"""Words of nanoGPT, Hugging Face, litgpt, Megatron and GPT-NeoX, and keys of the past -> what to write here.

docs/migrating.md says more of the first.
"""

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
use_wandb wandb wandb_log wandb_project report_to -> leave it out, curves and logs go to logging_dir, none to a service
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

# keys that there were, with their defaults; a checkpoint from then may still hold them
REMOVED = """
collective_timeout_seconds=600.0 -> leave it out, it is twice watchdog_seconds and at least 600
muon_momentum=0.95 -> leave it out, Muon's momentum is 0.95
background_upload=true -> leave it out, uploads run behind training and the end of a run waits for the last
upload_megabytes_per_second=0.0 -> leave it out, or limit the network outside of the run (tc, trickle)
histogram_steps=0 -> leave it out, TensorBoard shows scalars and text
check_replicas_steps=0 -> leave it out, each save compares the model's copies
muon_steps=5 -> leave it out, Muon takes 5 Newton-Schulz steps
muon_learning_rate=0.0 -> leave it out, Muon's updates have AdamW's scale and take learning_rate
reduce_every_micro_step=false -> leave it out; for less memory activation_checkpointing, or adam_moments=bf16
spike_sigma=0.0 -> spikes=report or skip, for what is 6 deviations above the last 128 steps
spike_action=report -> spikes=report or spikes=skip
allow_data_change=false -> allow_change=true
allow_batch_change=false -> allow_change=true
"""

OTHERS: dict[str, str] = {}  # {word: what to write}
GONE: dict[str, str] = {}  # {removed key: its default}
for _line in (TABLE + REMOVED).splitlines():
    _names, _, _ours = _line.partition(" -> ")
    for _name in _names.split():
        _key, _, _default = _name.partition("=")
        OTHERS[_key] = _ours
        GONE |= {_key: _default} if _default else {}
