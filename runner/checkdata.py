"""What can be wrong with a run's pictures, beside what a plan must refuse: unreadable, too small, twice there. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from runner import classfolder
from runner.data import Picture, some
from runner.finding import Finding, at, count
from runner.looking import Look, copies
from runner.plan import resolutions
from runner.prepare import Seen
from runner.sources import METADATA, SUFFIXES
from runner.views import Size, group

LEAST_SHOWN = 0.5  # of a picture, else it is told that the crop hides more than it shows

Looks = Mapping[str, Look | str]


def pictures_of(seen: Seen) -> tuple[Picture, ...]:
    """Everything that a run would decode."""
    own = seen.pictures
    return (*own.items, *own.held, *classes_of(seen)) if own else classes_of(seen)


def classes_of(seen: Seen) -> tuple[Picture, ...]:
    own = seen.spec.prior
    return classfolder.pictures(Path(own.images), own.count, own.prompt) if own else ()


def check_data(seen: Seen, looks: Looks) -> Iterator[Finding]:
    for picture in pictures_of(seen):
        key = "prior.images" if picture.name.startswith("class/") else "data.source"
        if isinstance(found := looks[picture.where], str):
            yield at(seen.source, "error", key, found)
    if seen.pictures is None:
        return
    yield from _twice(seen, looks)
    yield from _sizes(seen, looks)
    yield from _side_files(seen)
    yield from _classes(seen)


def _twice(seen: Seen, looks: Looks) -> Iterator[Finding]:
    """Copies: among the training pictures, and, worse, between them and those kept for the eval loss."""
    assert seen.pictures is not None
    held = {picture.where for picture in seen.pictures.held}
    read = [
        (picture, found)
        for picture in (*seen.pictures.items, *seen.pictures.held)
        if isinstance(found := looks[picture.where], Look)
    ]
    twins: list[str] = []
    leaks: list[str] = []
    near: list[str] = []
    for first, second, same in copies([found for _, found in read]):
        one, other = read[first][0], read[second][0]
        told = f"{one.name} and {other.name}{'' if same else ' (nearly)'}"
        if (one.where in held) == (other.where in held):
            twins.append(told)
        else:
            (leaks if same else near).append(told)
    if leaks:
        yield at(
            seen.source, "error", "data.holdout",
            f"{count(len(leaks), 'pair')} of a training and a held-out picture {_are(leaks)} the same picture, so the "
            "eval loss would be of what was trained on; take one of each out of the data", leaks,
        )  # fmt: skip
    if near:
        yield at(
            seen.source, "warning", "data.holdout",
            f"{count(len(near), 'pair')} of a training and a held-out picture look alike, so the eval loss would "
            "flatter the run; take one of each out of the data", near,
        )  # fmt: skip
    if twins:
        yield at(
            seen.source, "warning", "data.source",
            f"{count(len(twins), 'pair')} of pictures {_are(twins)} the same picture, which is then shown twice as "
            "often; take one of each out of the data, or leave it so on purpose", twins,
        )  # fmt: skip


def _sizes(seen: Seen, looks: Looks) -> Iterator[Finding]:
    assert seen.pictures is not None
    own = seen.spec.data
    read = [(one, found.size) for one in seen.pictures.items if isinstance(found := looks[one.where], Look)]
    grouped = group([size for _, size in read], resolutions(seen.spec), own.buckets)
    small: list[str] = []
    hidden: list[str] = []
    for size, chosen in grouped.items():
        for picture, has in (read[index] for index in chosen):
            scale = max(size[0] / has[0], size[1] / has[1])
            if scale > 1:
                small.append(f"{picture.name} is {_by(has)}, trained at {_by(size)}: enlarged {scale:.2g} times")
            shown = size[0] * size[1] / (has[0] * has[1] * scale * scale)
            if shown < LEAST_SHOWN:
                hidden.append(f"{picture.name} is {_by(has)}: a crop to {_by(size)} shows {shown:.0%} of it")
    if small:
        yield at(
            seen.source, "warning", "data.resolution",
            f"{count(len(small), 'picture')} smaller than trained at, so enlarged and blurred (found "
            f"{own.resolution!r}); lower data.resolution, or take larger pictures", small,
        )  # fmt: skip
    if hidden:
        way = "" if own.buckets else "; data.buckets = true trains each in its shape"
        yield at(
            seen.source, "warning", "data.buckets" if own.buckets else "data.resolution",
            f"{count(len(hidden), 'picture')} of which a crop shows less than half{way}", hidden,
        )  # fmt: skip
    if grouped:
        yield _table(seen, {size: len(chosen) for size, chosen in grouped.items()})


def _table(seen: Seen, counts: Mapping[Size, int]) -> Finding:
    """The bucket table; and what batches make of it."""
    train = seen.spec.train
    table = [f"{number} at {_by(size)}" for size, number in counts.items()]
    few = [_by(size) for size, number in counts.items() if number < train.batch_size]
    said = f"training pictures: {', '.join(table)}"
    if few:
        said += f"; batches of {train.batch_size} at {some(few)} repeat pictures, for there are fewer"
    if seen.plan:
        images = seen.plan.steps * train.batch_size * train.accumulate * seen.spec.compute.gpus
        said += f"; {seen.plan.steps} steps show each {images / sum(counts.values()):.3g} times"
        if images < sum(counts.values()):
            return at(seen.source, "warning", "train.steps", f"{said}: some are never seen; raise train.steps")
    return at(seen.source, "note", "data.source", said)


def _side_files(seen: Seen) -> Iterator[Finding]:
    """Captions beside the pictures that are empty, or of no picture. What an imagefolder's table says is the plan's."""
    folder = Path(seen.spec.data.source)
    if not folder.is_dir() or any((folder / name).is_file() for name in METADATA):
        return
    texts = [path for path in sorted(folder.rglob("*.txt")) if "/." not in f"/{path.relative_to(folder).as_posix()}"]
    images = {path.with_suffix(""): path.name for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES}
    empty = [path.relative_to(folder).as_posix() for path in texts if not path.read_bytes().strip()]
    alone = [path.relative_to(folder).as_posix() for path in texts if path.with_suffix("") not in images]
    if empty:
        yield at(
            seen.source, "warning", "data.source",
            f"{count(len(empty), 'caption file')} empty ({some(empty)}), so data.prompt is read instead; write the "
            "captions, or delete the files",
        )  # fmt: skip
    if alone:
        yield at(
            seen.source, "warning", "data.source",
            f"{count(len(alone), 'caption file')} without a picture beside it ({some(alone)}); a picture's caption is "
            "NAME.txt beside NAME.png",
        )  # fmt: skip
    told = {path.with_suffix("") for path in texts if path.read_bytes().strip()} & images.keys()
    if told and (bare := sorted(name for stem, name in images.items() if stem not in told)):
        yield at(
            seen.source, "note", "data.prompt",
            f"{len(bare)} of {len(images)} pictures have no caption of their own and read data.prompt ({some(bare)})",
        )  # fmt: skip


def _classes(seen: Seen) -> Iterator[Finding]:
    own = seen.spec.prior
    if own is None:
        return
    there = len(classes_of(seen))
    if there < own.count:
        yield at(
            seen.source, "note", "prior.images",
            f"{own.count - there} class images are not there yet (found {there} of {own.count}); the base makes them "
            "before the training",
        )  # fmt: skip


def _by(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _are(told: Sequence[str]) -> str:
    return "shows" if len(told) == 1 else "show"
