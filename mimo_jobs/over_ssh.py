"""``nemo-run`` on a login node for somebody elsewhere (`launchers.remote`): reads the words and the profile from standard input."""

import json
import sys
from pathlib import Path

from launchers import profiles
from mimo_jobs import cli


def main() -> int:
    """Run the command line that came over ssh, with the profile that came with it; returns its exit code."""
    given = json.loads(sys.stdin.readline())
    profiles.sent = {k: v for k, v in given["profile"].items() if v is not None}
    sys.argv[0] = str(Path(sys.executable).parent / "nemo-run")
    return cli.main(given["words"])


if __name__ == "__main__":
    sys.exit(main())
