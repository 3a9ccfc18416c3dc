"""A lock has one holder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.core import locks
from runner.core.errors import LockHeldError
from tests.support.paths import PROJECT


def test_a_lock_has_one_holder_and_dies_with_it(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    code = (
        f"import time\nfrom pathlib import Path\nfrom runner.core import locks\nwith locks.hold_lock(Path({str(lock)!r})):\n"
        "    print(1, flush=True)\n    time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(PROJECT)}
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    assert locks.is_locked(lock)
    with (
        pytest.raises(LockHeldError, match=f"process {holder.pid} is working on it"),
        locks.hold_lock(lock, timeout=0),
    ):
        pass
    holder.kill()
    holder.wait()
    assert not locks.is_locked(lock)
    with locks.hold_lock(lock, timeout=0):
        pass
