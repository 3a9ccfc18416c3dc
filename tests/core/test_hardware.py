"""How much memory a process may use, on a machine and in a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.core import hardware

GIB = 2**30


@pytest.mark.parametrize(
    ("limit", "available"),
    [
        ("max", 12),  # no limit: MemAvailable and SwapFree
        (str(6 * GIB), 3),  # 4 GiB in use, 1 of them file pages that can be dropped
        (str(100 * GIB), 12),
        (None, 12),  # no control group
    ],
)
def test_a_containers_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None, available: int
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 33554432 kB\nMemAvailable: 10485760 kB\nSwapFree: 2097152 kB\n")
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{4 * GIB}\n")
        (tmp_path / "memory.stat").write_text(f"anon 5\nactive_file {GIB // 2}\ninactive_file {GIB // 2}\n")
    monkeypatch.setattr(hardware, "MEMINFO", meminfo)
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    assert hardware.memory_available() == available * GIB


def test_where_the_kernel_does_not_say_nothing_is_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(hardware, "MEMINFO", meminfo)
    assert hardware.memory_available() is None
    meminfo.write_text("MemTotal: 33554432 kB\nMemFree: 1024 kB\n")
    assert hardware.memory_available() is None
