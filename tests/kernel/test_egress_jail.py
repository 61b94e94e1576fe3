"""The jail's side: what the step `egress` leaves inside, and the way without nf_tables."""

from __future__ import annotations

import json
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from sandbox._jail import egress
from sandbox._linux import netlink, process, syscalls, wire
from sandbox.errors import Unenforceable
from tests.helpers.net_scenes import PROBE, do
from tests.helpers.net_servers import Outside, http
from tests.helpers.net_world import WEB, run_in_world

pytestmark = pytest.mark.needs("userns")

ARGS = {"source_v4": "198.18.0.1", "source_v6": "2001:2::1", "port": 1, "ports": []}
AF_NETLINK, NETLINK_NETFILTER, EPROTONOSUPPORT = 16, 12, 93


class Launch:
    """As much of a launch as the step needs."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.ours, self.status = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def sockets(self) -> dict[str, socket.socket]:
        message, fds = wire.receive(self.ours)
        assert message is not None
        names = message["fds"]
        assert isinstance(names, list)
        return {name.removeprefix("egress:"): socket.socket(fileno=fd) for name, fd in zip(names, fds, strict=True)}


def in_new_network(body: Callable[[Launch], Any], **changes: Any) -> Any:
    """Run the step, then `body`, in a child with a network namespace of its own."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            process.die_with_parent()
            flags = syscalls.CLONE_NEWNET | (syscalls.CLONE_NEWUSER if os.geteuid() else 0)
            syscalls.unshare(flags)
            process.loopback_up()
            launch = Launch()
            egress.egress(launch, {**ARGS, **changes})  # type: ignore[arg-type]
            answer = {"answer": body(launch)}
        except BaseException:  # noqa: BLE001 - shown by the test
            answer = {"failed": traceback.format_exc()}
        os.write(write_fd, json.dumps(answer).encode())
        os._exit(0)
    os.close(write_fd)
    with open(read_fd, "rb") as file:
        answer = json.loads(file.read())
    os.waitpid(pid, 0)
    assert "failed" not in answer, answer["failed"]
    return answer["answer"]


def refusal(address: str, port: int) -> int | None:
    try:
        socket.create_connection((address, port), timeout=3).close()
    except OSError as error:
        return error.errno
    return None


def test_every_connect_lands_on_one_listener_that_knows_where_it_was_going() -> None:
    def body(launch: Launch) -> list[list[Any]]:
        found = []
        sockets = launch.sockets()
        for index, targets in enumerate(
            [[("93.184.216.34", 80), ("8.8.8.8", 53), ("1.2.3.4", 65535), ("198.18.0.2", 1)], [("2606:2800::1", 443)]]
        ):
            for target in targets:
                with socket.create_connection(target, timeout=3):
                    conn, _ = sockets[f"tcp:{index}"].accept()
                    found.append(list(conn.getsockname()[:2]))
                    conn.close()
        return [*found, launch.notes]

    *found, notes = in_new_network(body)
    assert found == [
        ["93.184.216.34", 80],
        ["8.8.8.8", 53],
        ["1.2.3.4", 65535],
        ["198.18.0.2", 1],
        ["2606:2800::1", 443],
    ]
    assert notes == []


def test_the_namespaces_own_addresses_are_left_to_its_programs() -> None:
    def body(launch: Launch) -> list[Any]:
        launch.sockets()
        found: list[Any] = [refusal(a, 8080) for a in ("127.0.0.1", "127.9.9.9", "198.18.0.1", "::1", "2001:2::1")]
        for address, family in (
            ("127.0.0.1", socket.AF_INET),
            ("198.18.0.1", socket.AF_INET),
            ("::1", socket.AF_INET6),
        ):
            with socket.create_server((address, 8080), family=family):
                found.append(refusal(address, 8080))
        return found

    assert in_new_network(body) == [111] * 5 + [None] * 3


