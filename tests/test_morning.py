"""The morning after: history, TensorBoard, results, compare."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import PROJECT, House
from nights import write_run
from PIL import Image

import runner
from runner.report.thumbnails import Thumbs, evenly
from runner.runs.sample_files import sample_tag
from runner.spec.schema import Token
from runner.tracking.history import History, read_history
from runner.tracking.hparams import FILE, write_board


@pytest.fixture
def night(tmp_path: Path) -> House:
    """Three runs, the second of which is the best."""
    house = House(tmp_path)
    for name, rank, loss in (("a", 4, 0.5), ("b", 8, 0.3), ("c", 16, 0.4)):
        write_run(tmp_path / "runs", name, rank=rank, loss=loss)
    return house


# ---- history -------------------------------------------------------------------------------------------------------


def test_history_survives_a_torn_line_and_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    first = History(path, 0)
    for step in range(1, 8):
        first.scalars({"train/loss": step / 10}, step)
    with path.open("a") as file:
        file.write('{"step": 8, "train/lo')  # killed
    assert list(read_history(path)["train/loss"]) == [1, 2, 3, 4, 5, 6, 7]
    resumed = History(path, 5)
    assert list(read_history(path)["train/loss"]) == [1, 2, 3, 4, 5]
    resumed.scalars({"train/loss": float("nan"), "train/lr": 1e-4}, 6)
    resumed.scalars({"train/loss": 9.0}, 7)
    resumed.scalars({"train/loss": 0.25}, 7)
    found = read_history(path)
    assert found["train/lr"] == {6: 1e-4}
    assert found["train/loss"] == {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4, 5: 0.5, 7: 0.25}


def test_history_takes_no_file_for_none_and_skips_what_is_no_line(tmp_path: Path) -> None:
    assert read_history(tmp_path / "none") == {}
    bad = tmp_path / "bad"
    bad.write_text(
        '[]\n{"step": "x"}\nnull\n{"step": 1, "a": "<b>", "c": 2, "d": 1' + "0" * 400 + "}\n\xff\n", encoding="latin-1"
    )
    assert read_history(bad) == {"c": {1: 2.0}}


def test_history_does_not_write_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("kept")
    (tmp_path / "history.jsonl").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic link"):
        History(tmp_path / "history.jsonl", 0).scalars({"x": 1.0}, 1)
    assert (tmp_path / "target").read_text() == "kept"


def test_a_real_run_writes_its_history(done: House) -> None:
    found = runner.history(done.folder / "runs", "a")
    assert list(found["train/loss"]) == [1, 2, 3, 4, 5, 6]
    assert list(found["rows/norm TOK clip"]) == [1, 2, 3]  # the rows are fixed after the pivot
    drift = list(found["rows/drift TOK t5"].values())
    assert 0 < drift[0] < drift[1] < drift[2]
    from safetensors.torch import load_file

    rows = load_file(done.folder / "runs" / "a" / "export" / "a_emb.safetensors")["clip_l"]
    assert found["rows/norm TOK clip"][3] == pytest.approx(float(rows.norm(dim=1).mean()), rel=2e-3)  # exported in bf16
    [record] = [one for one in runner.results(done.folder / "runs") if one.name == "a"]
    assert found["eval/loss"][6] == pytest.approx(record.eval_loss, rel=1e-5)


def test_norm_and_drift_are_a_tokens_own_and_a_mean_over_its_vectors() -> None:
    import torch

    from runner.data.tokens import placeholders
    from runner.training.encoders import LiveEncoder
    from runner.training.phases.train import row_sizes

    encoder = LiveEncoder("clip", torch.nn.Identity(), None, 1.0)
    encoder.first_rows = torch.tensor([[4.0, 0.0], [0.0, 4.0], [2.0, 0.0]])
    encoder.rows = torch.nn.Parameter(torch.tensor([[4.0, 3.0], [0.0, 5.0], [2.0, 0.0]]))
    context: Any = SimpleNamespace(
        plan=SimpleNamespace(placeholders=placeholders([Token(name="CAT"), Token(name="DOG", vectors=1)]))
    )
    assert row_sizes(context, {"clip": encoder}) == {
        "rows/norm CAT clip": 5.0,
        "rows/drift CAT clip": 0.5,  # 3 and 1, of a length of 4
        "rows/norm DOG clip": 2.0,
        "rows/drift DOG clip": 0.0,
    }
    encoder.rows.requires_grad_(False)
    assert row_sizes(context, {"clip": encoder}) == {}


# ---- TensorBoard ---------------------------------------------------------------------------------------------------


def loaded(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def hparams(folder: Path) -> dict[str, Any]:
    """What the HParams plugin finds of a run, by its own parsers."""
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    tags = loaded(folder).PluginTagToContent("hparams")
    found = {tag: plugin_data_pb2.HParamsPluginData.FromString(content) for tag, content in tags.items()}
    return {
        "experiment": found[metadata.EXPERIMENT_TAG].experiment,
        "start": found[metadata.SESSION_START_INFO_TAG].session_start_info,
        "end": found[metadata.SESSION_END_INFO_TAG].session_end_info
        if metadata.SESSION_END_INFO_TAG in found
        else None,
    }


def with_events(folder: Path) -> Path:
    """Events of a trainer, as far as the board asks."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))
    writer.add_scalar("eval/loss", 0.5, 1)
    writer.close()
    return folder


