"""Parses the body of a request for vLLM strictly, and writes the body that vLLM gets from what was parsed.

So vLLM cannot read a body in another way: with another encoding, another one of two equal names, or numbers in strings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from pydantic import ValidationError

from inferctl.serve.edge.errors import ApiError
from inferctl.tenancy.access.limits import BYTES_PER_TOKEN

# An answer without a limit counts with so many tokens, and may have no more if its key has a limit of tokens.
ANSWER_TOKENS = 1024
# vLLM's default for completions.
_COMPLETION_TOKENS = 16
# vLLM's largest number of prompts. Each sequence takes some time of its API process.
_MOST_SEQUENCES = 1024
# Each message has at least two tokens. vLLM checks 4,096 messages in about 0.1 s, in which nobody else is answered.
_TOKENS_PER_MESSAGE, _MOST_MESSAGES = 2, 4096
# Lists and objects of a body, in addition to some for each message. vLLM needs 10 us or more for each.
_VALUES, _VALUES_PER_MESSAGE = 4096, 4
# Of a body, for each token of the context, and in addition. English has about 4 bytes per token.
_MOST_BYTES_PER_TOKEN, _FEW_BYTES = 16, 64 * 1024
# The bytes of images, sounds and tensors say nothing about tokens.
_MEDIA = (b'"image_url"', b'"input_audio"', b'"audio_url"', b'"video_url"', b"_embeds", b'"base64"')
# Fields that may have them. vLLM counts the characters of a prompt before it tokenizes it.
_WITH_MEDIA = frozenset({"messages", "input", "prompt_embeds"})
# vLLM tokenizes these words twice in its event loop: 3.9 MB blocked it for 24 s.
_BAD_WORDS_CHARACTERS = 8192
_MOST_TOKEN_ID = 2**31 - 1
# What other servers of vLLM tell each other in requests: where to read and write their memory.
_OF_SERVERS = ("kv_transfer_params", "ec_transfer_params")
# The fields that limit an answer, the first one counts.
_LIMITS = {
    "chat": ("max_completion_tokens", "max_tokens"),
    "completions": ("max_tokens",),
    "responses": ("max_output_tokens",),
    "messages": ("max_tokens",),
}
# Lists and objects of one item of Responses, for which vLLM's class has about 15 errors each.
_VALUES_OF_ITEM = 256
# Lists of messages. vLLM checks each item.
_MESSAGES = ("messages", "input")
# What vLLM or Anthropic keep in one process. A client that chooses the id of a response can name that of another one.
_STATE = ("background", "previous_response_id", "conversation", "request_id", "container")
# What a server would run for the client: only functions, which clients run, are tools.
_TOOLS = {"responses": ("function", "custom", "namespace"), "messages": (None, "custom")}
_URLS = ("image_url", "audio_url", "video_url", "file_url")


@dataclass(frozen=True, slots=True)
class VllmRequest:
    """One parsed request. `body`: JSON for vLLM. `prompt_tokens`: estimated, except for token ids.

    `answer_tokens`: the most of one sequence. `choices`: sequences of one prompt. `prompt_logprobs`: it asks for the
    log-probabilities of its prompt.
    """

    body: bytes
    prompt_tokens: int
    answer_tokens: int = 0
    prompts: int = 1
    choices: int = 1
    prompt_logprobs: bool = False

    @property
    def sequences(self) -> int:
        return self.prompts * self.choices

    @property
    def tokens(self) -> int:
        """The tokens to reserve."""
        return self.prompt_tokens + self.sequences * self.answer_tokens


def generation(
    endpoint: str,
    raw: bytes,
    context: int,
    resolve: Callable[[Any], str],
    *,
    limited: bool = False,
    most_sequences: int | None = None,
    validate: Callable[[Any], object] = lambda _: None,
) -> VllmRequest:
    """Return the request of a body for `endpoint`, a key of `_LIMITS`. Raises `ApiError` 400, and as `resolve`.

    `context`: the largest one, in tokens. `resolve`: returns the name for vLLM of the wanted model. `limited`: the
    answers must have a limit. `most_sequences`: of one request. `validate`: of vLLM's class for Responses.
    """
    request = _object(raw, context)
    request["model"] = resolve(request.get("model"))
    extra = request.get("vllm_xargs")
    for name in _OF_SERVERS:
        if request.get(name) is not None or (isinstance(extra, dict) and name in extra):
            raise _invalid(name, "is not supported")
    if request.get("use_beam_search") not in (None, False):
        raise _invalid("use_beam_search", "is not supported: each token of each beam is a request to the engine")
    _integer(request, "priority")
    _check_words(request.get("bad_words"))
    if tools := _TOOLS.get(endpoint):
        _check_agent(request, tools)
    _check_media(request, endpoint == "messages")
    if endpoint == "responses":
        request["store"] = False  # vLLM's default is true
        _check_items(request, validate)
    limit = None
    for name in reversed(_LIMITS[endpoint]):
        found = _integer(request, name, least=int(endpoint != "completions"))
        limit = limit if found is None else found
    choices = _integer(request, "n", least=1) if endpoint in ("chat", "completions") else 1
    prompts, ids = 1, None
    if endpoint == "completions":
        limit = _COMPLETION_TOKENS if limit is None else limit
        prompts, ids = _prompts(request, context)
    elif limit is None and limited and endpoint != "messages":  # which must have one
        limit = request[_LIMITS[endpoint][0]] = min(ANSWER_TOKENS, context)
    sequences, most = prompts * (choices or 1), min(_MOST_SEQUENCES, most_sequences or _MOST_SEQUENCES)
    if sequences > most:
        message = f"times the number of prompts is {sequences}; the limit is {most}: send several requests"
        raise _invalid("n", message, "too_many_sequences")
    _check_size(raw, request, context * prompts)
    return VllmRequest(
        _json(request),
        -(-len(raw) // BYTES_PER_TOKEN) if ids is None else ids,
        # With `echo`, vLLM generates one token if none is asked for.
        max(1, min(ANSWER_TOKENS if limit is None else limit, context)),
        prompts,
        choices or 1,
        request.get("prompt_logprobs") is not None or bool(request.get("echo")),
    )


def _check_agent(request: Mapping[str, Any], tools: tuple[str | None, ...]) -> None:
    """Raise `ApiError` for what Responses and Messages ask of a server besides an answer."""
    for name in _STATE:
        if request.get(name) not in (None, False):
            raise _invalid(name, "is not supported: this server keeps no responses; send all messages", "stateless")
    if request.get("store"):
        raise _invalid("store", "must be false or absent: this server keeps no responses", "stateless")
    found = request.get("tools")
    hosted = ["mcp_servers"] if request.get("mcp_servers") else []
    for index, tool in enumerate(found if isinstance(found, list) else ()):
        if isinstance(tool, dict) and not (isinstance(kind := tool.get("type"), str | None) and kind in tools):
            hosted.append(f"tools[{index}].type")
    if hosted:
        message = f"is not supported: this server runs no tools; it accepts {' and '.join(filter(None, tools))} tools"
        raise _invalid(hosted[0], message, "hosted_tool")


def _check_items(request: Mapping[str, Any], validate: Callable[[Any], object]) -> None:
    """Raise `ApiError` for the first item that vLLM's class for Responses rejects.

    Of 2,000 such items, it writes 464,000 errors in 10 s, in which nobody else is answered.
    """
    for name in ("input", "tools"):
        found = request.get(name)
        for index, item in enumerate(found if isinstance(found, list) else ()):
            if name == "input" and sum(1 for _ in _containers([item])) > _VALUES_OF_ITEM:
                message = f"has more than {_VALUES_OF_ITEM} lists and objects"
                raise _invalid(f"input[{index}]", message, "too_many_values")
            try:
                validate({"input": "", name: [item]})
            except ValidationError as error:
                # The first one of the item: others say that it is no text.
                first = max(error.errors(include_url=False), key=lambda each: 0 in each["loc"])
                place = ".".join(map(str, first["loc"][-2:]))
                raise _invalid(f"{name}[{index}]", f"is not valid: {place}: {first['msg']}") from None
            except Exception:  # noqa: BLE001  # an error of vLLM's own, with which it responds itself
                pass


def _check_media(request: Mapping[str, Any], of_anthropic: bool) -> None:
    """Raise `ApiError` for an address of an image, sound or file that vLLM would load.

    Anthropic's bodies have the arguments of functions as objects, whose fields can have any name.
    """
    for each in _containers(request):
        found: Any = each if isinstance(each, dict) else {}
        urls = [found.get(name) for name in _URLS]
        if of_anthropic:
            source = found.get("source") if found.get("type") == "image" else None
            urls = [source.get("url") if source.get("type") == "url" else None] if isinstance(source, dict) else []
        for url in urls:
            address = url.get("url") if isinstance(url, dict) else url
            if isinstance(address, str) and not address.startswith("data:"):
                raise _invalid("url", "of media must start with `data:`: this server loads no media", "media_url")


def tokenization(raw: bytes, context: int, resolve: Callable[[Any], str], *, of_anthropic: bool = False) -> VllmRequest:
    """Return the request of a body for the tokenizer. Raises `ApiError` 400 or 413, and what `resolve` does."""
    most = _FEW_BYTES + _MOST_BYTES_PER_TOKEN * context
    if len(raw) > most:
        raise ApiError(413, f"the body has {len(raw)} bytes; the limit is {most}", code="body_too_large")
    request = _object(raw, context)
    request["model"] = resolve(request.get("model"))
    _check_media(request, of_anthropic)
    ids = request.get("tokens")
    if ids is not None:
        _check_ids("tokens", ids)
    return VllmRequest(_json(request), -(-len(raw) // BYTES_PER_TOKEN) if ids is None else len(ids))


def _object(raw: bytes, context: int) -> dict[str, Any]:
    """Return the JSON object of a body whose size vLLM can handle."""
    try:
        request = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the body is not valid JSON in UTF-8: {error}", code="invalid_json") from None
    if not isinstance(request, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_type")
    most = min(context // _TOKENS_PER_MESSAGE, _MOST_MESSAGES)
    for name in _MESSAGES:
        if isinstance(messages := request.get(name), list) and len(messages) > most:
            raise _invalid(name, f"has {len(messages)} items; the limit is {most}", "context_length_exceeded")
    limit = _VALUES + _VALUES_PER_MESSAGE * most
    if any(count >= limit for count, _ in enumerate(_containers(request))):
        raise ApiError(400, f"the body has more than {limit} lists and objects", code="too_many_values")
    return request


def _containers(value: Any) -> Iterator[Any]:
    """Yield the lists and objects in a JSON value."""
    found = [value]
    while found:
        each = found.pop()
        yield each
        values = each.values() if isinstance(each, dict) else each
        found += [inner for inner in values if isinstance(inner, dict | list)]


def _json(request: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(request)
    except orjson.JSONEncodeError:
        raise ApiError(400, "the body has too many levels", code="invalid_json") from None


def _prompts(request: Mapping[str, Any], context: int) -> tuple[int, int | None]:
    """Return the number of prompts of a completion, and the tokens of all of them if they are token ids or tensors."""
    prompt, tensors = request.get("prompt"), request.get("prompt_embeds")
    count, ids = 1, None
    if isinstance(prompt, list) and prompt and all(isinstance(each, list) for each in prompt):
        for each in prompt:
            _check_ids("prompt", each, context)
        count, ids = len(prompt), sum(map(len, prompt))
    elif isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
        if not all(isinstance(each, str) for each in prompt):
            raise _invalid("prompt", "must be texts or token ids, not both")
        count = len(prompt)
    elif isinstance(prompt, list):
        _check_ids("prompt", prompt, context)
        ids = len(prompt)
    elif not isinstance(prompt, str | None):
        raise _invalid("prompt", "must be a text, token ids, or a list of these")
    if tensors is None:
        return count, ids
    if not isinstance(tensors, str | list):
        raise _invalid("prompt_embeds", "must be a tensor, or a list of tensors")
    more = len(tensors) if isinstance(tensors, list) else 1
    count = more if prompt is None else count + more
    return count, count * context


def _check_ids(name: str, ids: Any, context: int | None = None) -> None:
    if not isinstance(ids, list) or any(type(each) is not int or not 0 <= each <= _MOST_TOKEN_ID for each in ids):
        raise _invalid(name, "has a value that is no token id")
    if context is not None and len(ids) > context:
        message = f"has {len(ids)} tokens; this model's maximum context length is {context} tokens"
        raise _invalid(name, message, "context_length_exceeded")


def _check_words(words: Any) -> None:
    if words is None:
        return
    if not isinstance(words, list) or not all(isinstance(each, str) for each in words):
        raise _invalid("bad_words", "must be a list of texts")
    if (size := sum(map(len, words))) > _BAD_WORDS_CHARACTERS:
        raise _invalid("bad_words", f"has {size} characters; the limit is {_BAD_WORDS_CHARACTERS}")


def has_media(body: bytes) -> bool:
    """Return whether the body of a request may have more tokens than bytes."""
    return any(name in body for name in _MEDIA)


def _check_size(raw: bytes, request: Mapping[str, Any], tokens: int) -> None:
    most, size = _FEW_BYTES + _MOST_BYTES_PER_TOKEN * tokens, len(raw)
    if size > most and has_media(raw):
        size = len(_json({name: value for name, value in request.items() if name not in _WITH_MEDIA}))
    if size > most:
        message = f"the body has {size} bytes; the limit for {tokens} tokens is {most}"
        raise ApiError(400, message, code="context_length_exceeded")


def _integer(request: Mapping[str, Any], name: str, least: int = 0) -> int | None:
    value = request.get(name)
    if value is not None and (type(value) is not int or value < least):
        raise _invalid(name, f"must be an integer of at least {least}")
    return value


def _invalid(name: str, reason: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, f"{name} {reason}", code=code, param=name)
