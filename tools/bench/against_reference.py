"""Whole processes, interleaved: diffusers' `train_dreambooth_lora_flux_advanced.py` and `fluxrun queue`, doing the
same.

    python tools/bench/against_reference.py --script SCRIPT [--model DIR] [--rounds 3] [--cases ...] [--slots 1 2]
        [--checkpointing selective]

SCRIPT lies in diffusers' repository under examples/advanced_diffusion_training; it runs as it stands, through
`reference.py`. Cases, all at batch 1, 256 px, 128 text tokens, rank 8 on the same layers, Prodigy, fp32, centre crops
of the same ten pictures:

pivotal-clip, pivotal-t5  40 steps, rows learned in CLIP, or in CLIP and T5, for the first half
captions                  40 steps, encoders frozen, a caption for each picture
four, four-short, twelve  a queue of pivotal-clip specs that differ in their seed, against a shell loop: four at 40 steps,
                          four at 10, twelve at 10

With `--slots 1 2` fluxrun's side of a queue is measured with either in every round, against the same shell loop; with
`--checkpointing selective`, or a number, it makes activations again while rows learn
(`inversion.gradient_checkpointing`); the reference goes on as ever.

Every run starts from nothing: its own output or runs folder, an empty cache. Per side: wall and CPU seconds, and the
peak of the largest process above what importing its libraries takes (all polled from outside, see watch.py). Quoted are
medians and the ratios round by round; below 1 is fluxrun's favour. Which side goes first changes with the round.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import Asked, machine, model_in, parser_of, pictures_in, spread, table
from watch import OUR_IMPORTS, Watched, fluxrun, imports, mib, watch


@dataclass(frozen=True)
class Case:
    encoders: tuple[str, ...]
    specs: int
    steps: int


CASES = {
    "pivotal-clip": Case(("clip",), 1, 40),
    "pivotal-t5": Case(("clip", "t5"), 1, 40),
    "captions": Case((), 1, 40),
    "four": Case(("clip",), 4, 40),
    "four-short": Case(("clip",), 4, 10),
    "twelve": Case(("clip",), 12, 10),
}
PROMPT = "a photo of TOK"


@dataclass(frozen=True)
class Bench:
    """What all cases share. captioned: the pictures with a metadata.jsonl, as `datasets` reads them, and NAME.txt
    apart."""

    reference: list[str]
    model: Path
    plain: Path
    captioned: Path
    listed: Path
    resolution: int
    tokens: int
    checkpointing: str

    def theirs(self, case: Case, out: Path, seed: int) -> list[str]:
        """The reference's command line."""
        words = [
            *self.reference, "--pretrained_model_name_or_path", str(self.model), "--output_dir", str(out),
            "--instance_prompt", PROMPT, "--resolution", str(self.resolution), "--max_sequence_length", str(self.tokens),
            "--rank", "8", "--optimizer", "prodigy", "--learning_rate", "1", "--text_encoder_lr", "1",
            "--train_batch_size", "1", "--max_train_steps", str(case.steps), "--lr_scheduler", "constant",
            "--lr_warmup_steps", "0", "--seed", str(seed), "--center_crop",
        ]  # fmt: skip
        if not case.encoders:
            return [*words, "--dataset_name", str(self.listed), "--caption_column", "text", "--image_column", "image"]
        words += [
            "--instance_data_dir",
            str(self.plain),
            "--train_text_encoder_ti",
            "--train_text_encoder_ti_frac",
            "0.5",
        ]
        return [*words, "--enable_t5_ti"] if "t5" in case.encoders else words

    def ours(self, case: Case, seed: int) -> str:
        """The spec."""
        return Asked(
            self.model, self.plain if case.encoders else self.captioned, self.resolution, self.tokens,
            encoders=case.encoders, steps=case.steps, seed=seed, prompt=PROMPT if case.encoders else None,
            checkpointing=self.checkpointing,
        ).text  # fmt: skip


def run_theirs(bench: Bench, case: Case) -> Watched:
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        commands = [shlex.join(bench.theirs(case, folder / f"out{seed}", seed)) for seed in range(case.specs)]
        took = watch(["sh", "-c", " && ".join(commands)], folder, folder / "log")
        made = list(folder.glob("out*/pytorch_lora_weights.safetensors"))
        if len(made) != case.specs:
            raise SystemExit(
                f"the reference made {len(made)} of {case.specs} LoRAs:\n{(folder / 'log').read_text()[-3000:]}"
            )
        return took


