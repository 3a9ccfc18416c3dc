"""The fingerprint of a base model."""

from __future__ import annotations

from pathlib import Path

from runner.base.files import fingerprint
from tests.support.bases import BASE


def test_a_fine_tune_of_the_base_has_another_fingerprint(tmp_path: Path) -> None:
    import shutil

    shutil.copytree(BASE.folder, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == fingerprint(BASE.folder)
    weights = tmp_path / "copy" / "transformer" / "diffusion_pytorch_model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert fingerprint(tmp_path / "copy") != fingerprint(BASE.folder)
