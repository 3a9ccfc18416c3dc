"""Captions: whether the encoders read all of them, and whether they name the tokens that they should teach."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from runner.core.humanize import list_some, pluralize
from runner.data import tokens
from runner.data.images import Picture
from runner.data.tokens import Placeholder
from runner.jobs.job import Job
from runner.preflight.finding import Finding, at
from runner.preflight.tokenizers import CLIP_READS, NAMES, CaptionReader

MAX_T5_TOKENS = 512  # the most that model.max_sequence_length may be
MAX_SHOWN = 100  # characters of a caption, or of what is cut off

ReaderOf = Callable[[Path, str, tuple[str, ...]], CaptionReader]  # of a base's folder, an encoder, and new entries


def check_captions(job: Job, base: Path | None, reader_of: ReaderOf) -> Iterator[Finding]:
    """base: the folder with its tokenizers; without it, how long captions are is unknown."""
    spec = job.spec
    if not job.was_read("tokens"):
        return
    placeholders = tokens.placeholders(spec.tokens)
    if job.pictures is not None:
        pictures = (*job.pictures.items, *job.pictures.held_out)
        yield from _captions_without_token(job, job.pictures.items, placeholders)
        if base is not None and job.was_read("model.base", "model.max_sequence_length", "inversion.encoders"):
            for encoder, limit in (("clip", CLIP_READS), ("t5", spec.model.max_sequence_length)):
                yield from _check_encoder(job, pictures, placeholders, base, reader_of, encoder, limit)
    yield from _check_prompts(job, placeholders)


def _captions_without_token(
    job: Job, pictures: Sequence[Picture], placeholders: Sequence[Placeholder]
) -> Iterator[Finding]:
    """Tokens that some captions do not name. (A token that no caption names is refused with the plan.)"""
    for index, placeholder in enumerate(placeholders):
        name = placeholder.name
        without = [
            picture for picture in pictures if name not in tokens.tokens_in_caption(picture.caption, placeholders)
        ]
        if 0 < len(without) < len(pictures):
            other_case = [picture for picture in without if name.lower() in picture.caption.lower()]
            hint = f" ({len(other_case)} in other letter case, which does not count)" if other_case else ""
            yield at(
                job.source, "warning", f"tokens.{index}.name",
                f"{len(without)} of {len(pictures)} captions without {name!r}{hint}; they teach it nothing, write it into "
                "them", [f"{picture.name}: {_shorten(picture.caption)!r}" for picture in without],
            )  # fmt: skip


def _check_encoder(
    job: Job, pictures: Sequence[Picture], placeholders: Sequence[Placeholder], base: Path, reader_of: ReaderOf,
    encoder: str, limit: int,
) -> Iterator[Finding]:  # fmt: skip
    """What one encoder cannot read, or cannot learn. limit: tokens it reads."""
    learns = encoder in job.spec.inversion.encoders
    entries = tuple(tokens.vocabulary_entries(placeholders)) if learns else ()
    try:
        reader = reader_of(base, encoder, entries)
    except (OSError, ValueError, KeyError):
        return  # a fault of the base, found by `base_files`
    if existing := reader.existing(entries):
        index = next(index for index, placeholder in enumerate(placeholders) if existing[0] in placeholder.entries)
        yield at(
            job.source, "error", f"tokens.{index}.placeholder",
            f"{NAMES[encoder]}'s tokenizer of this base has {existing[0]} already, so no new row can be learned for it; set "
            'another one, e.g. placeholder = "bird"',
        )  # fmt: skip
        return
    read = {
        caption: reader.read(tokens.expand_placeholders(caption, placeholders), entries, limit)
        for caption in dict.fromkeys(picture.caption for picture in pictures)
    }
    truncated = [(picture, caption) for picture in pictures if (caption := read[picture.caption]).unread]
    lost = [picture.name for picture, caption in truncated if any(entry in caption.unread for entry in entries)]
    if lost:
        yield at(
            job.source, "error", "data.source",
            f"in {pluralize(len(lost), 'caption')} a token stands after the {limit} tokens that {NAMES[encoder]} reads "
            f"({list_some(lost)}), so it learns nothing from them; name it earlier in the caption",
        )  # fmt: skip
    if truncated:
        can_raise = encoder == "t5" and limit < MAX_T5_TOKENS
        remedy = "shorten them"
        remedy += f", or raise model.max_sequence_length (up to {MAX_T5_TOKENS})" if can_raise else ""
        yield at(
            job.source, "warning", "data.source" if encoder == "clip" else "model.max_sequence_length",
            f"{pluralize(len(truncated), 'caption')} longer than the {limit} tokens that {NAMES[encoder]} reads; {remedy}, or "
            "accept that the rest is cut off",
            [
                f"{picture.name} has {caption.count}; cut off: {_with_names(caption.unread, placeholders)!r}"
                for picture, caption in truncated
            ],
        )  # fmt: skip


def _check_prompts(job: Job, placeholders: Sequence[Placeholder]) -> Iterator[Finding]:
    """A class prompt that names a token, and validation prompts that name none."""
    spec = job.spec
    if placeholders and spec.prior and (named := tokens.tokens_in_caption(spec.prior.prompt, placeholders)):
        yield at(
            job.source, "warning", "prior.prompt",
            f"the class prompt names the token {list_some(sorted(named))} (found {spec.prior.prompt!r}), which then learns "
            "the whole class; describe the class without it",
        )  # fmt: skip
    prompts = spec.validation.prompts
    if placeholders and prompts and not any(tokens.tokens_in_caption(prompt, placeholders) for prompt in prompts):
        names = list_some([placeholder.name for placeholder in placeholders])
        yield at(
            job.source, "warning", "validate.prompts",
            f"no prompt names a token that is learned ({names}), so the pictures would not show it; write it into one",
        )  # fmt: skip


def _with_names(text: str, placeholders: Sequence[Placeholder]) -> str:
    """Expanded text with the tokens' names again, as in the caption; shortened."""
    for placeholder in placeholders:
        text = text.replace(placeholder.text, placeholder.name)
    return _shorten(text)


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
