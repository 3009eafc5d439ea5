"""Executors as profiles: which file wins, what every field takes and refuses, and that hostile values stay data."""

import dataclasses
import datetime
import json

import pytest

from launchers import profiles
from launchers.profiles import Profile, from_plain, load, parse, seconds
from mimo_jobs.errors import UsageError, UserError

HOSTILE = [
    "$(touch pwned)",
    "`touch pwned`",
    "a;touch pwned",
    "a\nb",
    "a b",
    "a'b",
    'a"b',
    "a\\b",
    "a|b",
    "a&b",
    "a\0b",
    "-x",
    "",
]


@pytest.fixture
def user(tmp_path, monkeypatch):
    """Write the user's file; the working directory is an empty project."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    project = tmp_path / "project/deep"
    project.mkdir(parents=True)
    monkeypatch.chdir(project)

    def write(text: str) -> None:
        path = tmp_path / "config/mimo_jobs/executors.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return write


@pytest.fixture
def project(tmp_path, user):
    """Write the project's file, above the working directory."""
    return lambda text: (tmp_path / "project/executors.toml").write_text(text)


# ------------------------------------------------------------------------------------------------------------ precedence

USER = '[slurm]\naccount="u"\npartition="u"\ntime="1"\n[slurm.eos]\nqos="u"\npartition="ue"\n'
PROJECT = '[slurm]\npartition="p"\n[slurm.eos]\nqos="p"\n'


@pytest.mark.parametrize(
    ("files", "name", "line", "expected"),
    [
        ("", "slurm", {}, {}),
        ("u", "slurm", {}, {"account": "u", "partition": "u", "time": "1"}),
        ("p", "slurm", {}, {"partition": "p"}),
        ("up", "slurm", {}, {"account": "u", "partition": "p", "time": "1"}),
        ("up", "slurm", {"partition": "c"}, {"account": "u", "partition": "c", "time": "1"}),
        ("up", "slurm", {"partition": None}, {"account": "u", "time": "1"}),
        ("u", "slurm:eos", {}, {"account": "u", "partition": "ue", "time": "1", "qos": "u"}),
        # the project's file wins field by field, also over the user's own cluster
        ("up", "slurm:eos", {}, {"account": "u", "partition": "p", "time": "1", "qos": "p"}),
        ("up", "slurm:eos", {"qos": "c"}, {"account": "u", "partition": "p", "time": "1", "qos": "c"}),
    ],
)
def test_the_projects_file_wins_over_the_users_and_the_command_line_over_both(
    user, project, files, name, line, expected
):
    if "u" in files:
        user(USER)
    if "p" in files:
        project(PROJECT)
    assert load(name, line).plain() == expected


def test_environments_of_all_sources_are_merged_variable_by_variable(user, project):
    user('[slurm]\nenvironment={A="u",B="u",C="u",D="u"}\n[slurm.eos]\nenvironment={B="ue"}\n')
    project('[slurm]\nenvironment={C="p"}\n[slurm.eos]\nenvironment={D="pe",F="pe"}\n')
    found = load("slurm:eos", parse({"environment.D": "c", "environment.E": "$(c)"})).environment
    assert found == {"A": "u", "B": "ue", "C": "p", "D": "c", "E": "$(c)", "F": "pe"}
    assert load("slurm").environment == {"A": "u", "B": "u", "C": "p", "D": "u"}


def test_lists_are_replaced_not_joined(user, project):
    user('[slurm]\nsetup=["a","b"]\n')
    project('[slurm]\nsetup=["c"]\n')
    assert load("slurm").setup == ("c",)
    assert load("slurm", parse({"setup": "none"})).setup == ()


def test_an_unknown_cluster_is_refused_with_the_nearest_or_all_there_are(user, project):
    user("[slurm.eos]\n[slurm.selene]\n")
    project("[slurm.draco]\n")
    for name, said in (("eso", r"did you mean 'eos'"), ("x9", "there are draco, eos, selene")):
        with pytest.raises(UsageError, match=rf"no \[slurm.{name}\].*executors.toml.*{said}"):
            load(f"slurm:{name}")


