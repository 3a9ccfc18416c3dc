"""`python -m runner` is `fluxrun`."""

from __future__ import annotations

from runner.cli import main

main(prog_name="fluxrun")
