"""What can be wrong with a run's captions: longer than an encoder reads, without the tokens they should teach. No torch."""

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

LONGEST_T5 = 512  # what model.max_sequence_length may be
LONGEST_SHOWN = 100  # characters of what is cut off

ReaderOf = Callable[[Path, str, tuple[str, ...]], CaptionReader]


def check_text(seen: Job, base: Path | None, reader: ReaderOf) -> Iterator[Finding]:
    """`base`: its folder on this disk; without it nobody can say how long a caption is."""
    spec = seen.spec
    if not seen.was_read("tokens"):
        return
    known = tokens.placeholders(spec.tokens)
    if seen.pictures is not None:
        every = (*seen.pictures.items, *seen.pictures.held)
        yield from _unnamed(seen, seen.pictures.items, known)
        if base is not None and seen.was_read("model.base", "model.max_sequence_length", "inversion.encoders"):
            yield from _too_long(seen, every, known, base, reader)
    yield from _prompts(seen, known)


def _unnamed(seen: Job, pictures: Sequence[Picture], known: Sequence[Placeholder]) -> Iterator[Finding]:
    for index, one in enumerate(known):
        without = [picture for picture in pictures if one.name not in tokens.tokens_in_caption(picture.caption, known)]
        if 0 < len(without) < len(pictures):  # all of them: the plan refuses it
            other = [picture for picture in without if one.name.lower() in picture.caption.lower()]
            hint = f" ({len(other)} in other letters: it counts only as it is written)" if other else ""
            yield at(
                seen.source, "warning", f"tokens.{index}.name",
                f"{len(without)} of {len(pictures)} captions without {one.name!r}{hint}; they teach it nothing, write it into "
                "them", [f"{picture.name}: {_short(picture.caption)!r}" for picture in without],
            )  # fmt: skip


def _too_long(
    seen: Job, pictures: Sequence[Picture], known: Sequence[Placeholder], base: Path, reader: ReaderOf
) -> Iterator[Finding]:
    for encoder, limit in (("clip", CLIP_READS), ("t5", seen.spec.model.max_sequence_length)):
        learns = encoder in seen.spec.inversion.encoders
        pieces = tuple(piece for one in known for piece in one.pieces) if learns else ()
        try:
            own = reader(base, encoder, pieces)
        except (OSError, ValueError, KeyError):
            continue  # a fault of the base, told where its files are looked at
        if taken := own.taken(pieces):
            index = next(index for index, one in enumerate(known) if taken[0] in one.pieces)
            yield at(
                seen.source, "error", f"tokens.{index}.placeholder",
                f"{NAMES[encoder]}'s tokenizer of this base has {taken[0]} already, so no new row can be learned for it; set "
                'another one, e.g. placeholder = "bird"',
            )  # fmt: skip
            continue
        read = {
            caption: own.read(tokens.expand_placeholders(caption, known), pieces, limit)
            for caption in dict.fromkeys(one.caption for one in pictures)
        }
        cut = [(picture, found) for picture in pictures if (found := read[picture.caption]).unread]
        lost = [picture.name for picture, found in cut if any(piece in found.unread for piece in pieces)]
        if lost:
            yield at(
                seen.source, "error", "data.source",
                f"in {pluralize(len(lost), 'caption')} a token stands behind the {limit} tokens that {NAMES[encoder]} reads "
                f"({list_some(lost)}), so it learns nothing from them; name it earlier in the caption",
            )  # fmt: skip
        if cut:
            raised = encoder == "t5" and limit < LONGEST_T5
            way = "shorten them" + (f", or raise model.max_sequence_length (up to {LONGEST_T5})" if raised else "")
            key = "data.source" if encoder == "clip" else "model.max_sequence_length"
            yield at(
                seen.source, "warning", key,
                f"{pluralize(len(cut), 'caption')} longer than the {limit} tokens that {NAMES[encoder]} reads; {way}, or live "
                "with what is cut off",
                [f"{picture.name} has {found.count}; cut off: {_written(found.unread, known)!r}" for picture, found in cut],
            )  # fmt: skip


def _prompts(seen: Job, known: Sequence[Placeholder]) -> Iterator[Finding]:
    spec = seen.spec
    if known and spec.prior and (inside := tokens.tokens_in_caption(spec.prior.prompt, known)):
        yield at(
            seen.source, "warning", "prior.prompt",
            f"the class prompt names the token {list_some(sorted(inside))} (found {spec.prior.prompt!r}), which then learns "
            "the whole class; describe the class without it",
        )  # fmt: skip
    shown = spec.validation.prompts
    if known and shown and not any(tokens.tokens_in_caption(prompt, known) for prompt in shown):
        names = list_some([one.name for one in known])
        yield at(
            seen.source, "warning", "validate.prompts",
            f"no prompt names a token that is learned ({names}), so the pictures would not show it; write it into one",
        )  # fmt: skip


def _written(text: str, known: Sequence[Placeholder]) -> str:
    """With the tokens' names as in the caption."""
    for one in known:
        text = text.replace(one.text, one.name)
    return _short(text)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."
