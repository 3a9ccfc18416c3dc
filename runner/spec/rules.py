"""Rules over several keys of a spec."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from runner.spec.attention import HALF_PRECISION_ONLY
from runner.spec.schema import Recomputing, Spec
from runner.spec.unknown_keys import show_value


@dataclass(frozen=True)
class BrokenRule:
    """Keys that do not go together.

    key: the one at which it is reported; reads: all keys that the rule looks at: where one of them is faulty itself,
    the rule is not reported; missing: `key` is required and not there.
    """

    key: str
    message: str
    reads: tuple[str, ...]
    missing: bool = False


def broken_rules(spec: Spec, written: Mapping[str, Any]) -> Iterator[BrokenRule]:
    """written: the tables as the user wrote them."""
    yield from _length(spec)
    yield from _tokens(spec, written)
    yield from _learning(spec)
    yield from _eval_loss(spec)
    yield from _attention(spec)
    yield from _offload(spec)
    yield from _selective(spec)
    yield from _prodigy(spec)
    yield from _schedule(spec)


def _length(spec: Spec) -> Iterator[BrokenRule]:
    reads = ("train.steps", "train.epochs")
    if spec.train.steps is None and spec.train.epochs is None:
        message = "required key is missing; write steps = 1000 (or epochs = 10) below [train]"
        yield BrokenRule("train.steps", message, reads, missing=True)
    if spec.train.steps is not None and spec.train.epochs is not None:
        message = f"expected train.steps or train.epochs, got both (epochs = {spec.train.epochs}); remove one"
        yield BrokenRule("train.epochs", message, reads)


def _tokens(spec: Spec, written: Mapping[str, Any]) -> Iterator[BrokenRule]:
    for index, name in _repeated(token.name for token in spec.tokens):
        key = f"tokens.{index}.name"
        message = f"expected a different name for each token, got {show_value(name)} twice; change one"
        yield BrokenRule(key, message, (key,))
    for index, word in _repeated(token.placeholder for token in spec.tokens):
        key = f"tokens.{index}.placeholder"
        message = (
            f"expected a different placeholder for each token, got {show_value(word)} twice; change one, or remove both"
        )
        yield BrokenRule(key, message, (key,))
    if not spec.tokens and "inversion" in written:
        add = "" if spec.text_lora else "add a [[tokens]] table with a name, or "
        message = f"there are no tokens to learn; {add}remove [inversion]"
        yield BrokenRule("inversion", message, ("inversion", "tokens"))


def _repeated(words: Iterable[str | None]) -> Iterator[tuple[int, str]]:
    """Those that an earlier one equals, with their positions."""
    seen: set[str] = set()
    for index, word in enumerate(words):
        if word is None:
            continue
        if word in seen:
            yield index, word
        seen.add(word)


def _learning(spec: Spec) -> Iterator[BrokenRule]:
    if spec.inversion.encoders not in (("clip",), ("clip", "t5")):
        message = f'expected ["clip"] or ["clip", "t5"], got {show_value(list(spec.inversion.encoders))}'
        yield BrokenRule("inversion.encoders", message, ("inversion.encoders",))
    if spec.lora.until == 0 and not spec.tokens and spec.text_lora is None:
        message = "nothing is left to train, got 0; raise it, or add a [[tokens]] table for textual inversion"
        yield BrokenRule("lora.until", message, ("lora.until", "tokens", "text_lora"))
    if spec.text_lora is not None and spec.tokens:
        message = "a run cannot train both a LoRA and token embeddings in CLIP; remove [text_lora] or [[tokens]]"
        yield BrokenRule("text_lora", message, ("text_lora", "tokens"))


def _eval_loss(spec: Spec) -> Iterator[BrokenRule]:
    """Keys that need the eval loss need it to be measured."""
    reasons = []
    if spec.validation.every is None:
        reasons.append("is measured only where validate.every is set; set that too")
    if not spec.validation.loss:
        reasons.append("validate.loss = false turns off; remove that")
    keys = [f"stop.{name}" for name, value in spec.stop.model_dump().items() if value is not None]
    for key in [*keys, *(["export.best"] if spec.export.best else [])]:
        for reason in reasons:
            yield BrokenRule(key, f"needs the eval loss, which {reason}", (key, "validate.every", "validate.loss"))


def _attention(spec: Spec) -> Iterator[BrokenRule]:
    if spec.model.attention in HALF_PRECISION_ONLY and spec.model.dtype == "fp32":
        message = f'{spec.model.attention} needs model.dtype bf16 or fp16, got fp32; use "native"'
        yield BrokenRule("model.attention", message, ("model.attention", "model.dtype"))


def _offload(spec: Spec) -> Iterator[BrokenRule]:
    if spec.model.offload == "none":
        return
    for key, every in _gradient_checkpointing(spec):
        if every == "selective" or (every is not None and every > 1):
            message = f"offloaded blocks are always recomputed, got {show_value(every)}; remove this key"
            yield BrokenRule(key, message, (key, "model.offload"))
    if spec.model.compile:
        message = "compiled blocks cannot be offloaded, got true; remove this key or model.offload"
        yield BrokenRule("model.compile", message, ("model.compile", "model.offload"))


def _selective(spec: Spec) -> Iterator[BrokenRule]:
    instead = "use true, or n for every n-th block"
    for key, every in _gradient_checkpointing(spec):
        if every != "selective":
            continue
        if spec.model.compile:
            message = f'compiled blocks are recomputed as a whole, got "selective"; {instead}'
            yield BrokenRule(key, message, (key, "model.compile"))
        if spec.lora.dropout > 0:
            dropout = f"lora.dropout = {spec.lora.dropout:g}"
            message = f'recomputation would draw another dropout, got "selective" with {dropout}; {instead}'
            yield BrokenRule(key, message, (key, "lora.dropout"))


def _gradient_checkpointing(spec: Spec) -> Iterator[tuple[str, Recomputing | None]]:
    yield "model.gradient_checkpointing", spec.model.gradient_checkpointing
    yield "inversion.gradient_checkpointing", spec.inversion.gradient_checkpointing


def _prodigy(spec: Spec) -> Iterator[BrokenRule]:
    if spec.optimizer.name != "prodigy":
        return
    rates = {
        "inversion.lr": spec.inversion.lr if spec.tokens else None,
        "text_lora.lr": spec.text_lora.lr if spec.text_lora else None,
    }
    for key, lr in rates.items():
        if lr is not None and lr != spec.train.lr:
            message = (
                f"Prodigy has one learning rate for all that it trains, got {lr:g} with train.lr = {spec.train.lr:g}; "
                'remove this key, or use optimizer.name = "adamw"'
            )
            yield BrokenRule(key, message, (key, "train.lr", "optimizer.name"))


def _schedule(spec: Spec) -> Iterator[BrokenRule]:
    steps, schedule = spec.train.steps, spec.schedule
    if steps is not None and schedule.warmup > steps:
        message = f"expected at most train.steps ({steps}), got {schedule.warmup}; lower it"
        yield BrokenRule("schedule.warmup", message, ("schedule.warmup", "train.steps"))
    if schedule.warmup and schedule.name == "constant":
        message = (
            f"the constant schedule has no warm-up, got {schedule.warmup}; "
            'use schedule.name = "constant_with_warmup"'
        )  # fmt: skip
        yield BrokenRule("schedule.warmup", message, ("schedule.warmup", "schedule.name"))
    if schedule.cycles != 1 and schedule.name != "cosine_with_restarts":
        message = (
            f"only cosine_with_restarts has cycles, got {schedule.cycles}; remove it, or use schedule.name = "
            '"cosine_with_restarts"'
        )
        yield BrokenRule("schedule.cycles", message, ("schedule.cycles", "schedule.name"))
    if schedule.power != 1 and schedule.name != "polynomial":
        message = f'only polynomial has a power, got {schedule.power:g}; remove it, or use schedule.name = "polynomial"'
        yield BrokenRule("schedule.power", message, ("schedule.power", "schedule.name"))
