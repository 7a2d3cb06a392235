"""Text to tokens and back: the tokenizer, answers piece by piece, stop strings, chat templates."""

import json
import pathlib
from collections.abc import Sequence

import jinja2.sandbox
import tokenizers

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MOST_TOKENS_OF_A_CHARACTER = 4  # its bytes


class TextError(ValueError):
    """The client's text cannot be used."""


class Tokenizer:
    """A checkpoint's tokenizer.json and chat template."""

    def __init__(self, folder: pathlib.Path):
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._template, self._special = _read_template(folder)

    def encode(self, text: str, *, with_special: bool = True) -> list[int]:
        """The tokens of a text.

        Raises:
            TextError: it has half a surrogate pair, which JSON can say.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TextError(f"the text is not Unicode: {error}") from error
        return self._tokenizer.encode(text, add_special_tokens=with_special).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return self._tokenizer.decode(list(tokens))

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """The prompt of a conversation.

        Raises:
            TextError: the template refuses it.
        """
        try:
            text = self._template.render(
                messages=messages, add_generation_prompt=True, **self._special
            )
        except jinja2.TemplateError as error:
            raise TextError(f"the chat template refuses the messages: {error}") from error
        return self.encode(text, with_special=False)


def _read_template(folder: pathlib.Path) -> tuple[jinja2.Template, dict[str, str]]:
    """The chat template, and the names of special tokens that it may use."""
    path, settings = folder / "tokenizer_config.json", {}
    if path.exists():
        settings = json.loads(path.read_text())
    source = settings.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        source = (folder / "chat_template.jinja").read_text()
    if isinstance(source, list):  # several, for several uses
        source = next((t["template"] for t in source if t["name"] == "default"), None)
    if source is None:  # a model that has not learned to chat: it goes on with what was said
        source = "{{ messages | map(attribute='content') | join('\n') }}"
    special = {}
    for name in ("bos_token", "eos_token"):
        value = settings.get(name) or ""
        special[name] = value["content"] if isinstance(value, dict) else value

    def raise_exception(message: str) -> None:  # templates call it
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source), special


class Pieces:
    """Turns a sequence's tokens into pieces of text, of whole characters, up to a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.is_stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        # Tokens whose text is known, which the next token's may depend on (a space before it, say),
        # then tokens that do not make a whole character yet.
        self._tokens: list[int] = []
        self._known = 0
        self._whole, self._cut_at = 0, 0  # new whole characters; the token that cuts the next one
        self._held = ""  # text that may be the beginning of a stop string

    def push(self, token: int) -> str:
        """Returns the text that a token completes; "" if none, or once a stop string has come."""
        self._tokens.append(token)
        before = self._tokenizer.decode(self._tokens[: self._known])
        text = self._tokenizer.decode(self._tokens)[len(before) :]
        whole = len(text.rstrip(_REPLACEMENT))
        if whole > self._whole:  # a token may end one character and begin the next
            self._whole, self._cut_at = whole, len(self._tokens) - 1
        is_cut = whole < len(text)
        if is_cut and len(self._tokens) - self._cut_at < _MOST_TOKENS_OF_A_CHARACTER:
            return ""
        self._tokens = self._tokens[self._known :]
        self._known = self._cut_at = len(self._tokens)
        self._whole = 0
        return self._release(text)

    def flush(self) -> str:
        """Returns what is left at the end."""
        before = self._tokenizer.decode(self._tokens[: self._known])
        piece = self._release(self._tokenizer.decode(self._tokens)[len(before) :])
        piece += "" if self.is_stopped else self._held
        self._held, self._tokens, self._known = "", [], 0
        return piece

    def _release(self, text: str) -> str:
        """The part of held and new text that cannot be of a stop string; ends before one."""
        if self.is_stopped:
            return ""
        text = self._held + text
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of text begin `stop`."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
