"""Which attempt at a job left a file: jobs are started again with the same record. Standard library only."""

import os
import time
from pathlib import Path

SPREAD_SECONDS = 1.0  # ranks that no torchrun and no srun starts come one after another, on a busy machine 0.3 s apart
ATTEMPT = "MIMO_JOBS_ATTEMPT"  # of launchers that start a job again: the same in all ranks of one attempt alone


def name() -> str:
    """What the launcher calls this attempt; empty where it starts none again, and under torchrun or by hand."""
    return os.environ.get(ATTEMPT, "")


def is_earlier(path: Path, named: str | None = None, spread: float = SPREAD_SECONDS) -> bool:
    """Whether a file was written before this attempt began, hence by an earlier one.

    Args:
        named: the attempt that the file says it is of.
        spread: seconds by which ranks that have no torchrun may have started before this one; none did before rank 0.

    Raises:
        FileNotFoundError: it is gone.
    """
    if name() and named == name():  # under Slurm ranks may start minutes apart
        return False
    return path.stat().st_mtime < began() - (0.0 if _under_torchrun() else spread)


def began() -> float:
    """When torchrun was started, which starts all ranks of this host; without it this process. In epoch seconds."""
    process = os.getppid() if _under_torchrun() else os.getpid()
    words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    ticks = int(words[19])  # since boot (proc(5), starttime)
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def _under_torchrun() -> bool:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"  # later ones are other attempts under the same torchrun
