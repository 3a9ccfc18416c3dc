"""A text encoder on the device, with the token rows or the adapter that it learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from runner.cache.keys import Entry
from runner.checkpoint.storage import Weights
from runner.core.errors import FluxrunError
from runner.data import tokens
from runner.model import lora, token_rows
from runner.model.family import ModelFamily
from runner.plan.phases import gradient_checkpointing
from runner.training.adapter_shapes import text_lora_shape
from runner.training.context import RunContext


class LiveEncoder:
    """A text encoder on the device, with what was learned in it.

    rows: learned token rows [count, width], None where it has none; first_rows: their values before training. adapter:
    its LoRA by name, {} where it has none. Both are trainable parameters, frozen unless it was loaded to learn. ids:
    each caption's token ids [T]. checkpointed: whether it runs again in the backward pass instead of keeping its
    activations.
    """

    def __init__(self, family: ModelFamily, encoder: str, model: nn.Module, tokenizer: Any, table_std: float) -> None:
        """table_std: standard deviation of the embedding table, which the rows are kept at."""
        self.family, self.encoder, self.model, self.tokenizer = family, encoder, model, tokenizer
        self.table_std = table_std
        self.ids: dict[str, Tensor] = {}
        self.rows: nn.Parameter | None = None
        self.first_rows: Tensor | None = None
        self.adapter: Mapping[str, nn.Parameter] = {}
        self.checkpointed = False

    @classmethod
    def load(
        cls, context: RunContext, encoder: str, weights: Weights, *, learn_rows: bool = False, learn_lora: bool = False
    ) -> LiveEncoder:
        """Load it with copies of what `weights` holds for it. What is to be learned and is not in `weights` yet is
        initialized.

        Raises FluxrunError for a token that the encoder reads in no caption.
        """
        family = context.family
        tokenizer, model = family.load_tokenizer(context.base, encoder), family.load_encoder(context.base, encoder)
        live = cls(family, encoder, model, tokenizer, token_rows.table_std(model))
        if context.encoders[encoder].large and learn_rows:
            live._enable_recompute(context)
        if encoder in weights.rows or learn_rows:
            live._attach_rows(context, weights.rows.get(encoder), learn=learn_rows)
        if context.encoders[encoder].lora_layers and (weights.text_lora or learn_lora):
            live.adapter = lora.attach_lora(model, text_lora_shape(context.spec, context.base), context.spec.seed)
            if weights.text_lora:
                lora.set_tensors(live.adapter, weights.text_lora)
            for parameter in live.adapter.values():
                parameter.requires_grad_(learn_lora)
        length = context.spec.model.max_sequence_length
        for caption in context.captions:
            expanded = tokens.expand_placeholders(caption, context.plan.placeholders)
            live.ids[caption] = live._token_ids(expanded, length)
        if learn_rows:
            live.check_tokens(context)
        return live

    def _enable_recompute(self, context: RunContext) -> None:
        recompute, offloaded = gradient_checkpointing(context.spec, token_rows=True), context.base.offload
        checkpointed = recompute not in ("selective", 0)
        self.checkpointed = checkpointed and not offloaded  # offloaded blocks recompute themselves
        self.family.recompute_encoder(
            self.encoder,
            self.model,
            save_activations=checkpointed or offloaded,
            projections=recompute == "selective",
        )

    def _attach_rows(self, context: RunContext, trained: Tensor | None, *, learn: bool) -> None:
        """trained: the rows so far, None before training."""
        device, placeholders = context.base.device, context.plan.placeholders
        counts = [(len(placeholder.entries), placeholder.initializer) for placeholder in placeholders]
        first_rows = token_rows.initial_rows(self.model, self.tokenizer, counts, context.spec.seed, self.encoder)
        self.first_rows = first_rows.to(device)
        if trained is None:
            self._note_long_initializers(context, counts)
        rows = self.first_rows if trained is None else trained
        self.rows = nn.Parameter(rows.clone().to(device), requires_grad=learn)
        token_rows.attach_token_rows(self.model, self.tokenizer, context.vocabulary_entries, self.rows)

    def _note_long_initializers(self, context: RunContext, counts: Sequence[tuple[int, str | None]]) -> None:
        for vectors, phrase in counts:
            pieces = len(self.tokenizer(phrase, add_special_tokens=False).input_ids) if phrase else 0
            if pieces > vectors:
                context.event_log.message(
                    f"tokens.initializer {phrase!r} has {pieces} pieces in {self.encoder}: its first {vectors} are used; "
                    f"tokens.vectors = {pieces} would use all"
                )

    def check_tokens(self, context: RunContext) -> None:
        """Check that the encoder reads each token in some caption: it reads only so many tokens, and unread rows learn
        nothing.

        Raises FluxrunError for a token that is cut off in all captions that name it; logs one that is in some of them.
        """
        for placeholder in context.plan.placeholders:
            wanted = set(self.tokenizer.convert_tokens_to_ids(list(placeholder.entries)))
            naming = [
                caption
                for caption in context.pictures.captions
                if tokens.tokens_in_caption(caption, context.plan.placeholders) & {placeholder.name}
            ]
            cut = [caption for caption in naming if not wanted <= set(self.ids[caption].tolist())]
            if not cut:
                continue
            message = (
                f"{placeholder.name} lies behind the {len(self.ids[cut[0]])} tokens that {self.encoder} reads in "
                f"{len(cut)} of the {len(naming)} captions that name it (the first is {cut[0][:60]!r}...); move it to "
                "the front, or shorten them"
            )
            if len(cut) == len(naming):
                raise FluxrunError(message)
            context.event_log.message(message)

    def matches(self, weights: Weights) -> bool:
        """Whether rows and adapter equal those of `weights`, to the bit."""
        rows = weights.rows.get(self.encoder)
        adapter = weights.text_lora if self.family.architecture.encoders[self.encoder].lora_layers else {}
        if (rows is None) != (self.rows is None) or adapter.keys() != self.adapter.keys():
            return False
        pairs = [] if rows is None or self.rows is None else [(self.rows, rows)]
        pairs += [(self.adapter[name], adapter[name]) for name in adapter]
        return all(torch.equal(ours.detach().cpu(), theirs.cpu()) for ours, theirs in pairs)

    def embed_entry(self, entry: Entry) -> Tensor:
        """One embedding for the cache, [T, width] or pooled [width]."""
        with torch.no_grad():
            return self._embed(self._token_ids(entry.expanded, entry.length)[None], entry.pooling)[0]

    def _token_ids(self, expanded: str, length: int) -> Tensor:
        """[T], on the device."""
        ids = self.family.token_ids(self.encoder, self.tokenizer, expanded, length)
        return ids.to(next(self.model.parameters()).device)

    def embed(self, captions: Sequence[str], pooling: str) -> Tensor:
        """Embeddings of B captions, [B, T, width] or pooled [B, width]. Equal captions are encoded once.

        Where it is checkpointed it runs again late in the backward pass, when the transformer's activations have been
        freed.
        """
        distinct = list(dict.fromkeys(captions))
        ids = torch.stack([self.ids[caption] for caption in distinct])
        if self.checkpointed and torch.is_grad_enabled():
            embeddings: Tensor = checkpoint(self._embed, ids, pooling, use_reentrant=False, preserve_rng_state=False)
        else:
            embeddings = self._embed(ids, pooling)
        if len(distinct) == len(captions):
            return embeddings
        return torch.stack([embeddings[distinct.index(caption)] for caption in captions])

    def _embed(self, ids: Tensor, pooling: str) -> Tensor:
        return self.family.embed(self.encoder, self.model, self.tokenizer, ids, pooling)

    def post_step(self) -> None:
        """Keep the learned rows at the table's scale."""
        if self.rows is not None and self.rows.requires_grad:
            token_rows.keep_std(self.rows, self.table_std)
