"""Watch a command from outside: its wall and CPU seconds, and the memory of its processes, looked at every 20 ms in
/proc.

From outside and for both sides of a comparison alike: a process that counts its own peak counts it its own way (fluxrun
begins anew in every phase, the kernel's `ru_maxrss` with it).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TICK = 0.02  # seconds between two looks
OWN = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Memory:
    """Bytes resident: all of it, what is the process's own, and what maps a file (libraries, and weights read by
    mmap)."""

    rss: int
    anon: int
    file: int


NOTHING = Memory(0, 0, 0)


@dataclass
class Watched:
    """What a command took. cpu: seconds of all its processes, user and system. peaks: of its largest process, by what
    `label` said at the time; tree: the most all of its processes held together (what they share counted again)."""

    wall: float
    cpu: float
    peaks: dict[str, Memory] = field(default_factory=dict)
    tree: int = 0

    @property
    def peak(self) -> Memory:
        return max(self.peaks.values(), key=lambda memory: memory.rss, default=NOTHING)


def watch(
    command: Sequence[str], folder: Path, log: Path, label: Callable[[], str] = lambda: "", *,
    then: Callable[[int], bool] = lambda _: False,
) -> Watched:  # fmt: skip
    """Run `command` in `folder`, what it says into `log`. `then` is called with its pid at every look; True asks it to
    stop.

    Raises SystemExit with the end of the log where it fails by itself.
    """
    began, peaks, tree, asked = time.perf_counter(), dict[str, Memory](), 0, False
    with log.open("ab") as out:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, env=environment())
    try:
        while True:
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            held = [memory_of(one) for one in family(process.pid)]
            largest, now = max(held, key=lambda memory: memory.rss, default=NOTHING), label()
            if largest.rss > peaks.get(now, NOTHING).rss:
                peaks[now] = largest
            tree = max(tree, sum(memory.rss for memory in held))
            if not asked and then(process.pid):
                process.terminate()
                asked = True
            time.sleep(TICK)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode and not asked:
        raise SystemExit(
            f"{' '.join(command)}\nended with code {process.returncode}:\n{log.read_text(errors='replace')[-3000:]}"
        )
    return Watched(wall, used.ru_utime + used.ru_stime, peaks, tree)


def environment() -> dict[str, str]:
    """This one's, with the fluxrun that this file belongs to, and without the hub."""
    paths = [str(OWN), *filter(None, [os.environ.get("PYTHONPATH")])]
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    return {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(paths)}


def family(pid: int) -> list[int]:
    """The process and all that descend from it."""
    found, unseen = [], [pid]
    while unseen:
        one = unseen.pop()
        found.append(one)
        try:
            for thread in Path(f"/proc/{one}/task").iterdir():
                unseen += map(int, (thread / "children").read_text().split())
        except OSError:
            continue  # it has just gone
    return found


def memory_of(pid: int) -> Memory:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just gone
        return NOTHING
    kib = {
        line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmRSS", "RssAnon", "RssFile"))
    }
    return Memory(*(kib.get(name, 0) * 1024 for name in ("VmRSS", "RssAnon", "RssFile")))


def fluxrun(*arguments: str | Path) -> list[str]:
    """The command line of fluxrun, as its installed script would start it."""
    return [sys.executable, "-m", "runner", *map(str, arguments)]


OUR_IMPORTS = "from runner.model import libraries; import runner.engine.worker_main; libraries.preload_libraries()"
BARE_IMPORTS = """
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import CLIPTextModel, T5EncoderModel
import accelerate, peft, prodigyopt
"""


def imports(folder: Path, code: str) -> Watched:
    """What a process takes that imports and does nothing else."""
    return watch([sys.executable, "-c", code], folder, folder / "imports.log")


def mib(number: float) -> str:
    return f"{number / 2**20:.0f}"
