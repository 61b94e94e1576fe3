"""Profiles from files: inheritance, removal, sealing, the ceiling, origins, and what broken input says."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sandbox import profiles
from sandbox.errors import ManifestError, ProfileError
from sandbox.manifest import Manifest
from sandbox.profiles import available, load_names, resolve

Write = Callable[..., Path]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project directory, with no ceiling and no user profiles of this machine."""
    directory = tmp_path / "project"
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.setattr(profiles, "SYSTEM_CEILING", tmp_path / "etc-ceiling.toml")
    monkeypatch.delenv("SANDBOX_CEILING", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return directory


@pytest.fixture
def write(project: Path) -> Write:
    def write_file(name: str, text: str) -> Path:
        path = project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_file


def fails(*args: Any, kind: type[ManifestError] = ProfileError, **options: Any) -> str:
    with pytest.raises(ManifestError) as caught:
        resolve(*args, **options)
    assert type(caught.value) is kind, caught.value
    return str(caught.value)


# --- reading


def test_units_paths_and_words_become_the_manifest(project: Path, write: Write) -> None:
    (project / "data").mkdir()
    path = write(
        "reader.toml",
        """
        description = "reads"
        [filesystem]
        read = ["./data"]
        write = [":workspace"]
        deny = ["**/.env", "secret"]
        [network]
        allow = ["API.example.org"]
        upload_max = "1MiB"
        download_max = "unlimited"
        [resources]
        cpus = 2
        memory = "512MiB"
        io = "50MiB/s"
        wall_time = "1.5min"
        [environment]
        set = { A = "1" }
        [isolation]
        best_effort = ["io"]
        """,
    )
    resolved = resolve(path)
    manifest = resolved.manifest
    assert resolved.profile == manifest.name == "reader"
    assert manifest.description == "reads"
    assert manifest.filesystem.read == (f"{project}/data",)
    assert manifest.filesystem.deny == ("**/.env", f"{project}/secret")
    assert (manifest.network.mode, manifest.network.allow) == ("allowlist", ("api.example.org:443",))
    assert (manifest.network.upload_max_bytes, manifest.network.download_max_bytes) == (1 << 20, None)
    assert (manifest.resources.cpus, manifest.resources.memory_bytes) == (2.0, 512 << 20)
    assert (manifest.resources.io_bytes_per_s, manifest.resources.wall_time_s) == (50 << 20, 90.0)
    assert manifest.environment.set == {"A": "1"}
    assert resolved.digest == manifest.digest


def test_json_and_pyproject_say_the_same_as_toml(project: Path, write: Write) -> None:
    body = {"resources": {"memory": "1GiB", "pids": 7}, "environment": {"allow": ["TZ"]}}
    toml = '[{0}resources]\nmemory = "1GiB"\npids = 7\n[{0}environment]\nallow = ["TZ"]\n'
    write("same.toml", toml.format(""))
    write("same.json", json.dumps(body))
    write("pyproject.toml", toml.format("tool.sandbox.profiles.same."))
    digests = {
        resolve(project / "same.toml").digest,
        resolve(project / "same.json").digest,
        resolve("same").digest,
        resolve({"name": "same", **body}).digest,
    }
    assert len(digests) == 1


def test_the_table_tool_sandbox_itself_is_the_profile_project(write: Write) -> None:
    path = write(
        "pyproject.toml", '[tool.sandbox.resources]\npids = 7\n[tool.sandbox.profiles.other]\nextends="project"'
    )
    assert resolve("project").manifest.resources.pids == 7
    assert resolve(path).digest == resolve("project").digest
    assert resolve("other").manifest.resources.pids == 7


def test_relative_paths_are_the_files_own_and_those_of_overrides_the_callers(project: Path, write: Write) -> None:
    for name in ("sub/data", "data"):
        (project / name).mkdir(parents=True)
    path = write("sub/p.toml", '[filesystem]\nread = ["data"]')
    assert resolve(path).manifest.filesystem.read == (f"{project}/sub/data",)
    both = resolve(path, overrides={"read": ["data"]}).manifest.filesystem.read
    assert both == (f"{project}/data", f"{project}/sub/data")
    assert resolve(path, overrides={"read": [Path("data")]}).manifest.filesystem.read == both


def test_home_and_variables_are_expanded_at_load(
    tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home/x").mkdir(parents=True)
    monkeypatch.setenv("WHERE", str(project))
    read = ["~/x", "$WHERE", "${WHERE}"]
    assert resolve({"filesystem": {"read": read}}).manifest.filesystem.read == (f"{tmp_path}/home/x", str(project))
    assert "$NOWHERE" in fails({"filesystem": {"read": ["$NOWHERE/x"]}}, kind=ManifestError)


def test_a_symlinked_grant_is_its_real_path_and_keeps_what_was_asked(project: Path) -> None:
    (project / "real").mkdir()
    (project / "link").symlink_to("real")
    resolved = resolve("python", overrides={"read": [f"{project}/link"]})
    assert resolved.manifest.filesystem.read == (f"{project}/real",)
    assert resolved.origins[f"filesystem.read[{project}/real]"].asked == f"{project}/link"
    assert resolved.links == {f"{project}/link": f"{project}/real"}


def test_a_symlink_cannot_smuggle_a_write_grant_into_a_denied_tree(project: Path) -> None:
    (project / "secret/in").mkdir(parents=True)
    (project / "innocent").symlink_to("secret/in")
    overrides = {"write": ["innocent"], "deny": ["secret"]}
    assert "inside the denied tree" in fails("minimal", overrides=overrides, kind=ManifestError)
    assert resolve("minimal", overrides={"write": ["innocent"]}).manifest.filesystem.write == (f"{project}/secret/in",)


def test_a_denied_link_denies_the_link_and_what_it_leads_to(project: Path) -> None:
    (project / "real").mkdir()
    (project / "link").symlink_to("real")
    denied = resolve("minimal", overrides={"deny": ["link", "link/**/*.pem"]}).manifest.filesystem.deny
    assert set(denied) == {f"{project}/{name}{tail}" for name in ("real", "link") for tail in ("", "/**/*.pem")}


def test_a_missing_path_is_an_error_unless_it_is_marked_optional(project: Path) -> None:
    message = fails("python", overrides={"read": ["nothere"]}, kind=ManifestError)
    assert f"{project}/nothere" in message
    assert "asked as 'nothere'" in message
    assert '"?nothere"' in message
    resolved = resolve("python", overrides={"read": ["?nothere", "?."]})
    assert resolved.manifest.filesystem.read == (str(project),)
    assert any("nothere" in note for note in resolved.notes)


def test_a_missing_workspace_is_an_error(project: Path) -> None:
    (project / "file").write_text("")
    for workspace in ("nothere", "file"):
        assert "is not a directory" in fails("python", overrides={"workspace": workspace}, kind=ManifestError)


def test_a_workspace_is_writable_exactly_where_the_profile_or_the_mode_says_so(project: Path) -> None:
    workspace = {"workspace": project}
    granted = resolve("python", overrides=workspace).manifest
    assert (granted.filesystem.workspace, granted.filesystem.workspace_mode) == (str(project), "rw")
    assert resolve("minimal", overrides=workspace).manifest.filesystem.workspace_mode == "ro"
    cow = resolve("minimal", overrides={**workspace, "workspace_mode": "cow"}).manifest
    assert (cow.filesystem.workspace_mode, cow.workspace_writable) == ("cow", True)
    readonly = resolve("python", overrides={**workspace, "workspace_mode": "ro"}).manifest
    assert not readonly.workspace_writable


def test_a_program_is_found_by_name_in_the_jails_path_only(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = project / "mytool"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(project))
    assert resolve({"process": {"allow_exec": ["sh"]}}).manifest.process.allow_exec == (os.path.realpath("/bin/sh"),)
    assert "no program 'mytool'" in fails({"process": {"allow_exec": ["mytool"]}}, kind=ManifestError)
    assert resolve({"process": {"allow_exec": ["./mytool"]}}).manifest.process.allow_exec == (str(tool),)
    assert resolve({}).manifest.process.allow_exec is None


# --- extends and remove


def test_parents_compose_left_to_right_and_the_child_wins(write: Write) -> None:
    write("a.toml", '[resources]\npids = 1\nopen_files = 100\n[environment]\nallow = ["A", "X"]\nset = { S = "a" }')
    write(
        "b.toml", '[resources]\npids = 2\ninodes = 200\n[environment]\nallow = ["B", "X"]\nset = { S = "b", T = "b" }'
    )
    path = write(
        "c.toml",
        'extends = ["./a.toml", "./b.toml"]\n'
        '[resources]\ninodes = 300\n[environment]\nallow = ["C"]\nset = { T = "c" }',
    )
    manifest = resolve(path).manifest
    limits = manifest.resources
    assert (limits.pids, limits.open_files, limits.inodes) == (2, 100, 300)
    assert manifest.environment.allow == ("A", "B", "C", "X")
    assert manifest.environment.set == {"S": "b", "T": "c"}


def test_one_ancestor_may_be_reached_twice(write: Write) -> None:
    write("base.toml", "[resources]\npids = 5")
    for name in ("left", "right"):
        write(f"{name}.toml", 'extends = "./base.toml"')
    path = write("child.toml", 'extends = ["./left.toml", "./right.toml"]')
    assert resolve(path).manifest.resources.pids == 5


def test_description_is_not_inherited(write: Write) -> None:
    path = write("mine.toml", 'extends = "python"')
    assert resolve(path).manifest.description == ""
    assert resolve("python", overrides={"pids": 5}).manifest.description == resolve("python").manifest.description


def test_remove_takes_inherited_entries_away(write: Write) -> None:
    write("base.toml", '[environment]\nallow = ["A", "B"]\nset = { S = "1", T = "2" }\n[audit]\ncapture = ["args"]')
    path = write(
        "child.toml",
        'extends = "./base.toml"\n[remove.environment]\nallow = ["A"]\nset = ["S"]\n[remove.audit]\ncapture = true\n'
        '[environment]\nallow = ["C"]',
    )
    manifest = resolve(path).manifest
    assert manifest.environment.allow == ("B", "C")
    assert manifest.environment.set == {"T": "2"}
    assert manifest.audit.capture == ()
    flat = resolve(path, overrides={"remove": {"env_allow": ["B"]}}).manifest
    assert flat.environment.allow == ("C",)


@pytest.mark.parametrize(
    ("remove", "says"),
    [
        ('[remove.environment]\nallow = ["NOPE"]', "'NOPE' is not inherited"),
        ('[remove.environment]\nset = ["NOPE"]', "'NOPE' is not inherited"),
        ('[remove.filesystem]\ndeny = ["**/.env"]', "deny always wins"),
        ("[remove.resources]\npids = true", "is not a list"),
        ("[remove.environment]\nallow = false", "neither a list nor true"),
        ("[remove.environment]\nalow = true", "did you mean 'allow'?"),
        ("[remove]\nenvironment = 1", "not a table"),
    ],
)
def test_remove_refuses_what_it_cannot_do(write: Write, remove: str, says: str) -> None:
    assert says in fails(write("p.toml", f'extends = "web-reader"\n{remove}'))


def test_deny_wins_wherever_it_stands(project: Path, write: Write) -> None:
    (project / "data/secret").mkdir(parents=True)
    write("base.toml", '[filesystem]\ndeny = ["data/secret"]')
    path = write("child.toml", 'extends = "./base.toml"\n[filesystem]\nread = ["data/secret"]')
    resolved = resolve(path)
    assert resolved.manifest.filesystem.read == ()
    assert any("denied by" in note for note in resolved.notes)
    message = fails(path, overrides={"write": ["data/secret/x"]}, kind=ManifestError)
    assert "inside the denied tree" in message
    assert f"{project}/base.toml:2" in message


# --- sealed


@pytest.fixture
def sealed(project: Path, write: Write) -> Path:
    for name in ("data/sub", "out/sub", "elsewhere"):
        (project / name).mkdir(parents=True)
    return write(
        "sealed.toml",
        """
sealed = true
[filesystem]
read = ["data"]
write = ["out"]
deny = ["data/secret"]
[network]
allow = ["*.example.org:443"]
[resources]
memory = "1GiB"
io = "100MiB/s"
[gpu]
count = 2
[environment]
allow = ["TZ", "LANG"]
set = { S = "1" }
[process]
allow_exec = ["/usr/bin"]
[isolation]
best_effort = ["memory", "io"]
required = ["landlock"]
""",
    )


NARROWER: list[dict[str, Any]] = [
    {"memory": "1024MiB"},
    {"memory": "512MiB", "io": "1MiB/s", "pids": 3, "cpu_time": "1s"},
    {"read": ["data/sub", "out/sub"], "write": ["out/sub"]},
    {"workspace": "out", "workspace_mode": "rw"},
    {"workspace": "data", "workspace_mode": "ro"},
    {"workspace": "data", "workspace_mode": "cow"},
    {"write": [":workspace"]},
    {"allow_hosts": ["a.example.org:443"], "deny_hosts": ["b.example.org"]},
    {"network": "none"},
    {"env_set": {"S": "1"}},
    {"deny": ["out/keys"], "required": ["memory"]},
    {"remove": {"read": ["data"], "best_effort": ["io"], "env_set": ["S"]}},
    {"gpu.count": 1},
    {"gpu": {"count": 0, "devices": ["0", "1"]}},
    {"allow_exec": ["sh"]},
    {"warm": False, "durability": "fsync", "minimum": "microvm"},
]
WIDER: list[tuple[dict[str, Any], str]] = [
    ({"memory": "1025MiB"}, "1025MiB goes beyond 1GiB"),
    ({"io": "unlimited"}, "goes beyond 100MiB/s"),
    ({"pids": 65}, "65 goes beyond 64 (default)"),
    ({"read": ["elsewhere"]}, "elsewhere' goes beyond"),
    ({"write": ["data/sub"]}, "data/sub' goes beyond"),
    ({"workspace": "elsewhere"}, "elsewhere"),
    ({"workspace": "data", "workspace_mode": "rw"}, "data"),
    ({"allow_hosts": ["a.example.org:*"]}, "'a.example.org:*' goes beyond '*.example.org:443'"),
    ({"allow_hosts": ["a.b.example.org"]}, "a.b.example.org"),
    ({"env_allow": ["HOME"]}, "'HOME' goes beyond 'TZ', 'LANG'"),
    ({"env_set": {"S": "2"}}, "'2' goes beyond '1'"),
    ({"env_set": {"NEW": "2"}}, "goes beyond not set"),
    ({"best_effort": ["cpus"]}, "'cpus' goes beyond"),
    ({"remove": {"required": ["landlock"]}}, "leaving out 'landlock' goes beyond"),
    ({"remove": {"allow_exec": True}}, "every program goes beyond"),
    ({"gpu.count": 3}, "3 goes beyond 2"),
    ({"gpu": {"count": 0, "devices": ["0", "1", "2"]}}, "'0' goes beyond"),
    ({"capture": ["args"]}, "'args' goes beyond nothing"),
    ({"launcher": "docker"}, "docker goes beyond 'auto'"),
    ({"allow_protected": [".git/hooks"]}, "'.git/hooks' goes beyond nothing"),
]  # fmt: skip


@pytest.mark.parametrize("overrides", NARROWER, ids=lambda o: "-".join(o))
def test_a_sealed_profile_may_be_narrowed(sealed: Path, overrides: dict[str, Any]) -> None:
    assert resolve(sealed, overrides=overrides)


@pytest.mark.parametrize(("overrides", "says"), WIDER, ids=lambda o: "-".join(o) if isinstance(o, dict) else "")
def test_a_sealed_profile_cannot_be_widened(sealed: Path, overrides: dict[str, Any], says: str) -> None:
    message = fails(sealed, overrides=overrides)
    assert says in message
    assert "overrides" in message
    assert f"that profile is sealed ({sealed}:2 sealed)" in message


def test_a_child_cannot_widen_its_sealed_parent_and_the_error_names_both_places(project: Path, sealed: Path) -> None:
    child = project / "child.toml"
    child.write_text('extends = "./sealed.toml"\n\n[resources]\nmemory = "2GiB"\n')
    message = fails(child)
    assert message.startswith(f"{child}:4 resources.memory: 2GiB goes beyond 1GiB ({sealed}:10 resources.memory)")
    child.write_text('extends = "./sealed.toml"\n\n[resources]\nmemory = "1GiB"\n')
    assert resolve(child).manifest.resources.memory_bytes == 1 << 30


def test_a_sealed_grandparent_binds_and_so_does_one_beside_another_parent(write: Write, sealed: Path) -> None:
    write("middle.toml", 'extends = "./sealed.toml"')
    assert "sealed" in fails(write("c1.toml", 'extends = "./middle.toml"\n[resources]\npids = 1000'))
    assert "sealed" in fails(write("c2.toml", 'extends = ["./sealed.toml", "build"]'))


def test_an_earlier_result_remembers_the_seal(sealed: Path) -> None:
    first = resolve(sealed, overrides={"memory": "512MiB"})
    assert "sealed" in fails(first, overrides={"memory": "2GiB"})
    assert resolve(first, overrides={"memory": "256MiB"}).manifest.resources.memory_bytes == 256 << 20


# --- ceiling


def test_a_ceiling_lowers_and_takes_away_and_says_so(project: Path, write: Write) -> None:
    for name in ("data/sub", "other"):
        (project / name).mkdir(parents=True)
    ceiling = write(
        "ceiling.toml",
        '[filesystem]\nread = ["data/sub", "other"]\nwrite = []\ndeny = ["**/.ssh"]\n[resources]\nmemory = "256MiB"\n'
        'io = "10MiB/s"\n[environment]\nallow = ["TZ"]\n[isolation]\nbest_effort = []\nrequired = ["pids"]\n',
    )
    asked = {"read": ["data"], "write": ["other"], "io": "unlimited"}
    resolved = resolve("python", overrides=asked, ceiling=ceiling)
    fs, isolation = resolved.manifest.filesystem, resolved.manifest.isolation
    assert fs.read == (f"{project}/data/sub", f"{project}/other")
    assert fs.write == (":workspace",)
    assert fs.deny == ("**/.ssh",)
    assert resolved.manifest.resources.memory_bytes == 256 << 20
    assert resolved.manifest.resources.io_bytes_per_s == 10 << 20
    assert resolved.manifest.resources.pids == 128
    assert resolved.manifest.environment.allow == ("TZ",)
    assert (isolation.best_effort, isolation.required) == ((), ("pids",))
    assert f"resources.memory: 1GiB lowered to 256MiB by the ceiling ({ceiling}:6 resources.memory)" in resolved.notes
    assert resolved.origins["resources.memory"].line == 6


def test_what_a_ceiling_lets_write_it_also_lets_read(project: Path, write: Write) -> None:
    (project / "out/sub").mkdir(parents=True)
    ceiling = write("ceiling.toml", '[filesystem]\nread = []\nwrite = ["out"]')
    assert resolve("python", overrides={"read": ["out/sub"]}, ceiling=ceiling).manifest.filesystem.read == (
        f"{project}/out/sub",
    )


def test_ceilings_are_found_by_themselves_and_the_systems_cannot_be_argued_away(
    project: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = write("etc.toml", "[resources]\npids = 20")
    variable = write("env.toml", "[resources]\npids = 10")
    given = write("given.toml", "[resources]\npids = 15")
    assert resolve("python").manifest.resources.pids == 128
    monkeypatch.setenv("SANDBOX_CEILING", str(variable))
    assert resolve("python").manifest.resources.pids == 10
    assert resolve("python", ceiling=given).manifest.resources.pids == 15
    monkeypatch.setattr(profiles, "SYSTEM_CEILING", system)
    assert resolve("python", ceiling=write("wide.toml", "[resources]\npids = 1000")).manifest.resources.pids == 20
    monkeypatch.setenv("SANDBOX_CEILING", str(project / "nothere.toml"))
    assert "nothere.toml: cannot be read" in fails("python")


def test_a_ceiling_that_cannot_be_looked_at_is_not_skipped(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setattr(profiles, "SYSTEM_CEILING", tmp_path / "loop/ceiling.toml")
    assert "cannot be looked at" in fails("minimal")
    monkeypatch.setattr(profiles, "SYSTEM_CEILING", tmp_path / "nothere/ceiling.toml")
    assert resolve("minimal")


@pytest.mark.parametrize(
    ("ceiling", "says"),
    [
        ('extends = "python"', "no place in a ceiling"),
        ("sealed = true", "no place in a ceiling"),
        ('[environment]\nset = { A = "1" }', "no place in a ceiling"),
        ('[filesystem]\nworkspace = "/srv"', "no place in a ceiling"),
        ("[resources]\npids = 0", "0 is too small"),
        ("[resourcs]", "did you mean 'resources'?"),
    ],
)
def test_a_broken_ceiling_stops_everything(write: Write, ceiling: str, says: str) -> None:
    path = write("ceiling.toml", ceiling)
    message = fails("minimal", ceiling=path)
    assert says in message
    assert str(path) in message


def test_a_workspace_outside_the_ceiling_is_refused_and_its_twin_inside_is_not(project: Path, write: Write) -> None:
    for name in ("in/side", "out"):
        (project / name).mkdir(parents=True)
    ceiling = write("ceiling.toml", '[filesystem]\nwrite = [":workspace", "in"]')
    assert "outside the ceiling's filesystem.write" in fails("python", overrides={"workspace": "out"}, ceiling=ceiling)
    assert resolve("python", overrides={"workspace": "in/side"}, ceiling=ceiling).manifest.workspace_writable
    assert resolve("python", overrides={"workspace": "out", "workspace_mode": "cow"}, ceiling=ceiling)


def test_a_ceiling_of_no_network_leaves_no_host(write: Write) -> None:
    ceiling = write("ceiling.toml", '[network]\nmode = "none"')
    network = resolve("web-reader", overrides={"allow_hosts": ["a.example"]}, ceiling=ceiling).manifest.network
    assert (network.mode, network.allow) == ("none", ())


def test_a_ceiling_keeps_the_hosts_that_both_name(write: Write) -> None:
    ceiling = write("ceiling.toml", '[network]\nallow = ["*.example.org:443", "b.example.com:*"]')
    asked = ["a.example.org:*", "**.example.org:443", "b.example.com:80", "c.example.net"]
    network = resolve("web-reader", overrides={"allow_hosts": asked}, ceiling=ceiling).manifest.network
    assert network.allow == ("*.example.org:443", "a.example.org:443", "b.example.com:80")


# --- what is wrong, and where


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ('[resources]\n\nmemroy = "1GiB"', 3, "resources.memroy: unknown key\n  hint: did you mean 'memory'?"),
        ("[resources]\nmemory_bytes = 5", 2, "write 'memory' with a unit"),
        ("[resources]\nread = []", 2, "did you mean 'filesystem.read'?"),
        ("[resource]\npids = 1", 1, "did you mean 'resources'?"),
        ('memory = "1GiB"', 1, "did you mean 'resources.memory'?"),
        ("[resources]\nmemory = 512", 2, '512 has no unit; write it like "512MiB"'),
        ('[resources]\nmemory = "512M"', 2, "unknown unit 'M'"),
        ('[resources]\nmemory = "0B"', 2, "'0B' is too small; allowed: 1MiB or more"),
        ('[resources]\nwall_time = "-1s"', 2, "'-1s' is too small; allowed: 0.001s or more"),
        ('[resources]\nwall_time = "31d"', 2, "'31d' is too large"),
        ('[resources]\nmemory = "99999999TiB"', 2, "allowed: 16TiB or less"),
        ("[resources]\ncpus = nan", 2, "nan is not a finite number"),
        ("[resources]\npids = 1.5", 2, "1.5 is not a whole number"),
        ("[resources]\npids = true", 2, "True is not a whole number"),
        ("[process]\nwarm = 1", 2, "1 is not true or false"),
        ('[filesystem]\nread = "/etc"', 2, "is not a list\n  hint: write ['/etc']"),
        ('[filesystem]\nread = [\n  "/etc",\n  "/etc/nothere",\n]', 4, "'/etc/nothere' is not there"),
        ('[filesystem]\nread = [\n  "/etc",\n  "/e*",\n]', 4, "wildcard"),
        ("[filesystem]\nread = [1]", 2, "the entry 1 is not a string"),
        ('[filesystem]\nread = ["a\\u0000b"]', 2, "control character"),
        ('[filesystem]\nread = ["~nobody-of-this-name/x"]', 2, "home directory"),
        ('[filesystem]\nwrite = ["/etc/x"]\ndeny = ["/etc"]', 2, "inside the denied tree '/etc'"),
        ('[filesystem]\nread = ["/proc/1"]', 2, "the jail's own"),
        ('[isolation]\nbest_effort = ["mem"]', 2, "'mem' is not allowed; allowed: 'filesystem'"),
        ('[filesystem]\nallow_protected = ["hooks"]', 2, "'hooks' is no rule and no path; rules are git-redirect"),
        ('[isolation]\nbest_effort = ["io"]\nrequired = ["io"]', 2, "at once"),
        ('[network]\nmode = "none"\nallow = ["a.example"]', 3, "network.mode is 'none'"),
        ('[network]\nallow = ["*.com"]', 2, "too wide"),
        ('[gpu]\ncount = 1\ndevices = ["0"]', 2, "say one"),
        ("[environment.set]\nN = 4", 2, '4 is not a string\n  hint: write "4"'),
        ('[environment]\nset = { "A B" = "x" }', 2, "not a variable name"),
        ("environment = 3", 1, "3 is not a table"),
        ("sealed = 1", 1, "not true or false"),
        ("extends = 1", 1, "neither a profile's name nor a list"),
        ('extends = "pyhton"', 1, "there is no profile 'pyhton'\n  hint: did you mean 'python'?"),
        ('extends = ["minimal",\n "./gone.toml"]', 2, "is missing"),
        ('name = "a b"', 1, "not a name"),
        ("description = 3", 1, "not a string"),
        ("[resources]\npids = ", 2, "is not TOML"),
        ("[resources]\npids = 1\npids = 2", 3, "is not TOML"),
    ],
)
def test_a_wrong_file_is_one_error_with_file_line_and_key(write: Write, text: str, line: int, says: str) -> None:
    path = write("p.toml", text)
    message = fails(path)
    assert message.startswith((f"{path}:{line} ", f"{path}:{line}: "))
    assert says in message


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ('{"resources": {\n "pids": 0}}', 2, "0 is too small"),
        ('{"resources": {"pids": 1,}}', 1, "is not JSON"),
        ('{"filesystem": {"read": [\n"/etc",\n"/nothere"]}}', 3, "is not there"),
        ('{"resources": {"cpus": NaN}}', 1, "not a finite number"),
    ],
)
def test_a_wrong_json_file_has_its_line_too(write: Write, text: str, line: int, says: str) -> None:
    path = write("p.json", text)
    message = fails(path)
    assert message.startswith((f"{path}:{line} ", f"{path}:{line}: "))
    assert says in message


