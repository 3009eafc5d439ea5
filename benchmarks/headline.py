"""The whole way on the GPUs of one host, as a user types it: language TP 4 on ranks 0-3, images TP 4 on ranks 4-7.

    python -m benchmarks.headline                                        # the 27B shape on 8 GPUs, all phases
    python -m benchmarks.headline --ranks 4 --only plan conversion       # TP 2 + TP 2
    python -m benchmarks.headline --shape tiny --ranks 8                 # anywhere: gloo on CPUs
    python -m benchmarks.headline --set optimizer.state=bf16             # 12 bytes a weight in training instead of 18

plan        of the published 27B from its headers alone: bytes of every rank, every tensor covered once, what the planner says of
            training it
conversion  import, export from that layout, verify: every tensor bit for bit
training    ``--steps`` of SFT in the layout that the planner suggests with the language's TP fixed and the images on ranks of their
            own; a rank is killed once the checkpoint is there; the same command goes on from it for ``--resume-steps``; the result is
            exported, which compares every tensor with what was trained, and compared with the source, whose MTP it must have
recipes     every recipe once with the layout that it has by itself (on 8 ranks), few steps

Room in ``--workdir``, in times the bytes of the weights (27B: 55.6 GB): conversion 3 (source, checkpoint, export: 167 GB), recipes 10
(556 GB), training 17 (945 GB): 3 and two checkpoints with optimizer state, 7 each (``optimizer.state=bf16``: 5, all together 723 GB),
which ``--set saving.directory=DIR`` puts elsewhere. What is no more needed is removed. A real checkpoint as ``--source`` works, too;
its tokenizer makes fewer tokens of the samples. A failure exits 1 and writes no result.

Writes benchmarks/results/headline.json if everything ran with 27b on 8 GPUs and nothing was set otherwise, else
headline_SHAPE_RANKS_BACKEND.json there, of some phases with their names behind.
"""

import argparse
import dataclasses
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import headline_training
from benchmarks.commit import commit
from benchmarks.conversion import RESULTS, ROOT
from benchmarks.headline_parts import (
    RUNS,
    CommandLine,
    Failed,
    cards,
    covered_once,
    kinds,
    make_data,
    make_headers,
    planned_card,
    require,
)
from benchmarks.scale import disk
from benchmarks.training import versions
from recipes import RECIPES

STEPS, RESUME_STEPS, RECIPE_STEPS = 20, 5, 2
PHASES = ("plan", "conversion", "training", "recipes")
ROOM = {
    "plan": 0,
    "conversion": 3,
    "training": 3,
    "recipes": 10,
}  # times the weights' bytes; without checkpoints of training
SAVED = {"fp32": 7, "bf16": 5}  # the same of one such checkpoint, by optimizer.state
WEIGHTS = {"tiny": 1e6, "0.8b": 1.8e9, "4b": 9.4e9, "9b": 19.4e9, "27b": 55.6e9}
TENSORS = {"27b": 1199}  # 1184 of language, vision and head, 15 of multi-token prediction
SMALL = {"batch": 8, "samples": 16, "tokens": 128, "image": 64}
USUAL = {"batch": 32, "samples": 128, "tokens": 2048, "image": 768}
OF_BEST = ("layout", "micro_batch_size", "recompute", "sequence_parallel", "tokens_per_second_per_gpu", "peak_bytes")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(WEIGHTS), default="27b")
    parser.add_argument("--ranks", type=int, choices=(2, 4, 8), default=8)
    parser.add_argument(
        "--backend", choices=("auto", "gpu", "gloo"), default="auto", help="auto: GPUs if there are enough"
    )
    parser.add_argument(
        "--source", help="directory for the checkpoint, kept; made if not there (default: in the workdir)"
    )
    parser.add_argument(
        "--workdir", help="where to write (default: /dev/shm or beside the repository, where there is room)"
    )
    parser.add_argument("--only", nargs="+", choices=PHASES, default=PHASES, metavar="PHASE", help=", ".join(PHASES))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--resume-steps", type=int, default=RESUME_STEPS)
    parser.add_argument("--recipe-steps", type=int, default=RECIPE_STEPS, help="steps of the recipes phase")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="of qwen35vl_sft in the training phase"
    )
    parser.add_argument("--batch", type=int, help="samples of a step (default: 32; tiny 8)")
    parser.add_argument("--samples", type=int, help="of the data set (default: 128; tiny 16)")
    parser.add_argument("--tokens", type=int, help="of a sample, at most (default: 2048; tiny 128)")
    parser.add_argument("--image", type=int, help="pixels a side (default: 768; tiny 64)")
    parser.add_argument("--output")
    options = parser.parse_args(arguments)
    for name, value in (SMALL if options.shape == "tiny" else USUAL).items():
        setattr(options, name, getattr(options, name) or value)
    if wrong := [word for word in options.set if "=" not in word]:
        parser.error(f"--set {wrong[0]}: expected FIELD=VALUE")
    if min(options.steps, options.resume_steps) < 1:
        parser.error("--steps and --resume-steps: expected at least 1")
    try:
        _in_scratch(options)
    except Failed as error:
        sys.exit(f"headline: {error}")


