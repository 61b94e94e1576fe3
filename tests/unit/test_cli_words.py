"""A plain command line means to the light parser what it means to typer's."""

from __future__ import annotations

import inspect
from typing import Any

import typer
from hypothesis import given
from hypothesis import strategies as st

from sandbox.cli import app, words

RUN: Any = typer.main.get_command(app.build(["run"]))
COMMAND = RUN.commands["run"]
# Whichever click typer brings along or depends on.
MISTAKE = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
VALUES = st.one_of(
    st.sampled_from(["", "1", "0.5", "x", "-", "--", "--memory", "-p", "a=b", "=", "1_0", " 7", "1e3", "nan"]),
    st.text(max_size=6),
)
FLAGS = [flag for option in words.BY_NAME.values() for flag in option.flags]
WORD = st.one_of(
    VALUES,
    st.sampled_from([*FLAGS, "--no-such", "-x", "-pshell", "-w", "--help"]),
    st.tuples(st.sampled_from(FLAGS), VALUES).map("=".join),
)
PAIR = st.tuples(st.sampled_from(FLAGS), VALUES).map(list)


def by_typer(argv: list[str]) -> tuple[dict[str, Any], list[str]] | None:
    """What typer's own parser makes of it; None for an error. Variables of the environment are not looked at."""
    try:
        with COMMAND.make_context("run", list(argv)) as context:
            given = {
                name: value
                for name, value in context.params.items()
                if context.get_parameter_source(name).name == "COMMANDLINE"
            }
    except (MISTAKE, typer.Exit):
        return None
    return given, list(given.pop("command", []))


def test_the_table_is_all_that_run_takes() -> None:
    named = {name for parameter in COMMAND.params for name in [parameter.name] if name not in ("command", "help")}
    assert named == set(words.BY_NAME)
    for parameter in COMMAND.params:
        if parameter.name in words.BY_NAME:
            assert {*parameter.opts, *parameter.secondary_opts} == set(words.BY_NAME[parameter.name].flags)


@given(st.lists(st.one_of(PAIR, WORD.map(lambda word: [word])), max_size=6), st.sampled_from([[], ["--"]]))
def test_what_is_plain_means_the_same_to_both(parts: list[list[str]], end: list[str]) -> None:
    argv = [*(word for part in parts for word in part), *end, "true", "-x", "--", "y"]
    light = words.parse(argv)
    if light is not None:
        full = by_typer(argv)
        assert full is not None, argv
        assert {name: repr(value) for name, value in light[0].items()} == {
            name: repr(list(value) if isinstance(value, (list, tuple)) else value) for name, value in full[0].items()
        }
        assert light[1] == full[1]


def test_every_option_is_understood_by_the_light_parser() -> None:
    samples = {"text": "x", "int": "3", "float": "0.5", "words": "x"}
    for option in words.BY_NAME.values():
        for flag in option.flags:
            argv = [flag, *([samples[option.kind]] if option.kind in samples else []), "true"]
            assert words.parse(argv) == by_typer(argv), flag
    for odd in (["--help"], ["-pshell", "true"], ["--memory"], ["--pids", "many", "true"], ["--commit=1", "true"], []):
        assert words.parse(odd) is None, odd


def test_the_tables_defaults_are_those_of_run() -> None:
    from sandbox.cli import quick, run

    assert inspect.signature(run.run).parameters["profile"].default == quick._PROFILE
