"""Commands that mount and make file systems."""

from __future__ import annotations

import subprocess


def tried(*command: str) -> str:
    """ "", or why it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.strip() or f"{command[0]} failed"
