#!/bin/bash
#SBATCH --job-name=mimo:RUN.import
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --chdir=/shared/runs/RUN/1-import
#SBATCH --output=/shared/runs/RUN/1-import/slurm.log
#SBATCH --open-mode=append
trap '' USR1 USR2
command -v module >/dev/null || . /etc/profile
module load gcc/13 || exit 1
module load cuda/12.4 || exit 1
set -eo pipefail
source /etc/x.sh
export A="$HOME"
export PATH='/shared/my venv'"'"'s/bin':"$PATH" PYTHONSAFEPATH=1
unset PYTHONPATH
exec '/shared/my venv'"'"'s/bin/python' -m launchers.slurm_step /shared/runs/RUN/1-import
