"""Records of one kind in the store: a pydantic model under a key, instead of bytes in a folder."""

from __future__ import annotations

import json
from typing import Generic, TypeVar

from pydantic import BaseModel

from sdopt.disk.store import Store
from sdopt.errors import ArtifactError

R = TypeVar("R", bound=BaseModel)


class Shelf(Generic[R]):
    """One stage of the store whose entries are a record each, in `<stage>.json` or the file that is named."""

    def __init__(self, stage: str, kind: type[R], file: str = "") -> None:
        self.stage, self._kind, self._name = stage, kind, file or f"{stage}.json"

    def find(self, store: Store, key: str) -> R | None:
        """The record, where the store has it whole."""
        folder = store.find(self.stage, key)
        return self._kind.model_validate_json((folder / self._name).read_bytes()) if folder else None

    def put(self, store: Store, key: str, record: R) -> None:
        store.put(self.stage, key, {self._name: json.dumps(record.model_dump(mode="json")).encode()})

    def get(self, store: Store, key: str) -> R:
        """The record that must be there by now. Raises `ArtifactError` where somebody emptied the store meanwhile."""
        if (record := self.find(store, key)) is None:
            raise ArtifactError(
                f"a {self.stage} record vanished from the store while it was used", hint="run the same command again"
            )
        return record
