"""The peak of a run's last phase, which trains the LoRA alone, against a bare loop over the transformer alone.

    python tools/bench/lora_memory.py [--model DIR] [--rounds 3] [--steps 10] [--optimizer prodigy]

Each in a process of its own, watched from outside: `fluxrun queue`, pivotal with CLIP and T5 (so the encoders have been
there, and shall be gone) and with frozen encoders (so T5 and the VAE have been there); and `bare.py`. Peaks are quoted
above what the bare import of the libraries takes, on either side; the ratio of the whole processes stands beside.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

from bench import SIZES, Asked, machine, model_in, parser_of, pictures_in, spread, state_of, table
from watch import BARE_IMPORTS, NOTHING, OUR_IMPORTS, Memory, fluxrun, imports, mib, watch

LAST = "lora"


def ours(asked: Asked, folder: Path) -> Memory:
    """Of the largest process while the state says that the last phase trains."""
    folder.mkdir()
    (folder / "a.toml").write_text(asked.text)
    run = folder / "runs" / "a"
    took = watch(
        fluxrun("queue", "a.toml", "--gpus", "cpu"), folder, folder / "log", lambda: state_of(run).get("phase", "")
    )
    peak = took.peaks.get(LAST, NOTHING)
    if peak == NOTHING:
        raise SystemExit(f"phase {LAST} was not seen; others: {', '.join(took.peaks)}; more steps are needed")
    return peak


def bare(asked: Asked, folder: Path) -> Memory:
    words = [str(asked.base), "--steps", str(asked.steps), "--optimizer", asked.optimizer]
    for name in ("resolution", "tokens", "batch", "rank"):
        words += [f"--{name}", str(getattr(asked, name))]
    script = Path(__file__).with_name("bare.py")
    return watch([sys.executable, str(script), *words], folder, folder / "bare.log").peak


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="of the last phase")
    parser.add_argument("--optimizer", choices=("adamw", "prodigy"), default="prodigy")
    given = parser.parse_args()
    print(machine())
    rows = [["run", "ours MiB", "bare MiB", "above imports (ours, bare)", "ratio above imports", "ratio of the whole"]]
    size = SIZES["model"]
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        model, pictures = model_in(given.model, folder), pictures_in(folder / "pictures")
        first = [imports(folder, code).peak.rss for code in (OUR_IMPORTS, BARE_IMPORTS)]
        print(f"imports alone: ours {mib(first[0])} MiB, bare {mib(first[1])} MiB")
        for name, encoders in {"pivotal CLIP+T5": ("clip", "t5"), "frozen encoders": ()}.items():
            steps = given.steps * (2 if encoders else 1)
            prompt = "a photo of TOK" if encoders else "a photo of a thing"
            asked = Asked(
                model, pictures, size.resolution, size.tokens, size.batch, size.rank, given.optimizer, encoders,
                steps=steps, prompt=prompt,
            )  # fmt: skip
            pairs = []
            for number in range(given.rounds):
                pairs.append((ours(asked, folder / f"{len(encoders)}-{number}"), bare(asked, folder)))
                for side, memory in zip(("ours", "bare"), pairs[-1], strict=True):
                    print(f"{name}: {side} {mib(memory.rss)} MiB, own {mib(memory.anon)}, of files {mib(memory.file)}")
            sides = [statistics.median(pair[at].rss for pair in pairs) for at in (0, 1)]
            above = [(one.rss - first[0], other.rss - first[1]) for one, other in pairs]
            rows.append([
                name, *map(mib, sides), ", ".join(mib(statistics.median(pair[at] for pair in above)) for at in (0, 1)),
                spread([one / other for one, other in above], 3),
                spread([one.rss / other.rss for one, other in pairs], 3),
            ])  # fmt: skip
    table(rows)


if __name__ == "__main__":
    main()