def test_hparams_of_a_night(night: House) -> None:
    runs = night.folder / "runs"
    with_events(runs / "a")
    with_events(write_run(runs, "d", state="failed", rank=32, error="the loss left the numbers"))
    write_board(runs)
    found = hparams(runs / "a")
    assert [info.name for info in found["experiment"].hparam_infos] == ["lora.rank"]  # alpha only repeats it
    assert list(found["experiment"].hparam_infos[0].domain_discrete) == [4, 8, 16, 32]
    assert [info.display_name for info in found["experiment"].metric_infos] == [
        "eval loss", "train loss", "s/step", "peak memory, GiB",
    ]  # fmt: skip
    assert found["start"].group_name == "a"
    assert found["start"].hparams["lora.rank"].number_value == 4
    assert found["start"].hparams["validate.prompts"].string_value.startswith("['a TOK on snow'")
    assert (found["end"].status, hparams(runs / "d")["end"].status) == (1, 2)  # success, failure
    assert not (runs / "b" / FILE).exists()  # TensorBoard knows nothing else of it


def test_a_run_that_failed_and_is_done_now_is_shown_as_done_once(night: House) -> None:
    folder = with_events(night.folder / "runs" / "a")
    state = json.loads((folder / "state.json").read_text())
    for now, status in (("stopped", None), ("failed", 2), ("done", 1)):
        (folder / "state.json").write_text(json.dumps({**state, "state": now}))
        write_board(night.folder / "runs")
        end = hparams(folder)["end"]
        assert (end and end.status) == status
    assert len(list(folder.glob("events.out.*"))) == 2


def test_layout_and_spec_are_there_for_their_plugins(night: House) -> None:
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    folder = with_events(night.folder / "runs" / "a")
    write_board(night.folder / "runs")
    events = loaded(folder)
    [layout] = [event.tensor_proto.string_val[0] for event in events.Tensors(metadata.CONFIG_SUMMARY_TAG)]
    titles = [category.title for category in layout_pb2.Layout.FromString(layout).category]
    assert titles == ["Losses", "Held-out loss by timestep", "Token rows", "Going"]
    assert "spec" in events.PluginTagToContent("text")
    [text] = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("spec")]
    assert "    [lora]\n    rank = 4\n" in text
    assert list(events.Scalars("eval/loss"))  # the board's own file hides nothing of the trainer's


