"""What of a chain has to run, going on where a stopped conversion was, and casts in a verify."""

import json
import os
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import pytest

from mimo_jobs import pipeline
from mimo_jobs.checkpoint.manifest import MANIFEST_NAME, PARITY_NAME
from mimo_jobs.conversion import exporter, identity, importer, journal
from mimo_jobs.conversion.preflight import as_layout
from mimo_jobs.conversion.publish import staging_of
from mimo_jobs.conversion.verify import certify, verify_hf
from mimo_jobs.errors import JobFailed, UsageError, UserError
from mimo_jobs.parallel import world
from mimo_jobs.parallel.attempt import ATTEMPT
from mimo_jobs.pipeline import Plan, Step
from tests.conversion_ranks import convert
from tests.hf_files import config_of, make_hf

ONE = {"language": {}, "images": {}, "world_size": 1}
APART = {"language": {"tp": 2}, "images": {"tp": 1}}
STAGES = {"language": {"pp": 2}, "images": {"tp": 2}}


class Chain:
    """A pipeline in ``base``: its steps with what is changed, and each step done as its ranks would do it."""

    def __init__(self, base: Path) -> None:
        self.base, self.changed = base, {"import": {}, "export": {}, "verify": {}}

    def steps(self) -> list[Step]:
        b, common = (
            self.base,
            {"layout": as_layout(APART), "dtype": None, "mtp": "keep", "overwrite": False, "fsync": False},
        )
        made = {
            "import": {"model": f"{b}/hf", "target": f"{b}/w/mimo", **common},
            "export": {"source": f"{b}/w/mimo", "target": f"{b}/w/out", **common, "verify": True},
            "verify": {
                "left": f"{b}/hf",
                "right": f"{b}/w/out",
                "certificate": f"{b}/w/verify.json",
                "dtype": None,
                "mtp": "keep",
            },
        }
        jobs = {"import": "import_hf", "export": "export_hf", "verify": "verify"}
        return [Step(n, jobs[n], a | self.changed[n]) for n, a in made.items()]

    def plan(self, **more) -> Plan:
        return pipeline.make_plan("p", self.steps(), True, **more)

    def run(self, plan: Plan) -> None:
        for planned in plan.to_run:
            a = dict(planned.job_step.arguments)
            if planned.step.job == "verify":
                certify(a["left"], a["right"], Path(a["certificate"]), None, a["dtype"], a["mtp"])
                continue
            a.pop("fsync")
            convert(self.base / f"r-{planned.step.name}", planned.step.name, **(a | {"layout": a["layout"]}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A chain that has run, to be copied."""
    base = tmp_path_factory.mktemp("chain") / "base"
    make_hf(base / "hf", config_of(layers=2))
    chain = Chain(base)
    plan = chain.plan()
    assert [p.skip for p in plan.steps] == [False] * 3 and [p.why for p in plan.steps] == [""] * 3
    assert [p.preflight is not None for p in plan.steps] == [
        True,
        True,
        False,
    ]  # the export is planned from the import's source
    chain.run(plan)
    return base


@pytest.fixture
def chain(finished, tmp_path):
    """A chain that has run, in its own place: paths are part of no identity, times of files are."""
    shutil.copytree(finished, tmp_path / "base", copy_function=shutil.copy2)
    return Chain(tmp_path / "base")


def decided(plan: Plan) -> str:
    """``s`` for a step that is skipped, ``o`` for one that overwrites, ``r`` for one that simply runs."""
    return "".join("s" if p.skip else "o" if p.job_step.arguments.get("overwrite") else "r" for p in plan.steps)


def edit(path: Path, text: str) -> None:
    path.write_text(text)


CHANGES = {  # what -> (change, decisions, reason of the first step that runs)
    "nothing": (lambda c: None, "sss", ""),
    "another layout": (lambda c: c.changed.update({n: {"layout": as_layout(STAGES)} for n in ("import", "export")}), "sss", ""),
    "overwrite alone": (lambda c: c.changed["import"].update(overwrite=True), "sss", ""),
    "fsync": (lambda c: c.changed["export"].update(fsync=True), "sss", ""),
    "dtype by another name": (lambda c: (c.changed["import"].update(dtype="bf16"), c.changed["verify"].update(dtype="bf16")), "oor", "dtype was none, now BF16"),
    "dtype of the export": (lambda c: (c.changed["export"].update(dtype="fp32"), c.changed["verify"].update(dtype="fp32")), "sor", "dtype was none, now F32"),
    "mtp": (lambda c: (c.changed["export"].update(mtp="drop"), c.changed["verify"].update(mtp="drop")), "sor", "mtp was keep, now drop"),
    "verify=false": (lambda c: c.changed["export"].update(verify=False), "sor", "verify was true, now false"),
    "the source touched": (lambda c: os.utime(next(c.base.glob("hf/*.safetensors"))), "oor", "the source changed"),
    "the source's tokenizer": (lambda c: edit(c.base / "hf/tokenizer.json", "{}"), "oor", "the source changed"),
    "a file more in the source": (lambda c: edit(c.base / "hf/LICENSE", "x"), "oor", "the source changed"),
    "the export touched": (lambda c: os.utime(next(c.base.glob("w/out/*.safetensors"))), "ssr", "right changed"),
    "the export's tokenizer": (lambda c: edit(c.base / "w/out/tokenizer.json", "{}"), "ssr", "right changed"),
    "no checkpoint": (lambda c: shutil.rmtree(c.base / "w/mimo"), "rss", ""),
    "no export": (lambda c: shutil.rmtree(c.base / "w/out"), "srr", ""),
    "no certificate": (lambda c: (c.base / "w/verify.json").unlink(), "ssr", ""),
    "a truncated weight file": (lambda c: os.truncate(next(c.base.glob("w/mimo/*.distcp")), 10), "oss", "damaged"),
    "a truncated manifest": (lambda c: os.truncate(c.base / "w/mimo" / MANIFEST_NAME, 100), "oss", "damaged"),
    "a truncated shard": (lambda c: os.truncate(next(c.base.glob("w/out/*.safetensors")), 100), "sor", "what is there is damaged"),
    "a truncated parity.json": (lambda c: os.truncate(c.base / "w/out" / PARITY_NAME, 9), "sor", "what is there is damaged"),
    "a truncated certificate": (lambda c: os.truncate(c.base / "w/verify.json", 60), "ssr", "what is there is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_step_runs_again_when_what_it_would_make_is_not_what_is_there(chain, what):
    change, expected, reason = CHANGES[what]
    change(chain)
    plan = chain.plan()
    assert decided(plan) == expected
    first = next((p for p in plan.steps if not p.skip), None)
    assert first is None or reason in first.why, first.why
    assert all(p.why for p in plan.steps if p.skip or p.replaces)
    typed = any(c.get("overwrite") for c in chain.changed.values())
    assert typed or not any(p.step.arguments.get("overwrite") for p in plan.steps), (
        "leave to replace is not what was typed"
    )


@pytest.mark.parametrize("what", ["dtype of the export", "the source touched", "a truncated shard", "no certificate"])
def test_after_what_was_decided_has_run_there_is_nothing_to_do(chain, what):
    CHANGES[what][0](chain)
    if what == "dtype of the export":
        chain.changed["verify"]["dtype"] = "fp32"
    chain.run(chain.plan())
    assert decided(chain.plan()) == "sss"


@pytest.mark.parametrize(
    ("step", "field", "value", "said"),
    [
        ("verify", "dtype", "fp16", "verify.dtype=fp16, but import.dtype=none"),
        ("import", "dtype", "bf16", "verify.dtype=none, but import.dtype=bf16.*set dtype=bf16 for the whole chain"),
        ("export", "mtp", "drop", "verify.mtp=keep, but export.mtp=drop"),
    ],
)
def test_a_verify_that_could_only_fail_is_refused_before_anything_runs(chain, step, field, value, said):
    chain.changed[step][field] = value
    with pytest.raises(UsageError, match=said):
        chain.plan()


def test_leave_to_replace_an_old_output_does_not_outlive_it(chain):
    """What the record keeps is what the user typed: a later resume must ask again before it replaces what lies there by then."""
    os.utime(next(chain.base.glob("hf/*.safetensors")))
    plan = chain.plan()
    assert plan.steps[0].replaces and plan.steps[0].job_step.arguments["overwrite"] is True
    run = pipeline.record_at(chain.base / "r", "r-1", plan, "slurm", {})
    assert run.steps[0].arguments["overwrite"] is False
    (chain.base / "w/mimo" / MANIFEST_NAME).unlink()
    with pytest.raises(UserError, match="not from this pipeline"):
        pipeline.make_plan("p", [pipeline.step_of(s) for s in run.steps], True)


@pytest.mark.parametrize("name", ["mimo", "out"])
def test_a_foreign_directory_is_never_replaced_unasked(chain, name):
    step = {"mimo": "import", "out": "export"}[name]
    (chain.base / "w" / name / {"mimo": MANIFEST_NAME, "out": PARITY_NAME}[name]).unlink()
    with pytest.raises(
        UserError, match=rf"(?s){step}: .*not from this pipeline; give another workdir, or overwrite=true"
    ):
        chain.plan()
    chain.changed[step]["overwrite"] = True
    if name == "mimo":  # nothing in it says that it is a checkpoint: not even then
        with pytest.raises(UserError, match="overwrite=true replaces only checkpoints"):
            chain.plan()
    else:
        assert next(p for p in chain.plan().steps if p.step.name == step).why.startswith("overwrite=true: ")


@pytest.mark.parametrize("text", ["my notes", '{"a": 1}'])
def test_a_foreign_file_in_the_certificates_place_is_not_replaced(chain, text):
    edit(chain.base / "w/verify.json", text)
    with pytest.raises(UserError, match="verify"):
        chain.plan()


def test_a_chain_without_identities_may_begin_at_its_first_step_again(tmp_path):
    """``nemo-run resume`` of a quickstart whose first step failed."""
    b, common = tmp_path, {"layout": as_layout(APART), "dtype": None, "mtp": "keep", "overwrite": False, "fsync": False}
    steps = [
        Step("make", "make_tiny", {"target": f"{b}/hf", "seed": 0, "overwrite": False}),
        Step("import", "import_hf", {"model": f"{b}/hf", "target": f"{b}/mimo", **common}),
        Step("export", "export_hf", {"source": f"{b}/mimo", "target": f"{b}/out", **common, "verify": True}),
        Step(
            "verify",
            "verify",
            {"left": f"{b}/hf", "right": f"{b}/out", "certificate": None, "dtype": None, "mtp": "keep"},
        ),
    ]
    assert decided(pipeline.make_plan("quickstart", steps, False)) == "rrrr"
    assert decided(pipeline.make_plan("quickstart", steps, True)) == "rrrr"


def test_steps_that_are_queued_are_neither_compared_nor_checked_again(chain):
    shutil.rmtree(chain.base / "w")
    plan = chain.plan(active={"import"})
    assert decided(plan) == "rrr" and [p.preflight is not None for p in plan.steps] == [False, True, False]


def test_the_disk_must_hold_the_outputs_of_all_steps_together(chain, monkeypatch):
    shutil.rmtree(chain.base / "w")
    needed = [p.preflight.disk_needed for p in chain.plan().steps[:2]]
    assert all(needed)
    Usage = namedtuple("Usage", "total used free")
    for free, enough in ((sum(needed), True), (sum(needed) - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda p, f=free: Usage(0, 0, f))
        if enough:
            assert decided(chain.plan()) == "rrr"
        else:
            with pytest.raises(UserError, match=r"outputs of all steps need .*free"):
                chain.plan()


def test_an_export_that_cannot_be_is_refused_before_the_import_ran(chain):
    shutil.rmtree(chain.base / "w")
    chain.changed["export"]["layout"] = as_layout({"language": {"tp": 3}, "images": {"tp": 1}})
    with pytest.raises(UsageError, match=r"layout.language.tp=3"):
        chain.plan()
    chain.changed["export"] = {"layout": as_layout({"language": {"tp": 2, "rank_offset": 5}, "images": {"tp": 1}})}
    with pytest.raises(UsageError, match=r"rank_offset|starts at rank"):
        chain.plan()


def test_is_complete_agrees_with_the_plan(chain):
    for step in chain.steps():
        assert identity.is_complete(step.job, step.plain())
        assert not identity.is_complete(step.job, step.plain() | {"dtype": "fp32"})
    os.utime(next(chain.base.glob("hf/*.safetensors")))
    assert [identity.is_complete(s.job, s.plain()) for s in chain.steps()] == [False, True, False]


# -------------------------------------------------------------------------------------------------------------- journal


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def resumable(tmp_path, monkeypatch):
    """A checkpoint, a launcher that comes back, and interruptions without their pause."""
    monkeypatch.setenv(ATTEMPT, "0")
    monkeypatch.setattr(world, "INTERRUPT_SECONDS", 0.02)
    make_hf(tmp_path / "hf", config_of(layers=2))
    return tmp_path


JOBS = {"import": {"model": "hf", "target": "mimo"}, "export": {"source": "whole", "target": "out"}}


def attempt(base: Path, job: str, number: int | str = 0, layout: dict = APART, **more) -> None:
    convert(base / f"r-{job}-{number}", job, layout, **{k: str(base / v) for k, v in JOBS[job].items()} | more)


def uninterrupted(base: Path, job: str, layout: dict = APART) -> dict[str, bytes]:
    """What the job makes in one go; the export's source is made first."""
    convert(base / "r-whole", "import", layout, model=str(base / "hf"), target=str(base / "whole"))
    if job == "import":
        return files_of(base / "whole")
    attempt(base, "export", "whole", layout, target=str(base / "one-go"))
    return files_of(base / "one-go")


def interrupting(monkeypatch, after: int, middle: bool = False):
    """Every attempt is interrupted after so many tasks of all ranks together, or in the middle of the next one."""
    real, lock, count = journal.Journal._run, threading.Lock(), [0]

    def run(self, number, task):
        with lock:
            count[0] += 1
            now = count[0]
        if now > after:
            if middle:
                task()  # written, but not noted
            raise KeyboardInterrupt
        real(self, number, task)

    monkeypatch.setattr(journal.Journal, "_run", run)
    return count


@pytest.mark.parametrize(
    ("job", "every", "middle"),
    [("import", 9, False), ("import", 20, True), ("export", 13, True), ("export", 25, False)],
)
def test_a_conversion_interrupted_again_and_again_ends_as_one_that_was_not(resumable, monkeypatch, job, every, middle):
    expected = uninterrupted(resumable, job)
    target = resumable / JOBS[job]["target"]
    staging, noted = staging_of(target, "test"), [0]
    count = interrupting(monkeypatch, every, middle)
    for number in range(60):
        count[0] = 0
        try:
            attempt(resumable, job, number)
            break
        except (KeyboardInterrupt, JobFailed):
            assert not target.exists() and staging.is_dir()
            noted.append(journal.finished_tasks(staging))
    assert number > 0 and noted == sorted(noted), "an attempt undid what another had finished"
    assert files_of(target) == expected and not staging.exists()
    assert not [n for n in expected if Path(n).name.startswith(".") and n != ".metadata"]


@pytest.mark.parametrize("job", ["import", "export"])
def test_another_plan_discards_what_was_written(resumable, monkeypatch, job):
    uninterrupted(resumable, job)
    with monkeypatch.context() as patched:
        interrupting(patched, 9)
        with pytest.raises((KeyboardInterrupt, JobFailed)):
            attempt(resumable, job)
    staging = staging_of(resumable / JOBS[job]["target"], "test")
    assert journal.finished_tasks(staging) > 0
    (staging / "marker").touch()
    attempt(resumable, job, 1, dtype="fp32")
    assert not (resumable / JOBS[job]["target"] / "marker").exists()


def test_a_source_that_changed_meanwhile_discards_what_was_written(resumable, monkeypatch):
    with monkeypatch.context() as patched:
        interrupting(patched, 9)
        with pytest.raises((KeyboardInterrupt, JobFailed)):
            attempt(resumable, "import")
    for path in resumable.glob("hf/*.safetensors"):
        path.write_bytes(path.read_bytes()[:-64] + bytes(64))
        os.utime(path, (1, 1))
    attempt(resumable, "import", 1)
    assert files_of(resumable / "mimo") == uninterrupted(resumable, "import")


def test_without_a_launcher_that_comes_back_nothing_is_left(resumable, monkeypatch):
    monkeypatch.delenv(ATTEMPT)
    interrupting(monkeypatch, 9)
    with pytest.raises((KeyboardInterrupt, JobFailed)):
        attempt(resumable, "import")
    assert not staging_of(resumable / "mimo", "test").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"bytes": 1}', '{"tasks": 3, "bytes": 0}', '{"tasks": [1, 2], "bytes": "x"}']
)
def test_a_journal_that_cannot_be_read_costs_time_and_nothing_else(resumable, monkeypatch, text):
    with monkeypatch.context() as patched:
        interrupting(patched, 9)
        with pytest.raises((KeyboardInterrupt, JobFailed)):
            attempt(resumable, "import")
    edit(staging_of(resumable / "mimo", "test") / ".done-0", text)
    attempt(resumable, "import", 1)
    assert files_of(resumable / "mimo") == uninterrupted(resumable, "import")


