"""How many bytes quantized weights take.

The linear layers inside blocks are quantized, which are nearly all weights of FLUX.1's transformer and T5. Layers
before and after the blocks, embeddings, norms and biases keep the base's dtype.
"""

from __future__ import annotations

NF4_BLOCK = 64  # numbers that share a scale
# Bytes of one number. int8 and fp8 have a scale per row as well, which is left out here.
BYTES = {
    "int8": 1.0,
    "fp8": 1.0,
    "nf4": 0.5 + 4 / NF4_BLOCK,
}


def is_in_block(name: str) -> bool:
    """Whether a module is part of a block, by its name: "blocks.3.attn.to_q" has a number before its last part."""
    return any(part.isdecimal() for part in name.split(".")[:-1])


def weight_bytes(quantizable: int, other: int, scheme: str, plain: float) -> int:
    """Bytes of the weights of a part, by how many numbers of it can be quantized and how many cannot.

    scheme: as `model.quantize`, "none" included. plain: bytes of a number that is not quantized.
    """
    return int(quantizable * BYTES.get(scheme, plain) + other * plain)
