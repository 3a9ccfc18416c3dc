"""Files are replaced whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.core import files


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    files.write_text(path, "old")

    def broken() -> list[bytes]:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_bytes(path, (broken() for _ in range(1)))  # type: ignore[misc]
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]
    for stale in (".state.json.7.partial", ".export.partial/x"):  # of a process that was killed
        (tmp_path / stale).parent.mkdir(exist_ok=True)
        (tmp_path / stale).write_text("half")
    files.remove_partial_files(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]
