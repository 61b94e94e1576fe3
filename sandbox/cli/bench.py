"""`sandbox bench`: measure calls here, beside what else is installed; a table, a JSON file and charts."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    app.command(name="bench")(bench)


def bench(
    *,
    rounds: Annotated[int, typer.Option(help="Turns that everybody gets with each job.", min=1)] = 40,
    seconds: Annotated[float, typer.Option(help="Length of each load; 0 for none.", min=0)] = 5.0,
    sustained: Annotated[float, typer.Option(help="Seconds of sustained load; 0 for none.", min=0)] = 10.0,
    alive: Annotated[int, typer.Option(help="Jails that run at once; 0 for none.", min=0)] = 100,
    submissions: Annotated[int, typer.Option(help="Calls submitted at once; 0 for none.", min=0)] = 2000,
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds, no load: does it work at all?")] = False,
    peers: Annotated[bool, typer.Option(help="Measure other sandboxes that are installed.")] = True,
    image: Annotated[
        str, typer.Option(envvar="SANDBOX_BENCH_IMAGE", help="A local image with python3, for docker run.")
    ] = "",
    out: Annotated[str, typer.Option(help="Directory for the JSON file and the charts.")] = "bench/results",
    json_output: Annotated[bool, typer.Option("--json", help="The whole result on standard output.")] = False,
) -> None:
    """Measure what a call costs on this machine, in one run, beside other sandboxes (`bench/install-peers`)."""
    import json
    from pathlib import Path

    from sandbox.bench.run import Options, run, write

    options = Options(
        rounds=rounds,
        seconds=seconds,
        sustained_s=sustained,
        alive=alive,
        submissions=submissions,
        with_peers=peers,
        image=image,
    )
    if quick:
        options = Options(
            rounds=3, paced_calls=20, seconds=0.5, sustained_s=0, alive=0, submissions=0, with_peers=peers, image=image
        )
    result = run(options, lambda text: typer.echo(f"sandbox: {text}", err=True))
    for path in write(result, Path(out)):
        typer.echo(f"sandbox: wrote {path}", err=True)
    if json_output:
        typer.echo(json.dumps(result))
    else:
        _show(result)


def _show(result: dict[str, Any]) -> None:
    machine = result["machine"]
    busy = machine["load"]["busy_share"]
    typer.echo(f"{machine['cores']} cores of {machine['cpu']}, Linux {machine['kernel']}, {busy:.0%} busy at the start")
    for job, rows in result["latency_ms"].items():
        typer.echo(f"\n{job:20} {'p10':>9} {'median':>9} {'p95':>9} {'p99':>9} ms {'ratio':>7}")
        for name, row in rows.items():
            times = f"{row['times_ours']:.1f}" if row["times_ours"] else ""
            numbers = " ".join(f"{row[key]:9.2f}" for key in ("p10", "median", "p95", "p99"))
            typer.echo(f"{'* ' if row['ours'] else '  '}{name:18} {numbers}    {times:>7}")
    for name, why in result["missing"].items():
        typer.echo(f"not measured: {name}: {why}")
    for name, texts in result["failures"].items():
        typer.echo(f"failed: {name}: {texts[-1]}")
    typer.echo("")
    others = {name: result[name] for name in ("spawned_cpu_ms", "throughput_of_others") if name in result}
    for name, value in {**result["ours"], **others}.items():
        typer.echo(f"{name}: {_line(value)}")


def _line(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(_line(item) for item in value)
    if isinstance(value, dict) and "median" in value:
        return f"median {value['median']:.2f}, p95 {value['p95']:.2f}, p99 {value['p99']:.2f}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_line(item)}" for name, item in value.items())
    return f"{value:.6g}" if isinstance(value, float) else str(value)
