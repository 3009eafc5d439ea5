"""The planner's constants from measured layouts: fits, and writes mimo_jobs/planning/rates.json and the table in docs/planning.md.

    python -m benchmarks.fit_rates benchmarks/results/layouts*.json benchmarks/results/training_[0-9]*.json

Takes results of `benchmarks.layouts` and of `benchmarks.training` of published sizes on one kind of card; the matrix rate is the one
measured beside them.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from mimo_jobs.errors import UsageError
from mimo_jobs.planning import fit, rates
from mimo_jobs.planning.fit import Point
from mimo_jobs.planning.workload import Settings, Tuning, Workload

PAGE = Path(__file__).parents[1] / "docs" / "planning.md"
BEGIN, END = "<!-- fit: benchmarks.fit_rates -->", "<!-- end of fit -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    found = [json.loads(file.read_text()) for file in options.results]
    cards = {one["machine"]["card"] for one in found}
    if len(cards) != 1 or None in cards:
        parser.error(f"results of one kind of GPU are wanted, not of {', '.join(map(str, sorted(cards, key=str)))}")
    points = [point for one in found for point in points_of(one)]
    before = rates.load(known_card(cards.pop()))
    measured = statistics.median(r["matrix_tflops"] for one in found for r in ours(one))
    names = ", ".join(file.name for file in options.results)
    known = replace(before, matrix=measured * 1e12, source={**before.source, "matrix": f"measured: {names}"})
    fitted = fit.fit(points, known)
    told = fit.table(points, fitted)
    print(told)
    if not options.dry_run:
        rates.save(fitted)
        page = PAGE.read_text()
        start, stop = page.index(BEGIN) + len(BEGIN), page.index(END)
        PAGE.write_text(f"{page[:start]}\n`python -m benchmarks.fit_rates` on {names}:\n\n{told}\n{page[stop:]}")
        print(f"written: {rates.FILE}, {PAGE}")


def known_card(name: str) -> str:
    """The card of `rates.cards` that ``torch.cuda.get_device_name`` means. Raises `UsageError` for none."""
    cards = [card for card in rates.cards() if card in name.upper()]
    if not cards:
        raise UsageError(f"{name}: not one of {', '.join(rates.cards())}")
    return max(cards, key=len)


def ours(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What was measured of mimo_jobs, in the words of `benchmarks.layouts`."""
    if "layouts" in result:  # one without a language layout is transformers
        return [one for one in result["layouts"].values() if "failed" not in one and one["language"] is not None]
    both = ["language", "images"]
    return [
        {**run, "language": {}, "images": {}, "ranks": [{"components": both, "peak_gb": run["peak_gb"]}]}
        for run in result["runs"]["mimo_jobs"]
    ]


def points_of(result: dict[str, Any]) -> list[Point]:
    """A point for each layout that ran."""
    # `benchmarks.training` has one image a sample, and all rows in one micro-batch.
    alone = {
        "images": 1,
        "micro": result["settings"]["rows"],
        "freeze": "none",
        "sequence_parallel": False,
        "state": "fp32",
    }
    asked = alone | result["settings"]
    config = fit.published_config(asked["shape"])
    side = asked["image"] // config["vision_config"]["patch_size"]
    image_tokens = asked["images"] * side**2 // config["vision_config"]["spatial_merge_size"] ** 2
    workload = Workload(
        asked["tokens"],
        image_tokens,
        asked["tokens"] - image_tokens,
        asked["rows"],
        asked["tokens"],
        images=asked["images"],
    )
    settings = Settings(asked["micro"], asked["recompute"], asked["sequence_parallel"])
    tuning, points = Tuning(freeze=asked["freeze"], state=asked["state"]), []
    for one in ours(result):
        words = [
            f"layout.{name}.{field}={size}" for name in ("language", "images") for field, size in one[name].items()
        ]
        apart = any("rank_offset" in one[name] for name in ("language", "images"))
        if not apart:
            words += ["layout.language.rank_offset=0", "layout.images.rank_offset=0"]
        peaks = {
            name: max(rank["peak_gb"] * 1e9 for rank in one["ranks"] if name in rank["components"])
            for name in ("language", "images")
        }
        points.append(Point(asked["shape"], " ".join(words), workload, settings, one["step_seconds"], peaks, tuning))
    return points


if __name__ == "__main__":
    main()
