"""Values that are allowed, each by itself, and hardly ever meant. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from runner.base.files import clip_config, local_folder, transformer_config
from runner.base.layers import CLIP_L, FLUX1, clip_layers, linear_layers, lora_layers
from runner.core.humanize import pluralize
from runner.core.notify import Target, literal_secrets
from runner.jobs.job import Job
from runner.preflight.finding import Finding, at
from runner.spec.schema import Spec

# An Adam step moves a number by about the learning rate. A LoRA's first matrix is drawn from +-1/sqrt(width), 0.018 at
# FLUX's 3072: above 0.01 two steps replace all of it. Rates in use are 1e-5 to 1e-3.
HIGHEST_LORA = 1e-2
# Token rows are of the size of CLIP's own, 0.01 to 0.04 a number; diffusers' textual inversion uses up to 5e-3. Several
# times the rows' size in one step is no learning.
HIGHEST_ROWS = 0.1
# Prodigy finds the step size itself and takes the rate as a factor of it; its authors keep it at 1
# (github.com/konstmish/prodigy). A tenth or ten times may be meant, 1e-4 is Adam's.
PRODIGY = (0.1, 10.0)


def check_values(seen: Job) -> Iterator[Finding]:
    yield from _rates(seen)
    yield from _ranks(seen)
    yield from _looks(seen)
    for key, message in literal_secrets(Target(**seen.spec.notify.model_dump())):
        yield at(seen.source, "warning", key, message)


def _rates(seen: Job) -> Iterator[Finding]:
    spec = seen.spec
    images = spec.train.batch_size * spec.train.accumulate * spec.compute.gpus if spec.train.scale_lr else 1
    scaled = f" times {images} images a step, by train.scale_lr" if images > 1 else ""
    prodigy = spec.optimizer.name == "prodigy"
    for key, lr, usual, highest in _trained_rates(spec):
        if key != "train.lr" and key not in seen.source.written and key not in seen.source.swept:
            continue  # it is train.lr's, which is told
        if prodigy and key == "train.lr" and not PRODIGY[0] <= lr * images <= PRODIGY[1]:
            yield at(
                seen.source, "warning", key,
                f"Prodigy finds the step size itself, and this is a factor of it (found {lr:g}{scaled}); set it to 1, or use "
                'optimizer.name = "adamw"',
            )  # fmt: skip
        elif not prodigy and lr * images > highest:
            yield at(
                seen.source, "warning", key,
                f"so high that each step undoes the one before (found {lr:g}{scaled}); usual are {usual}, and 1 with "
                'optimizer.name = "prodigy"',
            )  # fmt: skip


def _trained_rates(spec: Spec) -> Iterator[tuple[str, float, str, float]]:
    """(key, rate, those in use, the highest that can be meant) of what learns."""
    if spec.train.lr is not None and (spec.lora.until > 0 or spec.optimizer.name == "prodigy"):
        yield "train.lr", spec.train.lr, "1e-5 to 1e-3", HIGHEST_LORA
    if spec.tokens and spec.inversion.lr is not None:
        yield "inversion.lr", spec.inversion.lr, "1e-4 to 1e-2", HIGHEST_ROWS
    if spec.text_lora and spec.text_lora.lr is not None:
        yield "text_lora.lr", spec.text_lora.lr, "1e-6 to 1e-4", HIGHEST_LORA


def _ranks(seen: Job) -> Iterator[Finding]:
    """A matrix has no more directions than its shorter side."""
    if seen.planned is None:  # its base's config may be what is wrong
        return
    spec, folder = seen.spec, local_folder(seen.spec.model.base)
    adapted: list[tuple[str, int, Mapping[str, tuple[int, int]]]] = []
    if spec.lora.until > 0:
        every = linear_layers(transformer_config(spec.model.base, folder) or FLUX1)
        adapted.append(("lora.rank", spec.lora.rank, lora_layers(every, spec.lora.layers)))
    if spec.text_lora:
        adapted.append(("text_lora.rank", spec.text_lora.rank, clip_layers(clip_config(folder) or CLIP_L)))
    for key, rank, layers in adapted:
        narrow = [min(shape) for shape in layers.values() if min(shape) < rank]
        if narrow:
            yield at(
                seen.source, "warning", key,
                f"more than {len(narrow)} of {pluralize(len(layers), 'layer')} can use, the narrowest of which is {min(narrow)} wide "
                f"(found {rank}): the rest costs memory and learns nothing; lower it to {min(narrow)}",
            )  # fmt: skip


def _looks(seen: Job) -> Iterator[Finding]:
    """Rules that go by the eval loss, which is taken every `validate.every` steps."""
    spec, every, patience = seen.spec, seen.spec.validation.every, seen.spec.stop.no_better_for
    if every is None:
        return
    if patience is not None and patience < every:
        yield at(
            seen.source, "warning", "stop.no_better_for",
            f"shorter than validate.every, so the first look that is no better ends the training (found {patience}, "
            f"validate.every is {every}); set it to several times that, {3 * every} say, or look more often",
        )  # fmt: skip
    ruled = [name for name, value in spec.stop.model_dump().items() if value is not None]
    if ruled and seen.planned and every >= seen.plan.steps:
        yield at(
            seen.source, "warning", f"stop.{ruled[0]}",
            f"nothing is looked at before the end of the run (validate.every is {every}, the run has {seen.plan.steps} steps), "
            "so it never ends early; lower validate.every",
        )  # fmt: skip
