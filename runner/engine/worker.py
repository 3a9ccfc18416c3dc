"""One trainer process as its queue sees it. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from runner.core.errors import ExitCode
from runner.core.events import Event
from runner.core.hardware import seen

PATIENCE = 30.0  # seconds for an idle trainer to go

# Of a trainer on a CPU. glibc's caches of small pieces, off: a tensor is aligned to 64 bytes, which cuts a few off its block;
# once something small sits in these, the freed block no longer fits a tensor of the same size, and the heap grows by a
# quarter. What the heap frees at its end stays, until `device.release`: given back in every backward pass, it would be
# asked for and cleared again in every forward pass. MKL keeps no buffers between its calls.
HEAP = {
    "GLIBC_TUNABLES": ":".join(
        f"glibc.malloc.{name}"
        for name in ("tcache_count=0", "mxfast=0", "mmap_threshold=33554432", "trim_threshold=1073741824")
    ),
    "MKL_DISABLE_FAST_MM": "1",
}


class Worker:
    """The process, which begins with importing its libraries and waits to be told a run. `code` is None while a run goes on;
    after Code.DONE it waits for another one.

    gpus: as --gpus takes them; threads: how many it may compute with on the CPU; None leaves either to torch.
    """

    def __init__(self, gpus: str | None, threads: int | None) -> None:
        command = [sys.executable, "-P", "-m", "runner", "_train", "--parent", str(os.getpid())]
        environment = dict(os.environ)
        if gpus in (None, "cpu"):
            environment = {**HEAP, **environment}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        if gpus is not None:
            command += ["--gpus", "cpu" if gpus == "cpu" else "0"]  # the first of those it sees
        if gpus is not None and gpus != "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(seen, gpus.split(",")))
        self._said = tempfile.TemporaryFile()  # until it has a run, whose log takes the rest  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, env=environment,
            start_new_session=True,  # Ctrl-C reaches the queue alone, which passes it on once
        )  # fmt: skip
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self.code: int | None = None
        self.worn = False  # it says that it had better end
        self._log: Path | None = None  # of its run
        self._began = False
        self._rest = b""

    def order(self, folder: Path, attempt: int, later: Sequence[Path]) -> None:
        """A run, for a process that has none. `later`: folders of runs that wait for their turn."""
        self.code, self._log = None, folder / "run.log"
        told = {"folder": str(folder), "attempt": attempt, "later": list(map(str, later))}
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{json.dumps(told)}\n".encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            return  # it has just died, as `poll` will find

    def poll(self) -> list[Event]:
        """What it has said since the last call."""
        while data := self._read():
            self._rest += data
        *lines, self._rest = self._rest.split(b"\n")
        events: list[Event] = [json.loads(line) for line in lines]
        self._began = self._began or bool(events)
        if done := [event for event in events if event["say"] == "done"]:
            self.code, self.worn = ExitCode.DONE, bool(done[0]["worn"])
        elif data is not None:
            self.code = self.process.wait() or ExitCode.CRASHED  # one that is done says so before it goes
            if not self._began:
                self._pass_on()
        return [event for event in events if event["say"] != "done"]

    def _pass_on(self) -> None:
        """What it said before it could read its first order, into the log of that run."""
        self._said.seek(0)
        if self._log is not None and (said := self._said.read()):
            with contextlib.suppress(OSError), self._log.open("ab") as log:
                log.write(said)

    def _read(self) -> bytes | None:
        """b"" at the end, None where there is nothing now."""
        assert self.process.stdout is not None
        try:
            return os.read(self.process.stdout.fileno(), 1 << 16)
        except BlockingIOError:
            return None

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def lives(self) -> bool:
        """Whether it can be told another run."""
        return not self.worn and self.process.poll() is None

    def ask(self) -> None:
        """Save and stop; asked again, stop at once."""
        if self.lives:
            self.process.terminate()

    def kill(self) -> None:
        if self.lives:
            self.process.kill()

    def dismiss(self) -> None:
        """No more runs."""
        if self._log is None:  # nothing of anybody's is in it
            self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # an order that it did not live to read
                    pipe.close()
        self._said.close()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
