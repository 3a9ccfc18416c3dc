"""Train the bundled base `builtin:tiny` from nothing, and write it as a FluxPipeline folder.

    python tools/make_tiny_base.py --out runner/bases/tiny

Stages: vae, latents, flow, distill, save. Each keeps its result in the work folder, so `--stage` can begin at any.
About 80 minutes on two cores. Stages are timed, not counted in steps, so another machine gives another (equally good)
base; seeds fix the data.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_flow import Latents, Model, distill_guidance, make_latents, make_tokenizers, train_flow
from tiny_parts import make_scheduler, make_vae
from tiny_vae import train_vae

STAGES = ("vae", "latents", "flow", "distill", "save")
CARD = """---
license: apache-2.0
library_name: diffusers
---

# builtin:tiny

A miniature FLUX.1 that was really trained: 64 x 64 pictures of eight shapes in eight colours on eight backgrounds.
Made by `tools/make_tiny_base.py`, on synthetic pictures only; it holds nothing of FLUX.1's weights.
Prompts like "a large red heart on a navy background on the left"; guidance 3.5, `max_sequence_length=32`.
"""


def load_vae(work: Path) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(work / "vae")


def load_model(tokenizers: tuple[Any, Any], file: Path) -> Model:
    model = Model(*tokenizers)
    model.load_state_dict(load_file(file))
    return model


def save(out: Path, vae: Any, model: Model, tokenizers: tuple[Any, Any], shift: float, scaling: float) -> None:
    """FLUX.1-dev's layout. Transformer and VAE in fp16; encoders in fp32, as loading without a dtype needs one of
    them."""
    from diffusers import FluxPipeline

    vae.register_to_config(shift_factor=shift, scaling_factor=scaling)
    pipe = FluxPipeline(
        scheduler=make_scheduler(),
        vae=vae.half(),
        text_encoder=model.clip,
        tokenizer=tokenizers[0],
        text_encoder_2=model.t5,
        tokenizer_2=tokenizers[1],
        transformer=model.transformer.half(),
    )
    aside = out.with_name(out.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    pipe.save_pretrained(aside)
    (aside / "README.md").write_text(CARD)
    for config in aside.rglob("config.json"):
        text = config.read_text().splitlines()
        config.write_text("\n".join(line for line in text if "_name_or_path" not in line) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    aside.rename(out)
    megabytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6
    print(f"{out}: {megabytes:.1f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/tiny-base"))
    parser.add_argument("--stage", choices=STAGES, default="vae", help="begin here; earlier stages' results are read")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, nargs=3, default=(22, 40, 5), metavar=("VAE", "FLOW", "DISTILL"))
    parser.add_argument("--untrained", action="store_true", help="save the flow model as initialised (for development)")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    todo = STAGES[STAGES.index(given.stage) :]
    torch.set_num_threads(2)

    tokenizers = make_tokenizers(given.work, given.seed)
    if given.untrained:
        save(given.out, make_vae(), Model(*tokenizers), tokenizers, 0.0, 1.0)
        return
    vae = train_vae(given.work, given.minutes[0], given.seed) if "vae" in todo else load_vae(given.work)
    if "latents" in todo:
        (given.work / "latents.safetensors").unlink(missing_ok=True)
    latents: Latents = make_latents(vae, given.work, given.seed)
    if "flow" in todo:
        train_flow(latents, tokenizers, given.work, given.minutes[1], given.seed)
    if "distill" in todo:
        model = load_model(tokenizers, given.work / "flow.safetensors")
        distill_guidance(model, latents, given.work, given.minutes[2], given.seed)
    save(
        given.out,
        vae,
        load_model(tokenizers, given.work / "distilled.safetensors"),
        tokenizers,
        latents.shift,
        latents.scaling,
    )


if __name__ == "__main__":
    main()
