"""The tables of speed, from benchmarks/results: ``python -m benchmarks.readme_table`` writes them into README.md and docs/slurm.md."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
START, END = "<!-- speed: python -m benchmarks.readme_table -->", "<!-- end of speed -->"
RESULTS = ("conversion.json", "conversion_16_cores.json")
ROWS = {
    "import, 2 ranks": "import, 2 ranks",
    "export, 2 ranks": "export, 2 ranks",
    "import, 2 ranks, fsync": "import, fsync (the default), against `cp` + `sync`",
    "export, 2 ranks, fsync": "export, fsync (the default), against `cp` + `sync`",
    "gather on rank 0, save_file": "export by gathering on rank 0",
}


def table() -> str:
    """The markdown between the two markers."""
    results = [json.loads((ROOT / "benchmarks/results" / name).read_text()) for name in RESULTS]
    heads = [f"{r['machine']['cores']} cores: s, x cp | process s | RssAnon a rank" for r in results]
    lines = [f"| {' | '.join(['', *heads])} |", "|" + "---|" * (1 + 3 * len(results))]
    for case, label in ROWS.items():
        cells = [label]
        for r in results:
            row = r["cases"][case]
            move, ratio = row["move_seconds"], row["ratio"]
            cells.append(f"{move['median']:.2f}, {ratio['median']:.2f} [{ratio['min']:.2f}, {ratio['max']:.2f}]")
            cells.append(f"{row['process_seconds']['median']:.1f}")
            cells.append(f"{max(row['rss_anon_bytes']) / 1e6:.0f} MB")
        lines.append(f"| {' | '.join(cells)} |")
    more = []
    for r in results:
        gathered, ranks, machine = r["speedups"].values()
        more.append(
            f"{r['machine']['cores']} cores: export {gathered['median']:.1f}x faster than gathering; two ranks "
            f"{ranks['median']:.2f}x one rank with one thread, where two `dd` are {machine['median']:.2f}x one."
        )
    return "\n".join([*lines, "", *more])


def submission_table() -> str:
    """The markdown of docs/slurm.md: what the submit side takes."""
    found = json.loads((ROOT / "benchmarks/results/submission.json").read_text())["seconds"]
    lines = ["| command | seconds: median [min, max] |", "|---|---|"]
    return "\n".join(
        lines + [f"| {name} | {t['median']:.2f} [{t['min']:.2f}, {t['max']:.2f}] |" for name, t in found.items()]
    )


TABLES = {
    "README.md": (START, END, table),
    "docs/slurm.md": (
        "<!-- submission: python -m benchmarks.submission -->",
        "<!-- end of submission -->",
        submission_table,
    ),
}


def main() -> None:
    for name, (start, end, made) in TABLES.items():
        path = ROOT / name
        before, rest = path.read_text().split(start)
        path.write_text(f"{before}{start}\n{made()}\n{end}{rest.split(end)[1]}")


if __name__ == "__main__":
    main()
