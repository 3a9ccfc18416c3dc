"""What commands print with --json."""

from __future__ import annotations

from typing import Any

import click


def echo_json(document: Any, *, indent: int | None = 1) -> None:
    """Print one JSON document to stdout."""
    import json  # here, since `fluxrun --help` does not need it

    click.echo(json.dumps(document, indent=indent))
