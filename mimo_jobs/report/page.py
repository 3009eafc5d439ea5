"""The page: `content` in page.html.j2, with its style and its script inside."""

import base64
import hashlib
import os
import sys
from pathlib import Path

import jinja2
from markupsafe import Markup

from mimo_jobs.console import STATE_STYLES
from mimo_jobs.errors import UserError
from mimo_jobs.records import RunRecord
from mimo_jobs.report import content

NAME = "report.html"
HERE = Path(__file__).parent


def rendered(run: RunRecord) -> str:
    """The HTML of a run. Its only script is named by digest in the page's own policy, so that no other runs, whatever a record holds."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = ((HERE / name).read_text() for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html.j2").render(
        c=content.of_run(run), states=STATE_STYLES, style=Markup(style), script=Markup(script), digest=digest
    )


def write(run: RunRecord, target: str | None) -> Path | None:
    """Write the report, whole or not at all, to ``target`` or into the run's record; ``-`` prints it. Returns where it lies.

    Raises:
        UserError: it cannot be written there.
    """
    text = rendered(run)
    if target == "-":
        sys.stdout.write(text)
        return None
    place = Path(os.path.expanduser(target)).absolute() if target else run.root / NAME
    if place.is_dir():
        place = place / NAME
    partial = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8", errors="replace")
        os.replace(partial, place)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"{place}: {error.strerror or error}; give another file: nemo-run report {run.run_id} -o FILE"
        ) from None
    return place
