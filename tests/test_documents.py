"""Every block of Python in docs/ runs, and prints what the document says; links lead somewhere."""

import pathlib
import re

import documents
import pytest
from cpu_devices import FAST_COMPILATION

DOCS = sorted((documents.ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, *(documents.ROOT / name for name in ("README.md", "CONTRIBUTING.md"))]
PROGRAMS = [  # recipes.md has a test of its own, which compares what they compute
    page for page in DOCS if documents.read_examples(page.read_text()) and page.name != "recipes.md"
]


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda page: page.name)
def test_examples_run(page: pathlib.Path) -> None:
    documents.check_examples(page, FAST_COMPILATION)


def _anchors(text: str) -> set[str]:
    """Of the headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name) if name else page
        assert other.exists(), target
        if anchor:
            assert anchor in _anchors(other.read_text()), target


def test_every_gpu_tier_has_its_line() -> None:
    """What is tested where is said of all of them, and of no others."""
    source = (documents.ROOT / "tests/gpu/tiers.py").read_text()
    tiers = set(re.findall(r'^    Tier\("([\w-]+)"', source, re.MULTILINE))
    assert len(tiers) > 10
    rows = re.findall(
        r"^\| (`.*?) \|", (documents.ROOT / "docs/testing.md").read_text(), re.MULTILINE
    )
    assert set(re.findall(r"`([\w-]+)`", " ".join(rows))) == tiers


def test_an_example_that_prints_something_else_is_found(tmp_path: pathlib.Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nx = 1\nprint(x)\n```\n\nprints\n\n```text\n1\n```\n")
    documents.check_examples(page)
    page.write_text(page.read_text().replace("x = 1", "x = 2"))
    with pytest.raises(AssertionError, match=r"page\.md, line 4, printed\s+2\s+but the document"):
        documents.check_examples(page)
    page.write_text("```python\nraise ValueError('in line 2')\n```\n")
    with pytest.raises(AssertionError, match=r'page\.md", line 2'):
        documents.check_examples(page)
