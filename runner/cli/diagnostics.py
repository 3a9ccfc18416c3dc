"""Prints what is wrong: the faults of specs, and the findings of a check. On a terminal, with the line they are
about."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from runner.cli.excerpts import excerpts
from runner.core.errors import Fault
from runner.preflight.finding import Finding, format_places

SHOWN_ONCE_FROM = 3  # further places with the same fault, from which on it is printed once for all of them


def echo_faults(faults: Sequence[Fault]) -> None:
    """Print faults to stderr. A fault that many specs share is printed once, with a line that lists the other
    places."""
    shown = excerpts(faults) if sys.stderr.isatty() else {}
    same: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        same.setdefault((fault.key, fault.message), []).append(fault)
    for fault in faults:
        first, *others = same[fault.key, fault.message]
        many = len(others) >= SHOWN_ONCE_FROM
        if many and fault is not first:
            continue
        click.echo(fault, err=True)
        if fault in shown:
            click.echo(shown[fault], err=True)
        if many:
            click.echo(f"    {format_places([(other.file, other.line) for other in others])}", err=True)


def echo_findings(findings: Sequence[Finding], *, err: bool) -> None:
    """Print findings to stdout, or to stderr if `err`. Notes get no excerpt."""
    faults = [finding.fault for finding in findings if finding.fault and finding.level != "note"]
    shown = excerpts(faults) if (sys.stderr if err else sys.stdout).isatty() else {}
    for finding in findings:
        first, *more = finding.lines()
        excerpt = [shown[finding.fault]] if finding.fault in shown else []
        for line in (first, *excerpt, *more):
            click.echo(line, err=err)
