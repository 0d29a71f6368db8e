"""Files and databases that do not wait for the disk."""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, event


def hurry(connection: Any, record: Any) -> None:
    connection.execute("PRAGMA synchronous = OFF")


@pytest.fixture(scope="module", autouse=True)
def do_not_wait_for_the_disk() -> Iterator[None]:
    """SQLite waits at every step of a trial, ten times as long as the step takes."""
    event.listen(Engine, "connect", hurry)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdnas.system.files._sync", lambda path: None)
        yield
    event.remove(Engine, "connect", hurry)
