"""A worker process as its queue sees it: it is started, given one run after another, read and stopped."""

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
from runner.core.hardware import visible_gpu_id

SHUTDOWN_SECONDS = 30.0  # for an idle worker to end by itself

# Environment of a worker that trains on the CPU. glibc's caches of small blocks are off: a tensor is aligned to 64
# bytes, which cuts a few bytes off its block; once a small object sits in them, the freed block no longer fits a tensor
# of the same size, and the heap grows by a quarter. The trim threshold keeps freed memory at the heap's end until
# `device.release`; given back in every backward pass, it would be requested and cleared again in every forward pass.
# MKL keeps no buffers between its calls.
CPU_ALLOCATOR_ENV = {
    "GLIBC_TUNABLES": ":".join(
        f"glibc.malloc.{name}"
        for name in ("tcache_count=0", "mxfast=0", "mmap_threshold=33554432", "trim_threshold=1073741824")
    ),
    "MKL_DISABLE_FAST_MM": "1",
}


class Worker:
    """The process. It first imports its libraries, then waits for runs.

    gpus: as --gpus takes them. threads: for the CPU. None leaves either to torch. exit_code: how the last run ended,
    None while it trains. After `ExitCode.DONE` the process waits for another run; after every other code it has ended.
    """

    def __init__(self, gpus: str | None, threads: int | None) -> None:
        command = [sys.executable, "-P", "-m", "runner", "_train", "--parent", str(os.getpid())]
        environment = dict(os.environ)
        if gpus in (None, "cpu"):
            environment = {**CPU_ALLOCATOR_ENV, **environment}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        if gpus is not None:
            command += ["--gpus", "cpu" if gpus == "cpu" else "0"]  # the first GPU that the worker sees
        if gpus is not None and gpus != "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(visible_gpu_id, gpus.split(",")))
        self._startup_output = tempfile.TemporaryFile()  # stderr until a run's log takes it  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._startup_output, env=environment,
            start_new_session=True,  # Ctrl-C reaches the queue alone, which passes it on once
        )  # fmt: skip
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self.exit_code: int | None = None
        self._leaked = False  # it has asked to be replaced
        self._log_file: Path | None = None  # of its run
        self._sent_events = False
        self._partial_line = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def accepts_runs(self) -> bool:
        """Whether the process lives and has not asked to be replaced."""
        return not self._leaked and self.process.poll() is None

    def submit(self, folder: Path, attempt: int, upcoming: Sequence[Path]) -> None:
        """Give an idle worker a run. `upcoming`: folders of runs that wait, whose captions may be encoded along with
        its own."""
        self.exit_code, self._log_file = None, folder / "run.log"
        request = {"folder": str(folder), "attempt": attempt, "upcoming": list(map(str, upcoming))}
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{json.dumps(request)}\n".encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            return  # the process has just died; `read_events` will notice

    def read_events(self) -> list[Event]:
        """The events sent since the last call. Sets `exit_code` where the run has ended."""
        while data := self._read():
            self._partial_line += data
        *lines, self._partial_line = self._partial_line.split(b"\n")
        events: list[Event] = [json.loads(line) for line in lines]
        self._sent_events = self._sent_events or bool(events)
        if done := [event for event in events if event["kind"] == "run_done"]:
            self.exit_code, self._leaked = ExitCode.DONE, bool(done[0]["leaked"])
        elif data is not None:  # end of file
            self.exit_code = self.process.wait() or ExitCode.CRASHED  # a run that is done sends an event first
            if not self._sent_events:
                self._log_startup_output()
        return [event for event in events if event["kind"] != "run_done"]

    def _read(self) -> bytes | None:
        """What is in the pipe: b"" at its end, None where there is nothing now."""
        assert self.process.stdout is not None
        try:
            return os.read(self.process.stdout.fileno(), 1 << 16)
        except BlockingIOError:
            return None

    def _log_startup_output(self) -> None:
        """Append what the process wrote before it could read its first request to that run's log."""
        self._startup_output.seek(0)
        if self._log_file is not None and (output := self._startup_output.read()):
            with contextlib.suppress(OSError), self._log_file.open("ab") as log:
                log.write(output)

    def request_stop(self) -> None:
        """Ask for a save and stop; asked a second time, the worker stops at once."""
        if self.accepts_runs:
            self.process.terminate()

    def kill(self) -> None:
        if self.accepts_runs:
            self.process.kill()

    def shutdown(self) -> None:
        """End the process: at once where it never had a run, else after what it does now."""
        if self._log_file is None:
            self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # a request that the process did not live to read
                    pipe.close()
        self._startup_output.close()
        try:
            self.process.wait(SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
