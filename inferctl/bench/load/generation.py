"""Requests to generation servers: chat completions and completions, streamed, with fixed output lengths if possible."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from inferctl.core.errors import InferctlError

CHAT_PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class GenerationApi:
    """What a generation server accepts beyond the common part of the OpenAI API.

    - `ignore_eos`: outputs of a fixed length, with `ignore_eos` and `min_tokens`.
    - `event_usage`: usage in each event, with `continuous_usage_stats`.
    - `system_message`: a system message. It takes the start of the prompt, so that the default one of a chat template
      is not a common start of all prompts.
    """

    ignore_eos: bool = True
    event_usage: bool = True
    system_message: bool = True

    def body(self, path: str, model: str, texts: list[str], output_tokens: int) -> dict[str, Any]:
        """Return the JSON body of a request for `output_tokens` tokens after the prompt, which is in two parts."""
        prompt = " ".join(filter(None, texts))
        body: dict[str, Any] = {"model": model, "prompt": prompt}
        if path.endswith(CHAT_PATH):
            messages = [{"role": "user", "content": prompt}]
            if self.system_message and texts[0]:
                messages = [{"role": "system", "content": texts[0]}, {"role": "user", "content": texts[1]}]
            body = {"model": model, "messages": messages}
        usage = {"include_usage": True} | ({"continuous_usage_stats": True} if self.event_usage else {})
        body |= {"max_tokens": output_tokens, "temperature": 0, "stream": True, "stream_options": usage}
        return body | ({"ignore_eos": True, "min_tokens": output_tokens} if self.ignore_eos else {})

    def smaller(self) -> Iterator[GenerationApi]:
        """Yield the forms of a request without one of the features, then without all of them."""
        names = [field.name for field in fields(self)]
        yield from (replace(self, **{name: False}) for name in names)
        yield GenerationApi(*(False for _ in names))


def chunks(content: bytes, url: str) -> list[dict[str, Any]]:
    """Return the chunks of a whole event stream.

    Raises `InferctlError` if it has an error event, no finish reason or no `[DONE]`.
    """
    lines = [line[5:].strip() for line in content.split(b"\n") if line.startswith(b"data:")]
    try:
        found = [json.loads(line) for line in lines if line != b"[DONE]"]
        errors = [chunk["error"] for chunk in found if chunk.get("error")]
        finished = any(choice.get("finish_reason") for chunk in found for choice in chunk.get("choices") or ())
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise InferctlError(f"the response of {url} is not an event stream of completions: {error}") from None
    if errors:
        raise InferctlError(f"{url} returned an error event: {str(errors[0])[:300]}")
    if not finished or b"[DONE]" not in lines:
        missing = "`[DONE]`" if finished else "finish reason"
        raise InferctlError(f"the response of {url} is not a complete event stream of completions: no {missing}")
    return found