@pytest.mark.parametrize(("job", "module"), [("import", importer), ("export", exporter)])
def test_an_interruption_while_companions_are_copied_loses_none_of_them(resumable, monkeypatch, job, module):
    expected = uninterrupted(resumable, job)
    real, calls = shutil.copyfile, []

    def copyfile(*arguments, **more):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(module.shutil, "copyfile", copyfile)
        with pytest.raises((KeyboardInterrupt, JobFailed)):
            attempt(resumable, job)
    attempt(resumable, job, 1)
    assert files_of(resumable / JOBS[job]["target"]) == expected


def test_one_rank_goes_on_where_it_was_too(resumable, monkeypatch):
    interrupting(monkeypatch, 9)
    with pytest.raises(KeyboardInterrupt):
        attempt(resumable, "import", layout=ONE)
    assert journal.finished_tasks(staging_of(resumable / "mimo", "test")) == 9


@pytest.mark.parametrize("job", ["import", "export"])
def test_an_interruption_after_the_moving_keeps_what_was_moved(resumable, monkeypatch, job):
    uninterrupted(resumable, job)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        {"import": importer, "export": exporter}[job],
        {"import": "_source_digests", "export": "_digests"}[job],
        interrupted,
    )
    with pytest.raises((KeyboardInterrupt, JobFailed)):
        attempt(resumable, job)
    assert journal.finished_tasks(staging_of(resumable / JOBS[job]["target"], "test")) > 0


