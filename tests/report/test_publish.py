"""What is published when a night ends, and how run folders are read back."""

from __future__ import annotations

import shutil
import subprocess
import sys

import runner
from runner.tracking.hparams import write_sessions
from tests.support.house import House
from tests.support.paths import PROJECT
from tests.support.run_folders import write_run
from tests.support.tensorboard import with_events

# ---- history -------------------------------------------------------------------------------------------------------


# ---- TensorBoard ---------------------------------------------------------------------------------------------------


# ---- results and compare -------------------------------------------------------------------------------------------


def test_a_foreign_or_damaged_folder_is_read_as_far_as_it_can(night: House) -> None:
    runs = night.folder / "runs"
    write_run(runs, "foreign", eval_loss="<b>", steps=True, exports=["../../x", 3], versions=[1], wall_s=[2])
    (runs / "c" / "spec.toml").write_text("not [ toml")
    (runs / "a" / "spec.toml").write_text(f"seed = 1{'0' * 400}\nat = 2020-01-01\n")
    with_events(runs / "a")
    write_sessions(runs)
    (runs / "b" / "state.json").write_text('{"state": 7}')
    records = {record.name: record for record in runner.results(runs)}
    assert (records["foreign"].eval_loss, records["foreign"].exports, records["foreign"].versions) == (None, [], {})
    assert records["c"].spec == {}
    assert (records["b"].state, records["b"].eval_loss) == ("stopped", None)
    for command in (["results"], ["results", "--csv"], ["report"], ["compare", "foreign", "c"]):
        assert night.fluxrun(*command).code == 0


def test_importing_runner_and_reading_results_is_cheap(night: House) -> None:
    shutil.copytree(night.folder / "runs", night.folder / "other")
    code = (
        "import sys, runner\n"
        "assert not [name for name in sys.modules if name.startswith('runner.')]\n"
        "runner.Record; records = runner.results('other'); runner.history('other', 'a')\n"
        "import runner.report.publish, runner.report.compare\n"
        "from pathlib import Path\n"
        "runner.report.publish.publish(Path('other'), print)\n"
        "runner.report.compare.write_sheet(Path('other'), ['a', 'b'], Path('sheet.png'))\n"
        "list(runner.report.compare.as_tables(runner.report.compare.compare(Path('other'), ['a', 'b']), 80))\n"
        "assert {'torch', 'diffusers', 'transformers', 'pandas'}.isdisjoint(sys.modules), 'heavy'\n"
        "print(len(records))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=night.folder, env={"PYTHONPATH": str(PROJECT)}, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("3\n", "")


# ---- thumbnails ----------------------------------------------------------------------------------------------------
