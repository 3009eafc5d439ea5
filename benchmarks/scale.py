"""Conversion of a whole published size, phase by phase, beside ``cp`` of the same bytes on the same filesystem in the same run.

    python -m benchmarks.scale --shape 27b --source /dev/shm/model --workdir /data/work --ranks 4
    python -m benchmarks.scale --shape tiny --ranks 1 4                       # a quick look that it runs

The checkpoint (random weights, the published tensors and files) is imported with language and images on ranks of their own, exported
from another layout (both on all ranks), and verified. Each number of ranks is a repetition with a ``cp`` + ``sync`` of its own before
it; everything is flushed to the disk. Needs room for twice the bytes in ``--workdir``: the copy goes before the import comes.
Conversion uses no GPU: the ranks import no torch. Writes benchmarks/results/scale.json.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.commit import commit
from benchmarks.conversion import RESULTS, ROOT, Bench

MARGIN = 512 << 20  # what a rank may hold beside its own part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["tiny", "0.8b", "4b", "9b", "27b"], default="27b")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4], help="even numbers, and 1")
    parser.add_argument(
        "--source", help="directory for the checkpoint, kept; made if it is not there (default: in the workdir)"
    )
    parser.add_argument("--workdir", help="where to write (default: a temporary directory beside the repository)")
    parser.add_argument("--output", default=str(RESULTS / "scale.json"))
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="mimo-scale-", dir=options.workdir or ROOT.parent))
    try:
        run(options, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def run(options: argparse.Namespace, work: Path) -> None:
    from mimo_jobs.conversion.tiny import Shape, make_tiny, published

    source = Path(options.source or work / "source")
    if not source.exists():
        made = time.perf_counter()
        make_tiny(str(source), shape=Shape() if options.shape == "tiny" else published(options.shape))
        print(f"made {source} in {time.perf_counter() - made:.0f} s", flush=True)
    bench, rows = Bench(work, source), []
    for ranks in options.ranks:
        rows.append(one(bench, ranks))
        print(json.dumps(rows[-1]), flush=True)
    write(options, bench, rows)


def one(bench: Bench, ranks: int) -> dict[str, Any]:
    """cp, import, export, verify with so many ranks."""
    for file in bench.source.glob("*.safetensors"):
        subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)  # as far as the page cache holds it
    copied = bench.cp(sync=True)["move"]
    bench.fresh("copy")
    apart, together = layouts(ranks)
    imported = bench.job("import_hf", apart, ranks, True, model=str(bench.source), target=str(bench.fresh("mimo")))
    exported = bench.job(
        "export_hf", together, ranks, True, source=str(work := bench.work / "mimo"), target=str(bench.fresh("hf"))
    )
    shutil.rmtree(work)
    started = time.perf_counter()
    verify = [sys.executable, "-m", "mimo_jobs.cli", "verify", str(bench.source), str(bench.work / "hf"), "--json"]
    checked = json.loads(subprocess.run(verify, capture_output=True, text=True, check=False).stdout)
    seconds = time.perf_counter() - started
    bench.fresh("hf")
    return {
        "ranks": ranks, "cp_sync_seconds": round(copied, 2), "cp_gb_per_second": round(bench.nbytes / copied / 1e9, 2),
        "import": phase(bench, imported, apart, copied), "export": phase(bench, exported, together, copied),
        "verify_seconds": round(seconds, 2), "equal": checked["equal"], "tensors": checked["tensors"],
    }  # fmt: skip


def layouts(ranks: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Language and images apart, half of the ranks each; then both on all. With one rank, both on it."""
    half, one = max(1, ranks // 2), {"tp": 1}
    apart = (
        {"language": {"tp": half}, "images": {"tp": half, "rank_offset": half}}
        if ranks > 1
        else {"language": one, "images": one}
    )
    together = {"language": {"tp": ranks, "rank_offset": 0}, "images": {"tp": ranks, "rank_offset": 0}}
    return apart | {"world_size": ranks}, together | {"world_size": ranks}


def phase(bench: Bench, measured: dict[str, Any], layout: dict[str, Any], copied: float) -> dict[str, Any]:
    """Seconds of a phase from its first process to its last, and what the ranks held at most."""
    beside = [held - own for held, own in zip(measured["rss_anon"], measured["own_shard"], strict=True)]
    return {
        "layout": layout, "seconds": round(measured["process"], 2), "x_cp": round(measured["process"] / copied, 3),
        "gb_per_second": round(bench.nbytes / measured["process"] / 1e9, 2),
        "phases_seconds": {n: round(s, 2) for n, s in measured["phases"].items()},
        "rss_anon_bytes": measured["rss_anon"], "own_shard_bytes": measured["own_shard"], "within_shard_and_512_mb": max(beside) <= MARGIN,
    }  # fmt: skip


def write(options: argparse.Namespace, bench: Bench, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{options.shape} shape, {bench.nbytes / 1e9:.2f} GB, flushed to {disk(bench.work)}")
    for column in (
        "ranks",
        "cp + sync s",
        "import s",
        "x cp",
        "export s",
        "x cp",
        "verify s",
        "equal",
        "peak RssAnon MB a rank",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        peaks = max(*row["import"]["rss_anon_bytes"], *row["export"]["rss_anon_bytes"]) / 1e6
        table.add_row(
            str(row["ranks"]), f"{row['cp_sync_seconds']:.1f}", f"{row['import']['seconds']:.1f}", f"{row['import']['x_cp']:.2f}",
            f"{row['export']['seconds']:.1f}", f"{row['export']['x_cp']:.2f}", f"{row['verify_seconds']:.1f}",
            f"{row['tensors']}/{row['tensors']}" if row["equal"] else "NO", f"{peaks:.0f}",
        )  # fmt: skip
    Console(width=130).print(table)
    ranks = " ".join(map(str, options.ranks))
    result = {
        "command": f"python -m benchmarks.scale --shape {options.shape} --ranks {ranks}", "commit": commit(), "shape": options.shape,
        "bytes": bench.nbytes, "files": len(list(bench.source.glob("*.safetensors"))), "filesystem": disk(bench.work),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "kernel": platform.release()}, "repetitions": rows,
    }  # fmt: skip
    Path(options.output).write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {options.output}")


def disk(path: Path) -> str:
    """Type of the filesystem."""
    return subprocess.run(
        ["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