def _given(options: argparse.Namespace) -> list[str]:
    """The words that make it another measurement than the one that is known by the shape and the ranks."""
    usual = {"steps": STEPS, "resume_steps": RESUME_STEPS, "recipe_steps": RECIPE_STEPS}
    usual |= SMALL if options.shape == "tiny" else USUAL
    given = {name: getattr(options, name) for name, value in usual.items() if getattr(options, name) != value}
    words = [f"--{name.replace('_', '-')} {value}" for name, value in given.items()]
    return words + [f"--set {' '.join(options.set)}"] * bool(options.set) + ["--source DIR"] * bool(options.source)


def _in_scratch(options: argparse.Namespace) -> None:
    """Run it in a directory that is removed; of a failure the records of the commands stay. Raises `Failed`."""
    work = Path(tempfile.mkdtemp(prefix="mimo-headline-", dir=_place(options)))
    records = None
    try:
        Headline(options, work).run()
    except BaseException as error:
        records = work / RUNS if (work / RUNS).is_dir() else None
        where = f"\nrecords of the commands: {records}" if records else ""
        if isinstance(error, Failed):
            raise Failed(f"{error}{where}") from None
        print(where, file=sys.stderr)
        raise
    finally:
        for place in work.iterdir():
            if place != records:
                shutil.rmtree(place, ignore_errors=True)
        if records is None:
            work.rmdir()


def _place(options: argparse.Namespace) -> Path:
    """A directory with room. Raises `Failed`."""
    given = dict(word.split("=", 1) for word in options.set)
    saved = 0 if "saving.directory" in given else 2 * SAVED.get(given.get("optimizer.state", "fp32"), 0)
    room = ROOM | {"training": ROOM["training"] + saved}
    need = max(room[phase] for phase in options.only) * WEIGHTS[options.shape]
    places = [Path(options.workdir)] if options.workdir else [Path("/dev/shm"), ROOT.parent]
    free = {place: shutil.disk_usage(place).free for place in places if place.is_dir()}
    if found := [place for place, there in free.items() if there >= need]:
        return found[0]
    told = (
        ", ".join(f"{place} has {there / 1e9:.0f} GB" for place, there in free.items()) or "there is no such directory"
    )
    raise Failed(f"needs {need / 1e9:.0f} GB, but {told}; give another --workdir, or --only some phases")


