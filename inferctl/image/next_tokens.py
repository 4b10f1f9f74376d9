"""Verifies an image for generation: its server reads prompts as the model folder does, and predicts the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inferctl.core.errors import InferctlError
from inferctl.models import divergence
from inferctl.models.divergence import Divergence, Scored

# The last input of the reference: it shows the chat template.
CHAT = [{"role": "user", "content": "Name three rivers."}, {"role": "assistant", "content": "Rhine, Nile and Amazon."}]
CHAT = [*CHAT, {"role": "user", "content": "Which one is the longest?"}]


@dataclass(frozen=True)
class Prompt:
    """A prompt as the server read and predicted it; `name` is for messages. None for chat messages that it rejects."""

    name: str
    scored: Scored | None
    rejected: str = ""


def ask(send: Callable[[str, Mapping[str, Any]], Mapping[str, Any]], model: str, texts: Sequence[str]) -> list[Prompt]:
    """Return what the server predicts for each text, and for chat messages as the last prompt.

    `send` posts a body to a path and returns the response. Raises `InferctlError` if a text is rejected, or a response
    has no valid log-probabilities.
    """
    prompts = []
    for number, text in enumerate(texts, 1):
        response = send("/v1/completions", divergence.request(model, text))
        prompts.append(Prompt(f"text {number}", _read(response, response["choices"][0])))
    body = divergence.request(model, "")
    del body["prompt"]
    try:
        response = send("/v1/chat/completions", body | {"messages": CHAT})
    except InferctlError as error:
        return [*prompts, Prompt("the chat messages", None, error.message)]
    return [*prompts, Prompt("the chat messages", _read(response, response))]


def compare(prompts: Sequence[Prompt], reference: Sequence[Mapping[str, Any] | None], precision: str) -> Divergence:
    """Return the divergence of the server from the reference.

    Raises `InferctlError` if the server reads a prompt as other tokens, or the divergence exceeds the limits of the
    precision.
    """
    expected, found = [], []
    for prompt, text in zip(prompts, divergence.read_reference(reference), strict=True):
        if text is None:
            continue  # the model has no chat template
        if prompt.scored is None:
            raise InferctlError(
                f"the server rejects chat messages, but the model has a chat template: {prompt.rejected}"
            )
        if (served := list(prompt.scored.ids)) != list(text.ids):
            where = next((i for i, pair in enumerate(zip(served, text.ids, strict=False)) if pair[0] != pair[1]), None)
            where = min(len(served), len(text.ids)) if where is None else where
            raise InferctlError(
                f"the server reads {prompt.name} as other tokens than the tokenizer of the model folder, from token "
                f"{where + 1} on: {served[where : where + 3]} instead of {list(text.ids[where : where + 3])}"
            )
        expected.append(text)
        found.append(prompt.scored)
    result = divergence.compare(expected, found)
    if reason := divergence.failure(result, divergence.limits_of(precision)):
        raise InferctlError(
            f"the next tokens differ from the fp32 reference of the same weights: {reason} for {precision} "
            f"({result.positions} tokens; perplexity {result.perplexity:.4g}, with fp32 {result.perplexity_fp32:.4g})"
        )
    return result


def _read(response: Mapping[str, Any], holder: Mapping[str, Any]) -> Scored:
    ids = holder.get("prompt_token_ids")
    if not isinstance(ids, list) or not ids:
        raise InferctlError("the server does not report the token ids of a prompt (`return_token_ids`)")
    return divergence.read_served(response, ids)
