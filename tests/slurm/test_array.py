"""Checkpoints compared and hashed by job arrays on a real Slurm: results, time limits, requeues, failures, interrupts."""

import os
import time
from pathlib import Path

import pytest

from launchers import array
from launchers.profiles import Profile
from mimo_jobs.conversion.verify import verify_hf
from mimo_jobs.errors import UserError
from tests.hf_files import make_hf
from tests.slurm.cluster import ENDED

Pair = tuple[Path, Path]
PROFILE = Profile(account="research", partition="batch", cpus_per_task=2, mem="1G")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MIMO_JOBS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def sides(tmp_path):
    root = tmp_path / "a b'c$(touch pwned)"
    return make_hf(root / "left"), make_hf(root / "right")


def change(directory: Path, name: str) -> None:
    tensor = array.open_hf(directory).tensors[name]
    with open(directory / tensor.file, "r+b") as file:
        file.seek(tensor.offset)
        byte = file.read(1)
        file.seek(tensor.offset)
        file.write(bytes([byte[0] ^ 1]))


def arrays_running(cluster) -> list[str]:
    return [job["id"] for job in cluster.jobs() if job["name"].startswith("mimo:") and job["state"] not in ENDED]


class SlowPart(array.VerifyPart):
    """Takes its time for every tensor, and leaves word of it beside its file."""

    seconds = 0.3

    def batches(self, names):
        return ([name] for name in names)

    def compute(self, names):
        array.add_line(self.file.parent.parent / f"{self.file.stem}.computed", "".join(f"{n}\n" for n in names))
        time.sleep(self.seconds)
        return super().compute(names)


class EndlessPart(SlowPart):
    seconds = 600


class BadPart(SlowPart):
    """The first part fails, the others would take long."""

    def compute(self, names):
        if self.file.stem == "part-0":
            raise UserError("/x/model-2.safetensors: ends early\n  download it again")
        time.sleep(600)
        return []


class DyingPart(EndlessPart):
    def compute(self, names):
        os._exit(3)


def computed(home) -> list[str]:
    """Every start on a tensor, by all attempts of all parts."""
    return [line for file in sorted(home.glob("arrays/*.computed")) for line in file.read_text().split("\n") if line]


@pytest.fixture
def interrupted(cluster, sides: Pair, home, monkeypatch):
    """Compare ten tensors in two parts, with ``do(array's id)`` once some are done: no finished one may be done again."""

    def run(do):
        monkeypatch.setattr(array, "VerifyPart", SlowPart)
        few = list(array.open_hf(sides[0]).tensors)[:10]
        split, calls = array.split, []
        monkeypatch.setattr(array, "split", lambda tensors, tasks: split([t for t in tensors if t.name in few], tasks))

        def progress(done, total):
            if done and not calls:
                calls.append(max({int(job.split("_")[0]) for job in arrays_running(cluster)}))
                do(str(calls[0]))

        found = array.verify(*sides, PROFILE, tasks=2, progress=progress)
        wanted = verify_hf(*sides)["digests"]
        assert calls and found["equal"] and found["digests"] == {n: wanted[n] for n in sorted(few)}
        assert set(computed(home)) == set(few)
        assert 10 <= len(computed(home)) <= 12  # each part does again what it was at

    return run


# ------------------------------------------------------------------------------------------------------ results


