"""README.md: its example runs as it stands and prints what stands below it, and it stays short."""

import documents

README = documents.ROOT / "README.md"


def test_example_prints_what_readme_says() -> None:
    (example,) = documents.read_examples(README.read_text())
    assert "rows dropped" in example.expected
    documents.check_examples(README)


def test_two_screens() -> None:
    assert len(README.read_text().splitlines()) < 120
