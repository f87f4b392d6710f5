"""Words of nanoGPT, Hugging Face, litgpt, torchtitan, Megatron and GPT-NeoX, and what stands for them here.

A line: names of theirs, a colon, what to write. docs/migrating.md says more.
"""

_TABLE = """
batch_size micro_batch_size device_batch_size local_batch_size train_batch_size per_device_batch_size
    train_micro_batch_size_per_gpu: per_device_train_batch_size
total_batch_size global_bs: global_batch_size, in sequences
grad_accum_steps grad_accumulation_steps accumulate_grad_batches accumulation_steps gradient_accumulation
    iter_size: gradient_accumulation_steps, or global_batch_size
block_size seq_len seq_length max_seq_len max_seq_length context_length max_length n_ctx: sequence_length
n_layer n_layers num_layers depth: num_hidden_layers
n_head n_heads num_heads: num_attention_heads
n_embd dim d_model embed_dim model_dim: hidden_size, with intermediate_size usually 4 times it
ffn_hidden_size d_ff ffn_dim hidden_dim: intermediate_size
dropout resid_pdrop embd_pdrop attn_pdrop residual_dropout: hidden_dropout and attention_dropout
rotary_percent rotary_percentage partial_rotary_factor: rotary_pct
rope_theta rope_base rotary_base: rotary_emb_base
norm_eps norm_epsilon layernorm_epsilon layer_norm_epsilon: layer_norm_eps
activation act hidden_activation activation_function: hidden_act
tie_weights tied_embeddings weight_tying: tie_word_embeddings
parallel_residual gpt_j_residual: use_parallel_residual
init_std init_method_std: initializer_range
lr max_lr peak_lr base_lr: learning_rate
min_lr lr_min final_lr min_lr_ratio min_lr_frac: min_learning_rate, an absolute rate
wd weight_decay_rate: weight_decay
beta1 b1: adam_beta1
beta2 b2: adam_beta2
betas adam_betas: adam_beta1 and adam_beta2
eps adam_eps epsilon: adam_epsilon
optim optimizer_type optimizer_name: optimizer=adamw or muon
grad_clip clip_grad gradient_clip_val gradient_clipping clip max_norm: max_grad_norm
max_iters train_iters num_iterations num_iters steps num_steps total_steps num_train_steps
    training_steps max_train_steps lr_decay_iters lr_decay_steps: max_steps, where the decay ends as well
num_train_epochs epochs num_epochs max_epochs n_epochs max_tokens total_tokens token_budget train_tokens: max_steps;
    `train.py CONFIG.py --show` prints the epochs and tokens that it comes to
warmup_iters lr_warmup_steps num_warmup_steps lr_warmup_iters warmup: warmup_steps
warmup_ratio warmup_fraction lr_warmup_fraction: warmup_steps, a number of steps
lr_scheduler scheduler lr_decay_style decay_lr schedule lr_schedule decay_type: lr_scheduler_type=cosine, linear, constant or
    warmup_stable_decay
cooldown_steps num_decay_steps: decay_steps, with lr_scheduler_type=warmup_stable_decay
eval_interval eval_every eval_freq val_interval evaluation_strategy eval_strategy do_eval: eval_steps
eval_iters eval_batches max_iters_eval: eval_samples, a number of windows
log_interval log_freq log_every log_every_n_steps logging_interval logging_strategy: logging_steps
save_interval save_every checkpoint_interval checkpoint_every checkpoint_freq checkpointing_steps save_freq ckpt_interval
    save_strategy checkpoint_factor: save_steps
save_limit keep_latest_k keep_last_n_checkpoints checkpoint_total_limit checkpoints_total_limit: save_total_limit
out_dir output save_dir checkpoint_dir checkpoint_path ckpt_dir save_folder dump_folder save: output_dir
log_dir tensorboard_dir tensorboard_log_dir: logging_dir
run_name experiment_name exp_name job_name: output_dir and logging_dir of the run's own
use_wandb wandb wandb_log wandb_project wandb_run_name report_to tracker logger log_with use_tensorboard: leave it out;
    TensorBoard files, train.log and trace.jsonl go to logging_dir, and nothing is sent anywhere
dataset dataset_name dataset_path train_data train_file data_path data_root input_bin train_bin train_data_dir: data_dir, a
    folder of shards; `python data.py --help` says how to make them
tokenizer_name tokenizer_path tokenizer_name_or_path tokenizer_file: tokenizer
num_workers n_workers dataloader_workers num_data_workers: dataloader_num_workers
random_seed data_seed manual_seed: seed
resume_from resume_from_checkpoint load_checkpoint load from_checkpoint auto_resume resume_path: resume=latest, a
    checkpoint's name or its path
model_name_or_path model_name model pretrained_model init_checkpoint pretrained: init_from=OUT, after
    `python ckpt.py import FOLDER OUT`
bf16 fp16 half dtype precision torch_dtype amp use_amp bf16_full_eval fp16_full_eval mixed_precision_training: \
    mixed_precision=bf16, fp16 or no
tf32 allow_tf32: leave it out, fp32 products on a GPU are TF32 with mixed_precision=bf16
torch_compile compile use_compile torch_compile_mode: compile_model=true or false
fsdp fsdp_config sharding_strategy fsdp_enabled use_fsdp data_parallel_shard_degree deepspeed zero_stage
    strategy: parallel=fsdp
ddp use_ddp ddp_backend distributed: parallel=ddp
data_parallel_replicate_degree hybrid_shard dp_replicate: shard_size=GPUs per node, with parallel=fsdp
gradient_checkpointing use_gradient_checkpointing activation_checkpoint activation_checkpoint_mode checkpoint_activations
    ac_mode recompute: activation_checkpointing=selective or full
offload fsdp_offload_params enable_cpu_offload: cpu_offload
gpus num_gpus n_gpus ngpus devices num_devices nproc_per_node nproc n_gpu world_size num_nodes nnodes: a launcher's affair,
    `python -m refocused.run.launch --standalone --nproc_per_node=GPUS train.py CONFIG.py`
device use_cpu no_cuda use_cuda local_rank: leave it out, the GPUs that are visible are taken (CUDA_VISIBLE_DEVICES)
use_flash_attention flash_attn use_flash_attn attn_implementation flash: leave it out, torch's fastest attention is taken
config config_file config_path config_name cfg preset: the file alone, as `train.py configs/production.py`
bucket gcs_bucket gcs_bucket_name: bucket_name and checkpoint_bucket_path
"""

OTHERS: dict[str, str] = {}
for _line in _TABLE.replace("\n    ", " ").strip().splitlines():
    _names, _, _ours = _line.partition(": ")
    OTHERS |= dict.fromkeys(_names.split(), " ".join(_ours.split()))
