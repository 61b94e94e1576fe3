"""Getting at files that the manifest does not name: by path, by link, by /proc, by mount, by device, by handle."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sandbox import ManifestError, Sandbox
from sandbox._linux import files
from sandbox.planner import DEVICE_NODES
from tests.escape.conftest import Secret
from tests.helpers.escape import BOUNDS, Errno, Jail
from tests.helpers.workspaces import held

pytestmark = [pytest.mark.needs("jail")]

GONE = Errno("ENOENT")
READ_ONLY = Errno("EROFS")


def test_an_absolute_path_outside_the_view_does_not_exist(jail: Jail, secret: Secret) -> None:
    assert jail.one("read", str(secret.path)) == GONE
    assert jail.one("read", str(secret.path), read=[str(secret.directory)]) == secret.text


def test_dots_do_not_climb_out_of_the_root(jail: Jail, secret: Secret) -> None:
    climbing = f"/usr/../../../../..{secret.path}"
    assert jail.one("read", climbing) == GONE
    assert jail.one("read", climbing, read=[str(secret.directory)]) == secret.text


@pytest.mark.parametrize(
    "way", ["/proc/self/root", "/proc/self/cwd/../..", "/proc/thread-self/root", "/dev/fd/../root"]
)
def test_no_link_of_proc_leads_to_the_hosts_root(jail: Jail, secret: Secret, way: str) -> None:
    assert jail.one("read", f"{way}{secret.path}") == GONE
    assert jail.one("read", f"{way}{secret.path}", read=[str(secret.directory)]) == secret.text


def test_no_other_process_shows_its_root(jail: Jail, secret: Secret) -> None:
    others = [["read", f"/proc/{pid}/root{secret.path}"] for pid in (1, os.getpid(), os.getppid())]
    assert jail.act(*others) == [GONE] * len(others)
    assert jail.one("readlink", "/proc/self/root") == "/"


def test_a_link_made_inside_leads_nowhere(jail: Jail, secret: Secret) -> None:
    actions: list[list[str]] = [["symlink", str(secret.path), "link"], ["read", "link"]]
    assert jail.act(*actions) == [True, GONE]
    assert jail.act(*actions, read=[str(secret.directory)]) == [True, secret.text]


def test_a_link_in_a_granted_directory_does_not_lead_out_of_the_grant(
    jail: Jail, secret: Secret, tmp_path: Path
) -> None:
    granted = tmp_path / "granted"
    granted.mkdir()
    (granted / "inner").write_text("inner")
    (granted / "out").symlink_to(secret.path)
    (granted / "up").symlink_to("../host/secret")
    (granted / "in").symlink_to("inner")
    found = jail.act(*(["read", f"{granted}/{name}"] for name in ("out", "up", "in")), read=[str(granted)])
    assert found == [GONE, GONE, "inner"]


def test_a_directory_above_a_grant_shows_only_the_grant(jail: Jail, secret: Secret, tmp_path: Path) -> None:
    granted = tmp_path / "granted"
    granted.mkdir()
    assert jail.one("listdir", str(tmp_path), read=[str(granted)]) == ["granted"]
    assert jail.one("listdir", str(tmp_path), read=[str(tmp_path)]) == ["granted", "host"]


@pytest.mark.parametrize(
    "path", ["/etc/shadow", "/root/.ssh", "/boot", "/var/log", "/sys/kernel", "/run/systemd", "/mnt"]
)
def test_places_of_the_host_do_not_exist(jail: Jail, path: str) -> None:
    assert jail.act(["exists", path], ["exists", "/usr/bin"]) == [False, True]


def test_accounts_of_the_host_are_not_listed(jail: Jail) -> None:
    accounts = jail.one("read", "/etc/passwd").splitlines()
    assert [line.split(":")[0] for line in accounts] == ["root", "user", "nobody"]


def test_a_grant_that_was_replaced_by_a_link_is_refused(jail: Jail, secret: Secret, tmp_path: Path) -> None:
    """Between the resolution of a profile and the launch somebody turns the granted path into a link."""
    granted = tmp_path / "granted"
    granted.mkdir()
    (granted / "secret").write_text("harmless")
    probe = ["cat", f"{granted}/secret"]
    with Sandbox("shell", state=jail.box.state, read=[str(granted)]) as box:
        assert box.run(probe).stdout == b"harmless"
        granted.rename(tmp_path / "moved")
        granted.symlink_to(secret.directory)
        outcome = box.run(probe)
    assert (outcome.ending.kind, outcome.ending.fault) == ("launch_error", "host")
    assert os.strerror(errno.ELOOP) in outcome.ending.message
    assert secret.text.encode() not in outcome.stdout
    assert outcome.record.ending.kind == "launch_error"


@contextmanager
def swapping(one: Path, other: Path) -> Iterator[None]:
    """Two names that trade places without end, each time in one step (renameat2 with RENAME_EXCHANGE)."""
    stop = threading.Event()

    def swap() -> None:
        fd = os.open(one.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            while not stop.is_set():
                files.rename_exchange(fd, one.name, fd, other.name)
        finally:
            os.close(fd)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("where", ["grant", "nested", "workspace"])
def test_a_grant_that_is_swapped_for_a_link_all_the_time_never_leads_out(
    jail: Jail, secret: Secret, tmp_path: Path, where: str
) -> None:
    """Whoever may write the directory above the grant races every step between resolving and mounting."""
    top = tmp_path / "top"
    granted = top / "granted"
    granted.mkdir(parents=True)
    (granted / "secret").write_text("harmless")
    (top / "link").symlink_to(secret.directory)
    overrides: dict[str, Any] = {"read": [str(granted)]}
    if where == "nested":
        overrides["write"] = [str(top)]
    if where == "workspace":
        overrides = {"workspace": str(granted), "workspace_mode": "rw"}
    seen = set()
    with Sandbox("shell", state=jail.box.state, **BOUNDS, **overrides) as box, swapping(granted, top / "link"):
        for _ in range(25):
            try:
                outcome = box.run(["cat", f"{granted}/secret"])
            except ManifestError:
                continue
            assert secret.text.encode() not in outcome.stdout
            seen.add(outcome.ending.kind)
    assert seen <= {"ok", "launch_error", "tool_error"}
    assert held(secret.directory) == {"secret": secret.text}


@pytest.mark.parametrize(
    "action",
    [
        ("write", "{file}", "x"),
        ("create", "{directory}/new"),
        ("mkdir", "{directory}/new"),
        ("unlink", "{file}"),
        ("rename", "{file}", "{directory}/other"),
        ("symlink", "x", "{directory}/new"),
        ("link", "{file}", "{directory}/new"),
        ("chmod", "{file}", 0o600),
        ("chown", "{file}", -1, -1),
        ("setxattr", "{file}", "user.x", "x"),
        ("truncate", "{file}", 0),
        ("utime", "{file}"),
        ("map_writable", "{file}"),
        ("write", "/proc/self/root{file}", "x"),
    ],
    ids=lambda action: f"{action[0]}-{action[1].count('{')}{'-proc' if '/proc' in action[1] else ''}",
)
def test_a_grant_to_read_is_read_only(jail: Jail, tmp_path: Path, action: tuple[object, ...]) -> None:
    directory = tmp_path / "granted"
    directory.mkdir()
    file = directory / "file"
    file.write_text("kept")
    file.chmod(0o666)
    directory.chmod(0o777)
    words = [word.format(file=file, directory=directory) if isinstance(word, str) else word for word in action]
    assert jail.one(*words, read=[str(directory)]) == READ_ONLY
    assert (file.read_text(), os.listdir(directory)) == ("kept", ["file"])
    assert not isinstance(jail.one(*words, write=[str(directory)]), Errno)


@pytest.mark.parametrize("path", ["/usr/bin/planted", "/etc/planted", "/planted", "/usr/lib/planted", "/run/sandbox/x"])
def test_the_system_view_is_read_only(jail: Jail, path: str) -> None:
    refused = {"EROFS", "EACCES"}
    found = jail.act(["create", path], ["create", "/tmp/planted"])
    assert (str(found[0]) in refused, found[1]) == (True, 1), found


def test_system_programs_cannot_be_replaced(jail: Jail) -> None:
    found = jail.act(
        ["rename", "/usr/bin/env", "/usr/bin/x"], ["unlink", "/usr/bin/env"], ["run", ["/usr/bin/env", "true"]]
    )
    assert found == [READ_ONLY, READ_ONLY, [0, ""]]


def test_dev_holds_harmless_nodes_alone(jail: Jail) -> None:
    links = {"fd", "stdin", "stdout", "stderr", "ptmx"}
    assert set(jail.one("listdir", "/dev")) == {*DEVICE_NODES, *links, "mqueue", "pts", "shm"}


@pytest.mark.parametrize(
    ("kind", "major", "minor"),
    [
        ("char", 1, 1),
        ("char", 1, 11),
        ("char", 10, 229),
        ("block", 254, 0),
        ("block", 7, 0),
        ("char", 0, 0),
        ("char", 1, 3),
    ],
)
def test_device_nodes_cannot_be_made(jail: Jail, kind: str, major: int, minor: int) -> None:
    found = jail.act(["make_node", "/tmp/node", kind, major, minor], ["make_node", "/tmp/fifo", "fifo", 0, 0])
    assert found == [Errno("EPERM"), True]


@pytest.mark.needs("root")
def test_a_device_node_in_a_granted_directory_is_covered(jail: Jail, tmp_path: Path) -> None:
    node = tmp_path / "zero"
    os.mknod(node, 0o20666, os.makedev(1, 5))
    node.chmod(0o666)
    (tmp_path / "plain").write_text("plain")
    for access in ("read", "write"):
        found = jail.act(["read", str(node), 4], ["read", f"{tmp_path}/plain"], **{access: [str(tmp_path)]})
        assert found == [Errno("EACCES"), "plain"]


def test_a_hosts_socket_in_a_granted_directory_is_covered(jail: Jail, short_path: Path) -> None:
    """Path sockets belong to no network namespace and are reached through read-only mounts too (unix(7))."""
    path = short_path / "sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        path.chmod(0o777)
        server.listen()
        server.setblocking(False)
        for access in ("read", "write"):
            grant = {access: [str(short_path)]}
            assert jail.one("connect", "unix", str(path), **grant) == Errno("EACCES")
        with pytest.raises(BlockingIOError):
            server.accept()
    assert jail.one("talk", "unix", f"{short_path}/own", write=[str(short_path)]) == "hello"


def test_a_hosts_fifo_in_a_granted_directory_is_covered(jail: Jail, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o666)
    (tmp_path / "plain").write_text("plain")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    try:
        found = jail.act(["write", f"{tmp_path}/fifo", "x"], ["read", f"{tmp_path}/plain"], read=[str(tmp_path)])
        assert found == [Errno("EACCES"), "plain"]
        assert os.read(reader, 1) == b""
    finally:
        os.close(reader)


@pytest.mark.needs("user")
def test_a_directory_that_cannot_be_looked_into_is_covered(jail: Jail, short_path: Path) -> None:
    """One may pass through it by known names, and a socket in it could not be found beforehand."""
    closed = short_path / "closed"
    closed.mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{closed}/sock")
        server.listen()
        closed.chmod(0o100)
        found = jail.act(["connect", "unix", f"{closed}/sock"], ["listdir", str(short_path)], read=[str(short_path)])
        closed.chmod(0o700)
    assert found == [Errno("EACCES"), ["closed"]]


def test_hard_links_do_not_bring_a_read_only_file_into_reach(jail: Jail, tmp_path: Path) -> None:
    """Within one filesystem a second name would carry the file from a read-only grant into a writable one."""
    for name in ("read", "write"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    actions = [["link", f"{tmp_path}/{name}/file", f"{tmp_path}/write/second"] for name in ("read", "write")]
    found = jail.act(*actions, read=[f"{tmp_path}/read"], write=[f"{tmp_path}/write"])
    assert found == [Errno("EXDEV"), True]


def test_the_working_directory_may_not_lie_outside(jail: Jail, secret: Secret) -> None:
    outcome = jail.run(["pwd"], cwd=str(secret.directory))
    assert (outcome.ending.kind, outcome.exit_code) == ("tool_error", 127)
    outcome = jail.run(["pwd"], cwd=str(secret.directory), read=[str(secret.directory)])
    assert outcome.text == f"{secret.directory}\n"