def test_a_json_key_that_is_there_twice_is_refused(write: Write) -> None:
    assert "'pids' is there twice" in fails(write("p.json", '{"resources": {"pids": 1, "pids": 2}}'))


def test_cycles_and_endless_chains_are_refused(write: Write) -> None:
    write("a.toml", 'extends = "./b.toml"')
    path = write("b.toml", 'extends = "./a.toml"')
    assert "extends itself: " in fails(path)
    write("self.toml", 'extends = "./self.toml"')
    assert "extends itself" in fails(path.parent / "self.toml")
    write("c0.toml", "")
    for i in range(1, 12):
        write(f"c{i}.toml", f'extends = "./c{i - 1}.toml"')
    assert "more than 10 profiles" in fails(path.parent / "c11.toml")
    assert resolve(path.parent / "c9.toml")


def test_what_is_no_regular_readable_file_is_refused(project: Path, write: Write) -> None:
    assert "cannot be read: No such file" in fails(project / "nothere.toml")
    (project / "dir.toml").mkdir()
    assert "not a regular file" in fails(project / "dir.toml")
    os.mkfifo(project / "fifo.toml")
    assert "not a regular file" in fails(project / "fifo.toml")
    write("big.toml", "#" * (1 << 20) + "\n")
    assert "is larger than" in fails(project / "big.toml")
    (project / "latin.toml").write_bytes(b'# fine\ndescription = "\xe9"')
    assert f"{project}/latin.toml:2: is not UTF-8" in fails(project / "latin.toml")
    assert "is not a table" in fails(write("list.json", "[1]"))
    assert "nested too deeply" in fails(write("deep.json", "[" * 100000))
    assert "no table [tool.sandbox]" in fails(write("pyproject.toml", "[project]\nname='x'"))


