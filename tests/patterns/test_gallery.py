"""docs/gallery.md shows every registered static pattern as it is now; nothing is drawn here."""

from __future__ import annotations

import pytest
from tests.patterns.write_gallery import CALLS, IMAGES, PAGE, drawn, section

from regard.registry import Entry

ENTRIES = drawn()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.key)
def test_the_page_has_its_section_and_picture(entry: Entry) -> None:
    assert section(entry) in PAGE.read_text(), "run `make docs`"
    picture = IMAGES / f"{entry.key}.png"
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 3000


def test_nothing_else_is_there() -> None:
    keys = {entry.key for entry in ENTRIES}
    assert set(CALLS) <= keys
    assert {path.stem for path in IMAGES.glob("*")} == keys
    assert PAGE.read_text().count("\n## ") == len(keys)
    assert sum(path.stat().st_size for path in IMAGES.glob("*")) < 3 << 20
