"""TensorBoard's HParams page of a whole night."""

from __future__ import annotations

import json
import time

import pytest

from runner.tracking.history import read_history
from runner.tracking.hparams import EVENT_FILE, write_sessions
from tests.support.house import House
from tests.support.run_folders import write_run
from tests.support.tensorboard import hparams, loaded, with_events


def test_hparams_of_a_night(night: House) -> None:
    runs = night.folder / "runs"
    with_events(runs / "a")
    with_events(write_run(runs, "d", state="failed", rank=32, error="the loss left the numbers"))
    write_sessions(runs)
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
    assert not (runs / "b" / EVENT_FILE).exists()  # TensorBoard knows nothing else of it


def test_a_run_that_failed_and_is_done_now_is_shown_as_done_once(night: House) -> None:
    folder = with_events(night.folder / "runs" / "a")
    state = json.loads((folder / "state.json").read_text())
    for now, status in (("stopped", None), ("failed", 2), ("done", 1)):
        (folder / "state.json").write_text(json.dumps({**state, "state": now}))
        write_sessions(night.folder / "runs")
        end = hparams(folder)["end"]
        assert (end and end.status) == status
    assert len(list(folder.glob("events.out.*"))) == 2


def test_layout_and_spec_are_there_for_their_plugins(night: House) -> None:
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    folder = with_events(night.folder / "runs" / "a")
    write_sessions(night.folder / "runs")
    events = loaded(folder)
    [layout] = [event.tensor_proto.string_val[0] for event in events.Tensors(metadata.CONFIG_SUMMARY_TAG)]
    titles = [category.title for category in layout_pb2.Layout.FromString(layout).category]
    assert titles == ["Losses", "Held-out loss by timestep", "Token rows", "Training"]
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


def test_a_resume_within_the_same_second_leaves_the_session_its_name(house: House) -> None:
    from runner.tracking.hparams import EVENT_FILE
    from runner.tracking.trackers import _put_earlier_files_first

    later = f"events.out.tfevents.{int(time.time()) + 60}.host.1.0"
    for name in (EVENT_FILE, later):
        (house.folder / name).write_bytes(b"")
    _put_earlier_files_first(house.folder)
    assert sorted(path.name for path in house.folder.glob("events*")) == [
        EVENT_FILE,
        "events.out.tfevents.0000000000.host.1.0",
    ]
