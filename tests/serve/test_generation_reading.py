"""What the edge reads in a request of generation, and that vLLM's own classes never generate more than that."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError, model_validator

from inferctl.serve.edge.errors import ApiError
from inferctl.serve.generate import vllm_request

CONTEXT = 256
MESSAGES = [{"role": "user", "content": "hi"}]
FUNCTION = {"type": "function", "name": "a", "parameters": {"type": "object"}}


class OfResponses(BaseModel):
    """Stands in for vLLM's class. `most_items`: that it had to read at a time."""

    most_items: ClassVar[int] = 0
    input: str | list[dict[str, Any]]
    tools: list[dict[str, Any]] = []

    @model_validator(mode="before")
    @classmethod
    def count(cls, data: Any) -> Any:
        cls.most_items = max(cls.most_items, len(data["input"]), len(data.get("tools", ())))
        return data


def responses(**fields: Any) -> bytes:
    return json.dumps({"input": MESSAGES, **fields}).encode()


def chat(**fields: Any) -> bytes:
    return json.dumps({"messages": MESSAGES, **fields}).encode()


def with_part(part: Any) -> bytes:
    """Return a body for Responses and Messages with a part of a message, in the result of a tool."""
    result = [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [part]}]}]
    return json.dumps({"input": result, "messages": result, "max_tokens": 9}).encode()


def completion(prompt: Any, **fields: Any) -> bytes:
    return json.dumps({"prompt": prompt, **fields}).encode()


@pytest.mark.parametrize(
    ("endpoint", "raw", "sequences", "answer"),
    [
        ("chat", chat(max_tokens=10), 1, 10),
        ("chat", chat(max_completion_tokens=20, max_tokens=10), 1, 20),
        ("chat", chat(max_completion_tokens=None, max_tokens=10), 1, 10),
        ("chat", chat(max_tokens=10, n=3), 3, 10),
        ("chat", chat(n=None), 1, CONTEXT),
        ("chat", chat(max_tokens=10_000), 1, CONTEXT),
        ("completions", completion("a"), 1, 16),
        # vLLM reads no `max_completion_tokens` there.
        ("completions", completion("a", max_completion_tokens=1, max_tokens=200), 1, 200),
        ("completions", completion("a", max_completion_tokens=1), 1, 16),
        ("completions", completion("a", max_tokens=0, echo=True), 1, 1),
        ("completions", completion(["a", "b"], max_tokens=10, n=2), 4, 10),
        ("completions", completion([1, 2], max_tokens=10), 1, 10),
        ("completions", completion([[1], [2]], max_tokens=10), 2, 10),
        ("completions", completion(None, prompt_embeds=["aa", "bb"], max_tokens=10), 2, 10),
        ("completions", completion(["a"], prompt_embeds="aa", max_tokens=10), 2, 10),
        ("responses", responses(max_output_tokens=10, n=5, max_tokens=1), 1, 10),
        ("responses", responses(), 1, CONTEXT),
        ("messages", chat(max_tokens=10, n=5, max_completion_tokens=1), 1, 10),
    ],
)
def test_the_most_that_a_request_can_generate(endpoint: str, raw: bytes, sequences: int, answer: int) -> None:
    asked = vllm_request.generation(endpoint, raw, CONTEXT, str, limited=True)
    assert (asked.sequences, asked.answer_tokens) == (sequences, answer)
    assert asked.tokens >= sequences * answer