def test_a_name_that_is_there_twice_is_refused(project: Path, write: Write) -> None:
    """An agent that writes `.sandbox/profiles/python.toml` into its workspace must not become the python profile."""
    planted = write(".sandbox/profiles/python.toml", "[resources]\nmemory = '64GiB'")
    message = fails("python")
    assert "is there twice" in message
    assert str(planted) in message
    assert resolve(planted).manifest.resources.memory_bytes == 64 << 30


def test_profiles_are_found_in_project_and_user_directories(project: Path, tmp_path: Path, write: Write) -> None:
    write(".sandbox/profiles/mine.toml", "[resources]\npids = 3")
    user = tmp_path / "config/sandbox/profiles"
    user.mkdir(parents=True)
    (user / "ours.json").write_text('{"extends": "mine"}')
    assert resolve("ours").manifest.resources.pids == 3
    assert {"mine", "ours", "python"} <= set(load_names())
    assert resolve("mine", cwd=project).profile == "mine"


def test_a_broken_profile_is_listed_with_its_error(write: Write) -> None:
    write(".sandbox/profiles/broken.toml", "[nope]")
    infos = {info.name: info for info in available()}
    assert "unknown key" in infos["broken"].error
    assert infos["python"].error == ""


# --- overrides and origins


def test_overrides_may_be_flat_dotted_or_nested_and_none_is_not_given() -> None:
    same = [{"memory": "2GiB"}, {"resources.memory": "2GiB"}, {"resources": {"memory": "2GiB"}, "pids": None}]
    assert len({resolve("python", overrides=o).digest for o in same}) == 1


