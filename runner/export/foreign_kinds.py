"""What a LoRA file can hold that is no LoRA of FLUX.1: other models, other methods, other parts. Tables of key
patterns.

`foreign_layouts` lists the programs that the names come from.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of keys that are no LoRA of FLUX.1's transformer or CLIP.

    pattern: a regular expression for the key. name: what it is, in words. optional: without such keys the rest of the
    file is still a complete LoRA.
    """

    pattern: str
    name: str
    optional: bool = False


OTHER_MODELS = (
    Kind(r"lora_unet_(input|middle|output)_blocks?_|lora_te2_text_model_|text_encoder_2\.text_model\.", "an SDXL LoRA"),
    Kind(r"(lora_unet_|unet\.|^)(down|mid|up)_blocks?[_.]", "a LoRA of Stable Diffusion 1, 2 or XL"),
    Kind(r"joint_blocks[_.]", "an SD3 LoRA"),
    Kind(r"joint_transformer_blocks[_.]", "an AuraFlow LoRA"),
    Kind(r"(double|single)_stream_blocks[_.]", "a HiDream LoRA"),
    Kind(
        r"^(transformer\.|diffusion_model\.|lora_unet__?|lycoris_)?blocks[_.]\d+[_.](self_attn|cross_attn|attn[12]|ffn)",
        "a Wan LoRA",
    ),
    Kind(r"transformer_blocks[_.]\d+[_.]attn[12][_.]", "an LTX or PixArt LoRA"),
    Kind(r"transformer_blocks[_.]\d+[_.](img|txt)_(mlp[_.]net|mod[_.]1)", "a Qwen-Image LoRA"),
    Kind(r"(img|txt)_mlp[_.]fc[12]|individual_token_refiner|(img|txt)_mod[_.]linear", "a HunyuanVideo LoRA"),
    Kind(r"attn[_.]to_qkv_mlp_proj|(double|single)_stream_modulation", "a FLUX.2 LoRA"),
    Kind(r"(^|[_.])layers[_.]\d+[_.](attention|feed_forward)[_.]", "a Z-Image or Lumina LoRA"),
)  # fmt: skip
# Input width of q -> another model whose blocks have the names of FLUX.1's.
OTHER_WIDTHS = {1536: "an SD3 LoRA", 2432: "an SD3.5 LoRA", 6144: "a FLUX.2 LoRA"}
KINDS = (
    Kind(r"\.lokr_\w+$", "LoKr, a Kronecker product, which cannot be written as a LoRA of its rank"),
    Kind(r"\.hada_\w+$", "LoHa, a Hadamard product, which cannot be written as a LoRA of its rank"),
    Kind(r"\.(oft_\w+|oft_R\.weight|boft_\w+)$", "OFT, a rotation of the weights, which is no LoRA"),
    Kind(r"\.[ab][12]\.weight$", "GLoRA, which is no LoRA"),
    Kind(r"\.on_input$|\.ia3_\w+", "IA3, which is no LoRA"),
    Kind(r"\.lora_mid\.weight$", "LoCon with a middle matrix, which is for convolutions; FLUX.1 has none"),
    Kind(r"dora_scale$|lora_magnitude_vector", "DoRA, whose magnitudes go with the base's weights: no LoRA can hold them"),
    Kind(
        r"_norm[._](scale|set_weight|weight|diff)$|\.[wb]_norm$|norm_[qk]\.weight$",
        "a norm's weights, which LoRA files of neither layout have", True,
    ),
    Kind(r"\.reshape_weight$", "a control LoRA's wider input, which is for another transformer than FLUX.1's"),
    Kind(r"\.diff_b$|\.bias$|\.lora_bias$", "a bias, which LoRA files of the kohya layout do not have", True),
    Kind(r"\.diff$", "a full difference of a weight, which is no LoRA", True),
    Kind(
        r"^(lora_te[23]_encoder_block_|text_encoder_2\.encoder\.|text_encoders\.t5xxl\.)",
        "a T5 LoRA, which diffusers does not read and fluxrun does not convert", True,
    ),
    Kind(r"^bundle_emb\.", "an embedding bundled with the LoRA; take it out as a file of its own", True),
)  # fmt: skip
UNKNOWN = Kind("", "no layer of FLUX.1")