def test_the_tokens_of_a_prompt() -> None:
    assert vllm_request.generation("completions", completion([[1, 2, 3]] * 4), CONTEXT, str).prompt_tokens == 12
    text = completion("word " * 100)
    assert vllm_request.generation("completions", text, CONTEXT, str).prompt_tokens == -(-len(text) // 4)
    assert (
        vllm_request.generation("completions", completion("", prompt_embeds=["a"]), CONTEXT, str).prompt_tokens
        == 2 * CONTEXT
    )  # vLLM runs the empty prompt too
    assert vllm_request.tokenization(json.dumps({"tokens": [7] * 100}).encode(), CONTEXT, str).prompt_tokens == 100


@pytest.mark.parametrize(
    ("endpoint", "raw", "code"),
    [
        ("chat", b"{", "invalid_json"),
        ("chat", b'{"messages": [], "x": NaN}', "invalid_json"),
        ("chat", b'{"messages": [], "x": Infinity}', "invalid_json"),
        ("chat", b'{"messages": [], "x": "\xff"}', "invalid_json"),
        ("chat", b'{"messages": [], "x": "\\ud800"}', "invalid_json"),
        ("chat", b'{"messages": [],}', "invalid_json"),
        ("chat", b"\xef\xbb\xbf" + chat(), "invalid_json"),
        ("chat", chat().decode().encode("utf-16"), "invalid_json"),
        ("chat", chat().decode().encode("utf-32-le"), "invalid_json"),
        ("chat", b'{"messages":' + b"[" * 300 + b"]" * 300 + b"}", "invalid_json"),
        ("chat", b"[]", "invalid_type"),
        ("chat", chat(max_tokens="4000"), "invalid_value"),
        ("chat", chat(max_tokens=100.0), "invalid_value"),
        ("chat", chat(max_tokens=True), "invalid_value"),
        ("chat", chat(max_tokens=-1), "invalid_value"),
        ("chat", chat(max_tokens=0), "invalid_value"),
        ("chat", chat(max_tokens=10**30), "invalid_value"),
        ("chat", chat(max_tokens="4000", max_completion_tokens=1), "invalid_value"),
        ("chat", chat(n="128"), "invalid_value"),
        ("chat", chat(n=100.0), "invalid_value"),
        ("chat", chat(n=0), "invalid_value"),
        ("chat", chat(n=2000), "too_many_sequences"),
        ("chat", chat(priority=-1), "invalid_value"),
        ("chat", chat(priority="-1"), "invalid_value"),
        # A field that vLLM ignores is no image.
        ("chat", chat(user="a" * 80_000, image_url=1), "context_length_exceeded"),
        ("chat", chat(allowed_token_ids=[1] * 80_000, x_embeds=""), "context_length_exceeded"),
        ("completions", completion("a" * 80_000, image_url=1), "context_length_exceeded"),
        # 3.9 MB of them blocked the event loop for 24 s.
        ("chat", chat(bad_words=["a " * 5000]), "invalid_value"),
        ("chat", chat(bad_words=["a" * 10] * 1000, image_url=1), "invalid_value"),
        ("completions", completion("a", bad_words=["a " * 5000], image_url=1), "invalid_value"),
        ("chat", chat(bad_words="a"), "invalid_value"),
        ("chat", chat(bad_words=[1]), "invalid_value"),
        ("chat", chat(use_beam_search=True), "invalid_value"),
        ("chat", chat(use_beam_search="yes"), "invalid_value"),
        ("chat", chat(kv_transfer_params={"prompt_token_ids": [1] * 200}), "invalid_value"),
        ("completions", completion("a", ec_transfer_params={}), "invalid_value"),
        ("chat", chat(vllm_xargs={"kv_transfer_params": "a"}), "invalid_value"),  # vLLM's answer is a 500
        ("chat", json.dumps({"messages": MESSAGES * 200}).encode(), "context_length_exceeded"),
        ("chat", chat(tools=[{}] * 6000), "too_many_values"),
        ("chat", json.dumps({"messages": [{"role": "user", "content": [{}] * 6000}]}).encode(), "too_many_values"),
        ("chat", chat(documents=[{}] * 6000), "too_many_values"),
        ("chat", chat(user="a" * 80_000), "context_length_exceeded"),
        ("completions", completion(["a", 1]), "invalid_value"),
        ("completions", completion(["1", 2]), "invalid_value"),
        ("completions", completion([1, "2"]), "invalid_value"),
        ("completions", completion([1.0, 2.0]), "invalid_value"),
        ("completions", completion([True]), "invalid_value"),
        ("completions", completion([[1], ["2"]]), "invalid_value"),
        ("completions", completion([[1], "a"]), "invalid_value"),
        ("completions", completion({"a": 1}), "invalid_value"),
        ("completions", completion([-1]), "invalid_value"),
        ("completions", completion([2**40]), "invalid_value"),
        ("completions", completion([1] * (CONTEXT + 1)), "context_length_exceeded"),
        ("completions", completion(["a"] * 1000, n=2), "too_many_sequences"),
        ("completions", completion(None, prompt_embeds={"a": 1}), "invalid_value"),
        ("responses", responses(max_output_tokens="10"), "invalid_value"),
        ("responses", responses(priority=-1), "invalid_value"),
        ("responses", responses(vllm_xargs={"ec_transfer_params": "a"}), "invalid_value"),
        ("responses", json.dumps({"input": MESSAGES * 200}).encode(), "context_length_exceeded"),
        ("responses", responses(instructions="a" * 80_000, image_url=1), "context_length_exceeded"),
        ("responses", json.dumps({"input": [*MESSAGES * 100, 5]}).encode(), "invalid_value"),
        ("responses", responses(tools=[FUNCTION] * 100 + ["a"]), "invalid_value"),
        ("responses", json.dumps({"input": [{"content": [{}] * 300}]}).encode(), "too_many_values"),
        ("messages", chat(max_tokens=10.0), "invalid_value"),
        ("messages", chat(max_tokens=10, kv_transfer_params={}), "invalid_value"),
        # What keeps state in one process: another server, or another key, would have it or not.
        ("responses", responses(store=True), "stateless"),
        ("responses", responses(store="true"), "stateless"),
        ("responses", responses(background=True), "stateless"),
        ("responses", responses(background="yes", store=False), "stateless"),
        ("responses", responses(previous_response_id="resp_1"), "stateless"),
        ("responses", responses(previous_response_id=""), "stateless"),
        ("responses", responses(conversation={"id": "conv_1"}), "stateless"),
        ("responses", responses(request_id="resp_of_another"), "stateless"),
        ("messages", chat(max_tokens=10, container="c"), "stateless"),
        # What a server runs or loads for the client.
        ("responses", responses(tools=[{"type": "web_search"}]), "hosted_tool"),
        ("responses", responses(tools=[FUNCTION, {"type": "mcp", "server_label": "a"}]), "hosted_tool"),
        ("responses", responses(tools=[{"name": "a"}]), "hosted_tool"),
        ("responses", responses(tools=[{"type": ["mcp"]}]), "hosted_tool"),
        ("messages", chat(max_tokens=10, tools=[{"type": "web_search_20250305", "name": "a"}]), "hosted_tool"),
        ("messages", chat(max_tokens=10, mcp_servers=[{"type": "url", "url": "https://a"}]), "hosted_tool"),
        ("responses", with_part({"type": "input_image", "image_url": "https://a/b.png"}), "media_url"),
        ("responses", with_part({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}), "media_url"),
        ("responses", with_part({"type": "input_file", "file_url": "http://a"}), "media_url"),
        ("chat", with_part({"type": "image_url", "image_url": {"url": "https://a/b.png"}}), "media_url"),
        ("messages", with_part({"type": "image", "source": {"type": "url", "url": "HTTP://a"}}), "media_url"),
    ],
)
def test_what_could_be_read_in_two_ways_or_costs_too_much_is_rejected(endpoint: str, raw: bytes, code: str) -> None:
    with pytest.raises(ApiError) as raised:
        vllm_request.generation(endpoint, raw, CONTEXT, str, validate=OfResponses.model_validate)
    assert (raised.value.status, raised.value.code) == (400, code)
    assert OfResponses.most_items <= 1, "the errors of many items together block vLLM for seconds"


@pytest.mark.parametrize(
    ("endpoint", "raw"),
    [
        ("responses", responses(store=False, background=False, previous_response_id=None, tools=[FUNCTION])),
        ("responses", responses(tools=[{"type": "custom", "name": "a"}, {"type": "namespace", "name": "b"}])),
        ("responses", with_part({"type": "input_image", "image_url": "data:image/png;base64,AAAA"})),
        ("messages", chat(max_tokens=9, tools=[{"name": "a", "input_schema": {}}, {"type": "custom", "name": "b"}])),
        ("messages", with_part({"type": "tool_use", "input": {"image_url": "https://a", "type": "url", "url": "a"}})),
        ("messages", chat(max_tokens=9, metadata={"user_id": "a"}, thinking={"type": "disabled"})),
        ("messages", with_part({"type": "image", "source": {"type": "base64", "data": "A" * 200_000}})),
    ],
)
def test_what_agents_send_is_passed_on(endpoint: str, raw: bytes) -> None:
    read = json.loads(raw) | ({"store": False} if endpoint == "responses" else {})
    passed = json.loads(vllm_request.generation(endpoint, raw, CONTEXT, str).body)
    assert passed == read | {"model": "None"}, "nothing is stored, also if vLLM could"


def test_images_and_prompts_for_a_whole_context_are_accepted() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 200_000}}
    vllm_request.generation(
        "chat", json.dumps({"messages": [{"role": "user", "content": [image]}]}).encode(), CONTEXT, str
    )
    vllm_request.generation("completions", completion([["\u4e2d" * 3 * CONTEXT][0]] * 100), CONTEXT, str)
    vllm_request.generation("completions", completion([[100_000] * CONTEXT] * 100), CONTEXT, str)


