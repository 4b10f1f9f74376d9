"""The requests that vLLM runs, read in its API process.

A response that is not a stream says nothing until its end, so only vLLM knows what it computed for a client that left.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

log = logging.getLogger("inferctl.usage")

# vLLM's default on most hardware.
_SEQUENCES = 1024
# Endpoint -> what vLLM puts before the id of a request.
_PREFIXES = {"chat": "chatcmpl", "completions": "cmpl"}


@dataclass(frozen=True, slots=True)
class Computed:
    """Tokens of one request. `cached_tokens`: of the prompts."""

    input_tokens: int
    output_tokens: int
    cached_tokens: int


class EngineRequests:
    """`client`: vLLM's client of its engine. `sequences`: the most that run at a time, None for vLLM's default.

    It uses attributes of the versions that the locks of the images have. With others, nothing is known.
    """

    def __init__(self, client: Any, sequences: int | None) -> None:
        self._client, self._warned = client, False
        try:
            self.capacity = int(client.vllm_config.scheduler_config.max_num_seqs)
        except AttributeError:
            self.capacity = sequences or _SEQUENCES

    def computed(self, endpoint: str, request_id: str, answer_tokens: int, sequences: int) -> Computed | None:
        """Return what was computed for a request that runs; None if that is not known.

        vLLM forgets prompts whose sequences all ended while others run: each of these counts with `answer_tokens`.
        """
        try:
            states = self._states(endpoint, request_id)
            parents = {id(state.parent_req): state.parent_req for state in states if state.parent_req is not None}
            ended = [one for parent in parents.values() for one in parent.output_aggregator if one is not None]
            # Also one without a token yet: the engine may have put it into its cache, where the next request finds it.
            prompts = {state.external_req_id: state for state in states}
            # Before the first token, they did not start yet.
            started = any(not state.is_prefilling for state in states)
            missing = sequences - len(states) - len(ended) if started else 0
            return Computed(
                sum(state.prompt_len for state in prompts.values()),
                sum(state.detokenizer.num_output_tokens() for state in states)
                + sum(len(one.token_ids) for one in ended)
                + max(0, missing) * answer_tokens,
                sum(state.num_cached_tokens for state in prompts.values()),
            )
        except (AttributeError, TypeError) as error:  # another version
            if not self._warned:
                self._warned = True
                log.warning("what clients that leave had computed is not recorded with this version of vLLM: %s", error)
            return None

    async def abort(self, endpoint: str, request_id: str) -> None:
        """End a request whose client left, in case that it still runs."""
        try:
            running = {state.external_req_id for state in self._states(endpoint, request_id)}
            if running:
                await self._client.abort(sorted(running))
        except AttributeError:
            pass

    def close(self) -> None:
        """End the task that waits for outputs of the engine, when there are no requests any more.

        vLLM ends it a moment after its connection to the engine. If the task runs in between, as on a busy machine, it
        logs an EngineDeadError with a traceback.
        """
        if (task := getattr(self._client, "output_handler", None)) is not None:
            task.cancel()

    def _states(self, endpoint: str, request_id: str) -> list[Any]:
        name = f"{_PREFIXES[endpoint]}-{request_id}"
        states = self._client.output_processor.request_states.values()
        # vLLM appends the number of the prompt.
        return [each for each in states if each.external_req_id == name or each.external_req_id.startswith(f"{name}-")]
