"""Set-ups for `fluxrun check`: files, changed specs and made-up GPUs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.preflight import libraries
from tests.support.house import House

Patch = pytest.MonkeyPatch
Setup = Callable[[House, Patch], Path]


def text(name: str, content: str) -> Setup:
    """A file beside the spec, or in the pictures' folder."""

    def setup(house: House, _: Patch) -> Path:
        (house.folder / name).parent.mkdir(parents=True, exist_ok=True)
        house.write(name, content)
        return house.spec()

    return setup


def appended(more: str, **changes: str) -> Setup:
    def setup(house: House, _: Patch) -> Path:
        path = house.spec(**changes)
        path.write_text(path.read_text() + more)
        return path

    return setup


def gpu(*rows: str, more: str = "", **changes: str) -> Setup:
    """A machine with an nvidia-smi that says so, and a torch that can use what it says."""

    def setup(house: House, patch: Patch) -> Path:
        (house.folder / "bin").mkdir()
        tool = house.write("bin/nvidia-smi", "#!/bin/sh\n" + "".join(f"echo '{row}'\n" for row in rows))
        tool.chmod(0o755)
        patch.setenv("PATH", f"{house.folder / 'bin'}:{os.environ['PATH']}")
        patch.setenv("CUDA_VISIBLE_DEVICES", ",".join(row.split(",")[0] for row in rows))
        patch.setattr(libraries, "version_of", lambda name: "99.0")
        return appended(more, **changes)(house, patch)

    return setup
