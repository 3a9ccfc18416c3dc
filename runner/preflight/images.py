"""Images: unreadable, duplicate, too small or badly shaped, animated or unused ones; and what is wrong with caption
files."""

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
from runner.preflight.fingerprints import ImageFingerprint, find_duplicates

MIN_SHOWN = 0.5  # part of an image that a crop should show

Fingerprints = Mapping[str, ImageFingerprint | str]  # by `Picture.location`; a message where the image cannot be read


def pictures_of(job: Job) -> tuple[Picture, ...]:
    """Every image that the run would decode: for training, held out, and class images."""
    pictures = job.pictures
    return (*pictures.items, *pictures.held_out, *_class_pictures(job)) if pictures else _class_pictures(job)


def _class_pictures(job: Job) -> tuple[Picture, ...]:
    prior = job.spec.prior
    return (
        class_images.class_pictures(Path(prior.images), prior.count, prior.prompt)
        if prior and job.was_read("prior")
        else ()
    )


def check_images(job: Job, fingerprints: Fingerprints) -> Iterator[Finding]:
    """fingerprints: of all `pictures_of` the job."""
    yield from _unreadable(job, fingerprints)
    if job.pictures is None:
        return
    yield from _duplicates(job, fingerprints)
    yield from _sizes(job, fingerprints)
    yield from _unused_files(job, "data.source", job.pictures.folder)
    yield from _animated(job, fingerprints)
    yield from _caption_files(job)
    yield from _class_images(job, fingerprints)


def _unreadable(job: Job, fingerprints: Fingerprints) -> Iterator[Finding]:
    by_key: dict[str, list[str]] = {}
    for picture in pictures_of(job):
        key = "prior.images" if picture.name.startswith("class/") else "data.source"
        if isinstance(message := fingerprints[picture.location], str):
            by_key.setdefault(key, []).append(job.source.relative(key, message))
    for key, messages in by_key.items():
        if len(messages) == 1:
            yield at(job.source, "error", key, messages[0])
        else:
            yield at(job.source, "error", key, f"{len(messages)} images cannot be read", messages)


def _duplicates(job: Job, fingerprints: Fingerprints) -> Iterator[Finding]:
    """Copies among the training images, and, worse, between them and the images held out for the eval loss."""
    assert job.pictures is not None
    held_out = {picture.location for picture in job.pictures.held_out}
    readable = [
        (picture, fingerprint)
        for picture in (*job.pictures.items, *job.pictures.held_out)
        if isinstance(fingerprint := fingerprints[picture.location], ImageFingerprint)
    ]

    def on_both_sides(members: Sequence[int]) -> bool:
        return len({readable[index][0].location in held_out for index in members}) == 2

    copies: list[str] = []
    leaks: list[str] = []
    near_leaks: list[str] = []
    for group in find_duplicates([fingerprint for _, fingerprint in readable]):
        names = _join_names([readable[index][0].name for index in group.members])
        line = names if len(group.exact_copies) == 1 else f"{names} (nearly)"
        if any(on_both_sides(indices) for indices in group.exact_copies):
            leaks.append(line)
        elif on_both_sides(group.members):
            near_leaks.append(line)
        else:
            copies.append(line)
    if leaks:
        yield at(
            job.source, "error", "data.holdout",
            f"{pluralize(len(leaks), 'held-out picture')} {'is' if len(leaks) == 1 else 'are'} also in the training data, so the "
            "eval loss would be too low; keep one copy of each in the data", leaks,
        )  # fmt: skip
    if near_leaks:
        yield at(
            job.source, "warning", "data.holdout",
            f"{pluralize(len(near_leaks), 'held-out picture')} {'has' if len(near_leaks) == 1 else 'have'} a near copy in the "
            "training data, so the eval loss would be too low; keep one copy of each in the data", near_leaks,
        )  # fmt: skip
    if copies:
        yield at(
            job.source, "warning", "data.source",
            f"{pluralize(len(copies), 'picture')} found more than once, so training shows them more often; keep one copy of each "
            "in the data, or ignore this if intended", copies,
        )  # fmt: skip


def _join_names(names: Sequence[str]) -> str:
    if len(names) > 6:
        return f"{', '.join(names[:5])} and {len(names) - 5} more"
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _sizes(job: Job, fingerprints: Fingerprints) -> Iterator[Finding]:
    """Images that are enlarged for training, or of which a crop shows too little; and the table of buckets."""
    assert job.pictures is not None
    if not job.was_read("data.resolution", "data.buckets"):
        return
    data = job.spec.data
    readable = [
        (picture, fingerprint.size)
        for picture in job.pictures.items
        if isinstance(fingerprint := fingerprints[picture.location], ImageFingerprint)
    ]
    buckets = group_by_bucket([size for _, size in readable], resolutions(job.spec), data.buckets)
    small: list[str] = []
    cropped: list[str] = []
    for bucket, indices in buckets.items():
        for picture, size in (readable[index] for index in indices):
            scale = max(bucket[0] / size[0], bucket[1] / size[1])
            if scale > 1:
                enlarged = f"enlarged {scale:.2g} times"
                small.append(f"{picture.name} is {_format_size(size)}, trained at {_format_size(bucket)}: {enlarged}")
            shown = bucket[0] * bucket[1] / (size[0] * size[1] * scale * scale)
            if shown < MIN_SHOWN:
                crop = f"a crop to {_format_size(bucket)} shows {shown:.0%} of it"
                cropped.append(f"{picture.name} is {_format_size(size)}: {crop}")
    if small:
        yield at(
            job.source, "warning", "data.resolution",
            f"{pluralize(len(small), 'picture')} smaller than trained at, so enlarged and blurred (found "
            f"{data.resolution!r}); lower data.resolution, or take larger pictures", small,
        )  # fmt: skip
    if cropped:
        remedy = "" if data.buckets else "; data.buckets = true trains each in its shape"
        yield at(
            job.source, "warning", "data.buckets" if data.buckets else "data.resolution",
            f"{pluralize(len(cropped), 'picture')} of which a crop shows less than half{remedy}", cropped,
        )  # fmt: skip
    if buckets:
        yield _bucket_table(job, {bucket: len(indices) for bucket, indices in buckets.items()})


