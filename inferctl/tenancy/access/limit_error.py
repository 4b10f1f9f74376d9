"""The error of a request that exceeds a limit of its key."""

from __future__ import annotations

import math
from typing import Literal

Resource = Literal["requests", "tokens"]


class LimitError(Exception):
    """A request exceeds a limit of its key. `retry_after`: seconds until it fits; None if it never does.

    `size`: the bytes of the body from which `amount` is estimated, because the request was not tokenized; 0 if it was.
    """

    def __init__(
        self,
        resource: Resource,
        limit: int,
        used: int,
        amount: int,
        retry_after: float | None,
        *,
        size: int = 0,
    ) -> None:
        self.resource, self.retry_after = resource, retry_after
        what = f"{limit} {resource} per minute"
        needed = f"about {amount} {resource} for its {size} bytes" if size else f"{amount} {resource}"
        if retry_after is None:
            message = f"the request needs {needed}, and the limit of this key is {what}"
        elif used + amount <= limit and not size:
            message = f"the limit of this key is {what}, and this server used its share of what remains"
            message += f"; retry after {math.ceil(retry_after)} s"
        else:
            message = f"the limit of this key is {what}: {used} are used, and the request needs {needed}"
            message += f"; retry after {math.ceil(retry_after)} s"
        super().__init__(message)