def test_programs_that_ask_for_configured_families_get_both() -> None:
    """AI_ADDRCONFIG (ssh, Java, browsers) counts addresses beside loopback only."""

    def body(launch: Launch) -> list[str]:
        launch.sockets()
        infos = socket.getaddrinfo("198.18.0.9", 80, socket.AF_INET, flags=socket.AI_ADDRCONFIG)
        infos += socket.getaddrinfo("2001:2::9", 80, socket.AF_INET6, flags=socket.AI_ADDRCONFIG)
        return sorted({str(info[4][0]) for info in infos})

    assert in_new_network(body) == ["198.18.0.9", "2001:2::9"]


def test_what_is_no_tcp_fails_at_once() -> None:
    def body(launch: Launch) -> list[int | None]:
        launch.sockets()
        found = []
        for address in ("93.184.216.34", "2606:2800::1"):
            with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.settimeout(3)
                sock.connect((address, 443))
                sock.send(b"x")
                try:
                    sock.recv(1)
                    found.append(None)
                except OSError as error:
                    found.append(error.errno)
        return found

    assert in_new_network(body) == [111, 111]


def test_without_nf_tables_named_ports_are_listened_on_and_others_refused() -> None:
    def body(launch: Launch) -> list[Any]:
        sockets = launch.sockets()
        found: list[Any] = [sorted(sockets)]
        with socket.create_connection(("93.184.216.34", 80), timeout=3):
            conn, _ = sockets["tcp80:1"].accept()
            found.append(list(conn.getsockname()))
            conn.close()
        return [*found, refusal("93.184.216.34", 81), refusal("93.184.216.34", 80), launch.notes]

    names, where, other, named, notes = in_new_network(body, ports=[53, 80])
    assert names == ["dns:4", "dns:5", "tcp53:0", "tcp53:2", "tcp80:1", "tcp80:3"]
    assert where == ["93.184.216.34", 80]
    assert (other, named) == (111, None)
    assert "no nf_tables" in notes[0]


def test_our_own_addresses_are_all_seen() -> None:
    def body(launch: Launch) -> list[str]:
        launch.sockets()
        return sorted(netlink.interface_addresses())

    assert in_new_network(body) == ["127.0.0.1", "198.18.0.1", "2001:2::1", "::1"]


def refuse_netfilter() -> None:
    """From here on, in us and all that we start: a kernel without nf_tables."""
    import pyseccomp

    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    rules.add_rule(
        pyseccomp.ERRNO(EPROTONOSUPPORT),
        "socket",
        pyseccomp.Arg(0, pyseccomp.EQ, AF_NETLINK),
        pyseccomp.Arg(2, pyseccomp.EQ, NETLINK_NETFILTER),
    )
    rules.load()


def call_without_nf_tables() -> dict[str, Any]:
    from sandbox import Sandbox

    refuse_netfilter()
    outside = Outside()
    for port in (80, 81):
        outside.serve(f"web {port}", WEB, port, http)
    get = {"host": "www.example.test", "send": "GET /x HTTP/1.1\r\n\r\n", "once": True}
    actions = [do("tcp", port=80, **get), do("tcp", port=81, **get), do("lookup", host="evil.test")]
    with Sandbox("python") as box:
        outcome = box.run(["python3", "-c", PROBE, json.dumps(actions)], allow_hosts=["www.example.test:80"])
        with pytest.raises(Unenforceable) as refused:
            box.run(["true"], allow_hosts=["www.example.test:8000-8100"])
    record = outcome.record.to_json()
    return {
        "results": json.loads(outcome.stdout),
        "enforcement": record["enforcement"]["network"],
        "notes": record["isolation"]["notes"],
        "denied": [[item["host"], item["port"]] for item in record["network"] if item["decision"] == "deny"],
        "refusal": str(refused.value),
    }


def test_a_call_without_nf_tables_is_held_as_tightly_and_says_what_it_does_not_see() -> None:
    told = run_in_world(call_without_nf_tables, {"www.example.test": WEB})
    named, other, evil = told["results"]
    assert "you asked for /x" in named["text"]
    assert other["error"] == "ECONNREFUSED"
    assert evil["error"] == "EAI_NONAME"
    assert told["enforcement"]["level"] == "full"
    assert "nobody sees the attempt" in told["enforcement"]["reason"]
    assert any("no nf_tables" in note for note in told["notes"])
    assert told["denied"] == [["evil.test", 53]]
    assert "no ranges" in told["refusal"]
