"""The `scumble` command: a table of commands, each imported when it is called, so that help is quick."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from scumble.collector import start_up
from scumble.errors import ScumbleError, to_be_printed

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("scumble.cli.demo:demo", "See the whole path on the embedded base: offline, in minutes."),
    "train": ("scumble.cli.train:train", "Train an adapter on your pictures."),
    "generate": ("scumble.cli.generate:generate", "Draw pictures with a base and adapters."),
    "evaluate": (
        "scumble.cli.evaluate:evaluate",
        "Measure what an adapter learned, obeys, broke and copied.",
    ),
    "inspect": ("scumble.cli.inspect:inspect", "Say what an adapter file holds."),
    "convert": ("scumble.cli.convert:convert", "Write an adapter in another tool's format."),
    "merge": ("scumble.cli.merge:merge", "Merge adapters into one, or into a base."),
    "resize": ("scumble.cli.resize:resize", "Give an adapter a smaller rank."),
    "extract": ("scumble.cli.extract:extract", "Make a LoRA of a fine-tuned model's difference to its base."),
    "subtract": ("scumble.cli.subtract:subtract", "Take one adapter's change out of another's."),
    "check-mix": (
        "scumble.cli.check_mix:check_mix",
        "Say where two adapters meet, and which will damage the other.",
    ),
    "data": ("scumble.cli.data:app", "Check a dataset before training on it."),
    "config": ("scumble.cli.config:app", "Write, check and describe settings files."),
    "push": ("scumble.cli.push:push", "Upload a run or an adapter to the Hugging Face Hub."),
    "pull": ("scumble.cli.pull:pull", "Fetch an adapter from the Hugging Face Hub."),
    "sign": ("scumble.cli.sign:sign", "Sign an adapter file."),
    "verify": ("scumble.cli.verify:verify", "Check that an adapter file is what was written."),
    "reproduce": ("scumble.cli.reproduce:reproduce", "Write the settings file that made an adapter."),
    "picturebook": ("scumble.cli.picturebook:app", "The embedded base and its pictures."),
    "doctor": ("scumble.cli.doctor:doctor", "Check this machine, and name the fix for what is wrong."),
}
"""Name -> where it lives, and its line in `scumble --help` (the first line of its own help)."""

_LOAD_A_BASE = {"demo", "train", "generate", "evaluate"}


class LazyGroup(TyperGroup):
    """A group that knows its commands' names and help lines, and imports a command when it is run."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A stand-in with the help line while help is printed; `resolve_command` puts the real one in its
        place."""
        if cmd_name not in COMMANDS:
            return None
        self.commands.setdefault(cmd_name, TyperCommand(cmd_name, help=COMMANDS[cmd_name][1]))
        return self.commands[cmd_name]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        for name in COMMANDS:  # so that a mistyped name is compared with all of them
            self.get_command(ctx, name)
        found, command, rest = super().resolve_command(ctx, args)
        return found, command if found is None else load_command(found), rest


def load_command(name: str) -> Any:
    """The real command behind a line of the table: a Typer app as it is, a function as an app of one
    command."""
    module, _, attribute = COMMANDS[name][0].partition(":")
    found = getattr(importlib.import_module(module), attribute)
    if not isinstance(found, typer.Typer):
        app = typer.Typer(add_completion=False)
        app.command(name)(found)
        found = app
    command = typer.main.get_command(found)
    command.name = name
    return command


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        from scumble import __version__

        typer.echo(f"scumble {__version__}")
        raise typer.Exit()


@app.callback()
def scumble(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and stop."
    ),
    debug: bool = typer.Option(
        False, "--debug", help="Show the traceback of an error. Works after any command."
    ),
) -> None:
    """LoRA fine-tuning of Stable Diffusion.

    Try it, offline:  scumble demo
    """


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit with its code: 0, or the error's own with its text in one red message.

    An error that scumble did not foresee keeps its traceback, since it is a bug.
    """
    own = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:cut]
    arguments = [item for item in arguments[:cut] if item != "--debug"] + arguments[cut:]
    if not debug:  # what the libraries remark on their own optional parts is no news to the person who trains
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        # a process that is ours alone, and will call `started`
        with start_up(own and bool(arguments) and arguments[0] in _LOAD_A_BASE):
            typer.main.get_command(app).main(args=arguments, prog_name="scumble")
    except ScumbleError as error:
        if debug:
            raise
        if to_be_printed(error):
            from rich.console import Console
            from rich.text import Text

            text = Text(f"error: {error}", style="bold red")
            Console(stderr=True, soft_wrap=True, highlight=False).print(text)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