def test_a_real_run_and_its_resume_are_one_session(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = house.spec(steps="steps = 2", lr="lr = 1e-2\nuntil = 1.0")
    with monkeypatch.context() as night:
        night.setattr("runner.engine.supervisor.publish", lambda *_: None)
        assert house.fluxrun("queue", spec).code == 0
    folder = house.folder / "runs" / "a"
    assert hparams(folder)["start"].hparams["train.steps"].number_value == 2  # before there is a morning
    spec.write_text(spec.read_text().replace("steps = 2\nbatch", "steps = 4\nbatch"))  # goes on
    said = house.fluxrun("queue", spec)
    assert said.code == 0, said.err
    assert "resuming at step 2 of 4" in said.err
    events = loaded(folder)
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert list(read_history(folder / "history.jsonl")["train/loss"]) == [1, 2, 3, 4]
    assert len(events.Tensors("_hparams_/session_start_info")) == 1
    assert hparams(folder)["start"].hparams["train.steps"].number_value == 4
    assert events.Scalars("run/s_per_step")[-1].step == 4
    assert (house.folder / "runs" / "index.html").is_file()  # written by the queue


def test_the_same_prompt_and_seed_have_the_same_tag() -> None:
    assert sample_tag("a TOK on snow", 3) == "samples/a-TOK-on-snow/3"
    others = [sample_tag(prompt, 3) for prompt in ("a TOK, on snow", "a TOK on snow!", "雪", "x" * 50, "x" * 60, "")]
    assert len(set(others)) == 6
    assert all(tag.count("/") == 2 for tag in others)


# ---- results and compare -------------------------------------------------------------------------------------------


def test_results_show_the_keys_that_differ(night: House) -> None:
    said = night.fluxrun("results", "--sort", "eval_loss")
    header, *rows = [line.split() for line in said.out.splitlines() if len(line.split()) > 3]
    assert header[:5] == ["run", "state", "eval", "loss", "lora.rank"]
    assert [row[:4] for row in rows] == [
        ["b", "done", "0.3000", "8"],
        ["c", "done", "0.4000", "16"],
        ["a", "done", "0.5000", "4"],
    ]
    by_rank = json.loads(night.fluxrun("results", "--json", "--sort", "lora.rank").out)
    assert [row["name"] for row in by_rank] == ["a", "b", "c"]
    assert by_rank[0]["spec"]["train.lr"] == 1e-3


def test_results_as_csv_load_into_pandas_and_parquet(night: House) -> None:
    import pandas

    write_run(night.folder / "runs", "odd", prompts=["=1+1", 'with "quotes", commas\nand lines'[:22]])
    spec = night.folder / "runs" / "odd" / "spec.toml"
    spec.write_text(spec.read_text().replace("resolution = 64", "resolution = [64, 96]"))
    said = night.fluxrun("results", "--csv")
    rows = list(csv.DictReader(io.StringIO(said.out)))
    assert [row["name"] for row in rows] == ["a", "b", "c", "odd"]
    assert [row["spec.data.resolution"] for row in rows] == ["64", "64", "64", "[64, 96]"]
    frame = pandas.read_csv(io.StringIO(said.out))
    assert frame.set_index("name").loc["b", "eval_loss"] == 0.3
    again = pandas.DataFrame(runner.table(runner.results(night.folder / "runs")))
    again.to_parquet(night.folder / "results.parquet")
    back = pandas.read_parquet(night.folder / "results.parquet")
    assert list(back["spec.lora.rank"]) == [4, 8, 16, 8]
    assert list(back["name"]) == ["a", "b", "c", "odd"]


def test_a_column_of_a_table_holds_one_kind_of_value() -> None:
    records = [
        runner.Record("a", "done", spec={"x": 1, "y": 1}),
        runner.Record("b", "done", spec={"x": "one", "y": 0.5}),
    ]
    assert [(row["spec.x"], row["spec.y"]) for row in runner.table(records)] == [("1", 1), ('"one"', 0.5)]


def test_compare_two_runs(night: House) -> None:
    said = night.fluxrun("compare", "b", "a", "--out", "sheet.png")
    assert said.code == 0, said.err
    lines = [line.split() for line in said.out.splitlines()]
    assert ["lora.rank", "8", "4"] in lines
    assert ["eval", "loss", "0.3000", "*", "0.5000"] in lines
    [sigma] = [line for line in lines if line[:1] == ["0.3"]]
    assert sigma == ["0.3", "0.2473", "0.4073", "+64.7", "%"]
    assert "a is below b at 0 of 9 noise levels" in said.out
    assert "do not compare" not in said.out
    with Image.open(night.folder / "sheet.png") as sheet:
        assert sheet.size == (2 * 200 + 8, 22 + 2 * 222)  # two runs wide, two prompts high
        left, right = sheet.getpixel((100, 100)), sheet.getpixel((300, 100))
    assert (left, right) == ((30, 255, 240), (30, 255, 120))  # rank is their blue


def test_compare_as_json_tells_when_losses_do_not_compare(night: House) -> None:
    spec = night.folder / "runs" / "c" / "spec.toml"
    spec.write_text(spec.read_text().replace("holdout = 2", "holdout = 1"))
    found = json.loads(night.fluxrun("compare", "a", "b", "c", "--json").out)
    assert found["runs"] == ["a", "b", "c"]
    assert found["differing"]["data.holdout"] == [2, 2, 1]
    assert found["comparable"] is False
    assert found["by_sigma"]["0.5"] == pytest.approx([0.509, 0.309, 0.409], abs=0.002)
    assert "these eval losses do not compare" in night.fluxrun("compare", "a", "c").out


def test_compare_refuses_what_it_cannot(night: House) -> None:
    assert night.fluxrun("compare", "a", "x", "y").err == (
        "fluxrun: no such run in runs: x, y; `fluxrun results` lists them\n"
    )
    assert "comparing takes two runs or more (found a)" in night.fluxrun("compare", "a", "a").err
    write_run(night.folder / "runs", "other", prompts=["another"])
    assert "share no picture" in night.fluxrun("compare", "a", "other", "--out", "x.png").err


def test_a_foreign_or_damaged_folder_is_read_as_far_as_it_can(night: House) -> None:
    runs = night.folder / "runs"
    write_run(runs, "foreign", eval_loss="<b>", steps=True, exports=["../../x", 3], versions=[1], wall_s=[2])
    (runs / "c" / "spec.toml").write_text("not [ toml")
    (runs / "a" / "spec.toml").write_text(f"seed = 1{'0' * 400}\nat = 2020-01-01\n")
    with_events(runs / "a")
    write_board(runs)
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


def test_thumbs_are_made_once_and_forgotten_with_their_picture(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.effect_noise((640, 480), 40).save(picture)
    thumbs = Thumbs(tmp_path)
    small = thumbs.of(picture)
    assert small is not None
    with Image.open(io.BytesIO(small)) as opened:
        assert (opened.format, opened.size) == ("WEBP", (160, 120))
    [made] = (tmp_path / ".thumbs").iterdir()
    made.write_bytes(b"from the cache")
    assert thumbs.of(picture) == b"from the cache"
    picture.write_bytes(b"no picture")
    again = Thumbs(tmp_path)
    assert again.of(picture) is None
    again.forget_others()
    assert not list((tmp_path / ".thumbs").iterdir())


def test_steps_are_chosen_evenly() -> None:
    assert evenly([5, 1, 3], 3) == [1, 3, 5]
    assert evenly(range(0, 101), 5) == [0, 25, 50, 75, 100]
    assert evenly(range(10), 2) == [0, 9]
    assert evenly(range(10), 1) == [9]


def test_a_resume_within_the_same_second_leaves_the_session_its_name(house: House) -> None:
    from runner.tracking.hparams import FILE
    from runner.tracking.trackers import _make_way

    later = f"events.out.tfevents.{int(time.time()) + 60}.host.1.0"
    for name in (FILE, later):
        (house.folder / name).write_bytes(b"")
    _make_way(house.folder)
    assert sorted(path.name for path in house.folder.glob("events*")) == [
        FILE,
        "events.out.tfevents.0000000000.host.1.0",
    ]
