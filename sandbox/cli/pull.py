"""`sandbox pull`: have the Docker daemon fetch an image for the launcher docker, with its progress in sight.

A call never waits for a registry, and is refused where its image is not there; this is what to do about it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping


def register(app: typer.Typer) -> None:
    app.command(name="pull")(pull)


def pull(
    image: Annotated[str, typer.Argument(help="NAME[:TAG] or NAME@DIGEST; without either, the tag latest.")],
) -> None:
    """Fetch an image into the Docker daemon, and print its digest, which is what records name it by.

    The daemon is the one of DOCKER_HOST, else this host's. Exit status: 0 fetched, 125 not, and why.
    """
    import os

    from sandbox.cli.progress import Progress
    from sandbox.launchers.docker_engine import Engine

    layers = Layers()
    with Progress(f"pulling {image}") as progress:

        def told(event: Mapping[str, Any]) -> None:
            layers.take_in(event)
            progress.update(f"pulling {image}: {layers}")

        digest = Engine(os.environ.get("DOCKER_HOST", "")).pull(image, told)
    typer.echo(digest)


class Layers:
    """What a daemon has said of an image's layers so far; as text, how much of it is here."""

    def __init__(self) -> None:
        self._bytes: dict[str, tuple[int, int]] = {}
        self._there: dict[str, bool] = {}

    def __str__(self) -> str:
        done, total = (sum(pair[index] for pair in self._bytes.values()) for index in (0, 1))
        return f"{sum(self._there.values())} of {len(self._there)} layers, {done / 1e6:.1f} of {total / 1e6:.1f} MB"

    def take_in(self, event: Mapping[str, Any]) -> None:
        """One message of the daemon's. Those that are not about a layer say nothing."""
        name, status = str(event.get("id", "")), str(event.get("status", ""))
        if status == "Pulling fs layer":
            self._there[name] = False
        elif status in ("Already exists", "Pull complete"):
            self._there[name] = True
        detail = event.get("progressDetail") or {}
        if status == "Downloading" and detail.get("total"):
            self._bytes[name] = int(detail.get("current", 0)), int(detail["total"])
        elif status in ("Download complete", "Pull complete") and name in self._bytes:
            self._bytes[name] = self._bytes[name][1], self._bytes[name][1]
