"""The shapes of OpenAI's completions and chat completions: requests checked, answers built."""

import dataclasses
import secrets
import time
from typing import Any

_MOST_STOPS = 4
_MOST_STOP_LENGTH = 256  # characters
# What clients send that changes nothing here.
_IGNORED = {"metadata", "parallel_tool_calls", "service_tier", "store", "user"}
# What would change the answer and is not done: refused, unless its value asks for nothing.
_NOTHING = {
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "n": 1,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "suffix": "",
    "tools": [],
}


class RequestError(Exception):
    """A request that is answered by an error; `status` is HTTP's."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None):
        super().__init__(message)
        self.status, self.param = status, param

    def body(self) -> dict:
        """The error as OpenAI's clients know it."""
        kind = "invalid_request_error" if self.status < 429 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": None}}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request that was checked.

    Attributes:
        is_chat: which of the two shapes it has.
        prompt: a text or tokens; of a chat the messages, whose contents are texts.
        max_tokens: None: as many as there is room for.
        temperature: 0 takes the likeliest token.
        top_p: in (0, 1].
        seed: uint32, drawn if none was given.
        stop: strings that end the answer, and are not in it.
        is_stream: whether the answer comes piece by piece,
        has_usage: and at its end the numbers of tokens.
    """

    is_chat: bool
    prompt: str | list[int] | list[dict]
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]
    is_stream: bool
    has_usage: bool


def parse(body: Any, *, is_chat: bool, model: str) -> Asked:
    """Checks a request.

    Raises:
        RequestError: it is malformed, or asks for what is not done.
    """
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    rest = {name: value for name, value in body.items() if value is not None}

    def take(name: str, default: Any, kind: type | tuple[type, ...], what: str) -> Any:
        value = rest.pop(name, default)
        is_bool = isinstance(value, bool) and kind is not bool  # which is an int to Python
        if value is not default and (is_bool or not isinstance(value, kind)):
            raise RequestError(f"{name} must be {what}", param=name)
        return value

    if take("model", model, str, "a string") != model:
        raise RequestError(f"the model here is {model!r}", status=404, param="model")
    prompt = _messages(rest) if is_chat else _prompt(rest)
    most = take("max_tokens", None if is_chat else 16, int, "an integer")
    if is_chat:
        most = take("max_completion_tokens", most, int, "an integer")
    temperature = take("temperature", 1.0, (int, float), "a number")
    top_p = take("top_p", 1.0, (int, float), "a number")
    seed = take("seed", None, int, "an integer")
    stop = take("stop", [], (str, list), "a string or a list of strings")
    is_stream = take("stream", False, bool, "true or false")
    options = take("stream_options", {}, dict, "an object")
    if most is not None and most < 1:
        raise RequestError("max_tokens must be at least 1", param="max_tokens")
    if not 0 <= temperature <= 2:
        raise RequestError("temperature must be between 0 and 2", param="temperature")
    if not 0 < top_p <= 1:
        raise RequestError("top_p must be above 0 and at most 1", param="top_p")
    stop = [stop] if isinstance(stop, str) else stop
    if len(stop) > _MOST_STOPS or not all(
        isinstance(s, str) and 0 < len(s) <= _MOST_STOP_LENGTH for s in stop
    ):
        raise RequestError(
            f"stop must be at most {_MOST_STOPS} strings of 1 to {_MOST_STOP_LENGTH} characters",
            param="stop",
        )
    for name, value in rest.items():
        if name not in _IGNORED and not (name in _NOTHING and _is_same(value, _NOTHING[name])):
            raise RequestError(f"{name} is not supported here", param=name)
    return Asked(
        is_chat=is_chat,
        prompt=prompt,
        max_tokens=most,
        temperature=float(temperature),
        top_p=float(top_p),
        seed=secrets.randbits(32) if seed is None else seed % 2**32,
        stop=tuple(stop),
        is_stream=is_stream,
        has_usage=options.get("include_usage") is True,
    )


def _is_same(value: Any, nothing: Any) -> bool:
    """Equality in JSON, where 0 is not false: logprobs = 0 asks for the chosen tokens'."""
    return value == nothing and isinstance(value, bool) == isinstance(nothing, bool)


def _prompt(rest: dict) -> str | list[int]:
    prompt = rest.pop("prompt", None)
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]  # a batch of one
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return prompt
    raise RequestError("prompt must be one text or one list of tokens, not empty", param="prompt")


def _messages(rest: dict) -> list[dict]:
    messages = rest.pop("messages", None)
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list, not empty", param="messages")
    checked = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError("a message must be an object with a role", param="messages")
        content = message.get("content")
        if isinstance(content, list):  # of parts
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
        if not isinstance(content, str):
            raise RequestError("a message's content must be text", param="messages")
        if message.get("tool_calls") or message.get("function_call"):
            raise RequestError("tool calls are not supported here", param="messages")
        checked.append({"role": message["role"], "content": content})
    return checked


@dataclasses.dataclass
class Answer:
    """Builds the answer to a request."""

    asked: Asked
    model: str
    num_prompt_tokens: int
    num_tokens: int = 0

    def __post_init__(self):
        self._has_begun = False
        kind = "chatcmpl" if self.asked.is_chat else "cmpl"
        self._id, self._created = f"{kind}-{secrets.token_hex(12)}", int(time.time())

    def _object(self, kind: str, choices: list[dict]) -> dict:
        name = "text_completion"
        if self.asked.is_chat:
            name = f"chat.completion{kind}"
        return {
            "id": self._id,
            "object": name,
            "created": self._created,
            "model": self.model,
            "choices": choices,
        }

    def _usage(self) -> dict:
        total = self.num_prompt_tokens + self.num_tokens
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_tokens,
            "total_tokens": total,
        }

    def whole(self, text: str, reason: str) -> dict:
        """The answer in one piece."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        if self.asked.is_chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        return self._object("", [choice]) | {"usage": self._usage()}

    def piece(self, text: str, reason: str | None) -> dict:
        """A piece of a stream; the last one has a reason."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        if self.asked.is_chat:
            choice["delta"] = {} if self._has_begun else {"role": "assistant"}
            self._has_begun = True
            if text or reason is None:
                choice["delta"]["content"] = text
        else:
            choice["text"] = text
        return self._object(".chunk", [choice])

    def usage_piece(self) -> dict:
        """What ends a stream whose client wants to know its tokens."""
        return self._object(".chunk", []) | {"usage": self._usage()}