def _bucket_table(job: Job, counts: Mapping[Size, int]) -> Finding:
    """How many images are in each bucket, and how often training shows them."""
    train = job.spec.train
    rows = [f"{count} at {_format_size(bucket)}" for bucket, count in counts.items()]
    text = f"training pictures: {', '.join(rows)}"
    smaller = [
        _format_size(bucket)
        for bucket, count in counts.items()
        if job.was_read("train.batch_size") and count < train.batch_size
    ]
    if smaller:
        text += f"; batches of {train.batch_size} at {list_some(smaller)} repeat pictures, for there are fewer"
    if job.planned:
        shown = job.plan.steps * train.batch_size * train.accumulate * job.spec.compute.gpus
        total = sum(counts.values())
        text += f"; {job.plan.steps} steps show each {shown / total:.3g} times"
        if shown < total:
            key = "train.steps" if train.epochs is None else "train.epochs"
            return at(job.source, "warning", key, f"{text}: some are never seen; raise {key}")
    return at(job.source, "note", "data.source", text)


def _unused_files(job: Job, key: str, folder: PictureFolder | None) -> Iterator[Finding]:
    """Files that look like images or captions, and are not used."""
    if folder is None:
        return
    for files, kind, use in ((folder.unused, "picture", "used"), (folder.unread, "caption", "read")):
        if files:
            one, several = f"1 file looks like a {kind} and is", f"{len(files)} files look like {kind}s and are"
            yield at(
                job.source, "warning", key, f"{one if len(files) == 1 else several} not {use}", reasons(folder, files)
            )


def _animated(job: Job, fingerprints: Fingerprints) -> Iterator[Finding]:
    animated = [
        picture.name
        for picture in pictures_of(job)
        if isinstance(fingerprint := fingerprints[picture.location], ImageFingerprint) and fingerprint.animated
    ]
    if animated:
        yield at(
            job.source, "warning", "data.source",
            f"{pluralize(len(animated), 'picture')} animated ({list_some(animated)}); only the first frame is used, save others "
            "as pictures of their own",
        )  # fmt: skip


def _caption_files(job: Job) -> Iterator[Finding]:
    """Caption files that are empty, of no image, or of several. Metadata files are checked when the data is read."""
    assert job.pictures is not None
    folder = job.pictures.folder
    if folder is None or metadata_of(folder.folder):
        return
    caption_files = list(dict.fromkeys(folder.captions.values()))
    empty = {path for path in caption_files if not path.read_bytes().strip()}
    uncaptioned = [path for path in folder.pictures if folder.captions.get(path, None) in {None, *empty}]
    if empty:
        names = sorted(folder.name(path) for path in empty)
        yield at(
            job.source, "warning", "data.source",
            f"{pluralize(len(empty), 'caption file')} empty ({list_some(names)}), so data.prompt is read instead; write the "
            "captions, or delete the files",
        )  # fmt: skip
    if folder.orphan_captions:
        yield at(
            job.source, "warning", "data.source",
            f"{pluralize(len(folder.orphan_captions), 'caption file')} without a picture beside it "
            f"({list_some(folder.names(folder.orphan_captions))}); a picture's caption is NAME.txt beside NAME.png",
        )  # fmt: skip
    if folder.shared_captions:
        sharing = [
            f"{_join_names(folder.names(paths))}: {folder.name(folder.captions[paths[0]])}"
            for paths in folder.shared_captions
        ]
        yield at(
            job.source, "warning", "data.source",
            f"{pluralize(len(folder.shared_captions), 'caption file')} shared by pictures of one name, each of which takes its caption "
            "from it; rename the pictures, if that was not meant", sharing,
        )  # fmt: skip
    if uncaptioned and len(uncaptioned) < len(folder.pictures):
        yield at(
            job.source, "note", "data.prompt",
            f"{len(uncaptioned)} of {len(folder.pictures)} pictures have no caption of their own and read data.prompt "
            f"({list_some(folder.names(uncaptioned))})",
        )  # fmt: skip


def _class_images(job: Job, fingerprints: Fingerprints) -> Iterator[Finding]:
    """Class images that are unused or too small, and how many are still to be generated."""
    prior = job.spec.prior
    if prior is None or not job.was_read("prior"):
        return
    yield from _unused_files(job, "prior.images", class_images.scan(Path(prior.images)))
    pictures = _class_pictures(job)
    side = max(resolutions(job.spec))
    by_name = [(picture.name.removeprefix("class/"), fingerprints[picture.location]) for picture in pictures]
    small = [
        f"{name} is {_format_size(fingerprint.size)}"
        for name, fingerprint in by_name
        if isinstance(fingerprint, ImageFingerprint) and min(fingerprint.size) < side
    ]
    if small:
        yield at(
            job.source, "warning", "prior.images",
            f"{pluralize(len(small), 'class image')} smaller than trained at ({side}), so enlarged and blurred; name another "
            "folder, for the base to make them as large", small,
        )  # fmt: skip
    if len(pictures) < prior.count:
        yield at(
            job.source, "note", "prior.images",
            f"{prior.count - len(pictures)} class images are not there yet (found {len(pictures)} of {prior.count}); the base "
            "makes them before the training",
        )  # fmt: skip


def _format_size(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
