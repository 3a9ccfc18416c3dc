"""`python -m runner` is `fluxrun`."""

from runner.cli import main

main(prog_name="fluxrun")