def test_the_certificate_is_that_of_one_process(cluster, sides: Pair, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SBATCH_PARTITION", "nope")  # the user's own defaults, and those of a job that this runs in
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    steps = []
    found = array.verify(*sides, PROFILE, tasks=4, progress=lambda *step: steps.append(step))
    assert found == verify_hf(*sides) and found["equal"]
    assert steps[-1] == (found["bytes"], found["bytes"])
    assert list(home.glob("arrays/*")) == [] and not list(tmp_path.glob("**/pwned*"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a b'c$(touch pwned)", "home"]


def test_differences_casts_and_what_is_missing(cluster, sides: Pair, home):
    left, right = sides
    name = "model.language_model.layers.3.self_attn.k_norm.weight"
    change(right, name)
    found = array.verify(left, right, PROFILE, tasks=3)
    assert found == verify_hf(left, right)
    assert not found["equal"] and found["different"] == {name: {"first_byte": 0, "element": 0}}
    other = make_hf(right.parent / "other", mtp=False)
    cast = array.verify(left, other, PROFILE, tasks=1, dtype="float32", mtp="drop")
    assert cast == verify_hf(left, other, dtype="float32", mtp="drop")
    assert len(cast["different"]) > 50 and not cast["only_left"]


def test_digests_are_those_of_this_machine(cluster, sides: Pair, home):
    assert array.hash_files(sides[0], PROFILE, tasks=2) == array.hash_files(sides[0], None)


def test_it_works_without_accounting(cluster, sides: Pair, home):
    cluster.stop_database()
    assert array.verify(*sides, PROFILE, tasks=2)["equal"]


def test_an_interpreter_with_an_odd_path(cluster, sides: Pair, home, tmp_path):
    import sys

    venv = tmp_path / "v e'n$(touch pwned)v"
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin" / "python"
    python.write_text(f'#!/bin/sh\ntouch "$(dirname "$0")/used"\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    profile = Profile(account="research", partition="batch", venv=str(venv), setup=("echo $((40 + 2))",))
    assert array.verify(*sides, profile, tasks=2)["equal"]
    assert (venv / "bin" / "used").exists() and not list(tmp_path.glob("**/pwned*"))


# ------------------------------------------------------------------------------------------------------ cut short


def test_a_time_limit_costs_no_finished_tensor(cluster, interrupted):
    interrupted(lambda job: cluster.run("scancel", "--signal=USR2", job))


def test_a_requeue_by_slurm_costs_no_finished_tensor(cluster, interrupted):
    interrupted(lambda job: cluster.run("scontrol", "requeue", job))


def test_a_lost_node_and_a_restarted_controller_cost_no_finished_tensor(cluster, interrupted):
    def disaster(job):
        node = next(j["nodes"] for j in cluster.jobs() if j["id"].startswith(f"{job}_") and j["state"] == "RUNNING")
        cluster.kill_node(node)
        cluster.restart_controller()

    interrupted(disaster)


def test_a_part_that_never_finishes_anything_gives_up(cluster, sides: Pair, home, monkeypatch):
    monkeypatch.setattr(array, "VerifyPart", EndlessPart)
    signalled: list[int] = []

    def progress(done, total):
        started = len(computed(home))
        if started > len(signalled):  # a new attempt is at work
            signalled.append(started)
            cluster.run("scancel", "--signal=USR2", *arrays_running(cluster))

    with pytest.raises(UserError, match=r"stopped 3 times before anything was finished; set executor\.time to more"):
        array.verify(*sides, PROFILE, tasks=1, progress=progress)
    assert len(signalled) == 3


# ------------------------------------------------------------------------------------------------------ failures


def test_the_first_error_ends_all(cluster, sides: Pair, home, monkeypatch):
    monkeypatch.setattr(array, "VerifyPart", BadPart)
    with pytest.raises(UserError) as caught:
        array.verify(*sides, PROFILE, tasks=3)
    lines = str(caught.value).split("\n")
    assert lines[0].startswith("part 1 of 3 failed (Slurm job ")
    assert lines[0].endswith("): /x/model-2.safetensors: ends early") and lines[1] == "  download it again"
    assert lines[2].startswith("  its log: ") and Path(lines[2].removeprefix("  its log: ")).exists()
    cluster.wait("the other parts' end", lambda: not arrays_running(cluster), 60)


def test_a_part_that_dies_and_one_that_is_cancelled(cluster, sides: Pair, home, monkeypatch):
    monkeypatch.setattr(array, "RESULT_SECONDS", 2.0)
    monkeypatch.setattr(array, "VerifyPart", DyingPart)
    with pytest.raises(UserError, match=r"part 1 of 1 failed \(Slurm job \d+ on tnode\d\): srun: error: .*exit code 3"):
        array.verify(*sides, PROFILE, tasks=1)
    monkeypatch.setattr(array, "VerifyPart", EndlessPart)
    with pytest.raises(UserError, match=r"part [12] of 2 failed \(Slurm job \d+_\d.*\): cancelled\n"):
        array.verify(*sides, PROFILE, tasks=2, progress=lambda *_: cluster.run("scancel", "--state=RUNNING", "--me"))
    cluster.wait("the other part's end", lambda: not arrays_running(cluster), 60)


def test_an_interrupt_ends_all(cluster, sides: Pair, home, monkeypatch):
    monkeypatch.setattr(array, "VerifyPart", EndlessPart)

    def progress(done, total):
        if computed(home):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        array.verify(*sides, PROFILE, tasks=2, progress=progress)
    cluster.wait("the parts' end", lambda: not arrays_running(cluster), 60)


def test_an_interrupt_while_sbatch_runs_ends_all(cluster, sides: Pair, home, monkeypatch):
    from submitit.slurm.slurm import SlurmExecutor

    submit = SlurmExecutor._submit_command

    def then_interrupted(self, command):
        submit(self, command)
        raise KeyboardInterrupt

    monkeypatch.setattr(SlurmExecutor, "_submit_command", then_interrupted)
    with pytest.raises(KeyboardInterrupt):
        array.verify(*sides, PROFILE, tasks=2)
    cluster.wait("the parts' end", lambda: not arrays_running(cluster), 60)
    assert [job for job in cluster.jobs() if job["name"].startswith("mimo:verify-")]


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"partition": "nope"}, "Slurm refused the job array: .*[Ii]nvalid partition"),
        ({"account": "nope"}, "Slurm refused the job array: .*Invalid account"),
        ({"cpus_per_task": 4000}, r"Slurm would never start it \(PartitionConfig\)|configuration is not available"),
        ({"setup": ("echo 'no such module' >&2; false",)}, r"part 1 of 2 failed \(Slurm job .*\): no such module"),
        ({"venv": "/no venv"}, r"part 1 of 2 failed \(Slurm job .*\): .*/no venv/bin/python"),
    ],
)
def test_what_a_profile_has_wrong(cluster, sides: Pair, home, monkeypatch, wrong, said):
    monkeypatch.setattr(array, "RESULT_SECONDS", 2.0)
    profile = Profile(**{"account": "research", "partition": "batch"} | wrong)
    with pytest.raises(UserError, match=said):
        array.verify(*sides, profile, tasks=2)
    assert not arrays_running(cluster)
