"""The table of every key a profile may name: how it is written, where it goes in the manifest, what narrower means.

One table drives reading, merging, narrowing, the ceiling, the file form and the JSON Schema, so that a new key is
one new line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal[
    "size", "rate", "time", "real", "count", "flag", "word", "path", "grants", "patterns", "programs", "words", "table",
    "http",
]  # fmt: skip
# limit: smaller is narrower, None is widest. grants: a subset by meaning. denials: a superset. order: earlier in
# `words` is narrower. fixed: neither is narrower. workspace: judged together with the path grants. http: rules that
# restrict hosts, judged by what they leave.
Meaning = Literal["limit", "grants", "denials", "order", "fixed", "workspace", "http"]


@dataclass(frozen=True, slots=True)
class Field:
    """One key. `attr` is the manifest's name for it, `alias` the flat name for overrides."""

    section: str
    name: str
    kind: Kind
    meaning: Meaning
    attr: str = ""
    alias: str = ""
    words: tuple[str, ...] = ()
    unlimited: bool = False
    help: str = ""

    @property
    def key(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def field(self) -> str:
        return self.attr or self.name

    @property
    def is_list(self) -> bool:
        return self.kind in LISTS


LISTS: Final = frozenset({"grants", "patterns", "programs", "words", "http"})
_FS, _NET, _RES, _GPU, _ENV, _SEC, _PROC, _AUDIT, _ISO = (
    "filesystem", "network", "resources", "gpu", "environment", "secrets", "process", "audit", "isolation"
)  # fmt: skip

FIELDS: Final[tuple[Field, ...]] = (
    Field(_FS, "read", "grants", "grants", alias="read", help="Trees the call may read."),
    Field(_FS, "write", "grants", "grants", alias="write", help="Trees it may write; ':workspace' is its workspace."),
    Field(_FS, "deny", "patterns", "denials", alias="deny", help="Trees nothing may reach, wherever they are granted."),
    Field(
        _FS,
        "allow_protected",
        "words",
        "grants",
        alias="allow_protected",
        help="Names below a writable workspace that are protected unless listed, such as '.git/hooks'.",
    ),
    Field(_FS, "workspace", "path", "workspace", alias="workspace", help="Directory of the host; empty: private."),
    Field(
        _FS,
        "workspace_mode",
        "word",
        "workspace",
        alias="workspace_mode",
        words=("private", "ro", "cow", "rw"),
        help="How the workspace is given; 'cow' keeps changes apart until they are committed.",
    ),
    Field(_NET, "mode", "word", "order", alias="network", words=("none", "allowlist"), help="Implied by allow."),
    Field(_NET, "allow", "words", "grants", alias="allow_hosts", help="'host:port', '*.host', 'CIDR:port'."),
    Field(_NET, "deny", "words", "denials", alias="deny_hosts", help="Rules that win over allow."),
    Field(
        _NET,
        "http",
        "http",
        "http",
        alias="http",
        help="What hosts may be sent: '[deny] METHODS HOST [PATH] [inspect]', or a table with those keys.",
    ),
    Field(
        _NET,
        "extra_roots",
        "grants",
        "grants",
        alias="extra_roots",
        help="Files of authorities, beside the system's, for the servers of inspected TLS.",
    ),
    Field(_NET, "upload_max", "size", "limit", "upload_max_bytes", "upload_max", unlimited=True, help="Bytes out."),
    Field(
        _NET, "download_max", "size", "limit", "download_max_bytes", "download_max", unlimited=True, help="Bytes in."
    ),
    Field(_NET, "rate", "rate", "limit", "rate_bytes_per_s", "network_rate", unlimited=True, help="Bytes a second."),
    Field(_NET, "connections_max", "count", "limit", alias="connections_max", unlimited=True, help="In all."),
    Field(_NET, "connections_at_once", "count", "limit", alias="connections_at_once", help="Open at one time."),
    Field(_NET, "flow_time", "time", "limit", "flow_time_s", "flow_time", unlimited=True, help="Of one connection."),
    Field(_NET, "idle_time", "time", "limit", "idle_time_s", "idle_time", unlimited=True, help="Without a byte."),
    Field(_NET, "host_upload_max", "size", "limit", "host_upload_max_bytes", unlimited=True, help="To each host."),
    Field(_NET, "host_download_max", "size", "limit", "host_download_max_bytes", unlimited=True, help="From each."),
    Field(_NET, "host_rate", "rate", "limit", "host_rate_bytes_per_s", unlimited=True, help="Bytes a second, each."),
    Field(_NET, "host_connections_max", "count", "limit", unlimited=True, help="To each host, in all."),
    Field(_NET, "host_connections_at_once", "count", "limit", unlimited=True, help="To each host, at one time."),
    Field(
        _NET,
        "on_breach",
        "word",
        "order",
        alias="on_breach",
        words=("kill", "cut"),
        help="What a crossed budget ends: the connection ('cut') or the whole call ('kill').",
    ),
    Field(_RES, "cpus", "real", "limit", alias="cpus", help="Cores' worth of CPU time, such as 1.5."),
    Field(_RES, "memory", "size", "limit", "memory_bytes", "memory", help="RAM, swap and private files together."),
    Field(_RES, "pids", "count", "limit", alias="pids", help="Processes and threads at one time."),
    Field(_RES, "cpu_time", "time", "limit", "cpu_time_s", "cpu_time", unlimited=True, help="CPU time in all."),
    Field(_RES, "wall_time", "time", "limit", "wall_time_s", "wall_time", help="Time from start to end."),
    Field(_RES, "disk", "size", "limit", "disk_bytes", "disk", help="Private files; memory-backed, so keep <= memory."),
    Field(_RES, "inodes", "count", "limit", alias="inodes", help="Private files and directories."),
    Field(_RES, "output", "size", "limit", "output_bytes", "output", help="What it may print."),
    Field(_RES, "open_files", "count", "limit", alias="open_files", help="Open files of one process."),
    Field(_RES, "io", "rate", "limit", "io_bytes_per_s", "io", unlimited=True, help="Bytes a second to block devices."),
    Field(_GPU, "count", "count", "limit", help="Any so many GPUs; not together with devices."),
    Field(_GPU, "devices", "words", "grants", help="Named GPUs: index, 'GPU-<uuid>' or 'MIG-<uuid>'."),
    Field(_GPU, "memory", "size", "limit", "memory_bytes", unlimited=True, help="GPU memory in all."),
    Field(_GPU, "sm_percent", "count", "limit", unlimited=True, help="Share of the multiprocessors, 1 to 100."),
    Field(_GPU, "time", "time", "limit", "seconds", unlimited=True, help="GPU time in all."),
    Field(_GPU, "energy_j", "real", "limit", unlimited=True, help="Energy in joules."),
    Field(_GPU, "power_watts", "count", "limit", unlimited=True, help="Power in watts."),
    Field(_GPU, "processes_max", "count", "limit", unlimited=True, help="Processes on the GPU at one time."),
    Field(_GPU, "allow_mps", "flag", "order", words=("false", "true"), help="Whether MPS sharing is acceptable."),
    Field(_GPU, "duty_percent", "count", "limit", help="From this utilisation on, steady duty is reported."),
    Field(_GPU, "duty_time", "time", "limit", "duty_time_s", help="For how long without a break until it is reported."),
    Field(_ENV, "allow", "words", "grants", alias="env_allow", help="Variables passed on from the caller."),
    Field(_ENV, "set", "table", "grants", alias="env_set", help="Variables with a given value."),
    Field(
        _SEC,
        "entries",
        "table",
        "grants",
        alias="secrets",
        help="Values that the gateway sets as a header for one host.",
    ),
    Field(
        _PROC,
        "allow_exec",
        "programs",
        "grants",
        alias="allow_exec",
        help="Programs that may be executed; left out: all that are visible.",
    ),
    Field(_PROC, "warm", "flag", "order", alias="warm", words=("false", "true"), help="false: fresh interpreter."),
    Field(_AUDIT, "capture", "words", "grants", alias="capture", help="Contents to store: args, output, result."),
    Field(
        _AUDIT,
        "durability",
        "word",
        "order",
        alias="durability",
        words=("fsync", "flush"),
        help="When a record counts as written.",
    ),
    Field(
        _ISO,
        "launcher",
        "word",
        "fixed",
        alias="launcher",
        help="Which launcher: 'auto', 'jail', 'docker', 'oci' or 'nsjail'.",
    ),
    Field(_ISO, "image", "word", "fixed", alias="image", help="The image of a container's root, where one is taken."),
    Field(_ISO, "runtime", "word", "fixed", alias="runtime", help="The OCI runtime: runc, crun, runsc or kata."),
    Field(
        _ISO,
        "minimum",
        "word",
        "order",
        alias="minimum",
        words=("microvm", "userspace-kernel", "namespaces"),
        help="The least isolation that will do.",
    ),
    Field(_ISO, "required", "words", "denials", alias="required", help="Controls that must be full."),
    Field(_ISO, "best_effort", "words", "grants", alias="best_effort", help="Controls that may be less than full."),
)
BY_KEY: Final = {field.key: field for field in FIELDS}
BY_MANIFEST_KEY: Final = {f"{field.section}.{field.field}": field for field in FIELDS}
ALIASES: Final = {field.alias: field for field in FIELDS if field.alias}
# "$schema" is for editors of JSON files; nothing reads it here.
TOP_KEYS: Final = ("name", "description", "extends", "remove", "sealed", "$schema")
SETTING: Final = "environment.set"
SECRETS: Final = "secrets.entries"
# Tables whose keys are the user's: each entry is a scalar of its own. `[secrets]` is such a table as a whole.
_PREFIXES: Final = {SETTING: "environment.set.", SECRETS: "secrets."}


def entry_key(table: str, name: str) -> str:
    """The key path of one entry of a table: of a variable of `environment.set`, or of a secret."""
    return _PREFIXES[table] + name


def table_of(key: str) -> tuple[str, str] | None:
    """The table and the name in it that a scalar's key path means; None for any other key."""
    found = (table for table, prefix in _PREFIXES.items() if key.startswith(prefix))
    return next(((table, key.removeprefix(_PREFIXES[table])) for table in found), None)
