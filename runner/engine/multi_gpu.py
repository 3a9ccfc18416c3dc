"""A run on several GPUs: this process is rank 0, the others are started here and end with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from runner.cache.store import Cache
from runner.core.errors import FluxrunError
from runner.core.process_identity import exit_with_parent
from runner.data import sources
from runner.jobs.data_sets import data_source
from runner.jobs.prepare import plan_of
from runner.model import device
from runner.model.flux1 import loading
from runner.runs.run import Run
from runner.spec.schema import Spec, dump
from runner.training.distributed import Ranks
from runner.training.run import assist_rank


@contextmanager
def train_on_ranks(spec: Spec, key: str, runs: Path, where: torch.device, split: int) -> Iterator[Ranks]:
    """Ranks for this run, joined. Raises FluxrunError where there are not as many GPUs as the spec asks for.

    `key`: the plan's, which every rank must come to by itself.
    """
    count = spec.compute.gpus
    if count == 1:
        yield Ranks()
        return
    if where.type == "cuda" and torch.cuda.device_count() < count:
        raise FluxrunError(f"compute.gpus is {count}, this machine has {torch.cuda.device_count()}; lower it")
    helpers = []
    ranks = Ranks(0, count)
    store = ranks.meet()
    try:
        for rank in range(1, count):
            order = {"spec": dump(spec), "runs": str(runs.resolve()), "rank": rank, "count": count, "port": store.port,
                     "device": where.type, "key": key, "split": split, "parent": os.getpid()}  # fmt: skip
            command = [sys.executable, "-P", "-m", "runner.engine.multi_gpu"]  # -P: whatever lies where the user stands
            helper = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
            helpers.append(helper)
            assert helper.stdin is not None
            helper.stdin.write(json.dumps(order))
            helper.stdin.close()
        if where.type == "cpu":
            torch.set_num_threads(max(1, torch.get_num_threads() // count))
        ranks.join(store, where)
        yield ranks
    finally:
        ranks.leave()
        for helper in helpers:
            helper.terminate()
            helper.wait()


def main() -> None:
    """A helper: reads its orders from stdin, trains along, writes nothing."""
    order = json.load(sys.stdin)
    exit_with_parent(order["parent"])
    spec = Spec.model_validate(order["spec"])
    ranks = Ranks(order["rank"], order["count"])
    where = torch.device("cuda", ranks.rank) if order["device"] == "cuda" else torch.device("cpu")
    device.prepare_device(where, tf32=spec.model.tf32)
    loading.quiet()
    if where.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks.count))
    pictures = sources.read_source(data_source(spec)).hold_out(spec.data.holdout)
    plan = plan_of(spec, pictures)
    if plan.key != order["key"]:
        raise FluxrunError("the data changed while the run was starting; start it again")
    model, runs = spec.model, Path(order["runs"])
    cache, dtype = Cache(runs / "cache"), device.resolve_dtype(model.dtype, where)
    base = loading.open_base(
        model.base, model.revision, model.variant, where, dtype, model.quantize, cache.folder, model.offload == "blocks"
    )
    ranks.join(ranks.find(order["port"]), where)
    try:
        assist_rank(Run(runs, spec.name), spec, plan, pictures, base, cache, ranks, order["split"])
    finally:
        ranks.leave()


if __name__ == "__main__":
    main()