def test_unknown_or_doubled_overrides_are_refused() -> None:
    assert "unknown override 'memroy'\n  hint: did you mean 'memory'?" in fails(
        "python", overrides={"memroy": "1GiB"}, kind=ManifestError
    )
    doubled = {"memory": "1GiB", "resources.memory": "2GiB"}
    assert "given twice" in fails("python", overrides=doubled, kind=ManifestError)


def test_naming_a_host_asks_for_the_allowlist() -> None:
    assert resolve("python").manifest.network.mode == "none"
    assert resolve("python", overrides={"allow_hosts": ["a.example"]}).manifest.network.mode == "allowlist"


def test_requiring_a_control_ends_its_best_effort() -> None:
    isolation = resolve("python", overrides={"required": ["memory"]}).manifest.isolation
    assert (isolation.best_effort, isolation.required) == (("cpus", "io"), ("memory",))


def test_every_value_knows_where_it_was_written(project: Path, write: Write) -> None:
    path = write(
        "p.toml", '# comment\nextends = "python"\n\n[environment]\nallow = [\n  "TZ",  # zone\n  "EXTRA",\n]\n'
    )
    resolved = resolve(path, overrides={"pids": 5})
    origins = resolved.origins
    assert (origins["environment.allow[EXTRA]"].file, origins["environment.allow[EXTRA]"].line) == (str(path), 7)
    assert origins["environment.allow[TZ]"].file.endswith("python.toml")
    assert str(origins["resources.pids"]) == "overrides resources.pids"
    assert origins["resources.inodes"].file == "default"
    assert resolved.describe("resources.memory_bytes").startswith("resources.memory = 1GiB (")
    assert resolved.describe("resources.pids") == "resources.pids = 5 (overrides resources.pids)"
    assert [Path(file).name for file, _ in resolved.sources] == ["python.toml", "p.toml"]
    assert all(digest.startswith("sha256:") for _, digest in resolved.sources)


