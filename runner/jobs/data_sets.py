"""The data sets that the specs of one command name, each read once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.core import hub
from runner.core.errors import UnreachableError
from runner.data import sources
from runner.data.images import DataError, Pictures
from runner.data.sources import COLUMNAR, DatasetSource
from runner.plan.faults import KeyMessage
from runner.spec.schema import Spec

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class OpenedDataSet:
    """What reading a data set came to. pictures: None where it was not read. faults: (key, message) each; unreachable:
    the hub's failure to answer. Without either, only the hub has it, and it was not to be fetched."""

    pictures: Pictures | None = None
    faults: Sequence[KeyMessage] = ()
    unreachable: UnreachableError | None = None


class DataSetRegistry:
    """The data sets of one command's runs. fetch: whether those of the hub are loaded."""

    def __init__(self, *, fetch: bool) -> None:
        self.fetch = fetch
        self._opened: dict[DatasetSource, OpenedDataSet] = {}

    def of(self, source: DatasetSource, spec_folder: Path) -> OpenedDataSet:
        """spec_folder: of the file that names the data set."""
        if source not in self._opened:
            self._opened[source] = self._open(source, spec_folder)
        return self._opened[source]

    def _open(self, source: DatasetSource, spec_folder: Path) -> OpenedDataSet:
        if faults := name_faults(source, spec_folder):
            return OpenedDataSet(faults=faults)
        if not (self.fetch or Path(source.text).exists()):
            return OpenedDataSet()
        try:
            return OpenedDataSet(sources.read_source(source))
        except UnreachableError as error:
            return OpenedDataSet(unreachable=error)
        except DataError as error:
            return OpenedDataSet(faults=error.faults)


def data_source(spec: Spec) -> DatasetSource:
    data = spec.data
    return DatasetSource(data.source, data.config, data.split, data.image_column, data.caption_column, data.prompt)


def name_faults(source: DatasetSource, spec_folder: Path) -> list[KeyMessage]:
    """(key, message) of what is wrong with a data set's name, which must be an existing path or could be a hub id."""
    path = Path(source.text)
    if path.is_absolute() and path.exists():
        if path.is_file() and path.suffix not in COLUMNAR:
            allowed = "allowed are a folder, a .parquet or .arrow file, a hub data set"
            return [("data.source", f"not a folder (found {source.text!r}); {allowed}")]
        return []
    is_inside_folder = (
        spec_folder / source.text.split("/")[0]
    ).is_dir()  # "data/icnos" is a misspelt folder, no hub id
    if is_inside_folder or not HUB_ID.fullmatch(source.text):
        folders = [path.name for path in spec_folder.iterdir() if path.is_dir()]
        guess = difflib.get_close_matches(Path(source.text).name, folders, 1)
        return [
            (
                "data.source",
                f"no such folder (found {source.text!r}); allowed are a folder (relative to the spec) or a hub data set "
                f"(owner/name){f'; did you mean {guess[0]}?' if guess else ''}",
            )
        ]
    if wrong := hub.repository_id_fault(source.text):
        return [("data.source", wrong)]
    return []