def run_ours(bench: Bench, case: Case, slots: int) -> Watched:
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        (folder / "specs").mkdir()
        for seed in range(case.specs):
            (folder / "specs" / f"s{seed:02}.toml").write_text(bench.ours(case, seed))
        took = watch(fluxrun("queue", "specs", "--gpus", "cpu", "--slots", str(slots)), folder, folder / "log")
        made = [run for run in (folder / "runs").glob("s*") if any((run / "export").glob("*.safetensors"))]
        if len(made) != case.specs:
            raise SystemExit(f"fluxrun made {len(made)} of {case.specs} LoRAs:\n{(folder / 'log').read_text()[-3000:]}")
        return took


def listed_in(folder: Path, captioned: Path) -> Path:
    """The pictures once more, with their captions in a metadata.jsonl."""
    pictures_in(folder)
    lines = [
        {"file_name": file.name, "text": (captioned / f"{file.stem}.txt").read_text().strip()}
        for file in sorted(folder.iterdir())
    ]
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def row_of(name: str, case: Case, pairs: Sequence[tuple[Watched, Watched]], base: tuple[int, int]) -> list[str]:
    def sides(values: Sequence[tuple[float, float]], digits: int) -> str:
        return ", ".join(f"{statistics.median(pair[at] for pair in values):.{digits}f}" for at in (0, 1))

    wall = [(one.wall, other.wall) for one, other in pairs]
    cpu = [(one.cpu, other.cpu) for one, other in pairs]
    peak = [((one.peak.rss - base[0]) / 2**20, (other.peak.rss - base[1]) / 2**20) for one, other in pairs]
    return [
        name, f"{case.specs} x {case.steps}", sides(wall, 1), spread([a / b for a, b in wall], 2), sides(cpu, 1),
        spread([a / b for a, b in cpu], 2), sides(peak, 0), spread([a / b for a, b in peak], 2),
    ]  # fmt: skip


def told(name: str, side: str, took: Watched) -> None:
    peak = took.peak
    print(
        f"{name}: {side} {took.wall:.1f} s, CPU {took.cpu:.1f} s, largest process {mib(peak.rss)} MiB (own "
        f"{mib(peak.anon)}, of files {mib(peak.file)}), all processes {mib(took.tree)} MiB",
        flush=True,
    )


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--script", type=Path, required=True, help="train_dreambooth_lora_flux_advanced.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--slots", type=int, nargs="+", default=[1], help="of fluxrun queue, one after the other")
    parser.add_argument("--steps", type=int, help="of every case, to try whether all works")
    parser.add_argument("--checkpointing", default="false", help="our inversion.gradient_checkpointing")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    print(machine())
    rows = [[
        "case", "specs x steps", "wall s (ours, reference)", "ratio", "CPU s (ours, reference)", "ratio",
        "peak MiB above imports (ours, reference)", "ratio",
    ]]  # fmt: skip
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        captioned = pictures_in(folder / "captioned", captions=True)
        bench = Bench(
            [sys.executable, str(Path(__file__).with_name("reference.py")), str(given.script.resolve())],
            model_in(given.model, folder), pictures_in(folder / "plain"), captioned,
            listed_in(folder / "listed", captioned), given.resolution, given.tokens,
            f'"{given.checkpointing}"' if given.checkpointing == "selective" else given.checkpointing,
        )  # fmt: skip
        base = imports(folder, OUR_IMPORTS), watch([*bench.reference, "--help"], folder, folder / "log")
        for side, took in zip(("ours", "reference"), base, strict=True):
            told("imports alone", side, took)
        for name in given.cases:
            case = CASES[name]
            if given.steps:
                case = Case(case.encoders, case.specs, given.steps)
            rounds = []
            for number in range(given.rounds):
                order = ["reference", *given.slots]
                rounds.append(dict[str | int, Watched]())
                for side in order if number % 2 else order[::-1]:
                    took = run_theirs(bench, case) if side == "reference" else run_ours(bench, case, int(side))
                    told(name, side if side == "reference" else f"ours, {side} at a time", took)
                    rounds[-1][side] = took
            for slots in given.slots:
                title = name if slots == 1 else f"{name}, `--slots {slots}`"
                pairs = [(took[slots], took["reference"]) for took in rounds]
                rows.append(row_of(title, case, pairs, (base[0].peak.rss, base[1].peak.rss)))
    table(rows)


if __name__ == "__main__":
    main()