def test_half_a_journal_of_a_killed_rank_is_not_published(resumable, monkeypatch):
    with monkeypatch.context() as patched:
        interrupting(patched, 9)
        with pytest.raises((KeyboardInterrupt, JobFailed)):
            attempt(resumable, "import")
    edit(staging_of(resumable / "mimo", "test") / "..done-1.tmp", '{"by')  # manifest.write_json's name for it
    attempt(resumable, "import", 1)
    assert not [n for n in files_of(resumable / "mimo") if "done" in n]


# --------------------------------------------------------------------------------------------------------------- verify


@pytest.mark.parametrize(
    "options", [{"dtype": "bf16"}, {"dtype": "fp32"}, {"mtp": "drop"}, {"dtype": "fp16", "mtp": "drop"}]
)
@pytest.mark.parametrize("when", ["import", "export"])
def test_a_cast_or_a_drop_verifies_with_the_same_options_only(chain, tmp_path, options, when):
    first, second = (options, {}) if when == "import" else ({}, options)
    b = chain.base
    convert(b / "r1", "import", APART, model=str(b / "hf"), target=str(b / "m"), **first)
    convert(b / "r2", "export", APART, source=str(b / "m"), target=str(b / "o"), **second)
    found = verify_hf(b / "hf", b / "o", **options)
    assert (
        found["equal"] and found["bit_exact"] == found["tensors"] and found["cast"]["mtp"] == options.get("mtp", "keep")
    )
    assert not verify_hf(b / "hf", b / "o")["equal"]
    assert not verify_hf(b / "hf", b / "w/out", **options)["equal"]
    certify(b / "hf", b / "o", b / "new/v.json", **options)
    assert json.loads((b / "new/v.json").read_text())["identity"]["job"] == "verify"
    with pytest.raises(JobFailed, match=r"\d+ tensors differ, the first is .*\n.*nemo-run verify"):
        certify(b / "hf", b / "o", b / "none.json")
    assert not (b / "none.json").exists()


def test_one_flipped_bit_after_a_cast_is_found_where_it_is(chain):
    b = chain.base
    convert(b / "r1", "export", APART, source=str(b / "w/mimo"), target=str(b / "o"), dtype="fp32")
    from mimo_jobs.weights.safetensors_io import open_hf

    tensor = max(open_hf(b / "o").tensors.values(), key=lambda t: t.nbytes)
    with open(b / "o" / tensor.file, "r+b") as file:
        file.seek(tensor.offset + 4 * 1001 + 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    found = verify_hf(b / "hf", b / "o", dtype="fp32")
    assert not found["equal"] and found["different"] == {tensor.name: {"first_byte": 4 * 1001 + 2, "element": 1001}}
