"""The tables of speed, from benchmarks/results: ``python -m benchmarks.readme_table`` writes them into README.md and docs."""

import json
from pathlib import Path
from typing import Any

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


def scale_table() -> str:
    """The markdown of README.md: a whole published size."""
    found = json.loads((ROOT / "benchmarks/results/scale.json").read_text())
    lines = [
        f"| {found['shape'].upper()}, {found['bytes'] / 1e9:.1f} GB in {found['files']} files | s | x `cp` + `sync` | RssAnon a rank |",
        "|---|---|---|---|",
    ]
    for row in found["repetitions"]:
        lines.append(f"| `cp` + `sync` of the same files | {row['cp_sync_seconds']:.1f} | 1 | |")
        for phase, layout in (
            ("import", "language and images on ranks of their own"),
            ("export", "of it, to a layout with both on all ranks"),
        ):
            one, most = row[phase], max(row[phase]["rss_anon_bytes"]) / 1e6
            lines.append(
                f"| {phase}, {row['ranks']} ranks, {layout} | {one['seconds']:.1f} | {one['x_cp']:.2f} | {most:.0f} MB |"
            )
        equal = f"{row['tensors']}/{row['tensors']} tensors bit-exact" if row["equal"] else "tensors differ"
        lines.append(f"| verify: {equal} | {row['verify_seconds']:.1f} | | |")
    return "\n".join(lines)


def ranks_table() -> str:
    """The markdown of docs/checkpoint.md: what more ranks do on one disk."""
    lines = [
        "| | ranks | `cp` + `sync`, s | import, s: whole, moving, flushing | x | export, s: whole, moving, flushing | x |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in sorted((ROOT / "benchmarks/results").glob("scale_*_cores.json")):
        found = json.loads(path.read_text())
        for row in found["repetitions"]:
            told = []
            for phase in ("import", "export"):
                one, seconds = row[phase], row[phase]["phases_seconds"]
                told.append(f"{one['seconds']:.1f}, {seconds[phase]:.1f}, {seconds['sync']:.1f} | {one['x_cp']:.2f}")
            what = f"{found['shape'].upper()}, {found['bytes'] / 1e9:.1f} GB, {found['machine']['cores']} cores"
            lines.append(f"| {what} | {row['ranks']} | {row['cp_sync_seconds']:.1f} | {told[0]} | {told[1]} |")
    return "\n".join(lines)


def training_table() -> str:
    """The markdown of README.md and docs/training.md: steps on one GPU beside transformers', peak memory beside what is predicted."""
    lines = [
        "| shape, batch | transformers, tokens/s | mimo_jobs, tokens/s | ratio | device busy in a step, ms | of the matrix rate: 6ND, with attention | peak GB: transformers, mimo_jobs, predicted |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in sorted((ROOT / "benchmarks/results").glob("training_*[0-9b].json")):
        found = json.loads(path.read_text())
        asked, (theirs, ours) = found["settings"], (found["runs"][side][-1] for side in ("transformers", "mimo_jobs"))
        kind = "weights and state in bf16" if asked["baseline"] == "bf16" else "fp32 weights under autocast"
        how = f"`recompute={asked['recompute']}`, `optimizer.state={asked['state']}`, beside {kind}"
        lines.append(
            f"| {asked['shape'].upper()}, {asked['rows']} x {asked['tokens']}; {how} (`{path.name}`) | {theirs['tokens_per_second']:.0f} | {ours['tokens_per_second']:.0f} | "
            f"{found['ratio']:.2f} | {ours['profile']['device_ms']:.0f} of {1000 * ours['step_seconds']:.0f} | {ours['mfu_6nd_of_matrix_rate']:.3f}, {ours['mfu_of_matrix_rate']:.3f} | {theirs['peak_gb']:.1f}, {ours['peak_gb']:.1f}, {predicted(asked) / 1e9:.1f} |"
        )
    return "\n".join(lines)


def predicted(asked: dict[str, Any]) -> int:
    """Bytes that `training.memory` says of a benchmark's settings, both components on one rank."""
    from mimo_jobs.layout import ComponentLayout, ParallelLayout
    from mimo_jobs.planning.fit import published_config
    from mimo_jobs.planning.sizes import Sizes
    from mimo_jobs.planning.workload import Settings, Tuning

    config = published_config(asked["shape"])
    side = asked["image"] // config["vision_config"]["patch_size"] // config["vision_config"]["spatial_merge_size"]
    sizes = Sizes(config, Tuning(state=asked.get("state", "fp32")))
    layout = ParallelLayout(ComponentLayout(rank_offset=0), ComponentLayout(rank_offset=0), 1).resolve()
    found = sizes.memory(layout, Settings(asked["rows"], asked["recompute"], False), asked["tokens"], side**2)
    return sum(one.total for one in found.values())


TABLES = (
    ("README.md", START, END, table),
    ("README.md", "<!-- scale: python -m benchmarks.scale -->", "<!-- end of scale -->", scale_table),
    ("docs/checkpoint.md", "<!-- ranks: python -m benchmarks.scale -->", "<!-- end of ranks -->", ranks_table),
    (
        "docs/slurm.md",
        "<!-- submission: python -m benchmarks.submission -->",
        "<!-- end of submission -->",
        submission_table,
    ),
    *(
        (page, "<!-- training: python -m benchmarks.readme_table -->", "<!-- end of training -->", training_table)
        for page in ("README.md", "docs/training.md")
    ),
)


def main() -> None:
    for name, start, end, made in TABLES:
        path = ROOT / name
        before, rest = path.read_text().split(start)
        path.write_text(f"{before}{start}\n{made()}\n{end}{rest.split(end)[1]}")


if __name__ == "__main__":
    main()
