"""What can be wrong with a run's pictures, beside what a plan must refuse: unreadable, too small, twice there. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from runner.core.humanize import list_some, pluralize
from runner.data import class_images
from runner.data.buckets import Size, group_by_bucket
from runner.data.image_files import PictureFolder, metadata_of
from runner.data.images import Picture
from runner.data.sources import reasons
from runner.jobs.job import Job
from runner.plan.build import resolutions
from runner.preflight.finding import Finding, at
from runner.preflight.fingerprints import ImageFingerprint, duplicates

LEAST_SHOWN = 0.5  # of a picture, else it is told that the crop hides more than it shows

Looks = Mapping[str, ImageFingerprint | str]


def pictures_of(seen: Job) -> tuple[Picture, ...]:
    """Everything that a run would decode."""
    own = seen.pictures
    return (*own.items, *own.held, *classes_of(seen)) if own else classes_of(seen)


def classes_of(seen: Job) -> tuple[Picture, ...]:
    own = seen.spec.prior
    return class_images.pictures(Path(own.images), own.count, own.prompt) if own and seen.was_read("prior") else ()


def check_data(seen: Job, looks: Looks) -> Iterator[Finding]:
    yield from _unreadable(seen, looks)
    if seen.pictures is None:
        return
    yield from _twice(seen, looks)
    yield from _sizes(seen, looks)
    yield from _left_out(seen, "data.source", seen.pictures.folder)
    yield from _animated(seen, looks)
    yield from _captions(seen)
    yield from _classes(seen, looks)


def _unreadable(seen: Job, looks: Looks) -> Iterator[Finding]:
    wrong: dict[str, list[str]] = {}
    for picture in pictures_of(seen):
        key = "prior.images" if picture.name.startswith("class/") else "data.source"
        if isinstance(found := looks[picture.where], str):
            wrong.setdefault(key, []).append(seen.source.relative(key, found))
    for key, told in wrong.items():
        if len(told) == 1:
            yield at(seen.source, "error", key, told[0])
        else:
            yield at(seen.source, "error", key, f"{len(told)} images cannot be read", told)


def _twice(seen: Job, looks: Looks) -> Iterator[Finding]:
    """Copies: among the training pictures, and, worse, between them and those kept for the eval loss."""
    assert seen.pictures is not None
    held = {picture.where for picture in seen.pictures.held}
    read = [
        (picture, found)
        for picture in (*seen.pictures.items, *seen.pictures.held)
        if isinstance(found := looks[picture.where], ImageFingerprint)
    ]

    def parted(members: Sequence[int]) -> bool:
        return len({read[index][0].where in held for index in members}) == 2

    twins: list[str] = []
    leaks: list[str] = []
    near: list[str] = []
    for same_view in duplicates([found for _, found in read]):
        names = _and([read[index][0].name for index in same_view.members])
        told = names if len(same_view.copies) == 1 else f"{names} (nearly)"
        if any(parted(same) for same in same_view.copies):
            leaks.append(told)
        else:
            (near if parted(same_view.members) else twins).append(told)
    if leaks:
        yield at(
            seen.source, "error", "data.holdout",
            f"{pluralize(len(leaks), 'picture')} both trained on and held out, so the eval loss would be of what was trained "
            "on; keep one copy of each in the data", leaks,
        )  # fmt: skip
    if near:
        yield at(
            seen.source, "warning", "data.holdout",
            f"{pluralize(len(near), 'picture')} nearly both trained on and held out, so the eval loss would flatter the run; "
            "keep one copy of each in the data", near,
        )  # fmt: skip
    if twins:
        yield at(
            seen.source, "warning", "data.source",
            f"{pluralize(len(twins), 'picture')} there more than once, so shown more often than others; keep one copy of each "
            "in the data, or leave it so on purpose", twins,
        )  # fmt: skip


def _and(names: Sequence[str]) -> str:
    if len(names) > 6:
        return f"{', '.join(names[:5])} and {len(names) - 5} more"
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _sizes(seen: Job, looks: Looks) -> Iterator[Finding]:
    assert seen.pictures is not None
    if not seen.was_read("data.resolution", "data.buckets"):
        return
    own = seen.spec.data
    read = [(one, found.size) for one in seen.pictures.items if isinstance(found := looks[one.where], ImageFingerprint)]
    grouped = group_by_bucket([size for _, size in read], resolutions(seen.spec), own.buckets)
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
            f"{pluralize(len(small), 'picture')} smaller than trained at, so enlarged and blurred (found "
            f"{own.resolution!r}); lower data.resolution, or take larger pictures", small,
        )  # fmt: skip
    if hidden:
        way = "" if own.buckets else "; data.buckets = true trains each in its shape"
        yield at(
            seen.source, "warning", "data.buckets" if own.buckets else "data.resolution",
            f"{pluralize(len(hidden), 'picture')} of which a crop shows less than half{way}", hidden,
        )  # fmt: skip
    if grouped:
        yield _table(seen, {size: len(chosen) for size, chosen in grouped.items()})


def _table(seen: Job, counts: Mapping[Size, int]) -> Finding:
    """The bucket table; and what batches make of it."""
    train = seen.spec.train
    table = [f"{number} at {_by(size)}" for size, number in counts.items()]
    known = seen.was_read("train.batch_size")
    few = [_by(size) for size, number in counts.items() if known and number < train.batch_size]
    said = f"training pictures: {', '.join(table)}"
    if few:
        said += f"; batches of {train.batch_size} at {list_some(few)} repeat pictures, for there are fewer"
    if seen.planned:
        images = seen.plan.steps * train.batch_size * train.accumulate * seen.spec.compute.gpus
        said += f"; {seen.plan.steps} steps show each {images / sum(counts.values()):.3g} times"
        if images < sum(counts.values()):
            key = "train.steps" if seen.spec.train.epochs is None else "train.epochs"
            return at(seen.source, "warning", key, f"{said}: some are never seen; raise {key}")
    return at(seen.source, "note", "data.source", said)


def _left_out(seen: Job, key: str, folder: PictureFolder | None) -> Iterator[Finding]:
    """What looks like a picture or a caption, and is not used."""
    if folder is None:
        return
    for files, kind, use in ((folder.unused, "picture", "used"), (folder.unread, "caption", "read")):
        if files:
            look = (
                f"1 file looks like a {kind} and is"
                if len(files) == 1
                else f"{len(files)} files look like {kind}s and are"
            )
            yield at(seen.source, "warning", key, f"{look} not {use}", reasons(folder, files))


def _animated(seen: Job, looks: Looks) -> Iterator[Finding]:
    moving = [
        one.name
        for one in pictures_of(seen)
        if isinstance(found := looks[one.where], ImageFingerprint) and found.animated
    ]
    if moving:
        yield at(
            seen.source, "warning", "data.source",
            f"{pluralize(len(moving), 'picture')} animated ({list_some(moving)}); only the first frame is used, save others as "
            "pictures of their own",
        )  # fmt: skip


def _captions(seen: Job) -> Iterator[Finding]:
    """Captions beside the pictures that are empty, of no picture, or of several. What a metadata file says is the plan's."""
    assert seen.pictures is not None
    folder = seen.pictures.folder
    if folder is None or metadata_of(folder.folder):
        return
    texts = list(dict.fromkeys(folder.captions.values()))
    empty = {path for path in texts if not path.read_bytes().strip()}
    bare = [path for path in folder.pictures if folder.captions.get(path, None) in {None, *empty}]
    if empty:
        names = sorted(folder.name(path) for path in empty)
        yield at(
            seen.source, "warning", "data.source",
            f"{pluralize(len(empty), 'caption file')} empty ({list_some(names)}), so data.prompt is read instead; write the "
            "captions, or delete the files",
        )  # fmt: skip
    if folder.alone:
        yield at(
            seen.source, "warning", "data.source",
            f"{pluralize(len(folder.alone), 'caption file')} without a picture beside it ({list_some(folder.names(folder.alone))}); "
            "a picture's caption is NAME.txt beside NAME.png",
        )  # fmt: skip
    if folder.shared:
        told = [f"{_and(folder.names(paths))}: {folder.name(folder.captions[paths[0]])}" for paths in folder.shared]
        yield at(
            seen.source, "warning", "data.source",
            f"{pluralize(len(folder.shared), 'caption file')} shared by pictures of one name, each of which takes its caption "
            "from it; rename the pictures, if that was not meant", told,
        )  # fmt: skip
    if bare and len(bare) < len(folder.pictures):
        yield at(
            seen.source, "note", "data.prompt",
            f"{len(bare)} of {len(folder.pictures)} pictures have no caption of their own and read data.prompt "
            f"({list_some(folder.names(bare))})",
        )  # fmt: skip


def _classes(seen: Job, looks: Looks) -> Iterator[Finding]:
    own = seen.spec.prior
    if own is None or not seen.was_read("prior"):
        return
    yield from _left_out(seen, "prior.images", class_images.contents(Path(own.images)))
    there = classes_of(seen)
    side = max(resolutions(seen.spec))
    read = [(one.name.removeprefix("class/"), looks[one.where]) for one in there]
    small = [
        f"{name} is {_by(found.size)}"
        for name, found in read
        if isinstance(found, ImageFingerprint) and min(found.size) < side
    ]
    if small:
        yield at(
            seen.source, "warning", "prior.images",
            f"{pluralize(len(small), 'class image')} smaller than trained at ({side}), so enlarged and blurred; name another "
            "folder, for the base to make them as large", small,
        )  # fmt: skip
    if len(there) < own.count:
        yield at(
            seen.source, "note", "prior.images",
            f"{own.count - len(there)} class images are not there yet (found {len(there)} of {own.count}); the base makes "
            "them before the training",
        )  # fmt: skip


def _by(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
