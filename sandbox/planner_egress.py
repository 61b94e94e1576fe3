"""The network part of a plan: the jail's step, the gateway's policy, and what this host makes of it. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

from sandbox import planner_http
from sandbox.destinations import parse_host
from sandbox.host import HostFacts
from sandbox.manifest import Manifest
from sandbox.plan import Limit, Step

# Benchmark ranges, which are nobody's (RFC 2544, 5180): the jail's own address and the resolver's. The gateway gives
# its synthetic answers from the rest of them.
SOURCE_V4: Final = "198.18.0.1"
SOURCE_V6: Final = "2001:2::1"
NAMESERVER: Final = "198.18.0.2"
# Below 1024, where nothing inside can bind, also when the gateway has closed its listener.
LISTENER_PORT: Final = 1
DNS_PORT: Final = 53
# One listener a port and family without nf_tables; they travel in one message.
PORTS_MAX: Final = 12


def is_on(manifest: Manifest) -> bool:
    return manifest.network.mode == "allowlist"


def nameserver(manifest: Manifest) -> str:
    return NAMESERVER if is_on(manifest) else "127.0.0.1"


def refusal(manifest: Manifest, facts: HostFacts) -> str:
    """Why this host cannot give the call this network; empty when it can."""
    if not is_on(manifest) or facts.tproxy.ok or len(_ports(manifest)) <= PORTS_MAX:
        return ""
    wanted = "sudo modprobe nft_tproxy on the host may bring it"
    return f"{facts.tproxy.reason}; without it at most {PORTS_MAX} ports can be named, and no ranges ({wanted})"


def steps(manifest: Manifest, facts: HostFacts) -> tuple[Step, ...]:
    """The jail's step. Its arguments hold nothing of the rules where they need not: such jails serve any manifest."""
    if not is_on(manifest):
        return ()
    ports = [] if facts.tproxy.ok else sorted({DNS_PORT, *_ports(manifest)})
    args = {"source_v4": SOURCE_V4, "source_v6": SOURCE_V6, "port": LISTENER_PORT, "ports": ports}
    return (Step("egress", "call", args),)


def limit(manifest: Manifest, facts: HostFacts, plain: Limit) -> Limit:
    """The control `network` as it is held with a gateway. Nothing passes that it does not carry, on any kernel."""
    if not is_on(manifest) or plain.level != "full":
        return plain
    if facts.tproxy.ok:
        return replace(plain, mechanism="network namespace with loopback only, egress gateway by tproxy")
    reason = f"{facts.tproxy.reason}: ports that no rule names are refused by the kernel, and nobody sees the attempt"
    return replace(plain, mechanism="network namespace with loopback only, egress gateway by port", reason=reason)


def policy(manifest: Manifest, extra_roots: Iterable[tuple[str, str, str]] = ()) -> dict[str, Any] | None:
    """What the gateway is told: rules and budgets. `extra_roots`: (path, digest, certificates)."""
    network = manifest.network
    if not is_on(manifest):
        return None
    return {
        "allow": list(network.allow),
        "deny": list(network.deny),
        "http": planner_http.policy(manifest, extra_roots),
        "on_breach": network.on_breach,
        "call": {
            "upload_max_bytes": network.upload_max_bytes,
            "download_max_bytes": network.download_max_bytes,
            "rate_bytes_per_s": network.rate_bytes_per_s,
            "connections_max": network.connections_max,
            "connections_at_once": network.connections_at_once,
            "flow_time_s": network.flow_time_s,
            "idle_time_s": network.idle_time_s,
        },
        "host": {
            "upload_max_bytes": network.host_upload_max_bytes,
            "download_max_bytes": network.host_download_max_bytes,
            "rate_bytes_per_s": network.host_rate_bytes_per_s,
            "connections_max": network.host_connections_max,
            "connections_at_once": network.host_connections_at_once,
        },
    }


def _ports(manifest: Manifest) -> set[int]:
    """Every port that some rule names; a range counts as its ports, up to one more than would do."""
    found: set[int] = set()
    for text in manifest.network.allow:
        rule = parse_host(text)
        found.update(range(rule.low, min(rule.high, rule.low + PORTS_MAX) + 1))
    return found