def test_a_key_with_a_limit_gets_no_answer_without_one() -> None:
    for endpoint, raw, field in (
        ("chat", chat(), "max_completion_tokens"),
        ("responses", responses(), "max_output_tokens"),
    ):
        both = [vllm_request.generation(endpoint, raw, 8192, str, limited=limited) for limited in (True, False)]
        limited, unlimited = both
        assert json.loads(limited.body)[field] == limited.answer_tokens < 8192
        assert field not in json.loads(unlimited.body)


def test_a_key_asks_for_no_more_sequences_than_it_can_have() -> None:
    assert vllm_request.generation("chat", chat(n=8), CONTEXT, str, most_sequences=8).sequences == 8
    with pytest.raises(ApiError, match="is 9; the limit is 8"):
        vllm_request.generation("chat", chat(n=9), CONTEXT, str, most_sequences=8)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"tokens": [2**40]}, 400),
        ({"tokens": [-1]}, 400),
        ({"tokens": "a"}, 400),
        ({"tokens": [1.0]}, 400),
        ({"messages": MESSAGES * 129}, 400),
        ({"messages": [{"role": "user", "content": [{"audio_url": {"url": "http://a"}}]}]}, 400),
        ({"prompt": "a" * 80_000}, 413),
    ],
)
def test_bodies_that_the_tokenizer_does_not_get(body: Any, status: int) -> None:
    with pytest.raises(ApiError) as raised:
        vllm_request.tokenization(json.dumps(body).encode(), CONTEXT, str)
    assert raised.value.status == status


