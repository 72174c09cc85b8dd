#!/usr/bin/env bash
# sbatch configs/slurm.sh --method moco --dataset DIR --out /shared/runs/moco    (from the repository; a disk of all nodes)
# Three minutes before its time is over, or when it is pre-empted, the job saves, stops and queues itself again, and then
# resumes: bsim.py gets --resume.
#SBATCH --job-name=bsim
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180

again() {
    trap '' USR1 TERM
    scancel --signal=TERM "$SLURM_JOB_ID" # the steps, not this script; they finish their step and save
    wait "$steps"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap again USR1 TERM

FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export FIRST
srun bash -c 'exec accelerate launch --config_file configs/2x8gpu.yaml --num_machines "$SLURM_NNODES" \
    --num_processes $((SLURM_NNODES * SLURM_GPUS_ON_NODE)) --machine_rank "$SLURM_NODEID" --main_process_ip "$FIRST" \
    --main_process_port $((20000 + SLURM_JOB_ID % 10000)) bsim.py "$@" --resume' bash "$@" &
steps=$!
wait "$steps"
