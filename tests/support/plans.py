"""A small spec and the facts that a plan needs."""

from __future__ import annotations

from pathlib import Path

from runner.plan.phases import Facts
from runner.spec.loader import load
from runner.spec.schema import Spec

FACTS = Facts(("a TOK",), 8, "data", "base", None)


def spec_of(tmp_path: Path, extra: str = "") -> Spec:
    path = tmp_path / "a.toml"
    model = '[model]\nbase = "builtin:tiny"\n'
    if extra.startswith("[model]"):
        model, extra = model + extra.removeprefix("[model]\n"), ""
    path.write_text(model + '[data]\nsource = "x"\n[train]\nsteps = 7\n' + extra)
    return load([path])[0].spec


TOKENS = '[[tokens]]\nname = "TOK"\n'
