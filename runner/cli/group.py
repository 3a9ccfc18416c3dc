"""The click group behind `fluxrun`: prints every error that a command raises, and exits with its code."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from runner.core import output
from runner.core.errors import DiskError, FluxrunError, InterruptedRunError, SpecError, is_disk_error


class FluxrunGroup(click.Group):
    """Errors that are not listed here keep their traceback: they are mistakes in fluxrun."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SpecError as error:
            from runner.cli.diagnostics import echo_faults
            from runner.core.humanize import pluralize

            with output.ignore_lost_output():
                echo_faults(error.faults)
                click.echo(f"{pluralize(len(error.faults), 'fault')}; nothing was started", err=True)
            ctx.exit(error.exit_code)
        except FluxrunError as error:
            with output.ignore_lost_output():
                click.echo(f"fluxrun: {error}", err=True)
            ctx.exit(error.exit_code)
        except BrokenPipeError:  # `fluxrun results | head`
            ctx.exit(output.exit_code_of_closed_pipe())
        except OSError as error:
            if not (error.filename and is_disk_error(error)):
                raise
            with output.ignore_lost_output():
                click.echo(
                    f"fluxrun: {error.filename}: {error.strerror}; fix that, then type the same command again",
                    err=True,
                )
            ctx.exit(DiskError.exit_code)
        except KeyboardInterrupt:
            with output.ignore_lost_output():
                click.echo(f"{os.linesep if sys.stderr.isatty() else ''}fluxrun: stopped by Ctrl-C", err=True)
            ctx.exit(InterruptedRunError.exit_code)
