"""Import and export against ``cp`` of the same bytes, paired in one run.

    uv run python -m benchmarks.conversion                 # published 0.8B shape, 1.7 GB, 2 ranks
    uv run python -m benchmarks.conversion --shape tiny    # a quick look that it runs

Every repetition runs every case once, in random order, with a warm page cache; a ratio is that case's seconds over
``cp``'s in the same repetition, and the table shows medians with [min, max]. "move" is the byte moving alone (slowest
rank), "process" is from the start of the rank processes to the end of the last one: interpreter, imports, plan, move,
digests, fsync, publication. Writes benchmarks/results/conversion.json.
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.commit import commit

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# language and images on the same two ranks, and the single rank of the scaling row
TWO = {"language": {"tp": 2}, "images": {"tp": 2}, "world_size": 2}
ONE = {"language": {"tp": 1}, "images": {"tp": 1}, "world_size": 1}
APART = {"language": {"tp": 1}, "images": {"tp": 1, "rank_offset": 1}}


def launch(command: list[str], ranks: int, local: int | None = None) -> dict:
    """Start ``ranks`` processes with torchrun's variables; wall seconds, peak RssAnon of each, last stdout line.

    ``local``: ranks to share the cores with, so that ``local=cores`` gives a rank one thread.
    """
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(random.randint(20000, 40000))}
    start = time.perf_counter()
    processes = [
        subprocess.Popen(
            command, env={**common, "RANK": str(r), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(local or ranks)},
            stdout=subprocess.PIPE, text=True,
        )
        for r in range(ranks)
    ]  # fmt: skip
    peaks = [0] * ranks
    watching = threading.Event()

    def watch() -> None:
        while not watching.wait(0.01):
            for r, p in enumerate(processes):
                peaks[r] = max(peaks[r], rss_anon(p.pid))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    outputs = [p.communicate()[0] for p in processes]
    seconds = time.perf_counter() - start
    watching.set()
    if any(p.returncode for p in processes):
        raise SystemExit(f"{command}: exit codes {[p.returncode for p in processes]}")
    return {"process": seconds, "rss_anon": peaks, "stdout": outputs[0].strip().splitlines()[-1:]}


def rss_anon(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon")), 0)
    except OSError:
        return 0


class Bench:
    """One benchmark run in a scratch directory that holds the source checkpoint and every output."""

    def __init__(self, work: Path, source: Path) -> None:
        self.work, self.source = work, source
        self.nbytes = sum(p.stat().st_size for p in source.glob("*.safetensors"))

    def fresh(self, name: str) -> Path:
        path = self.work / name
        shutil.rmtree(path, ignore_errors=True)
        return path

    def job(
        self, job: str, layout: dict, ranks: int, fsync: bool, local: int | None = None, **arguments: object
    ) -> dict:
        record = self.fresh("record")
        record.mkdir()
        spec = {"schema": 1, "job": job, "run_id": "bench", "world_size": ranks, "record": str(record),
                "arguments": {**arguments, "layout": layout, "fsync": fsync}}  # fmt: skip
        (record / "JOB.json").write_text(json.dumps(spec))
        measured = launch([sys.executable, "-m", "mimo_jobs.worker", str(record / "JOB.json")], ranks, local)
        summary = json.loads((record / "result.json").read_text())["summary"]
        phases = summary["seconds"]
        move = phases["import" if job == "import_hf" else "export"]
        return {"move": move, "phases": phases, "process": measured["process"], "rss_anon": measured["rss_anon"],
                "own_shard": summary["bytes_per_rank"]}  # fmt: skip

    def cp(self, sync: bool) -> dict:
        target = self.fresh("copy")
        target.mkdir()
        start = time.perf_counter()
        for file in self.source.glob("*.safetensors"):
            subprocess.run(["cp", "--reflink=never", str(file), str(target)], check=True)
            if sync:
                subprocess.run(["sync", str(target / file.name)], check=True)
        return {"move": time.perf_counter() - start}

    def gather(self) -> dict:
        target = self.fresh("gathered")
        target.mkdir()
        command = [sys.executable, str(ROOT / "benchmarks/gather_baseline.py"), str(self.source), str(target)]
        measured = launch(command, 2)
        return {
            "move": json.loads(measured["stdout"][0])["seconds"],
            "process": measured["process"],
            "rss_anon": measured["rss_anon"],
        }

    def cases(self) -> dict:
        source, mimo = str(self.source), str(self.work / "mimo")

        def imported(layout: dict, ranks: int, fsync: bool) -> dict:
            return self.job("import_hf", layout, ranks, fsync, model=source, target=str(self.fresh("imported")))

        def exported(layout: dict, ranks: int, fsync: bool, local: int | None = None) -> dict:
            return self.job("export_hf", layout, ranks, fsync, local, source=mimo, target=str(self.fresh("exported")))

        return {
            "cp": lambda: self.cp(False),
            "cp+sync": lambda: self.cp(True),
            "import, 2 ranks": lambda: imported(TWO, 2, False),
            "import, 2 ranks, language | images": lambda: imported(APART, 2, False),
            "import, 2 ranks, fsync": lambda: imported(TWO, 2, True),
            "export, 2 ranks": lambda: exported(TWO, 2, False),
            "export, 1 rank, 1 thread": lambda: exported(ONE, 1, False, os.cpu_count()),
            "export, 1 rank, a thread a core": lambda: exported(ONE, 1, False),
            "export, 2 ranks, fsync": lambda: exported(TWO, 2, True),
            "gather on rank 0, save_file": self.gather,
        }


def middle(values: list[float]) -> dict:
    return {"median": round(statistics.median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["0.8b", "tiny"], default="0.8b")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workdir", help="where to work (default: a temporary directory beside the repository)")
    parser.add_argument("--output", default=str(RESULTS / "conversion.json"))
    options = parser.parse_args()
    console = Console(width=max(120, Console().width))
    work = Path(options.workdir or tempfile.mkdtemp(prefix="mimo-bench-", dir=ROOT.parent))
    try:
        run(options, work, console)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def run(options: argparse.Namespace, work: Path, console: Console) -> None:
    from mimo_jobs.conversion.tiny import Shape, make_tiny, published

    source = work / "source"
    with console.status("making the checkpoint"):
        make_tiny(str(source), shape=published("0.8b") if options.shape == "0.8b" else Shape())
    bench = Bench(work, source)
    bench.job("import_hf", TWO, 2, True, model=str(source), target=str(work / "mimo"))
    os.sync()
    cases, samples = bench.cases(), []
    for repeat in range(options.repeats + 1):
        order = list(cases)
        random.Random(repeat).shuffle(order)
        row = {}
        for name in order:
            for file in source.glob("*.safetensors"):
                subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)  # warm page cache
            with console.status(f"{repeat}/{options.repeats} {name}"):
                row[name] = cases[name]()
            os.sync()
        if repeat:  # the first repetition warms the interpreter's files and is thrown away
            samples.append(row)
    check = subprocess.run(
        [sys.executable, "-m", "mimo_jobs.cli", "verify", str(source), str(work / "exported"), "--json"],
        capture_output=True, text=True,
    )  # fmt: skip
    equal = json.loads(check.stdout)["equal"]
    report(options, bench, samples, equal, console)


def report(options: argparse.Namespace, bench: Bench, samples: list[dict], equal: bool, console: Console) -> None:
    rows = {}
    table = Table(
        title=f"{options.shape} shape, {bench.nbytes / 1e9:.3f} GB, {len(samples)} paired repetitions, export bit-exact: {equal}"
    )
    for column in ("case", "move s", "x cp", "process s", "peak RssAnon MB a rank", "own shard MB"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name in samples[0]:
        base = "cp+sync" if name.endswith("fsync") else "cp"
        taken = [s[name] for s in samples]
        moved = [t["move"] + t.get("phases", {}).get("sync", 0.0) for t in taken]
        row = {"move_seconds": middle(moved), "against": base,
               "ratio": middle([m / s[base]["move"] for m, s in zip(moved, samples, strict=True)])}  # fmt: skip
        if "process" in taken[0]:
            row["process_seconds"] = middle([t["process"] for t in taken])
            row["rss_anon_bytes"] = [max(t["rss_anon"][r] for t in taken) for r in range(len(taken[0]["rss_anon"]))]
        if "phases" in taken[0]:
            row["phases_seconds"] = {p: middle([t["phases"][p] for t in taken]) for p in taken[0]["phases"]}
            row["own_shard_bytes"] = taken[0]["own_shard"]
        rows[name] = row

        def show(m: dict) -> str:
            return f"{m['median']:.2f} [{m['min']:.2f}, {m['max']:.2f}]"

        table.add_row(
            name, show(row["move_seconds"]), show(row["ratio"]), show(row["process_seconds"]) if "process_seconds" in row else "",
            " ".join(f"{b / 1e6:.0f}" for b in row.get("rss_anon_bytes", [])), " ".join(f"{b / 1e6:.0f}" for b in row.get("own_shard_bytes", [])),
        )  # fmt: skip
    console.print(table)

    def paired(a: str, b: str) -> dict:
        return middle([s[a]["move"] / s[b]["move"] for s in samples])

    speedups = {
        "export: gather on rank 0 / ours, 2 ranks": paired("gather on rank 0, save_file", "export, 2 ranks"),
        "export: 1 rank, 1 thread / 2 ranks": paired("export, 1 rank, 1 thread", "export, 2 ranks"),
        "what the machine allows: one dd / two dd at once of half the bytes each": middle(
            [two_copies(bench) for _ in samples]
        ),
    }
    for name, value in speedups.items():
        console.print(f"{name}: {value['median']:.2f} [{value['min']:.2f}, {value['max']:.2f}]")
    result = {
        "command": f"python -m benchmarks.conversion --shape {options.shape} --repeats {options.repeats}", "commit": commit(), "shape": options.shape,
        "bytes": bench.nbytes, "repeats": len(samples), "export_bit_exact": equal,
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "kernel": platform.release()},
        "versions": {p: metadata.version(p) for p in ("torch", "megatron-core", "safetensors", "blake3")},
        "cases": rows, "speedups": speedups,
    }  # fmt: skip
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"written: {options.output}")


def two_copies(bench: Bench) -> float:
    """Seconds of one dd of the bytes over seconds of two at once of half of them: what a second writer can gain here."""
    target = bench.fresh("halves")
    target.mkdir()
    source = max(bench.source.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    blocks = source.stat().st_size >> 20

    def dd(skip: int, count: int, out: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["dd", f"if={source}", f"of={target / out}", "bs=1M", f"skip={skip}", f"seek={skip}", f"count={count}",
             "conv=notrunc", "status=none"]
        )  # fmt: skip

    start = time.perf_counter()
    dd(0, blocks, "one").wait()
    alone = time.perf_counter() - start
    start = time.perf_counter()
    for process in [dd(0, blocks // 2, "two"), dd(blocks // 2, blocks - blocks // 2, "two")]:
        process.wait()
    return alone / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
