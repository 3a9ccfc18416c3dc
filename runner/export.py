"""Trained weights as files that other programs load. The only place where foreign key names appear."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runner import tensors
from runner.checkpoint import Weights
from runner.errors import BadFile
from runner.lora import LoraShape, adapter_metadata
from runner.sample import Exported
from runner.tokens import Placeholder

LORA_FILE = "pytorch_lora_weights.safetensors"
CLIP_PREFIX = "text_encoder.text_model"
POOLINGS = {
    "diffusers": "The rows were trained as diffusers reads them: CLIP's pooled vector at the first new token. ComfyUI reads "
    "it at the end of the prompt; there they act a little differently (train with `inversion.pooling` eos or both).",
    "eos": "The rows were trained as ComfyUI reads them: CLIP's pooled vector at the end of the prompt. diffusers reads it "
    "at the first new token; there they act a little differently (train with `inversion.pooling` diffusers or both).",
    "both": "The rows were trained for diffusers and ComfyUI alike, which read CLIP's pooled vector at different places.",
}
EMBEDDING_KEYS = {"clip": ("clip_l",), "t5": ("t5", "t5xxl")}  # diffusers reads t5, ComfyUI asks for t5xxl


def file_stem(name: str) -> str:
    """A run's name as a file name; a sweep's has a folder in it."""
    return name.replace("/", "-")


def exported_files(folder: Path, name: str, placeholders: tuple[Placeholder, ...]) -> Exported:
    """What of a run's export folder a pipeline loads."""
    lora, embeddings = folder / LORA_FILE, folder / f"{file_stem(name)}_emb.safetensors"
    return Exported(lora if lora.is_file() else None, embeddings if embeddings.is_file() else None, placeholders)


@dataclass(frozen=True)
class Shapes:
    """Of the adapters that there are."""

    lora: LoraShape | None
    text_lora: LoraShape | None


def write_lora(path: Path, weights: Weights, shapes: Shapes) -> None:
    """diffusers' layout: `transformer.<module>.lora_A/B.weight`, `text_encoder.text_model.<module>...`, the adapters'
    configs as JSON in the metadata. transformers 5 names CLIP's modules without `text_model`; stock diffusers reads
    both, ComfyUI only that."""
    named = {f"transformer.{name}": value for name, value in weights.lora.items()}
    named |= {f"{CLIP_PREFIX}.{name}": value for name, value in weights.text_lora.items()}
    described: dict[str, Any] = {}
    for prefix, shape in (("transformer", shapes.lora), ("text_encoder", shapes.text_lora)):
        described |= {f"{prefix}.{key}": value for key, value in adapter_metadata(shape).items()} if shape else {}
    tensors.save(path, named, {"format": "pt", "lora_adapter_metadata": json.dumps(described, sort_keys=True)})


def write_embeddings(path: Path, weights: Weights) -> None:
    """Rows in the order of the specs' tokens, [vectors, width] per encoder."""
    named = {key: rows for encoder, rows in weights.rows.items() for key in EMBEDDING_KEYS[encoder]}
    tensors.save(path, named, {"format": "pt"})


def verify_lora(model: Any, trained: Mapping[str, Tensor], shape: LoraShape) -> None:
    """The adapter that stock diffusers made of the file must be the trained one. Raises BadFile with the layer."""
    adapters = list(getattr(model, "peft_config", {}))
    if len(adapters) != 1:
        raise BadFile(f"{LORA_FILE}: diffusers loaded {len(adapters)} adapters, wanted is one")
    loaded = {
        name.replace(f".{adapters[0]}.weight", ".weight"): value
        for name, value in model.named_parameters()
        if f".{adapters[0]}." in name
    }
    if loaded.keys() != trained.keys():
        odd = sorted(loaded.keys() ^ trained.keys())[0]
        raise BadFile(f"{LORA_FILE}: {odd} is trained or loaded, not both")
    for name, value in trained.items():
        if not torch.equal(loaded[name].cpu(), value.cpu().to(loaded[name].dtype)):
            raise BadFile(f"{LORA_FILE}: {name} reads back with other values than were trained")
    scale = shape.alpha / shape.rank
    for name, module in model.named_modules():
        if adapters[0] in getattr(module, "scaling", {}) and module.scaling[adapters[0]] != scale:
            raise BadFile(
                f"{LORA_FILE}: {name} reads back with scale {module.scaling[adapters[0]]}, trained was {scale}"
            )


