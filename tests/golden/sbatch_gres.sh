#!/bin/bash
#SBATCH --job-name=mimo:RUN.import
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=3
#SBATCH --gres=gpu:8
#SBATCH --mem=64G
#SBATCH --exclusive
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --chdir=/shared/runs/RUN/1-import
#SBATCH --output=/shared/runs/RUN/1-import/slurm.log
#SBATCH --open-mode=append
trap '' USR1 USR2
set -eo pipefail
export PATH=/shared/venv/bin:"$PATH" PYTHONSAFEPATH=1
export PYTHONPATH=/shared/runs/RUN/code
exec /shared/venv/bin/python -m launchers.slurm_step /shared/runs/RUN/1-import
