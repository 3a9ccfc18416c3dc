"""A run on several GPUs: the worker process is rank 0 and starts one helper process for each other rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from runner.core.errors import FluxrunError
from runner.core.events import EventLog
from runner.core.process_identity import exit_with_parent
from runner.data import sources
from runner.jobs.data_sets import data_source
from runner.jobs.prepare import plan_of
from runner.model import device, libraries
from runner.runs.run import Run
from runner.spec.schema import Spec, dump
from runner.training.context import RunContext, open_base, open_cache
from runner.training.distributed import Ranks
from runner.training.run import assist_rank


@contextmanager
def train_on_ranks(
    spec: Spec, key: str, runs: Path, torch_device: torch.device, micro_batch_parts: int
) -> Iterator[Ranks]:
    """The run's ranks, connected; the helpers end with the context.

    key: the plan's key; each helper plans the run itself and compares. Raises FluxrunError where this machine has fewer
    GPUs than the spec asks for.
    """
    count = spec.compute.gpus
    if count == 1:
        yield Ranks()
        return
    if torch_device.type == "cuda" and torch.cuda.device_count() < count:
        raise FluxrunError(f"compute.gpus is {count}, this machine has {torch.cuda.device_count()}; lower it")
    helpers = []
    ranks = Ranks(0, count)
    store = ranks.meet()
    try:
        for rank in range(1, count):
            request = {"spec": dump(spec), "runs": str(runs.resolve()), "rank": rank, "count": count, "port": store.port,
                       "device": torch_device.type, "key": key, "micro_batch_parts": micro_batch_parts, "parent": os.getpid()}  # fmt: skip
            # -P: import nothing from the user's folder
            command = [sys.executable, "-P", "-m", "runner.engine.multi_gpu"]
            helper = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
            helpers.append(helper)
            assert helper.stdin is not None
            helper.stdin.write(json.dumps(request))
            helper.stdin.close()
        if torch_device.type == "cpu":
            torch.set_num_threads(max(1, torch.get_num_threads() // count))
        ranks.join(store, torch_device)
        yield ranks
    finally:
        ranks.leave()
        for helper in helpers:
            helper.terminate()
            helper.wait()


def main() -> None:
    """A helper process: it reads its request from stdin and trains along; rank 0 alone writes files.

    Raises FluxrunError where its plan is not rank 0's.
    """
    request = json.load(sys.stdin)
    exit_with_parent(request["parent"])
    spec = Spec.model_validate(request["spec"])
    ranks = Ranks(request["rank"], request["count"])
    torch_device = torch.device("cuda", ranks.rank) if request["device"] == "cuda" else torch.device("cpu")
    device.prepare_device(torch_device, tf32=spec.model.tf32)
    libraries.quiet()
    if torch_device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks.count))
    pictures = sources.read_source(data_source(spec)).hold_out(spec.data.holdout)
    plan = plan_of(spec, pictures)
    if plan.key != request["key"]:
        raise FluxrunError("the data changed while the run was starting; start it again")
    runs = Path(request["runs"])
    cache = open_cache(runs)
    base = open_base(spec, torch_device, cache)
    ranks.join(ranks.find(request["port"]), torch_device)
    try:
        parts = request["micro_batch_parts"]
        context = RunContext(spec, plan, pictures, base, cache, EventLog(), ranks, lambda: False, parts)
        assist_rank(Run(runs, spec.name), context)
    finally:
        ranks.leave()


if __name__ == "__main__":
    main()
