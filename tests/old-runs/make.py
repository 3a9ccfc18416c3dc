"""Make a folder of old runs: `python tests/old-runs/make.py v2`. See README.md."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

SPEC = """
[model]
base = "builtin:tiny"
max_sequence_length = 32
[data]
source = "pictures"
resolution = 64
[[tokens]]
name = "TOK"
[inversion]
until = 0.75
lr = 1e-2
[lora]
rank = 1
layers = ["transformer_blocks.0.attn.to_q"]
[train]
steps = 4
batch_size = 1
lr = 1e-3
[checkpoint]
keep = 1
[track]
to = []
"""


def main(out: Path) -> None:
    from PIL import Image

    from tests.support.house import House
    from tests.support.runs import stopping_after

    out.mkdir()
    house = House.__new__(House)
    house.folder = out
    (out / "pictures").mkdir()
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (64, 64), colour).save(out / "pictures" / f"{number}.png")
        (out / "pictures" / f"{number}.txt").write_text(f"a {colour} TOK\n")
    for name in ("half", "whole"):
        house.write(f"{name}.toml", SPEC.lstrip())
    with stopping_after(2):
        assert house.fluxrun("queue", "half.toml").code == 3
    assert house.fluxrun("queue", "whole.toml").code == 0
    shutil.rmtree(out / "runs" / "cache")
    for name in ("half", "whole"):
        run = out / "runs" / name
        spec = run / "spec.toml"
        spec.write_text(spec.read_text().replace(str(out.resolve()), "/an/old/folder"))
        scrub(run / "state.json")
        log = run / "run.log"
        log.write_text(re.sub(r"^[\d-]+ [\d:]+", "2023-11-14 22:13:20", log.read_text(), flags=re.MULTILINE))
        (run / ".lock").unlink()
    scrub(out / "runs" / "index.jsonl")
    (out / "runs" / "index.html").unlink()  # made again by every queue, and full of paths
    shutil.rmtree(out / "runs" / ".slots")
    (out / "runs").rename(out / "night")  # `runs` is what git ignores


def scrub(path: Path) -> None:
    path.write_text(re.sub(r'"(started|finished|updated)": [\d.]+', r'"\1": 1700000000.0', path.read_text()))


if __name__ == "__main__":
    main(Path(__file__).parent / sys.argv[1])
