"""The round trip in small: nothing to download, no GPU."""

from typing import TYPE_CHECKING

from mimo_jobs import jobs, paths
from recipes import layouts

if TYPE_CHECKING:
    import fiddle as fdl


def quickstart(workdir: jobs.Dir | None = None, seed: int = 0) -> "dict[str, fdl.Partial[dict]]":
    """Make a tiny model, import it, export it from another layout, verify it, compare the logits.

    Example: workdir=quickstart

    Args:
        workdir: where the three checkpoints go; without it a fresh directory
        seed: seed of the random weights
    """
    import fiddle as fdl

    base = workdir or str(paths.home() / paths.new_id("quickstart"))
    original, mimo, exported = (f"{base}/{name}" for name in ("original", "mimo", "exported"))
    return {
        "make": fdl.Partial(jobs.make_tiny, target=original, seed=seed),
        "import": fdl.Partial(jobs.import_hf, model=original, target=mimo, layout=layouts.split_3ranks()),
        "export": fdl.Partial(jobs.export_hf, source=mimo, target=exported, layout=layouts.pipeline_3ranks()),
        "verify": fdl.Partial(jobs.verify, left=original, right=exported),
        "logits": fdl.Partial(jobs.compare_logits, left=original, right=exported),
    }
