"""Text piece by piece: whole characters, and nothing of a stop string or behind it."""

import json
import pathlib
import random

import checkpoint
import pytest
from serve_moe.text import Pieces, TextError, Tokenizer


@pytest.fixture
def tokenizer(tmp_path: pathlib.Path) -> Tokenizer:
    (tmp_path / "tokenizer.json").write_text(json.dumps(checkpoint.byte_tokenizer()))
    return Tokenizer(tmp_path)


def _pieces(tokenizer: Tokenizer, tokens: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    pieces = Pieces(tokenizer, stop)
    out = [pieces.push(token) for token in tokens]
    return [*out, pieces.flush()]


def test_a_token_is_a_byte(tokenizer: Tokenizer) -> None:
    text = "a b\n\t\0 é € 😀 \x7f\xad"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    with pytest.raises(TextError, match="not Unicode"):
        tokenizer.encode("\ud800")


def test_pieces_are_whole_characters(tokenizer: Tokenizer) -> None:
    text = "né€😀x"
    out = _pieces(tokenizer, list(text.encode()))
    assert out == ["n", "", "é", "", "", "€", "", "", "", "😀", "x", ""]
    cut = _pieces(tokenizer, list("é".encode())[:1])
    assert "".join(cut) == "\N{REPLACEMENT CHARACTER}"
    rubbish = _pieces(tokenizer, [0x80] * 40 + [ord("a")])
    assert "".join(rubbish[:8])  # is not held for good
    assert "".join(rubbish).endswith("a")


class _BytesTokenizer:
    """Tokens of several bytes, as byte-level BPE has them."""

    def __init__(self, tokens: list[bytes]):
        self._tokens = tokens

    def decode(self, tokens: list[int]) -> str:
        return b"".join(self._tokens[token] for token in tokens).decode(errors="replace")


def test_tokens_may_end_one_character_and_begin_the_next() -> None:
    """However many in a row."""
    text = "你好世界你好世界!"
    data = text.encode()
    tokens = [data[:1], *(data[i : i + 3] for i in range(1, len(data), 3))]
    out = _pieces(_BytesTokenizer(tokens), list(range(len(tokens))))
    assert "".join(out) == text


def test_pieces_end_before_a_stop_string(tokenizer: Tokenizer) -> None:
    """Whatever tokens it comes in, and what only begins like one is not lost."""
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choices("abé", k=draw.randrange(30)))
        stop = tuple("".join(draw.choices("abé", k=draw.randrange(1, 5))) for _ in range(2))
        ends = [at + len(s) for s in stop if (at := text.find(s)) >= 0]
        seen = text[: min(ends, default=len(text))]  # the one that is whole first counts
        found = [at for at in map(seen.find, stop) if at >= 0]
        expected = text[: min(found)] if found else text
        assert "".join(_pieces(tokenizer, list(text.encode()), stop)) == expected


def test_chat_template_is_the_checkpoints(tmp_path: pathlib.Path, tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert bytes(tokenizer.encode_chat(messages)) == b"a\nb"  # without one
    template = (
        "{% for m in messages %}{% if m.role == 'x' %}{{ raise_exception('no x') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    settings = {"chat_template": template, "eos_token": {"content": "."}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with_template = Tokenizer(tmp_path)
    assert bytes(with_template.encode_chat(messages)) == b"<system>a.<user>b.<assistant>"
    with pytest.raises(TextError, match="no x"):
        with_template.encode_chat([{"role": "x", "content": ""}])

    several = [
        {"name": "tool_use", "template": "tools"},
        {
            "name": "default",
            "template": "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}",
        },
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert bytes(Tokenizer(tmp_path).encode_chat(messages)) == b"a"