def test_line_numbers_survive_strings_that_look_like_keys(write: Write) -> None:
    path = write("p.toml", 'description = """\n[resources]\npids = 3\n"""\n[resources]\n"pids" = 0 # x\n')
    assert fails(path).startswith(f"{path}:6 resources.pids")


def test_a_resolved_manifest_resolves_to_itself(project: Path) -> None:
    first = resolve("web-reader", overrides={"allow_hosts": ["a.example"], "read": ["."]})
    assert resolve(first) == first
    assert resolve(first.manifest).manifest == first.manifest
    assert resolve(first.manifest).digest == first.digest
    assert resolve(Manifest()).manifest == Manifest()


def test_a_current_directory_that_is_gone_is_one_clear_error(project: Path) -> None:
    gone = project / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    assert "current directory is not there" in fails("python")
    assert resolve("python", cwd=project)


@pytest.mark.parametrize("filler", ["a{0} = 1\n", "a{0} = 'x'\n", "a{0} = [\n1,\n]\n", "[t{0}]\n", "# {0}\n"])
def test_a_large_file_is_refused_as_quickly_as_a_small_one(write: Write, filler: str) -> None:
    path = write("large.toml", "".join(filler.format(i) for i in range(40_000)) + "[nope]\n")
    start = time.process_time()
    assert "unknown key" in fails(path)
    assert time.process_time() - start < 5
