#!/bin/bash
# sbatch deploy/slurm.sh configs/production_8gpu.py shard_size=8 global_batch_size=256 \
#     output_dir=/shared/checkpoints logging_dir=/shared/logs
# From the repository's folder with its .venv, on a disk that all nodes see. One task for each GPU, without torchrun:
# SLURM's signal and the exit code pass through. What the same command mends is put into the queue again.
#SBATCH --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8
#SBATCH --requeue --open-mode=append --signal=USR1@180 --time=24:00:00
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}
srun --kill-on-bad-exit=0 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS \
    LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE exec .venv/bin/python train.py "$@" resume=latest' task "$@"
code=$?
case $code in 70 | 74 | 75) scontrol requeue "$SLURM_JOB_ID" ;; esac
exit $code
