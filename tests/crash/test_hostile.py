"""Files from elsewhere: a run folder, a spec, a picture, a base or a header can be refused, and that is all they can
do."""

from __future__ import annotations

import ast
import io
import json
import shutil
import struct
from pathlib import Path

import pytest
from PIL import Image

from runner.checkpoint import storage
from runner.core.errors import BadFileError
from tests.support.broken_runs import go_on, lora
from tests.support.house import House
from tests.support.paths import PROJECT
from tests.support.runs import stopping_after

BANNED = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
CALLS = {"torch.load", "torch.save", "yaml.load", "os.system", "eval", "exec", "compile", "__import__"}
WEIGHTS = {"FluxPipeline", "kind"}  # what is loaded by from_pretrained and holds weights
NO_WEIGHTS = {"AutoTokenizer", "FlowMatchEulerDiscreteScheduler"}


def dangers(source: str) -> list[str]:
    """What a file does that could make data run as code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.split(".")[0] in BANNED]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module or ""] if (node.module or "").split(".")[0] in BANNED else []
        elif isinstance(node, ast.Call):
            called, named = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
            found += [called] if called in CALLS else []
            found += [f"{called} {name}" for name in ("trust_remote_code", "shell", "allow_pickle") if name in named]
            owner, _, method = called.rpartition(".")
            if method == "from_pretrained" and owner not in NO_WEIGHTS:
                safe = owner in WEIGHTS and ast.unparse(named.get("use_safetensors", ast.Constant(None))) == "True"
                found += [] if safe else [f"{called} without use_safetensors"]
    return found


def test_no_data_is_run_as_code() -> None:
    files = sorted((PROJECT / "runner").rglob("*.py"))
    assert len(files) > 40
    assert {file.name: dangers(file.read_text()) for file in files if dangers(file.read_text())} == {}


@pytest.mark.parametrize("line", [
    "import pickle", "from joblib import load", "torch.load(path)", "eval(text)", "kind.from_pretrained(folder)",
    "Other.from_pretrained(folder, use_safetensors=True)", "load_dataset(name, trust_remote_code=True)",
    "subprocess.run(text, shell=True)", "np.load(path, allow_pickle=True)", "FluxPipeline.from_pretrained(f, use_safetensors=None)",
])  # fmt: skip
def test_control_the_walk_finds_what_it_looks_for(line: str) -> None:
    assert len(dangers(line)) == 1


def test_a_base_of_pickles_is_refused(house: House) -> None:
    from runner.base.files import BUILTIN

    base = house.folder / "base"
    shutil.copytree(BUILTIN["builtin:tiny"], base)
    for weights in (base / "text_encoder").glob("*.safetensors"):
        weights.with_name("pytorch_model.bin").write_bytes(b"a pickle would be here")
        weights.unlink()
    said = house.fluxrun("queue", lora(house, base='base = "base"'), "--no-check")
    assert said.code == 1
    assert (
        f"a: failed: model.base: {base}/text_encoder has no .safetensors file; other weights (.bin, .ckpt) can run code when "
        "they are read, so fluxrun does not: save the model again with safe_serialization=True"
    ) in said.err
    assert "trying again" not in said.err


# ---- run folders ---------------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["checkpoints", "export", "samples", "quarantine", "run.log", ".lock"])
def test_links_out_of_a_run_folder_are_refused(house: House, name: str) -> None:
    outside = house.folder / "outside"
    outside.mkdir()
    (outside / "run.log").write_text("precious")
    run = house.folder / "runs" / "a"
    run.mkdir(parents=True)
    (run / name).symlink_to(outside / "run.log" if name in ("run.log", ".lock") else outside)
    said = house.fluxrun("queue", lora(house), "--no-check")
    assert said.code == 1
    link = f"runs/a/{name} is a symbolic link; fluxrun writes only inside a run's own folder: take it away"
    assert said.err == f"a: not run: {link}\n"
    assert tree(outside) == {"run.log": b"precious"}


GARBAGE = {
    "list": b"[1, 2]",
    "empty": b"",
    "deep": b"[" * 100_000,
    "noise": bytes(range(256)) * 9,
    "zeros": bytes(512),
    "number": b"1e999",
    "long number": b"9" * 5000,
    "wrong kinds": json.dumps({
        "state": "done", "name": [], "exports": 7, "steps": "many", "step": {}, "wall_s": "x", "train_loss": 1e300,
        "eval_loss": float("nan"), "error": 5, "split": [], "attempts": "[red]", "peak_memory_bytes": 10**400,
        "started": None, "versions": [], "phases": 3, "key": 1, "training_key": {}, "attempt": [1],
        "holder": {"host": 1}, "class images": [],
    }).encode(),
    "no state": b'{"step": 3}',
    "strange holder": b'{"attempt": 1, "holder": {"host": "HOST", "boot": "BOOT", "pid": -1, "started": null}}',
    "huge pid": b'{"attempt": 1, "holder": {"host": "HOST", "boot": "BOOT", "pid": 99999999999999999999, "started": 1}}',
}  # fmt: skip


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> House:
    """A run that was stopped at step 2 of 4."""
    house = House(tmp_path_factory.mktemp("stopped"))
    with stopping_after(2):
        assert house.fluxrun("queue", lora(house)).code == 3
    return house


@pytest.fixture
def again(stopped: House, tmp_path: Path) -> House:
    shutil.copytree(stopped.folder / "runs", tmp_path / "runs")
    house = House(tmp_path)
    lora(house)
    return house


def damage(house: House, name: str, kind: str) -> None:
    from runner.core.process_identity import Process

    own = Process.current()
    text = GARBAGE[kind].replace(b"HOST", own.host.encode()).replace(b"BOOT", own.boot.encode())
    (house.folder / "runs" / "a" / name).write_bytes(text)


FILES = ["state.json", "plan.json", "lease.json", "pins.json", "spec.toml"]


@pytest.mark.parametrize("name", FILES)
def test_garbage_in_a_run_folder_gives_no_traceback(again: House, name: str) -> None:
    """`House.fluxrun` raises what is not an exit."""
    before = tree(again.folder / "pictures")
    for kind in GARBAGE:
        damage(again, name, kind)
        for command in (("status",), ("status", "--json"), ("results",), ("results", "--json", "--sort", "steps")):
            assert again.fluxrun(*command).code == 0, (kind, command)
        assert again.fluxrun("plan", "a.toml").code == 0, kind  # whose run it is, the other files still tell
    assert tree(again.folder / "pictures") == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "wrong kinds") for name in FILES[:4]), ("state.json", "deep"), ("lease.json", "strange holder"),
     ("plan.json", "empty"), ("lease.json", "huge pid")],
)  # fmt: skip
def test_the_same_command_goes_on_over_garbage(again: House, name: str, kind: str) -> None:
    damage(again, name, kind)
    said = go_on(again, "a.toml")
    assert "resuming at step 2 of 4" in said.err


@pytest.mark.parametrize("kind", ["noise", "deep", "number"])
def test_a_run_of_which_nothing_can_be_read_is_another_one(again: House, kind: str) -> None:
    damage(again, "spec.toml", kind)
    damage(again, "plan.json", kind)
    said = again.fluxrun("queue", "a.toml")
    assert said.code == 2
    assert "runs/a holds another run: its spec.toml cannot be read (" in said.err


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def packed(header: bytes | object, data: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, stop: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


META = {"__metadata__": {"format": "1", "phase": "lora", "phase_key": "k", "step": "2", "scalars": "{}", "sha256": "x"}}
HEADERS: dict[str, bytes] = {
    "nothing": b"",
    "a part of a length": b"\x01\x00",
    "an absurd length": packed(META, length=2**63),
    "a length past the end": packed(META, length=10**6),
    "length 0": packed(b""),
    "a list": packed([1]),
    "deep": packed(b"[" * 100_000),
    "no metadata": packed({"a": entry(0, 8)}),
    "metadata that is a list": packed({"__metadata__": []}),
    "metadata of numbers": packed({"__metadata__": {"format": 1}}),
    "overlap": packed({**META, "lora/a": entry(0, 8), "lora/b": entry(4, 8)}),
    "past the end": packed({**META, "lora/a": entry(0, 4000)}),
    "backwards": packed({**META, "lora/a": entry(8, 0, [2])}),
    "a hole": packed({**META, "lora/a": entry(4, 8)}),
    "huge shape": packed({**META, "lora/a": entry(0, 8, [2**40, 2**40])}),
    "negative shape": packed({**META, "lora/a": entry(0, 8, [-2])}),
    "unknown kind": packed({**META, "lora/a": entry(0, 8, dtype="PICKLE")}),
    "a name with ../": packed({**META, "../../../etc/x": entry(0, 8)}),
    "a name with NUL": packed({**META, "lora/a\0b": entry(0, 8)}),
    "the same name twice": packed(
        b'{"__metadata__":' + json.dumps(META["__metadata__"]).encode()
        + b',"lora/a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"lora/a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADERS)
def test_a_hostile_header_is_a_bad_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "step-000002.safetensors"
    path.write_bytes(HEADERS[kind])
    with pytest.raises(BadFileError, match="step-000002"):
        storage.read(path)
    assert list(tmp_path.iterdir()) == [path]


def test_hostile_checkpoints_are_set_apart_and_the_run_goes_on(again: House) -> None:
    folder = again.folder / "runs" / "a" / "checkpoints"
    for step, data in enumerate(HEADERS.values(), 1000):
        (folder / f"step-{step:06d}.safetensors").write_bytes(data)
    said = go_on(again, "a.toml")
    assert "resuming at step 2 of 4" in said.err
    assert len(list((again.folder / "runs" / "a" / "quarantine").glob("*.safetensors-*"))) >= len(HEADERS)


# ---- specs and pictures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "a/b/c", ".hidden", "a\\u0000b", "a\\nb", ""])
def test_a_runs_name_stays_below_the_runs_folder(house: House, name: str) -> None:
    before = tree(house.folder)
    spec = lora(house)
    spec.write_text(f'name = "{name}"\n' + spec.read_text())
    said = house.fluxrun("queue", spec)
    assert said.code == 2
    assert ": name: " in said.err
    assert {path: data for path, data in tree(house.folder).items() if path != "a.toml"} == before


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    image = Image.new("RGB", (64, 64), "red")
    if kind in ("EPS", "PDF", "ICO", "PPM", "TGA"):
        image.save(buffer, kind)
        return buffer.getvalue()
    image.save(buffer, "PNG")
    data = buffer.getvalue()
    if kind == "truncated":
        return data[: len(data) // 2]
    if kind == "bomb":  # 100,000 x 100,000 by its header
        return data[:16] + struct.pack(">II", 100_000, 100_000) + data[24:]
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n"


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "PPM", "TGA", "truncated", "bomb", "postscript"])
def test_a_picture_that_is_none_of_ours_is_refused_by_name(
    house: House, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Whatever its suffix says; and no program is started to look at it."""
    import subprocess

    def started(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    from runner.data import images, sources

    path = house.folder / "pictures" / "9.png"
    path.write_bytes(picture(kind))
    (house.folder / "pictures" / "9.txt").write_text("a TOK")
    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(subprocess, "call", started)
    [bad] = [
        one for one in sources.read_folder(house.folder / "pictures", "image", None, None).items if one.name == "9.png"
    ]
    from runner.core.errors import FluxrunError

    with pytest.raises(FluxrunError, match=r"pictures/9\.png: not a readable image"):
        images.decode(bad)
    if kind == "EPS":
        said = house.fluxrun("queue", lora(house), "--no-check")
        assert said.code == 1
        assert f"a: failed: {path}: not a readable image (cannot identify image file" in said.err


def test_class_images_and_columns_are_opened_as_narrowly(tmp_path: Path) -> None:
    from datasets import Dataset

    from runner.core.errors import FluxrunError
    from runner.data import class_images, images, sources

    (tmp_path / "1.png").write_bytes(picture("EPS"))
    [one] = class_images.class_pictures(tmp_path, 1, "a thing")
    (tmp_path / "rows").mkdir()
    rows = {"image": [{"bytes": picture("EPS"), "path": "1.png"}], "text": ["a thing"]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "rows" / "0.parquet")
    source = sources.DatasetSource(str(tmp_path / "rows" / "0.parquet"), None, "train", "image", "text", None)
    [two] = sources.read_source(source).items
    for bad in (one, two):
        with pytest.raises(FluxrunError, match="not a readable image"):
            images.decode(bad)


BOOK = {"user-cache/fluxrun/pace.json", "user-cache/fluxrun/.pace.lock"}  # what a step took on this machine


def test_a_night_writes_below_its_runs_folder_and_the_machines_book_alone(house: House) -> None:
    lora(house)
    before = tree(house.folder)
    go_on(house, "a.toml")
    after = tree(house.folder)
    assert {path for path in after if not path.startswith("runs/")} == set(before) | BOOK
    assert all(after[path] == data for path, data in before.items())
