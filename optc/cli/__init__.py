"""The command line: one file per verb, imported when it is used, so that ``optc run`` starts in a moment."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

import click

from optc import __version__
from optc.errors import OptcError

VERBS = {
    "compile": "Compile a model into one verified artifact.",
    "tune": "Measure kernels and write what is fastest into a tuning log.",
    "log": "Show, merge and check tuning logs.",
    "run": "Run an artifact; needs no compiler.",
    "verify": "Compare an artifact with a reference, output by output.",
    "bench": "Time an artifact, side by side with other programs.",
    "inspect": "Show what is inside a model or an artifact.",
    "check": "List everything in a model that is not supported, without compiling.",
    "sensitivity": "Show what quantizing each layer alone costs in accuracy.",
    "quantize": "Quantize a model by calibration data; writes portable ONNX.",
    "optimize": "Run the graph passes only; writes portable ONNX.",
    "prune": "Remove channels, neurons and heads; writes smaller portable ONNX.",
    "split": "Split a PyTorch model into balanced pipeline stages.",
    "plan": "Plan how to train a PyTorch model on several devices.",
    "train": "Train a PyTorch model on several devices.",
    "targets": "List what can be compiled for.",
    "doctor": "Check this installation; say how to fix what is missing.",
    "completion": "Print the shell completion script.",
}


class _Verbs(click.Group):
    """Imports ``optc.cli.<verb>`` when the verb is asked for; the list of verbs needs no import."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command = import_module(f"optc.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.command(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="optc")
def cli() -> None:
    """Compile neural networks into one verified, self-contained artifact.

    \b
    Examples:
      optc compile model.onnx -o model.optc
      optc run model.optc --input x=image.npy
      optc bench model.optc --against onnxruntime --model model.onnx

    Exit codes: 0 ok, 1 internal error, 2 usage, 3 unsupported model, 4 accuracy, 5 missing tuning,
    6 bad artifact, 130 interrupted.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    try:
        code = cli.main(args=list(arguments) if arguments is not None else None, standalone_mode=False)
    except OptcError as error:
        click.echo(f"{click.style('error:', fg='red', bold=True)} {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; nothing was written", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output (head, say) went away.
        sys.stderr.close()
        sys.exit(0)
    sys.exit(code if isinstance(code, int) else 0)
