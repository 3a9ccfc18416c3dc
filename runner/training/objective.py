"""What training minimises, and what runs are compared by: the flow-matching loss on drawn and on fixed noise."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from runner.core.seeds import derive
from runner.data import buckets
from runner.data.buckets import CropView, Size
from runner.model import flow_matching
from runner.model.device import autocast, pin_memory, to_device
from runner.model.family import PromptEmbeds
from runner.model.latents import draw_latents, mean_latents
from runner.training.context import EVAL_SIGMAS, RunContext
from runner.training.encoders import CachedEncoder, LiveEncoder, encode_latents
from runner.training.prefetch import Prefetcher

Encoders = Mapping[str, LiveEncoder | CachedEncoder]


@dataclass(frozen=True)
class Prepared:
    """A part of a micro-batch in pinned host memory. texts: embeddings by encoder, of those that look them up; h, w: of the
    latents; shown: how many are no class images; dropout: seed of the adapters'."""

    noised: flow_matching.NoisyBatch
    texts: Mapping[str, Tensor]
    captions: list[str]
    pooling: str
    h: int
    w: int
    shown: int
    dropout: int


class FlowObjective:
    """The reference's loss on one micro-batch. Every random number comes from (seed, step, place in the step's batch),
    so that two micro-batches of two are one of four."""

    def __init__(self, context: RunContext, transformer: nn.Module, encoders: Encoders) -> None:
        spec, base = context.spec, context.base
        self.context, self.transformer, self.encoders = context, transformer, encoders
        self.moments = _moments(context)
        self.counts: dict[Size, int] = {size: len(found) * spec.data.repeats for size, found in context.groups.items()}
        self.family = context.family
        self.scale = self.family.latent_scale(base)
        weighting = flow_matching.Weighting(**spec.train.weighting.model_dump())
        self.flow = flow_matching.Flow(base, weighting, self.family.pack)
        self.predict = self.family.predictor(transformer, spec.train.guidance, base.device, base.dtype)
        self.ahead = Prefetcher(self.prepare, in_thread=base.device.type != "cpu")

    def close(self) -> None:
        self.ahead.close()

    # ---- training --------------------------------------------------------------------------------------------------

    def batch(self, step: int, micro: int) -> list[tuple[CropView, str]]:
        """(view, caption) of the micro-batch; with prior preservation as many class images behind."""
        own, context = self.context.spec, self.context
        accumulate = own.train.accumulate * context.ranks.count
        size, shown = buckets.draw_batch(
            own.seed, step, micro, images=own.train.batch_size, accumulate=accumulate, counts=self.counts
        )
        group, out = context.groups[size], []
        for place, (index, epoch) in enumerate(shown):
            picture = group[index % len(group)]
            number = epoch * own.data.repeats + index // len(group)
            variant = buckets.variant(own.seed, picture.name, number, context.variants)
            draw = random.Random(derive(own.seed, "caption", step, micro * own.train.batch_size + place))
            dropped = draw.random() < own.data.caption_dropout
            out.append((CropView(picture, size, variant), "" if dropped else picture.caption))
        if own.prior:
            classes = {size: len(context.class_pictures)}
            _, drawn = buckets.draw_batch(
                own.seed, step, micro, images=own.train.batch_size, accumulate=accumulate, counts=classes, what="class"
            )
            out += [(CropView(context.class_pictures[index], size, None), own.prior.prompt) for index, _ in drawn]
        return out

    def prepare(self, step: int, micro: int) -> Prepared:
        """All of a part of a micro-batch that needs no device."""
        context, own, device = self.context, self.context.spec, self.context.base.device
        whole, part = divmod(micro, context.split)
        whole = whole * context.ranks.count + context.ranks.rank
        count = own.train.batch_size
        chosen = range(count)[part * count // context.split : (part + 1) * count // context.split]
        batch = self.batch(step, whole)
        places = [*chosen, *(count + at for at in chosen)] if own.prior else [*chosen]
        parts = []
        for place in places:
            kind, at = ("noise", place) if place < count else ("class-noise", place - count)
            generator = torch.Generator().manual_seed(derive(own.seed, kind, step, whole * count + at))
            latents = draw_latents(self.moments[batch[place][0]][None], self.scale, generator)
            parts.append(self.flow.add_noise(latents, self.flow.sample_timesteps(1, generator), generator))
        captions, pooling = [batch[place][1] for place in places], self._pooling(step, whole)
        texts = {
            name: pin_memory(encoder.look_up(captions, pooling), device)
            for name, encoder in self.encoders.items()
            if isinstance(encoder, CachedEncoder)
        }
        dropout = derive(own.seed, "dropout", step, whole, *([part] if part else []))
        h, w = self.moments[batch[0][0]].shape[-2:]
        noised = _each(flow_matching.collate(parts), lambda tensor: pin_memory(tensor, device))
        return Prepared(noised, texts, captions, pooling, h, w, len(chosen), dropout)

    def loss(self, step: int, micro: int) -> Tensor:
        """`micro` counts the parts of micro-batches, of which a step has accumulate * split on each rank."""
        context, own, device = self.context, self.context.spec, self.context.base.device
        last = micro + 1 == own.train.accumulate * context.split
        made = self.ahead.get((step, micro), then=(step + 1, 0) if last else (step, micro + 1))
        noised = _each(made.noised, lambda tensor: to_device(tensor, device))
        if own.lora.dropout > 0:  # dropout can only draw from the global generator
            torch.manual_seed(made.dropout)
        prompts = self.family.prompt_embeds(
            {
                name: to_device(made.texts[name], device)
                if name in made.texts
                else encoder.embed(made.captions, made.pooling)
                for name, encoder in self.encoders.items()
            }
        )
        with autocast(device, context.base.dtype):
            prediction = self.predict(noised, prompts, made.h, made.w)
        errors = self.flow.loss_per_image(prediction, noised)
        shown = made.shown
        return errors[:shown].mean() + (own.prior.weight * errors[shown:].mean() if own.prior else 0.0)

    def _pooling(self, step: int, micro: int) -> str:
        own = self.context.spec
        if own.inversion.pooling != "both":
            return own.inversion.pooling
        return random.Random(derive(own.seed, "pooling", step, micro)).choice(("diffusers", "eos"))

    def read(self, captions: list[str], pooling: str) -> PromptEmbeds:
        embeddings = {name: encoder.embed(captions, pooling) for name, encoder in self.encoders.items()}
        return self.family.prompt_embeds(embeddings)

    def post_step(self) -> None:
        for encoder in self.encoders.values():
            encoder.post_step()

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[float, float]:
        """Unweighted loss at nine fixed sigmas, each a mean over its pictures; noise fixed by the picture's name alone, so
        that runs of any seed and weighting compare."""
        context, device = self.context, self.context.base.device
        points = context.eval_points
        total, shown = dict.fromkeys(EVAL_SIGMAS, 0.0), Counter(sigma for _, sigmas in points for sigma in sigmas)
        pooling = "eos" if context.spec.inversion.pooling == "eos" else "diffusers"
        self.transformer.eval()
        for view, all_sigmas in points:
            moments = self.moments[view]
            mean = mean_latents(moments[None], self.scale)  # [1, C, h, w]
            with torch.no_grad():
                text = self.read([view.picture.caption], pooling)
            fits = context.spec.train.batch_size // context.split
            for start in range(0, len(all_sigmas), fits):
                sigmas = all_sigmas[start : start + fits]
                parts = []
                for sigma in sigmas:
                    generator = torch.Generator().manual_seed(derive(0, "eval", view.picture.name, str(sigma)))
                    at = torch.tensor([sigma])
                    parts.append(flow_matching.add_noise(mean, at, at, generator, self.family.pack))
                noised = _each(flow_matching.collate(parts), lambda tensor: to_device(tensor, device))
                read = PromptEmbeds(text.txt.expand(len(sigmas), -1, -1), text.vec.expand(len(sigmas), -1))
                with torch.no_grad(), autocast(device, context.base.dtype):
                    made = self.predict(noised, read, *moments.shape[-2:])
                for sigma, error in zip(
                    sigmas, (made.float() - noised.target).square().flatten(1).mean(1), strict=True
                ):
                    total[sigma] += float(error) / shown[sigma]
        self.transformer.train()
        return total


def _moments(context: RunContext) -> dict[CropView, Tensor]:
    """What every view became in the VAE; equal pixels share one tensor."""
    found = context.cache.read("latents", context.latent_keys.values(), lambda: encode_latents(context))
    return {view: found[key] for view, key in context.latent_keys.items()}


def _each(noised: flow_matching.NoisyBatch, change: Callable[[Tensor], Tensor]) -> flow_matching.NoisyBatch:
    return flow_matching.NoisyBatch(
        *(change(part) for part in (noised.img, noised.target, noised.sigmas, noised.timesteps))
    )
