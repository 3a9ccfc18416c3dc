"""What quantised weights take, for estimates. No torch.

Quantised are the linear layers inside blocks (a part of their name is a number): nearly all of FLUX.1's transformer and T5.
What stands before and after the blocks, embeddings, norms and biases stay in the base's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping

NF4_BLOCK = 64
BYTES = {
    "int8": 1.0,
    "fp8": 1.0,
    "nf4": 0.5 + 4 / NF4_BLOCK,
}  # of one number; beside it int8 and fp8 have a scale per row


def in_a_block(name: str) -> bool:
    return any(part.isdecimal() for part in name.split(".")[:-1])


def in_blocks(layers: Mapping[str, tuple[int, int]]) -> int:
    """How many numbers of these linear layers (`basefiles.linear_layers`) are quantised."""
    return sum(out * inside for name, (out, inside) in layers.items() if in_a_block(name))


def held(numbers: int, quantised: int, scheme: str, plain: float) -> int:
    """Bytes of a part with so many numbers, `quantised` of them in such layers. plain: bytes of each other number."""
    each = BYTES.get(scheme, plain)
    return int(quantised * each + (numbers - quantised) * plain)
