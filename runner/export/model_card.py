"""The model card, README.md of an exported folder: what the files are, and how to use them. It contains no local
path."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from runner.data.tokens import expand_placeholders, tokens_in_caption, vocabulary_entries
from runner.export.about import ExportInfo
from runner.export.formats import LORA_FILE
from runner.export.webui import webui_words
from runner.spec.dtypes import TORCH_NAMES
from runner.spec.export_names import embeddings_file, file_stem, kohya_file

POOLINGS = {
    "diffusers": "The rows were trained as diffusers reads them: CLIP's pooled vector at the first new token. ComfyUI reads "
    "it at the end of the prompt; there they act a little differently (train with `inversion.pooling` eos or both).",
    "eos": "The rows were trained as ComfyUI reads them: CLIP's pooled vector at the end of the prompt. diffusers reads it "
    "at the first new token; there they act a little differently (train with `inversion.pooling` diffusers or both).",
    "both": "The rows were trained for diffusers and ComfyUI alike, which read CLIP's pooled vector at different places.",
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+|builtin:\w+")
CURVE = "samples/loss.png"


def model_card(
    about: ExportInfo, errors: Mapping[str, float], pictures: Sequence[tuple[str, str]], guidance: float, repo: str | None,
    layers: Sequence[str], curve: bool,
) -> str:  # fmt: skip
    """The text of the card.

    errors: the largest error of each exported file. pictures: (prompt, file). guidance: the scale of the samples. repo:
    the hub repository it is pushed to, if any. layers: the layers with LoRA. curve: whether there is a picture of the
    loss.
    """
    lines = [
        *_front(about, pictures),
        "",
        f"# {about.name}",
        "",
        f"Trained on `{about.base}` by fluxrun, {about.step} steps.",
        "",
        *_pictures(pictures),
        *_trigger_words(about),
        "## Use with diffusers",
        "",
        "```python",
        *_code(about, errors, guidance, repo),
        "```",
        "",
        *_comfyui(about, errors),
        *_webui(about, errors),
        *_files(errors, layers, about.layer_names.around),
    ]
    if curve:
        lines += ["## Training", "", f"![The smoothed training loss by step]({CURVE})", ""]
    lines += ["## Settings", "", "| key | value |", "|---|---|"]
    lines += [f"| {key} | `{_cell(value)}` |" for key, value in about.settings.items()]
    return "\n".join([*lines, "", *_licence(about)])


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("`", "'")


def _front(about: ExportInfo, pictures: Sequence[tuple[str, str]]) -> Iterator[str]:
    yield "---"
    if HUB_ID.fullmatch(about.base):  # the hub refuses cards that name anything else
        yield f"base_model: {about.base}"
    for key, value in about.licence.items():
        yield f"{key}: {value}"
    yield from ("library_name: diffusers", "pipeline_tag: text-to-image", "tags:")
    yield from (f"- {tag}" for tag in ("text-to-image", "diffusers", "lora", "flux", "fluxrun"))
    if about.placeholders:
        yield f"instance_prompt: {json.dumps(' '.join(placeholder.text for placeholder in about.placeholders))}"
    if pictures:
        yield "widget:"
    for prompt, file in pictures:
        yield from (f"- text: {json.dumps(prompt)}", "  output:", f"    url: {file}")
    yield "---"


def _pictures(pictures: Sequence[tuple[str, str]]) -> Iterator[str]:
    for prompt, file in pictures:
        yield from (f"![{prompt.replace('<', '&lt;')}]({file})", "")


def _trigger_words(about: ExportInfo) -> Iterator[str]:
    if not about.placeholders:
        return
    yield from ("## Trigger words", "")
    yield from (
        f"- `{placeholder.text}` is what the training captions call {placeholder.name}"
        for placeholder in about.placeholders
    )
    yield ""
    if len(about.placeholders) > 1:
        yield "In the embedding files the rows of all of them follow one another in this order: ComfyUI and WebUI put them"
        yield from ("into the prompt together, diffusers one by one.", "")
    yield from (POOLINGS[about.settings["inversion.pooling"]], "")


def _code(about: ExportInfo, errors: Mapping[str, float], guidance: float, repo: str | None) -> Iterator[str]:
    """Python code that draws the run's first sample, with the run's base, size, steps and length."""
    embeddings = embeddings_file(about.name)
    bundled = about.base.startswith("builtin:")
    yield from ("import torch", "from diffusers import AutoPipelineForText2Image")
    if repo:
        yield "from huggingface_hub import snapshot_download"
    if bundled:
        yield "from runner import base_folder  # fluxrun, which this base comes with"
    if embeddings in errors:
        yield "from safetensors.torch import load_file"
    yield ""
    yield f'folder = snapshot_download("{repo}")' if repo else 'folder = "."  # where this README lies'
    if bundled:
        yield f'base = base_folder("{about.base}")'
    else:
        note = "" if HUB_ID.fullmatch(about.base) else "  # the name of a folder: write where it lies on your disk"
        yield f'base = "{about.base}"{note}'
    yield 'device = "cuda" if torch.cuda.is_available() else "cpu"'
    yield f"dtype = {_dtype(about.settings.get('model.dtype'))}"
    files = "".join(
        f", {key}={json.dumps(value)}"
        for key in ("revision", "variant")
        if (value := about.settings.get(f"model.{key}")) is not None
    )
    yield f"pipe = AutoPipelineForText2Image.from_pretrained(base, torch_dtype=dtype{files}).to(device)"
    if LORA_FILE in errors:
        yield f'pipe.load_lora_weights(folder, weight_name="{LORA_FILE}")'
    if embeddings in errors:
        yield f'rows = load_file(f"{{folder}}/{embeddings}")'
        entries = json.dumps(vocabulary_entries(about.placeholders))
        for key, suffix in (("clip_l", ""), ("t5", "_2")):
            if key == "clip_l" or "t5" in about.settings["inversion.encoders"]:
                yield f'pipe.load_textual_inversion(rows["{key}"], token={entries},'
                yield f"    text_encoder=pipe.text_encoder{suffix}, tokenizer=pipe.tokenizer{suffix})"
    yield from _call(about, guidance, LORA_FILE in errors)


def _dtype(asked: str | None) -> str:
    """The run's dtype as Python code. Without `model.dtype` fluxrun uses bf16 on a GPU and fp32 on a CPU."""
    return TORCH_NAMES[asked] if asked else 'torch.bfloat16 if device == "cuda" else torch.float32'