def test_without_any_file_a_named_cluster_says_where_one_goes(user):
    with pytest.raises(UsageError, match=r"~/.config/mimo_jobs/executors.toml or ./executors.toml"):
        load("slurm:eos")


def test_a_profile_that_came_over_ssh_is_the_whole_truth(user, monkeypatch):
    user(USER)
    monkeypatch.setattr(profiles, "sent", {"partition": "sent"})
    assert load("slurm:nowhere", {"partition": "again"}).plain() == {"partition": "sent"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[slurm", r"executors.toml: "),
        ("[slurm]\na=1\na=2", r"executors.toml: "),
        ("[slrum]\n", r"unknown table \[slrum\]"),
        ("partition='x'", r"unknown table \[partition\]"),
        ("slurm=3", r"expected a table \[slurm\]"),
        ("[slurm]\npatition='x'", r"\[slurm\] patition: unknown field 'patition'; did you mean 'partition'\?"),
        ("[slurm.eos]\nzzz='x'", r"\[slurm.eos\] zzz: unknown field 'zzz'; the fields are account,"),
        ("[slurm]\npartition=3", r"\[slurm\] partition=3: expected name"),
        ("[slurm.partition]\na='x'", r"partition={'a': 'x'}: expected name"),
        ("[slurm]\nretries=true", r"retries=True: expected an integer"),
        ("[slurm]\nretries=1.0", r"retries=1.0: expected an integer"),
        ("[slurm]\nretries='1'", r"retries='1': expected an integer"),
        ("[slurm]\nexclusive=1", r"exclusive=1: expected true or false"),
        ("[slurm]\nsetup='x'", r"setup='x': expected a list"),
        ("[slurm]\nsetup=['x',1]", r"setup\[1\]=1: expected one line"),
        ("[slurm]\nenvironment=['x']", r"environment=\['x'\]: expected a table"),
        ("[slurm]\nenvironment={A=1}", r"environment.A=1: expected text; write it in quotes"),
        ("[slurm]\nenvironment={A={B='x'}}", r"environment.A={'B': 'x'}: expected text"),
        ("[slurm]\nenvironment={'A-B'='x'}", r"'A-B' is no name of an environment variable"),
        ("[slurm]\ntime=04:00:00", r"expected minutes, HH:MM:SS or D-HH:MM:SS"),
        ("[slurm]\nssh='login'", r"ssh=login needs venv"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_the_file_and_the_field(user, text, said):
    user(text)
    with pytest.raises(UserError, match=said):
        load("slurm:eos" if "eos" in text else "slurm")


def test_a_misspelled_environment_is_not_silently_taken_for_a_cluster(user):
    user('[slurm]\nenviroment = { NCCL_DEBUG = "WARN" }\n')
    with pytest.raises(UsageError, match="environment"):
        load("slurm")


# ---------------------------------------------------------------------------------------------------------------- fields

NAMES = ("account", "partition", "cpu_partition", "qos", "reservation", "gpu", "network_interface", "ssh")
BAD_NAMES = [*HOSTILE, True, 3, ["a"], {"a": "b"}, datetime.date(2026, 1, 1)]
VALUES: dict[str, tuple[list, list]] = {  # field -> (good, bad)
    **{n: (["a", "gpu,cpu", "a.b-c_d", "user@host", "9"], BAD_NAMES) for n in NAMES},
    "constraint": (["h100&ib", "[a*2|b]", "(a|b)", "!a"], ["a b", "$(x)", "`x`", "a;b", "a'b", "", "a\n", 1]),
    "nodelist": (["node[1-3,5]", "a,b"], ["a b", "$x", "", "a;b", "a\n"]),
    "exclude": (["node[1-3,5]"], ["a b", ">f", "", "a\n"]),
    "time": (["30", "1:30", "1:30:00", "2-0", "2-12:30", "2-12:30:15"], ["", "1h", "-1", "1:2", "1:30:00:00", "UNLIMITED", "٣", 30, "1\n"]),
    "signal": (["USR1@60", "B:USR2", "TERM", "INT@65535"], ["KILL", "USR1@", "USR1@x", "usr1@60", "USR1@60 ", "STOP@1", ""]),
    "gpus_per_node": ([1, 8], [0, -1, True, "8", 8.0, None]),
    "gpu_request": (["gpus-per-node", "gres", "none"], ["gpus", "", None, True, 1, []]),
    "gpu_memory": ([1, 80], [0, True, "80"]),
    "cpus_per_task": ([1, 64], [0, False, "4"]),
    "mem": (["0", "64G", "1000", "2T"], ["64GB", "64 G", "-1", "", "64g", 64]),
    "exclusive": ([True, False], [1, 0, "true", None]),
    "retries": ([0, 9], [-1, True, "1"]),
    "container_image": (["/i.sqsh", "nvcr.io#nvidia/pytorch:24.01", *(h for h in HOSTILE if h and "\0" not in h)], ["", "a\0b", 1]),
    "container_mounts": ([[], ["/a:/b:ro", "/c d:/$(e)"]], ["/a:/b", [1], [""], ["a\0"]]),
    "container_python": (["python", "/opt/my py/python"], ["", "\0", 1]),
    "environment": ([{}, {"A": "$(x)'\"\n\\", "_b1": ""}], [{"A": "a\0b"}, {"1A": "x"}, {"A=B": "x"}, {"": "x"}, {"A\n": "x"}, {"A": 1}, "x", []]),
    "venv": (["/shared/venv", "~/venv", "/a b/$(c)"], ["venv", "./v", "", "/a\n", "/a\0", 1]),
    "modules": ([[], ["cuda/12.4", "gcc"]], [["a b"], ["$(x)"], ["a;b"], [""], ["-f"], ["a\n"], "cuda"]),
    "setup": ([[], ["source /etc/profile", "export A=$(x)"]], [["a\nb"], ["a\rb"], [""], ["a\0"], "x"]),
    "code": (["snapshot", "installed"], ["git", "", True]),
    "sbatch": ([[], ["--comment=a b $(c)", "--oversubscribe"]], [["-N4"], ["comment"], ["--comment='x"], ["--comment=a\\"], ["--comment=a\nb"], ["--a b"]]),
    "srun": ([[], ["--mpi=pmix", "--comment=$(x)"]], [["--mpi=a'b"], ["x"], ["--ntasks=3"], ["--export=NONE"], ["--x\0"]]),
    "on_finish": (["notify", "/x/y 'a b' $(touch pwned)", "a\nb"], ["", "  ", "a 'b", "a\0b", 1]),
}  # fmt: skip
CASES = [(f, v, True) for f, (good, _) in VALUES.items() for v in good]
CASES += [(f, v, False) for f, (_, bad) in VALUES.items() for v in bad]


def test_the_table_has_every_field_and_every_field_is_documented():
    assert set(VALUES) == {f.name for f in dataclasses.fields(Profile)}
    for name in VALUES:
        assert f"        {name}: " in (Profile.__doc__ or ""), name


@pytest.mark.parametrize(("name", "value", "good"), CASES, ids=[f"{f}-{i}" for i, (f, _, _) in enumerate(CASES)])
def test_every_field_takes_what_it_should_and_refuses_the_rest_by_name(name, value, good):
    venv = {"venv": "/v"} if name == "ssh" else {}
    if not good:
        with pytest.raises(UsageError, match=rf"{name}"):
            from_plain({name: value} | venv, {})
        return
    made = from_plain({name: value} | venv, {})
    held = getattr(made, name)
    assert (list(held) if isinstance(held, tuple) else held) == value
    assert from_plain(json.loads(json.dumps(made.plain())), {}) == made


@pytest.mark.parametrize("option", profiles.OWN_ELSEWHERE)
@pytest.mark.parametrize("field", ["sbatch", "srun"])
def test_options_that_a_field_or_the_launcher_sets_are_refused(field, option):
    with pytest.raises(UsageError, match=rf"{field}.*{option} is set by the launcher"):
        from_plain({field: [f"{option}=1"]}, {})
    instead = profiles.OWN_ELSEWHERE[option]
    assert not instead or instead in VALUES


def test_plain_holds_no_defaults_and_round_trips_whole():
    assert Profile().plain() == {} and from_plain({}, {}) == Profile()
    given = {f: good[-1] for f, (good, _) in VALUES.items()}
    made = from_plain(given, {})
    assert from_plain(made.plain(), {}) == made
    assert {k: v for k, v in made.plain().items() if v != given[k]} == {}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"partition": "big"}, {"partition": "big"}),
        ({"retries": "2"}, {"retries": 2}),
        ({"retries": "x"}, {"retries": "x"}),  # refused by load, with the field's name
        ({"exclusive": "TRUE"}, {"exclusive": True}),
        ({"exclusive": "1"}, {"exclusive": "1"}),
        ({"partition": "None"}, {"partition": None}),
        ({"gpu_request": "none"}, {"gpu_request": "none"}),
        ({"signal": "none"}, {"signal": "none"}),
        ({"modules": "a,b"}, {"modules": ("a", "b")}),
        ({"modules": ""}, {"modules": ()}),
        ({"environment.A": "b,c=d"}, {"environment.A": "b,c=d"}),
        ({"environment.A": "none"}, {"environment.A": "none"}),
    ],
)
def test_words_of_the_command_line_become_values(given, expected):
    assert parse(given) == expected


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("patition", "unknown field 'executor.patition'; did you mean 'executor.partition'"),
        ("zzz", "unknown field 'executor.zzz'; the fields are"),
        ("partition.x", "unknown field 'executor.partition.x'"),
        ("environment", "set executor.environment.NAME=value"),
        ("", "unknown field 'executor.'"),
    ],
)
def test_fields_of_the_command_line_that_are_none_are_refused(field, said):
    with pytest.raises(UsageError, match=said):
        parse({field: "x"})