COUNTS: st.SearchStrategy[Any] = st.sampled_from(
    [None, 0, 1, 2, 5, 16, 128, 200, 4000, -1, 2.0, 1e30, True, False, "4000", "1e3", " 5 ", [], {}]
)
PROMPTS: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(["", "a", "a b", [], [1], [1, 2], ["a"], ["a", "b"], [[1], [2, 3]], ["1", "2"], [[]], [""]]),
    st.sampled_from([None, 5, {"prompt": "a"}, ["1", 2], [1.0], [True], [[1], "a"], [["a"]], [["1"], [2]]]),
)
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
FLAGS = st.sampled_from([None, True, False, "true", "no", 1, 0, "yes"])
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys((*LIMITS, "n", "min_tokens", "best_of", "priority"), COUNTS),
    **dict.fromkeys(("stream", "echo", "use_beam_search", "ignore_eos"), FLAGS),
    "truncate_prompt_tokens": st.sampled_from([None, -1, 0, 1, 50, "5"]),
    "prompt_embeds": st.sampled_from([None, "aa", ["aa", "bb"], [], ""]),
    "kv_transfer_params": st.sampled_from([None, {}, {"prompt_token_ids": [1, 2]}]),
    "stream_options": st.sampled_from([None, {}, {"include_usage": True}, {"include_usage": "no"}, "a"]),
    "store": FLAGS,
    "background": FLAGS,
    "x": st.sampled_from([float("nan"), "\u2028", 2**70]),
}
ENCODINGS = st.sampled_from(["utf-8"] * 8 + ["utf-8-sig", "utf-16", "utf-32-le", "latin-1"])


