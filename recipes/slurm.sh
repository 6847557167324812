#!/bin/bash
# Pretraining on several machines under SLURM: sbatch recipes/slurm.sh
# One process a GPU; Rookery takes rank, world size and address from srun.
#SBATCH --job-name=rookery
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=%x-%j.log

# SLURM sends SIGTERM two minutes before the time is over: the step is finished and saved. Submitted again, the same
# script goes on from there. proj_dir, data and model must lie on a file system that all machines see.
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

srun --kill-on-bad-exit=1 rookery train --data_file data/pile --proj_dir out/7b \
    --n_layer 32 --n_embd 4096 --ctx_len 4096 --micro_bsz 1 --accumulate_grad_batches 4 \
    --precision bf16 --grad_cp 1 --strategy fsdp
