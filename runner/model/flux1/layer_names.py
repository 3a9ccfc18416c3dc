"""FLUX.1's layers as the original (BFL) model names them: which of its matrices holds which of diffusers' modules.

The original keeps q, k and v (in a single block also the MLP's input) as one matrix.
Names after: sd-scripts networks/convert_flux_lora.py (the layout's shapes), ComfyUI comfy/utils.py flux_to_diffusers
(which matrix is which).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from runner.model.family import LayerNames

QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
# One matrix of the original's blocks -> diffusers' modules that it holds, from the first output row on.
DOUBLE = {
    "img_attn_qkv": QKV,
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_mod_lin": ("norm1_context.linear",),
}
SINGLE = {"linear1": (*QKV, "proj_mlp"), "linear2": ("proj_out",), "modulation_lin": ("norm.linear",)}
# The model's own layers; its proj_out is another one than the single blocks'.
AROUND = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
}


def matrix_of(module: str) -> tuple[str, tuple[str, ...]] | None:
    """The original's matrix that holds a module of the transformer, and all modules in it; None for an unknown one."""
    for matrix, name in AROUND.items():
        if module == name:
            return matrix, (name,)
    for original, blocks, table in _blocks():
        if match := re.fullmatch(rf"{blocks}\.(\d+)\.(.+)", module):
            for matrix, parts in table.items():
                if match[2] in parts:
                    return f"{original}_{match[1]}_{matrix}", tuple(f"{blocks}.{match[1]}.{part}" for part in parts)
    return None


def modules_of(matrix: str) -> tuple[str, ...] | None:
    """The modules that a matrix of the original holds, in the order of its output rows; None for an unknown one."""
    if matrix in AROUND:
        return (AROUND[matrix],)
    for original, blocks, table in _blocks():
        match = re.fullmatch(rf"{original}_(\d+)_(.+)", matrix)
        if match and match[2] in table:
            return tuple(f"{blocks}.{match[1]}.{part}" for part in table[match[2]])
    return None


def _blocks() -> Iterator[tuple[str, str, Mapping[str, tuple[str, ...]]]]:
    """(the original's name of the blocks, diffusers' name, matrices in one block)."""
    yield "double_blocks", "transformer_blocks", DOUBLE
    yield "single_blocks", "single_transformer_blocks", SINGLE


def architecture(guided: bool) -> str:
    """ModelSpec's name of an adapter's architecture. guided: whether the base takes a guidance."""
    return f"flux-1-{'dev' if guided else 'schnell'}/lora"


FLUX1 = LayerNames(
    title="FLUX.1",
    version="flux1",
    network="networks.lora_flux",
    architecture=architecture,
    implementation="https://github.com/black-forest-labs/flux",
    matrix_of=matrix_of,
    modules_of=modules_of,
    around=frozenset(AROUND.values()),
)
