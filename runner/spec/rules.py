"""Defaults that depend on other keys, and rules over several keys."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from runner.spec.attention import HALF
from runner.spec.schema import Inversion, Spec
from runner.spec.unknown_keys import show_value

SECRET_KEYS = {
    "token", "hf_token", "hub_token", "huggingface_token", "access_token", "api_key", "apikey", "wandb_api_key",
    "password", "secret",
}  # fmt: skip


# Keys whose default is another key's value, as `fill_defaults` says.
FOLLOWED_DEFAULTS = {
    "lora.alpha": "lora.rank",
    "inversion.lr": "train.lr",
    "text_lora.alpha": "text_lora.rank",
    "text_lora.lr": "train.lr",
    "validate.size": "data.resolution",
}


def follow_default(key: str, values: Mapping[str, Any]) -> str | None:
    """The key that `key` has its value from, where nobody set it; `values`: a resolved spec's, by dotted key."""
    followed = FOLLOWED_DEFAULTS.get(key, "")
    return followed if followed in values and values.get(key) == values[followed] else None


def fill_defaults(tables: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with the values that default to another key's. Wrong types are left for the model to refuse."""
    out = copy.deepcopy(dict(tables))

    def table(name: str) -> dict[str, Any]:
        inner = out.setdefault(name, {})
        return inner if isinstance(inner, dict) else {}

    optimizer, train, lora, data = table("optimizer"), table("train"), table("lora"), table("data")
    optimizer.setdefault("name", "adamw")
    if isinstance(train.get("weighting"), dict):
        train["weighting"].setdefault("scheme", "none")
    train.setdefault("lr", 1.0 if optimizer["name"] == "prodigy" else 1e-4)
    lora.setdefault("alpha", _float(lora.get("rank", 16)))
    inversion, validate = table("inversion"), table("validate")
    if data:
        drawn = data.get("center_crop") is not True or data.get("random_flip") is True
        data.setdefault("variants", 4 if drawn else 1)
    inversion.setdefault("until", 1.0 if lora.get("until") == 0 else 0.5)
    inversion.setdefault("lr", train["lr"])
    if isinstance(out.get("text_lora"), dict):
        text_lora = out["text_lora"]
        text_lora.setdefault("alpha", _float(text_lora.get("rank", 16)))
        text_lora.setdefault("lr", train["lr"])
    if "size" not in validate:
        resolution = data.get("resolution", 512)
        validate["size"] = resolution[0] if isinstance(resolution, list) and resolution else resolution
    for name in ("model", "data", "train"):
        if not out.get(name) and name not in tables:
            out.pop(name, None)  # a required table that is not there is one fault, not its keys'
    return out


def drop_unused_inversion(tables: dict[str, Any]) -> None:
    """Take [inversion] out of a spec that fluxrun wrote where no token learns: a resolved spec states every default, also of
    what does not apply. Choices that a user made there stay, to be refused; `lr` and `until` were filled in from other keys.
    """
    told = tables.get("inversion")
    if tables.get("tokens") or not isinstance(told, dict):
        return
    chosen = {key: value for key, value in told.items() if key not in ("lr", "until")}
    default = Inversion().model_dump(mode="json", exclude_none=True)
    if all(default.get(key) == value for key, value in chosen.items()):
        del tables["inversion"]


# Keys whose defaults are other keys' values -> those keys.
DERIVED: Mapping[str, frozenset[str]] = {
    "train.lr": frozenset({"optimizer.name"}),
    "lora.alpha": frozenset({"lora.rank"}),
    "data.variants": frozenset({"data.center_crop", "data.random_flip"}),
    "inversion.until": frozenset({"lora.until"}),
    "inversion.lr": frozenset({"train.lr", "optimizer.name"}),
    "text_lora.alpha": frozenset({"text_lora.rank"}),
    "text_lora.lr": frozenset({"train.lr", "optimizer.name"}),
    "validate.size": frozenset({"data.resolution"}),
}


def is_default(key: str, tables: Mapping[str, Any]) -> bool:
    """Whether a key of DERIVED has the value that it would have if it were not set."""
    name, _, last = key.partition(".")
    own = tables.get(name)
    if not isinstance(own, Mapping) or last not in own:
        return True
    rest = {**tables, name: {other: value for other, value in own.items() if other != last}}
    return bool(fill_defaults(rest)[name][last] == own[last])


def _float(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def secret_values(tables: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Keys and values that look like a credential; the value is not shown."""
    said = "a spec must not contain secrets (not shown); remove it, and use the environment variable HF_TOKEN or `hf auth login`"
    wandb = said.replace("HF_TOKEN or `hf auth login`", "WANDB_API_KEY or `wandb login`")
    items = tables.items() if isinstance(tables, Mapping) else enumerate(tables) if isinstance(tables, list) else ()
    for name, value in items:
        key = f"{path}.{name}" if path else str(name)
        if (str(name).lower() in SECRET_KEYS and isinstance(value, str)) or (
            isinstance(value, str) and value.startswith("hf_")
        ):
            yield key, wandb if "wandb" in str(name).lower() else said
        else:
            yield from secret_values(value, key)


@dataclass(frozen=True)
class BrokenRule:
    """Keys that do not go together. `reads`: all that this was found out from; where one of them is faulty itself,
    nothing can be said."""

    key: str
    message: str
    reads: tuple[str, ...]


def broken_rules(spec: Spec, written: Mapping[str, Any]) -> Iterator[BrokenRule]:
    """`written`: the tables as the user wrote them."""
    yield from _length(spec)
    yield from _tokens(spec, written)
    yield from _evaluation(spec)
    if spec.model.attention in HALF and spec.model.dtype == "fp32":
        yield BrokenRule(
            "model.attention",
            f'{spec.model.attention} needs model.dtype bf16 or fp16, got fp32; use "native"',
            ("model.attention", "model.dtype"),
        )
    yield from _offload(spec)
    yield from _selective(spec)
    yield from _prodigy(spec)
    yield from _schedule(spec)


def _length(spec: Spec) -> Iterator[BrokenRule]:
    reads = ("train.steps", "train.epochs")
    if spec.train.steps is None and spec.train.epochs is None:
        yield BrokenRule(
            "train.steps", "required key is missing; write steps = 1000 (or epochs = 10) below [train]", reads
        )
    if spec.train.steps is not None and spec.train.epochs is not None:
        yield BrokenRule(
            "train.epochs",
            f"expected train.steps or train.epochs, got both (epochs = {spec.train.epochs}); remove one",
            reads,
        )


def _tokens(spec: Spec, written: Mapping[str, Any]) -> Iterator[BrokenRule]:
    for index, name in _repeated(token.name for token in spec.tokens):
        key = f"tokens.{index}.name"
        yield BrokenRule(
            key, f"expected a different name for each token, got {show_value(name)} twice; change one", (key,)
        )
    for index, word in _repeated(token.placeholder for token in spec.tokens):
        key = f"tokens.{index}.placeholder"
        said = (
            f"expected a different placeholder for each token, got {show_value(word)} twice; change one, or remove both"
        )
        yield BrokenRule(key, said, (key,))
    if not spec.tokens and "inversion" in written:
        way = "" if spec.text_lora else "add a [[tokens]] table with a name, or "
        yield BrokenRule("inversion", f"there are no tokens to learn; {way}remove [inversion]", ("inversion", "tokens"))
    if spec.inversion.encoders not in (("clip",), ("clip", "t5")):
        yield BrokenRule(
            "inversion.encoders",
            f'expected ["clip"] or ["clip", "t5"], got {show_value(list(spec.inversion.encoders))}',
            ("inversion.encoders",),
        )
    if spec.lora.until == 0 and not spec.tokens and spec.text_lora is None:
        yield BrokenRule(
            "lora.until",
            "nothing is left to train, got 0; raise it, or add a [[tokens]] table for textual inversion",
            ("lora.until", "tokens", "text_lora"),
        )
    if spec.text_lora is not None and spec.tokens:
        yield BrokenRule(
            "text_lora",
            "a run cannot train both a LoRA and token embeddings in CLIP; remove [text_lora] or [[tokens]]",
            ("text_lora", "tokens"),
        )


def _repeated(words: Iterable[str | None]) -> Iterator[tuple[int, str]]:
    """Those that stand further up already, with their positions."""
    seen: set[str] = set()
    for index, word in enumerate(words):
        if word is None:
            continue
        if word in seen:
            yield index, word
        seen.add(word)


def _evaluation(spec: Spec) -> Iterator[BrokenRule]:
    """Keys that need the eval loss need it to be measured."""
    ways = []
    if spec.validation.every is None:
        ways.append("is measured only where validate.every is set; set that too")
    if not spec.validation.loss:
        ways.append("validate.loss = false turns off; remove that")
    ruled = [name for name, value in spec.stop.model_dump().items() if value is not None]
    for key in [f"stop.{name}" for name in ruled] + (["export.best"] if spec.export.best else []):
        for way in ways:
            yield BrokenRule(key, f"needs the eval loss, which {way}", (key, "validate.every", "validate.loss"))


def _offload(spec: Spec) -> Iterator[BrokenRule]:
    own = spec.model
    if own.offload == "none":
        return
    for table, every in (("model", own.gradient_checkpointing), ("inversion", spec.inversion.gradient_checkpointing)):
        if every == "selective" or (every is not None and every > 1):
            key = f"{table}.gradient_checkpointing"
            message = f"offloaded blocks are always recomputed, got {show_value(every)}; remove this key"
            yield BrokenRule(key, message, (key, "model.offload"))
    if own.compile:
        yield BrokenRule(
            "model.compile",
            "compiled blocks cannot be offloaded, got true; remove this key or model.offload",
            ("model.compile", "model.offload"),
        )


def _selective(spec: Spec) -> Iterator[BrokenRule]:
    for table in ("model", "inversion"):
        if getattr(spec, table).gradient_checkpointing != "selective":
            continue
        key = f"{table}.gradient_checkpointing"
        if spec.model.compile:
            yield BrokenRule(
                key,
                'compiled blocks are recomputed as a whole, got "selective"; use true, or n for every n-th block',
                (key, "model.compile"),
            )
        if spec.lora.dropout > 0:
            yield BrokenRule(
                key,
                f'recomputation would draw another dropout, got "selective" with lora.dropout = {spec.lora.dropout:g}; use true, or n for '
                "every n-th block",
                (key, "lora.dropout"),
            )


def _prodigy(spec: Spec) -> Iterator[BrokenRule]:
    if spec.optimizer.name != "prodigy":
        return
    own = {
        "inversion.lr": spec.inversion.lr if spec.tokens else None,
        "text_lora.lr": spec.text_lora.lr if spec.text_lora else None,
    }
    for key, lr in own.items():
        if lr is not None and lr != spec.train.lr:
            yield BrokenRule(
                key,
                f"Prodigy has one learning rate for all that it trains, got {lr:g} with train.lr = {spec.train.lr:g}; "
                'remove this key, or use optimizer.name = "adamw"',
                (key, "train.lr", "optimizer.name"),
            )


def _schedule(spec: Spec) -> Iterator[BrokenRule]:
    steps, own = spec.train.steps, spec.schedule
    if steps is not None and own.warmup > steps:
        yield BrokenRule(
            "schedule.warmup",
            f"expected at most train.steps ({steps}), got {own.warmup}; lower it",
            ("schedule.warmup", "train.steps"),
        )
    if own.warmup and own.name == "constant":
        yield BrokenRule(
            "schedule.warmup",
            f'the constant schedule has no warm-up, got {own.warmup}; use schedule.name = "constant_with_warmup"',
            ("schedule.warmup", "schedule.name"),
        )
    if own.cycles != 1 and own.name != "cosine_with_restarts":
        yield BrokenRule(
            "schedule.cycles",
            f'only cosine_with_restarts has cycles, got {own.cycles}; remove it, or use schedule.name = "cosine_with_restarts"',
            ("schedule.cycles", "schedule.name"),
        )
    if own.power != 1 and own.name != "polynomial":
        yield BrokenRule(
            "schedule.power",
            f'only polynomial has a power, got {own.power:g}; remove it, or use schedule.name = "polynomial"',
            ("schedule.power", "schedule.name"),
        )