def doubled(text: str, name: str, value: Any) -> str:
    """Add a field to a JSON object that may have it already."""
    return f"{text[:-1]}, {json.dumps(name)}: {json.dumps(value)}}}"


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    """Return an endpoint and a body for it, as a client could write it."""
    endpoint = draw(st.sampled_from(["chat", "completions", "responses", "messages"]))
    names = draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=6, unique=True))
    body = {name: draw(FIELDS[name]) for name in names}
    body |= {"prompt": draw(PROMPTS)} if endpoint == "completions" else {"messages": MESSAGES, "input": MESSAGES}
    text = json.dumps(body, ensure_ascii=draw(st.booleans()))
    if draw(st.booleans()):
        name = draw(st.sampled_from([*LIMITS, "n"]))
        text = doubled(text, name, draw(COUNTS))
    return endpoint, text.encode(draw(ENCODINGS), errors="replace")


def generated(endpoint: str, body: bytes) -> tuple[int, int, int] | None:
    """Return how many prompts, sequences and tokens vLLM's classes read; None if they reject the body."""
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.serve.utils.api_utils import get_max_tokens
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers.inputs.preprocess import prompt_to_seq

    classes: dict[str, Any] = {
        "chat": ChatCompletionRequest,
        "completions": CompletionRequest,
        "responses": ResponsesRequest,
        "messages": AnthropicMessagesRequest,
    }
    try:
        # As Starlette and FastAPI do it.
        request: Any = classes[endpoint].model_validate(json.loads(body))
        if endpoint == "messages":
            request = AnthropicServingMessages.to_chat_completion_request(request)
        if endpoint == "responses":
            params = request.to_sampling_params(get_max_tokens(CONTEXT, request.max_output_tokens, 0, {}), {})
            assert not (request.store or request.background)
            return 1, params.n, params.n * params.max_tokens
        count, limit = 1, request.max_tokens
        if endpoint != "completions":
            limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        else:
            prompts = [request.prompt_embeds, request.prompt]
            count = sum(len(prompt_to_seq(each)) for each in prompts if each is not None)
        most = get_max_tokens(CONTEXT, limit, 0, {}, None, request.truncate_prompt_tokens)
        assert not request.use_beam_search, "each token of a beam is a request"
        params = request.to_sampling_params(most, {})
    except (ValidationError, VLLMValidationError, ValueError, TypeError):
        return None
    assert params.max_tokens is not None
    return count, count * params.n, count * params.n * params.max_tokens


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(900)  # the import of vLLM takes a minute of CPU time
@settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(("completions", completion("a", max_completion_tokens=1, max_tokens=250)))
@example(("completions", completion("a", max_tokens=0, echo=True)))
@example(("chat", doubled(chat(max_tokens=1).decode(), "max_tokens", 250).encode()))
@given(bodies())
def test_vllm_generates_at_most_what_the_edge_charges(body: tuple[str, bytes]) -> None:
    pytest.importorskip("vllm")
    endpoint, raw = body
    try:
        asked = vllm_request.generation(endpoint, raw, CONTEXT, str, limited=True)
    except ApiError as error:
        assert error.status == 400  # vLLM does not get it
        return
    passed, read = orjson.loads(asked.body), orjson.loads(raw) | {"model": "None"}
    fields = {"chat": ("max_completion_tokens", "max_tokens"), "responses": ("max_output_tokens",)}.get(endpoint, ())
    if fields and all(read.get(field) is None for field in fields):
        read[fields[0]] = CONTEXT
    if endpoint == "responses":
        read["store"] = False
    assert passed == read, "vLLM gets what was read"
    if (found := generated(endpoint, asked.body)) is not None:
        prompts, sequences, tokens = found
        assert (asked.prompts, asked.sequences) >= (prompts, sequences)
        assert asked.sequences * asked.answer_tokens >= tokens