def _call(about: ExportInfo, guidance: float, with_lora: bool) -> Iterator[str]:
    settings = about.settings
    prompt = next(iter(settings["validate.prompts"]), settings.get("data.prompt", "your prompt"))
    if about.placeholders and not tokens_in_caption(prompt, about.placeholders):
        prompt = f"a {about.placeholders[0].name}"
    text, steps = json.dumps(expand_placeholders(prompt, about.placeholders)), settings["validate.steps"]
    side, guided = settings["validate.size"], f", guidance_scale={guidance}" if about.guided else ""
    yield f"image = pipe({text}, num_inference_steps={steps}{guided},"
    yield f"    max_sequence_length={settings['model.max_sequence_length']}, height={side}, width={side},"
    scale = ', joint_attention_kwargs={"scale": 1.0}' if with_lora else ""
    yield f"    generator=torch.Generator().manual_seed({settings['seed']}){scale}).images[0]"
    yield 'image.save("image.png")'


def _comfyui(about: ExportInfo, errors: Mapping[str, float]) -> Iterator[str]:
    stem = Path(embeddings_file(about.name)).stem
    yield from ("## Use with ComfyUI", "")
    if kohya_file(about.name) in errors:
        yield f"- Put `{kohya_file(about.name)}` into `models/loras` and choose it in a *Load LoRA* node (LoraLoader)"
        yield "  between the checkpoint and the prompts, with model and clip connected; strength 1.0."
    if f"{stem}.safetensors" in errors:
        yield f"- Put `{stem}.safetensors` into `models/embeddings` and write `embedding:{stem}` in the prompt,"
        yield f"  for example `a embedding:{stem} on a hill`."
    yield ""


def _webui(about: ExportInfo, errors: Mapping[str, float]) -> Iterator[str]:
    """Forge and A1111 have the LoRA in the prompt, and call an embedding by its file's name."""
    words, parts = webui_words(about), []
    yield from ("## Use with WebUI (Forge, A1111, SD.Next)", "")
    if about.placeholders:
        yield f"- Put `{words}.safetensors` into `embeddings` and write `{words}` where the concept shall be."
        parts.append(f"a {words} on a hill")
        if "t5" in about.settings["inversion.encoders"]:
            yield "  It holds CLIP's rows alone; these programs have no way to give T5 any."
    if kohya_file(about.name) in errors:
        yield f"- Put `{kohya_file(about.name)}` into `models/Lora` and write `<lora:{file_stem(about.name)}:1>`."
        parts.append(f"<lora:{file_stem(about.name)}:1>")
    yield from (f"- For example: `{' '.join(parts)}`", "")


def _files(errors: Mapping[str, float], layers: Sequence[str], around: Collection[str]) -> Iterator[str]:
    yield from ("## Files", "", "| file | largest difference from what was trained |", "|---|---|")
    yield from (f"| `{file}` | {error:.2g} |" for file, error in sorted(errors.items()))
    yield from ("", "Each was read back: the change of every weight for a LoRA, every value for an embedding.", "")
    if any(layer in around for layer in layers):
        yield "This LoRA also changes layers around the blocks (embedders, the last layer). diffusers does not read those from"
        yield from (f"the original layout, so there use `{LORA_FILE}`.", "")


def _licence(about: ExportInfo) -> Iterator[str]:
    named = about.licence.get("license_name") or about.licence.get("license")
    if named:
        link = about.licence.get("license_link")
        yield from ("## Licence", "", f"That of the base model: {f'[{named}]({link})' if link else named}.", "")
