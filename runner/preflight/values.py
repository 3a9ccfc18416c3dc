"""Values that are allowed but hardly ever meant, e.g. a learning rate of 10."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from runner.base.files import clip_config, local_folder, transformer_config
from runner.base.layers import CLIP_L, FLUX1, clip_layers, linear_layers, lora_layers
from runner.core.humanize import pluralize
from runner.core.notify import Target, literal_secrets
from runner.jobs.job import Job
from runner.preflight.finding import Finding, at
from runner.spec.schema import Spec

# An Adam step changes a weight by about the learning rate. A LoRA's first matrix is drawn from +-1/sqrt(width), which
# is 0.018 at FLUX's 3072, so above 0.01 two steps replace it. Usual rates are 1e-5 to 1e-3.
MAX_LORA_LR = 1e-2
# The values of a token's embedding are as large as CLIP's own, 0.01 to 0.04. diffusers' textual inversion uses rates up
# to 5e-3. A step of several times the embedding's size learns nothing.
MAX_EMBEDDING_LR = 0.1
# Prodigy estimates the step size and multiplies it by the rate, which its authors keep at 1 (github.com/konstmish/prodigy).
# 0.1 or 10 may be meant; 1e-4 is a rate for Adam.
PRODIGY_LR = (0.1, 10.0)


def check_values(job: Job) -> Iterator[Finding]:
    """Warnings about learning rates, ranks, early stopping and secrets."""
    yield from _learning_rates(job)
    yield from _ranks(job)
    yield from _validation(job)
    for key, message in literal_secrets(Target(**job.spec.notify.model_dump())):
        yield at(job.source, "warning", key, message)


def _learning_rates(job: Job) -> Iterator[Finding]:
    spec = job.spec
    images = spec.train.batch_size * spec.train.accumulate * spec.compute.gpus if spec.train.scale_lr else 1
    scaled = f" times {images} images a step, by train.scale_lr" if images > 1 else ""
    prodigy = spec.optimizer.name == "prodigy"
    for key, lr, usual, highest in _trained_rates(spec):
        if key != "train.lr" and key not in job.source.set_keys and key not in job.source.swept:
            continue  # its value is train.lr's, which is checked
        if prodigy and key == "train.lr" and not PRODIGY_LR[0] <= lr * images <= PRODIGY_LR[1]:
            yield at(
                job.source, "warning", key,
                f"Prodigy finds the step size itself, and this is a factor of it (found {lr:g}{scaled}); set it to 1, or use "
                'optimizer.name = "adamw"',
            )  # fmt: skip
        elif not prodigy and lr * images > highest:
            yield at(
                job.source, "warning", key,
                f"so high that each step undoes the one before (found {lr:g}{scaled}); usual are {usual}, and 1 with "
                'optimizer.name = "prodigy"',
            )  # fmt: skip


def _trained_rates(spec: Spec) -> Iterator[tuple[str, float, str, float]]:
    """(key, rate, usual rates, highest rate that can be meant) of everything that is trained."""
    if spec.train.lr is not None and (spec.lora.until > 0 or spec.optimizer.name == "prodigy"):
        yield "train.lr", spec.train.lr, "1e-5 to 1e-3", MAX_LORA_LR
    if spec.tokens and spec.inversion.lr is not None:
        yield "inversion.lr", spec.inversion.lr, "1e-4 to 1e-2", MAX_EMBEDDING_LR
    if spec.text_lora and spec.text_lora.lr is not None:
        yield "text_lora.lr", spec.text_lora.lr, "1e-6 to 1e-4", MAX_LORA_LR


def _ranks(job: Job) -> Iterator[Finding]:
    """A LoRA of a layer can use no higher rank than the layer's shorter side."""
    if job.planned is None:  # the base's config may be wrong
        return
    spec, folder = job.spec, local_folder(job.spec.model.base)
    adapted: list[tuple[str, int, Mapping[str, tuple[int, int]]]] = []
    if spec.lora.until > 0:
        linears = linear_layers(transformer_config(spec.model.base, folder) or FLUX1)
        adapted.append(("lora.rank", spec.lora.rank, lora_layers(linears, spec.lora.layers)))
    if spec.text_lora:
        adapted.append(("text_lora.rank", spec.text_lora.rank, clip_layers(clip_config(folder) or CLIP_L)))
    for key, rank, layers in adapted:
        narrow = [min(shape) for shape in layers.values() if min(shape) < rank]
        if narrow:
            yield at(
                job.source, "warning", key,
                f"more than {len(narrow)} of {pluralize(len(layers), 'layer')} can use, the narrowest of which is {min(narrow)} wide "
                f"(found {rank}): the rest costs memory and learns nothing; lower it to {min(narrow)}",
            )  # fmt: skip


def _validation(job: Job) -> Iterator[Finding]:
    """Rules of `stop` that use the eval loss, which is computed every `validate.every` steps."""
    spec, every, patience = job.spec, job.spec.validation.every, job.spec.stop.no_better_for
    if every is None:
        return
    if patience is not None and patience < every:
        yield at(
            job.source, "warning", "stop.no_better_for",
            f"shorter than validate.every, so the first eval loss that is no better ends the training (found {patience}, "
            f"validate.every is {every}); set it to several times that, e.g. {3 * every}, or lower validate.every",
        )  # fmt: skip
    rules = [name for name, value in spec.stop.model_dump().items() if value is not None]
    if rules and job.planned and every >= job.plan.steps:
        yield at(
            job.source, "warning", f"stop.{rules[0]}",
            f"no eval loss is computed before the end of the run (validate.every is {every}, the run has {job.plan.steps} "
            "steps), so it never ends early; lower validate.every",
        )  # fmt: skip
