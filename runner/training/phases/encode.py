"""The encode phase: latents and text embeddings that training will not change go into the cache."""

from __future__ import annotations

from collections.abc import Sequence

from runner.checkpoint.storage import Weights
from runner.model.device import release
from runner.plan.phases import Encode
from runner.training.context import RunContext
from runner.training.encoders import encode_latents, encode_texts, reads_untrained


def encode_phase(context: RunContext, phase: Encode, weights: Weights, upcoming: Sequence[RunContext] = ()) -> None:
    """Fill the cache with what training will read. A model is loaded only if the cache lacks something of it.

    weights: what was learned so far. upcoming: later runs of the queue with the same base; their texts are encoded in
    the same pass, so a large encoder is loaded once for the whole queue. Raises InterruptedRunError if a stop was
    requested.
    """
    if phase.latents:
        encode_latents(context)
    for encoder in context.encoders:
        readers = [run for run in upcoming if reads_untrained(run.plan, encoder)]
        if encoder in phase.encoders or readers:
            entries = context.entries(encoder, weights) if encoder in phase.encoders else {}
            encode_texts(context, encoder, weights, entries, readers)
    context.model_pool.live_encoders.clear()
    release(context.base.device)
