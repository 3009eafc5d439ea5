#!/bin/bash
#SBATCH --job-name=mimo:RUN.import
#SBATCH --account=research
#SBATCH --partition=h100,h200
#SBATCH --qos=high
#SBATCH --reservation=r1
#SBATCH --constraint='(a|b)&c'
#SBATCH --nodelist=n[1-3,7]
#SBATCH --exclude=n9
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --time=2-12:30:00
#SBATCH --signal=B:USR2@120
#SBATCH --requeue
#SBATCH --dependency=afterok:41
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --chdir=/shared/runs/RUN/1-import
#SBATCH --output=/shared/runs/RUN/1-import/slurm.log
#SBATCH --open-mode=append
#SBATCH --comment='a # $(touch pwned) "b"'
#SBATCH --oversubscribe
trap '' USR1 USR2
set -eo pipefail
export PATH=/shared/venv/bin:"$PATH" PYTHONSAFEPATH=1
export PYTHONPATH=/shared/runs/RUN/code
exec /shared/venv/bin/python -m launchers.slurm_step /shared/runs/RUN/1-import