@pytest.mark.parametrize(
    ("field", "text"), [("retries", "x"), ("exclusive", "1"), ("gpus_per_node", "none"), ("environment.A B", "x")]
)
def test_values_of_the_command_line_that_do_not_fit_are_refused_with_their_field(user, field, text):
    with pytest.raises(UsageError, match=rf"executor.{field.partition('.')[0]}"):
        load("slurm", parse({field: text}))


# sbatch(1), --time: "minutes", "minutes:seconds", "hours:minutes:seconds", "days-hours", "days-hours:minutes", "days-hours:minutes:seconds"
@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("0", 0), ("1", 60), ("30", 1800), ("90", 5400), ("1:30", 90), ("0:05", 5), ("100:00", 6000), ("1:00:00", 3600),
        ("01:02:03", 3723), ("2-0", 172800), ("2-12", 216000), ("2-12:30", 217800), ("2-12:30:15", 217815), ("1-00:00:00", 86400),
        ("00:00:00", 0), ("100-00:00:01", 8640001),
    ],
)  # fmt: skip
def test_seconds_of_every_format_that_slurm_has(limit, expected):
    assert seconds(limit) == expected
    assert from_plain({"time": limit}, {}).time == limit


def test_a_home_that_does_not_exist_is_no_defect():
    """``venv=~nobody/x`` is a path that the field takes, so what reads it must not fail with something else."""
    from launchers.slurm import interpreter

    with pytest.raises(UserError):
        interpreter(from_plain({"venv": "~no-such-user/venv"}, {}))
