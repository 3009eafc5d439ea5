"""The same command on a cluster's login node, over ssh: records, models and Slurm are there, so nothing has to be copied or guessed.

The words of the command line and the profile travel as one JSON line on standard input; the remote command itself is fixed but for
the path of the virtual environment, quoted for the remote shell.
"""

import json
import shlex
import subprocess
from collections.abc import Sequence

from launchers.profiles import Profile
from mimo_jobs.errors import UserError

NO_CONNECTION = 255  # ssh(1), EXIT STATUS


def command(profile: Profile) -> list[str]:
    """The ssh command of a profile. ``ssh`` never asks for a password: a login without one must work."""
    assert profile.ssh and profile.venv
    venv = profile.venv
    python = (
        f'"$HOME"/{shlex.quote(venv[2:] + "/bin/python")}'
        if venv.startswith("~/")
        else shlex.quote(f"{venv}/bin/python")
    )
    return [
        "ssh",
        "-o",
        "BatchMode=yes",
        "-o",
        "ConnectTimeout=15",
        "--",
        profile.ssh,
        f"exec {python} -m mimo_jobs.over_ssh",
    ]


def run(profile: Profile, words: Sequence[str]) -> int:
    """Run ``nemo-run WORDS`` over there with this profile; its exit code.

    Raises:
        UserError: ssh is not installed, or cannot connect.
    """
    said = json.dumps({"words": list(words), "profile": profile.plain() | {"ssh": None}})
    try:
        done = subprocess.run(command(profile), input=said + "\n", text=True, check=False)
    except FileNotFoundError:
        raise UserError(f"executor.ssh={profile.ssh}: ssh is not installed here") from None
    if done.returncode == NO_CONNECTION:
        raise UserError(
            f"executor.ssh={profile.ssh}: no connection; `ssh {profile.ssh}` must work without a password (see above)"
        )
    return done.returncode