class Headline:
    """One run in a scratch directory.

    Attributes:
        half: ranks of each component in the conversion; ``layout``: its fields.
        gpus: whether the ranks have GPUs.
        source, mimo, data: what all phases begin with, made by the first that needs them.
    """

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work, self.half = options, work, options.ranks // 2
        self.cards = cards() if options.backend != "gloo" else []
        self.gpus = len(self.cards) >= options.ranks
        require(
            self.gpus or options.backend != "gpu", f"--backend gpu: {len(self.cards)} of {options.ranks} GPUs are there"
        )
        self.card = planned_card(self.cards[0] if self.gpus else None)
        self.line = CommandLine(work, self.gpus)
        self.source, self.mimo, self.data = Path(options.source or work / "source"), work / "mimo", work / "data"
        self.layout = (f"layout.language.tp={self.half}", f"layout.images.tp={self.half}")

    def run(self) -> None:
        phases: dict[str, Callable[[], dict[str, Any]]] = {
            "plan": self.plan, "conversion": self.conversion, "training": lambda: headline_training.run(self),
            "recipes": self.recipes,
        }  # fmt: skip
        self.write({name: phases[name]() for name in PHASES if name in self.options.only})

    # ---------------------------------------------------------------------------------------------------------- plan

    def plan(self) -> dict[str, Any]:
        """Of the published 27B, whatever the shape that is run."""
        from mimo_jobs.conversion.importer import ImportArgs, plan_import
        from mimo_jobs.layout import ComponentLayout, ParallelLayout

        model, tp, ranks = self.work / "headers", ComponentLayout(tp=self.half), self.options.ranks
        nbytes = make_headers(model)
        layout = ParallelLayout(tp, tp).resolve()
        made = plan_import(ImportArgs(model, self.work / "nowhere", layout))
        once, planned = covered_once(made), made.bytes_per_rank
        require(
            sorted(once) == sorted(made.hf.tensors), f"{len(once)} of {len(made.hf.tensors)} tensors are covered once"
        )
        require(sum(planned) == nbytes, f"{sum(planned)} of {nbytes} bytes are planned")
        found = {
            "shape": "27b", "layout": layout.as_layout(), "tensors": len(once), "covered_once": kinds(once), "bytes": nbytes,
            "bytes_per_rank": planned,
            f"training on {ranks} {self.card}, language TP {self.half}, images apart": self._verdict(model, self.apart()),
            f"training on {ranks} {self.card}, any layout": self._verdict(model, []),
        }  # fmt: skip
        shutil.rmtree(model)
        each = " ".join(f"{n / 1e9:.2f}" for n in planned)
        print(f"plan: {len(once)} tensors of the 27B, each covered once; {nbytes / 1e9:.2f} GB, of the ranks {each}")
        return found

    def _verdict(self, model: Path, pins: Sequence[str]) -> dict[str, Any]:
        """Whether every parameter can be trained there, and how."""
        sample = ("tokens=2048", "image_tokens=576", "max_length=2048")
        ran = self.planned(model, *sample, *pins)
        if ran.rc:
            return {"fits": False, "said": ran.said.strip()}
        best = ran.data["layouts"][0]
        told = {name: best[name] for name in (*OF_BEST, "share_of_card")}
        return {"fits": True, "layouts_that_fit": ran.data["fit"], "best": told, "assumed": ran.data["assumed"]}

    def planned(self, model: Path, *words: str) -> Any:
        """What the planner says of all the ranks there are; exit code 1 or 2 where it finds nothing."""
        gpus = (f"gpus={self.options.ranks}", f"gpu={self.card}")
        return self.line.run("plan", "recipes.qwen35vl_sft", f"model={model}", *gpus, *words, codes=(0, 1, 2))

    def apart(self) -> list[str]:
        """The language's TP fixed, the images on ranks behind it."""
        language = (f"layout.language.{name}" for name in (f"tp={self.half}", "pp=1", "dp=1"))
        return [*language, f"layout.images.rank_offset={self.half}"]

    # ---------------------------------------------------------------------------------------------------- conversion

    def conversion(self) -> dict[str, Any]:
        made, exported = self._make_source(), self.work / "exported"
        found = made | {
            "layout": list(self.layout),
            "import": self._import(),
            "export": self.export(self.mimo, exported),
        }
        ran = self.line.run("verify", str(self.source), str(exported))
        told, seconds = ran.data, ran.seconds
        expected, different = TENSORS.get(self.options.shape, told["tensors"]), list(told["different"])
        exact = told["equal"] and told["tensors"] == told["bit_exact"] == expected
        require(exact, f"{told['bit_exact']}/{expected} tensors bit-exact; others: {different[:3]}")
        require(
            told["same_files"] and told["same_config"], "the export has other files, or another config, than the source"
        )
        shutil.rmtree(exported)
        print(f"parity: {told['bit_exact']}/{expected} tensors bit-exact, {len(different)} mismatches")
        return found | {
            "verify": {
                "tensors": told["tensors"], "bit_exact": told["bit_exact"], "mismatches": len(different), "of": kinds(told["digests"]),
                "bytes": told["bytes"], "seconds": round(seconds, 2), "gb_per_second": round(told["bytes"] / seconds / 1e9, 3),
            }
        }  # fmt: skip

    def _make_source(self) -> dict[str, Any]:
        """The checkpoint, if it is not there."""
        from mimo_jobs.conversion.tiny import Shape, make_tiny, published

        if self.source.exists():
            return {}
        # The tiny shape has two key heads; the language's TP 4 wants four.
        tiny = dataclasses.replace(Shape(), gdn_key_heads=4, gdn_value_heads=8)
        started, shape = time.perf_counter(), self.options.shape
        made = make_tiny(str(self.source), shape=tiny if shape == "tiny" else published(shape))
        seconds = round(time.perf_counter() - started, 1)
        print(f"made {made['tensors']} tensors, {made['bytes'] / 1e9:.3f} GB in {seconds} s", flush=True)
        return {"made_in_seconds": seconds}

    def _import(self) -> dict[str, Any]:
        return self._moved("import", f"model={self.source}", f"target={self.mimo}", *self.layout)

    def export(self, source: Path, target: Path) -> dict[str, Any]:
        return self._moved("export", f"source={source}", f"target={target}", *self.layout)

    def _moved(self, what: str, *words: str) -> dict[str, Any]:
        """Seconds of the whole command, and of the ranks' moving bytes, digests and flushing (the slowest of each)."""
        ran = self.line.run(f"recipes.qwen35vl_{what}", *words, "--executor", "local")
        told = ran.summary(f"qwen35vl_{what}")
        moved, ranks = told["bytes"], sum(told["seconds"].values())
        found = {
            "command": ran.command, "seconds": round(ran.seconds, 2), "gb_per_second": round(moved / ran.seconds / 1e9, 3),
            "phases_seconds": {n: round(s, 3) for n, s in told["seconds"].items()},
            "gb_per_second_of_phases": round(moved / ranks / 1e9, 3), "tensors": told["tensors"], "bytes": moved,
            "bytes_per_rank": told["bytes_per_rank"],
        }  # fmt: skip
        return found | {name: told[name] for name in ("parity", "trained") if name in told}

    # ------------------------------------------------------------------------------------------------------- recipes

    def prepare(self) -> int:
        """What training and recipes begin with, as far as it is not there. Returns image tokens of a sample."""
        self._make_source()
        if not self.mimo.exists():
            self._import()
        o, config = self.options, json.loads((self.source / "config.json").read_text())
        shutil.rmtree(self.data, ignore_errors=True)
        return make_data(self.data, config, o.samples, o.tokens, o.image)

    def recipes(self) -> dict[str, Any]:
        """Every recipe as README gives it; with fewer ranks than its own layout has, with a smaller one."""
        self.prepare()
        o, work = self.options, self.work / "recipes"
        layout = [] if o.ranks == 8 else list(self.layout)
        training = [
            f"source={self.mimo}",
            f"data={self.data}",
            *layout,
            f"steps={o.recipe_steps}",
            "global_batch_size=8",
        ]
        training += [f"dataset.max_length={o.tokens}", *([] if self.gpus else ["dataset.workers=0"])]
        merged = [f"source={self.mimo}", f"adapter={work / 'lora'}", f"target={work / 'merged'}", *layout]
        given = {
            "quickstart": [f"workdir={work / 'quickstart'}"],
            "qwen35vl_import": [f"model={self.source}", f"target={work / 'mimo'}", *layout],
            "qwen35vl_sft": [*training, f"target={work / 'sft'}"],
            "qwen35vl_lora": [*training, f"target={work / 'lora'}"],
            "qwen35vl_export": merged,
            "qwen35vl_pipeline": [f"model={self.source}", f"workdir={work / 'pipeline'}", *layout],
        }
        require(set(given) == set(RECIPES), f"other recipes than here: {', '.join(set(given) ^ set(RECIPES))}")
        found = {}
        for name, words in given.items():
            ran = self.line.run(f"recipes.{name}", *words, "--executor", "local")
            found[name] = {"command": ran.command, "rc": ran.rc, "seconds": round(ran.seconds, 2)}
            for step, told in ran.data["steps"].items():
                if "loss" in told:
                    found[name] |= {f"loss of {step}": [round(told["first_loss"], 5), round(told["loss"], 5)]}
            for place in work.iterdir():
                if place.name != "lora" or name == "qwen35vl_export":
                    shutil.rmtree(place)
        return found

    # -------------------------------------------------------------------------------------------------------- result

    def write(self, found: dict[str, dict[str, Any]]) -> None:
        o, complete, backend = self.options, set(found) == set(PHASES), "gpu" if self.gpus else "gloo"
        headline = (o.shape, o.ranks, backend) == ("27b", 8, "gpu") and not _given(o)
        parts = ["headline"] if headline else ["headline", o.shape, str(o.ranks), backend]
        place = Path(o.output or RESULTS / f"{'_'.join(parts if complete else [*parts, *found])}.json")
        words = [f"--shape {o.shape} --ranks {o.ranks}", *_given(o), *[f"--only {' '.join(found)}"] * (not complete)]
        result = {
            "command": f"python -m benchmarks.headline {' '.join(words)}", "commit": commit(), "complete": complete,
            "shape": o.shape, "ranks": o.ranks, "backend": backend, "filesystem": disk(self.work),
            "source": "given" if o.source else "random weights",
            "machine": {
                "card": self.cards[0] if self.gpus else None, "gpus": len(self.cards), "cores": os.cpu_count(),
                "python": platform.python_version(), "kernel": platform.release(),
            },
            "versions": versions(), "samples": {name: getattr(o, name) for name in USUAL}, **found, "commands": self.line.ran,
        }  # fmt: skip
        place.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {place}")


if __name__ == "__main__":
    main()