def verify_embeddings(pipe: Any, weights: Weights, pieces: list[str]) -> None:
    """The rows that stock diffusers put into its encoders must be the learned ones."""
    parts = {"clip": (pipe.text_encoder, pipe.tokenizer), "t5": (pipe.text_encoder_2, pipe.tokenizer_2)}
    for encoder, rows in weights.rows.items():
        model, tokenizer = parts[encoder]
        ids = torch.tensor(tokenizer.convert_tokens_to_ids(pieces), device=model.device)
        loaded = model.get_input_embeddings().weight[ids].cpu()
        if not torch.equal(loaded, rows.cpu().to(loaded.dtype)):
            raise BadFile(f"{encoder} embeddings read back with other values than were trained")


def model_card(
    name: str,
    base: str,
    settings: Mapping[str, Any],
    exported: Exported,
    pictures: list[tuple[str, str]],
    guidance: float,
    length: int,
    pooling: str,
) -> str:
    """README.md of a hub repo: how to use the files, with code that works as pasted. pictures: (prompt, file)."""
    front = ["---", f"base_model: {base}", "library_name: diffusers", "pipeline_tag: text-to-image", "tags:"]
    front += [f"- {tag}" for tag in ("text-to-image", "diffusers", "lora", "flux", "fluxrun")]
    words = {placeholder.name: placeholder.text for placeholder in exported.placeholders}
    if words:
        front.append(f"instance_prompt: {json.dumps(' '.join(words.values()))}")
    if pictures:
        front.append("widget:")
        for prompt, file in pictures:
            front += [f"- text: {json.dumps(prompt)}", "  output:", f"    url: {file}"]
    lines = [*front, "---", "", f"# {name}", "", f"Trained on `{base}` by fluxrun.", ""]
    if words:
        lines += [
            "## Trigger words",
            "",
            *(f"- `{text}` is what the training captions call {word}" for word, text in words.items()),
            "",
            POOLINGS[pooling],
            "",
        ]
    lines += ["## Use with diffusers", "", "```python", *_code(base, exported, guidance, length), "```", ""]
    lines += [
        "## Settings",
        "",
        "| key | value |",
        "|---|---|",
        *(f"| {key} | `{value}` |" for key, value in settings.items()),
        "",
    ]
    return "\n".join(lines)


def _code(base: str, exported: Exported, guidance: float, length: int) -> list[str]:
    pieces = [piece for placeholder in exported.placeholders for piece in placeholder.pieces]
    lines = ["import torch", "from diffusers import AutoPipelineForText2Image"]
    if exported.embeddings:
        lines.append("from safetensors.torch import load_file")
    lines += ["", f'pipe = AutoPipelineForText2Image.from_pretrained("{base}", torch_dtype=torch.bfloat16).to("cuda")']
    if exported.lora:
        lines.append(f'pipe.load_lora_weights(".", weight_name="{exported.lora.name}")')
    if exported.embeddings:
        lines.append(f'rows = load_file("{exported.embeddings.name}")')
        for key, suffix in (("clip_l", ""), ("t5", "_2")):
            condition = "" if key == "clip_l" else 'if "t5" in rows:\n    '
            lines.append(
                f'{condition}pipe.load_textual_inversion(rows["{key}"], token={pieces}, '
                f"text_encoder=pipe.text_encoder{suffix}, tokenizer=pipe.tokenizer{suffix})"
            )
    prompt = f"a {exported.placeholders[0].text}" if exported.placeholders else "your prompt"
    return [*lines, f'image = pipe("{prompt}", guidance_scale={guidance}, max_sequence_length={length}).images[0]']
