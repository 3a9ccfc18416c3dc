"""Does the bundled base draw what it is told? 200 held-out captions through the stock FluxPipeline, judged by rule.

    python tools/check_tiny_base.py [--base runner/bases/tiny] [--sheet sheet.png] [--json]

The judge knows nothing of the model: background is the border's colour, colour the median of what differs from it,
place and shape those of the best of the world's eight templates. Its ceiling is told beside: the same judge on the
real renderings, and on what the VAE makes of them.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tiny_world as world
from PIL import Image, ImageDraw

Array = np.ndarray[Any, Any]
ASKED = ("background", "colour", "place", "shape")


def nearest(value: Array, named: Mapping[str, Sequence[float]]) -> str:
    return min(named, key=lambda name: float(np.linalg.norm(value - np.array(named[name]))))


@cache
def templates() -> list[tuple[str, Array]]:
    """(shape, coverage 0..1 [64, 64]) for every size, centred on its own centroid."""
    made = []
    for shape in world.SHAPES:
        for r in range(9, 26):
            large = Image.new("RGB", (world.SIDE * world.SCALE,) * 2, (0, 0, 0))
            world.paint(ImageDraw.Draw(large), shape, (32, 32), r, (255, 255, 255), (0, 0, 0))
            made.append((shape, np.asarray(large.resize((world.SIDE,) * 2, Image.Resampling.BOX))[..., 0] / 255.0))
    return made


def centroid(coverage: Array) -> Array:
    """(x, y) of the mass."""
    y, x = np.mgrid[: coverage.shape[0], : coverage.shape[1]]
    mass = max(coverage.sum(), 1e-6)
    return np.array([(x * coverage).sum() / mass, (y * coverage).sum() / mass])


def judge(picture: Array) -> dict[str, str]:
    """picture [64, 64, 3] uint8 -> what it shows."""
    p = picture.astype(np.float64)
    border = np.concatenate(
        [p[:2].reshape(-1, 3), p[-2:].reshape(-1, 3), p[:, :2].reshape(-1, 3), p[:, -2:].reshape(-1, 3)]
    )
    back = np.median(border, 0)
    apart = np.linalg.norm(p - back, axis=-1)
    mask = apart > max(30.0, 0.5 * float(np.quantile(apart, 0.97)))
    if mask.sum() < 20:
        return {"background": nearest(back, world.BACKGROUNDS), "colour": "none", "place": "none", "shape": "none"}
    fill = np.median(p[mask], 0)
    axis = fill - back
    coverage = np.clip((p - back) @ axis / (axis @ axis), 0, 1)
    coverage[coverage < 0.2] = 0
    middle = centroid(coverage)
    best, shape_found, at = 1.0, "none", middle
    for shape, template in templates():
        dx, dy = np.rint(middle - centroid(template)).astype(int)
        for jx in (-1, 0, 1):
            for jy in (-1, 0, 1):
                error = float(np.abs(np.roll(template, (dy + jy, dx + jx), (0, 1)) - coverage).mean())
                if error < best:
                    best, shape_found, at = error, shape, np.array([32 + dx + jx, 32 + dy + jy])
    return {
        "background": nearest(back, world.BACKGROUNDS),
        "colour": nearest(fill, world.COLOURS),
        "place": nearest(at, world.PLACES),
        "shape": shape_found,
    }


def shares(pictures: Sequence[Array], scenes: Sequence[world.Scene]) -> dict[str, float]:
    """Part of the pictures that show each thing asked for, and all of them."""
    right = dict.fromkeys((*ASKED, "all"), 0)
    for picture, scene in zip(pictures, scenes, strict=True):
        found = judge(picture)
        good = [found[name] == getattr(scene, name) for name in ASKED]
        for name, ok in zip((*ASKED, "all"), (*good, all(good)), strict=True):
            right[name] += ok
    return {name: count / len(scenes) for name, count in right.items()}


def held_out_scenes(count: int) -> list[world.Scene]:
    """Fixed; shape, colour and background together were never trained on."""
    draw = random.Random("check")
    return [world.scene(draw, held_out=True) for _ in range(count)]


def drawn(base: Path, scenes: Sequence[world.Scene], steps: int, guidance: float) -> list[Array]:
    import torch
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(base, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    captions = [scene.caption(index) for index, scene in enumerate(scenes)]
    pictures: list[Array] = []
    for start in range(0, len(captions), 25):
        batch = captions[start : start + 25]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        images = pipe(
            batch, height=64, width=64, num_inference_steps=steps, guidance_scale=guidance,
            max_sequence_length=32, generator=generators,
        ).images  # fmt: skip
        pictures += [np.asarray(image) for image in images]
    return pictures


def reconstructed(base: Path, real: Sequence[Array]) -> tuple[list[Array], float]:
    """The VAE's versions, and its PSNR in dB."""
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(base / "vae", dtype=torch.float32)
    x = torch.from_numpy(np.stack(real)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        made = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
    psnr = float(-10 * torch.log10(((made - x) / 2).square().mean()))
    return list(((made + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()), psnr


def contact_sheet(pictures: Sequence[Array], scenes: Sequence[world.Scene], file: Path) -> None:
    cell, columns = 150, 6
    out = Image.new("RGB", (columns * cell, (len(pictures) + columns - 1) // columns * (cell + 16)), "white")
    pen = ImageDraw.Draw(out)
    for index, (picture, scene) in enumerate(zip(pictures, scenes, strict=True)):
        left, top = index % columns * cell, index // columns * (cell + 16)
        out.paste(Image.fromarray(picture).resize((cell - 6, cell - 6), Image.Resampling.BICUBIC), (left + 3, top))
        words = f"{scene.size} {scene.colour} {scene.shape} {scene.place}".strip()
        pen.text((left + 3, top + cell - 5), words, fill="black", font_size=9)
    out.save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("runner/bases/tiny"))
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    scenes = held_out_scenes(given.count)
    real = [np.asarray(world.render(scene)) for scene in scenes]
    versions, psnr = reconstructed(given.base, real)
    pictures = drawn(given.base, scenes, given.steps, given.guidance)
    table = {"base": shares(pictures, scenes), "vae": shares(versions, scenes), "real": shares(real, scenes)}
    if given.sheet:
        contact_sheet(pictures[:36], scenes[:36], given.sheet)
    if given.json:
        print(json.dumps({**table, "vae_psnr": psnr}, indent=1))
        return
    print(f"{len(scenes)} held-out captions, {given.steps} steps, guidance {given.guidance:g}; VAE {psnr:.1f} dB")
    for name, row in table.items():
        print(f"{name:<6}" + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
