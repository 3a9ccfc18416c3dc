"""The encode phase: everything that learns nothing is computed once, into the cache; and encoders, live or by look-up."""

from __future__ import annotations

from collections.abc import Sequence

from runner.checkpoint.storage import Weights
from runner.model.device import release
from runner.plan.phases import Encode
from runner.training.context import RunContext
from runner.training.encoders import encode_latents, encode_texts, reads


def encode_phase(context: RunContext, phase: Encode, weights: Weights, beside: Sequence[RunContext] = ()) -> None:
    """Fill the cache with what training will read. A model is loaded only if something of it is missing.

    `beside`: runs of the same base that come later; what the encoders read for them as they are is encoded in the same
    pass, so that T5 is loaded once for a whole queue.
    """
    if phase.latents:
        encode_latents(context)
    for encoder in context.encoders:
        others = [other for other in beside if reads(other.plan, encoder)]
        if encoder in phase.encoders or others:
            own = context.entries(encoder, weights) if encoder in phase.encoders else {}
            encode_texts(context, encoder, weights, own, others)
    context.model_pool.live.clear()
    release(context.base.device)
