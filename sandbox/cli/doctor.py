"""`sandbox doctor`: what this host can enforce, why not, and the command that would change it.

Exit status 0 when a call can run with full enforcement of everything that every call asks for, 1 when not (io limits
and Landlock are shown, but do not count: few calls ask for the one, the other is a second wall), 125 when the host
could not be looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sandbox.host import Control, HostFacts

FAILED = 125


def register(app: typer.Typer) -> None:
    app.command(name="doctor")(doctor)


def doctor(
    *, json_output: Annotated[bool, typer.Option("--json", help="Facts and controls as one JSON object.")] = False
) -> None:
    """Show what this host can enforce, what is missing and how to get it.

    Exit status: 0 calls run fully enforced, 1 something that every call asks for is missing, 125 the look failed.
    """
    import json
    import subprocess

    from sandbox import host

    try:
        facts = host.probe_apart()
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as err:
        typer.echo(f"sandbox doctor: {err}", err=True)
        raise typer.Exit(FAILED) from None
    if facts.gpu_devices:
        from dataclasses import replace

        from sandbox.gpu import inventory

        facts = replace(facts, gpu=inventory.find())
    table = host.controls(facts)
    short = [name for name in host.EVERY_CALL if table[name].level != "full"]
    if json_output:
        typer.echo(json.dumps(_as_json(facts, table, short), indent=2))
    else:
        _show(facts, table, short)
    raise typer.Exit(1 if short else 0)


def _as_json(facts: HostFacts, table: dict[str, Control], short: list[str]) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "full": not short,
        "missing": short,
        "controls": {name: asdict(control) for name, control in table.items()},
        "host": facts.to_json(),
    }


def _show(facts: HostFacts, table: dict[str, Control], short: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for label, text in _summary(facts):
        console.print(Text(f"{label:<16}", style="bold").append(text, style="not bold"), soft_wrap=True)
    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("control", "holds", "by"):
        grid.add_column(heading, overflow="fold")
    styles = {"full": "green", "partial": "yellow", "none": "red"}
    for name, control in table.items():
        grid.add_row(name, Text(control.level, style=styles[control.level]), control.mechanism or "-")
    console.print()
    console.print(grid)
    console.print()
    for (reason, fix), names in _gaps(table).items():
        console.print(Text(f"{', '.join(names)}: ", style="bold").append(reason, style="not bold"), soft_wrap=True)
        # A command to copy: never wrapped by us.
        console.print(Text(f"  fix: {fix}\n" if fix else ""), soft_wrap=True)
    verdict = f"not fully enforced here: {', '.join(short)}" if short else "calls run fully enforced on this host"
    console.print(Text(verdict, style="red" if short else "green"), soft_wrap=True)


def _gaps(table: dict[str, Control]) -> dict[tuple[str, str], list[str]]:
    """Controls that are less than full, those with the same reason and fix together."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, control in table.items():
        if control.level != "full":
            found.setdefault((control.reason, control.fix), []).append(name)
    return found


def _summary(facts: HostFacts) -> list[tuple[str, str]]:
    who = "root" if facts.is_root_like else f"uid {facts.uid}"
    where = f", in a container ({facts.container})" if facts.container else ""
    return [
        ("host", f"Linux {facts.kernel} {facts.machine}, Python {facts.python}, as {who}{where}"),
        ("machine", f"{facts.cpu_count} cores, {facts.memory_bytes >> 20} MiB, swap {facts.swap_bytes >> 20} MiB"),
        ("cgroups", _cgroups(facts)),
        ("user namespaces", "work" if facts.user_namespaces.ok else facts.user_namespaces.reason),
        ("overlay", _overlay(facts)),
        ("seccomp", f"libseccomp {facts.libseccomp or 'missing'}, actions {' '.join(facts.seccomp_actions) or 'none'}"),
        ("landlock", f"ABI {facts.landlock_abi}" if facts.landlock_abi else "none"),
        ("egress gateway", _gateway(facts)),
        ("gpu", _gpu(facts)),
        ("launchers", _launchers(facts)),
    ]


def _launchers(facts: HostFacts) -> str:
    """Which launchers can be had, and what each of the others lacks."""
    from sandbox.launchers.declared import DECLARED, choices
    from sandbox.planner_launcher import lack_here

    here: list[str] = []
    lacking: dict[str, list[str]] = {}
    for choice in choices("auto", ""):
        why, fix = lack_here(choice, facts)
        name = " ".join(filter(None, (choice.launcher, choice.runtime)))
        if why:
            reason = why.partition(": ")[2] or "not installed"
            lacking.setdefault(f"{reason}{f'   fix: {fix}' if fix else ''}", []).append(name)
        else:
            here.append(f"{name} (with an image and a daemon)" if DECLARED[choice.launcher].needs_image else name)
    gaps = [f"not here: {', '.join(names)}: {reason}" for reason, names in lacking.items()]
    return "\n                ".join([", ".join(here) or "none", *gaps])


def _overlay(facts: HostFacts) -> str:
    if not facts.overlay_in_userns.ok:
        return facts.overlay_in_userns.reason
    if facts.tmpfs_attributes.ok or facts.is_root_like:
        return "works in user namespaces"
    return "works in user namespaces, but directories cannot be removed in a cow workspace (needs Linux 6.6 or root)"


def _gateway(facts: HostFacts) -> str:
    """What an allowlist gets here; it is held on any kernel."""
    if facts.tproxy.ok:
        return "sees every port (nf_tables with tproxy)"
    from sandbox.planner_egress import PORTS_MAX

    few = f"at most {PORTS_MAX} ports in a manifest and no ranges, others are refused unseen"
    return f"{few}: {facts.tproxy.reason}   fix: sudo modprobe nft_tproxy on the host"


def _gpu(facts: HostFacts) -> str:
    """Details are `sandbox gpu`'s."""
    if facts.gpu is None:
        return f"no device nodes, NVML {'loads' if facts.gpu_library else 'not there'}"
    if facts.gpu["trouble"]:
        fix = f"   fix: {facts.gpu['fix']}" if facts.gpu["fix"] else ""
        return f"none can be granted: {facts.gpu['trouble']}{fix}"
    names = ", ".join(f"{unit['index']} {unit['name']}" for unit in facts.gpu["units"])
    return f"driver {facts.gpu['driver']}: {names}   (sandbox gpu)"


def _cgroups(facts: HostFacts) -> str:
    held = [f"{name} {control.where}" for name, control in facts.cgroups.items() if control.where]
    text = ", ".join(held) if held else "nothing open to us"
    return f"{facts.cgroup_kind}: {text}" + (f"; ours go below {facts.cgroup_path}" if facts.cgroup_path else "")
