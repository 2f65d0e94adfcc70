"""Code blocks fit the page: what is wider scrolls out of sight."""

from __future__ import annotations

from pages import ROOT, blocks

WIDEST = 88  # characters of a block of the site, on a screen of usual width
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def test_no_line_of_a_code_block_is_wider_than_the_page():
    wide = [
        f"{page.relative_to(ROOT)}:{block.line + number}: {line}"
        for page in PAGES
        if "_build" not in page.parts
        for block in blocks(page)
        for number, line in enumerate(block.text.splitlines(), 1)
        if len(line) > WIDEST
    ]
    assert not wide, "\n".join(wide)
