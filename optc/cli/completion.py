"""``optc completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from optc.errors import UsageError


@click.command(name="completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script for SHELL.

    \b
    Example:
      optc completion bash > ~/.local/share/bash-completion/completions/optc
    """
    from optc.cli import cli

    script = get_completion_class(shell)
    if script is None:
        raise UsageError(f"no completion for {shell}")
    click.echo(script(cli, {}, "optc", "_OPTC_COMPLETE").source())
