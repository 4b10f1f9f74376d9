"""Where a request meets keys and limits: it reads credentials, and makes the 401, 403 and the limit headers."""

from __future__ import annotations

import contextlib
import functools
import hmac
import ipaddress
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from starlette.types import Scope

from inferctl.config import spec
from inferctl.config.budget import Budget, parse
from inferctl.serve.edge.errors import ApiError
from inferctl.serve.edge.request_context import BY_MODEL, OTHER, RequestContext
from inferctl.serve.work import Caller
from inferctl.tenancy.access.budgets import UNAVAILABLE
from inferctl.tenancy.access.key_file import ApiKey, caller, is_caller_id
from inferctl.tenancy.access.key_table import KeyTable, UnavailableError
from inferctl.tenancy.access.keys import PREFIX
from inferctl.tenancy.access.limits import PERIOD_S, Limits, Quotas

log = logging.getLogger("inferctl.access")

# Path -> its name in `access.open`.
_PAGES = {
    "/": "docs",
    "/metrics": "metrics",
    "/info": "info",
    "/docs": "docs",
    "/docs/oauth2-redirect": "docs",
    "/redoc": "docs",
    "/openapi.json": "docs",
}
_KEY_HEADERS = (b"authorization", b"x-api-key", b"api-key")
# A gateway that authenticates clients sets it. That of inferctl removes it.
_PROXY_HEADER, _MAX_CALLER = b"x-inferctl-key-id", 200
_MOST = (1 << 63) - 1  # what fits into a message between processes; a limit can be any number


class EdgeAccess:
    """Who may use one server. `names`: of its models. `settings`: of the spec.

    `batch_secret`: with it, the worker of batches sends requests of their keys. None for a server without batches.
    """

    def __init__(self, settings: spec.Access, names: Iterable[str], batch_secret: str | None = None) -> None:
        """Raises `UsageError` if the key file is missing or not valid."""
        self._table = None
        if settings.key_file:
            self._table = KeyTable(Path(settings.key_file), log.warning, awaited=bool(settings.key_store))
        self._proxies = [ipaddress.ip_network(network) for network in settings.trusted_proxies]
        self._trusts = functools.lru_cache(maxsize=1024)(self._is_proxy)
        self.names, self._open = set(names), frozenset(settings.open)
        self._team_budgets = {name: text for name, text in settings.budgets.items() if name.startswith("team:")}
        self._default_limits = settings.requests_per_minute, settings.tokens_per_minute
        self._batch_secret = batch_secret.encode() if batch_secret else None
        if self._table:
            self._table.follow()

    @property
    def ready(self) -> bool:
        """Whether the keys are known."""
        return self._table is None or self._table.ready

    def authenticate(self, scope: Scope, context: RequestContext) -> None:
        """Write to the context who sends a request, unless it is for an open page. Raises `ApiError`."""
        # A path may be a page and, with another method, an endpoint of a task.
        endpoint = context.asked.endpoint
        page = _PAGES.get(scope["path"]) if endpoint == OTHER else None
        if page in self._open:
            return
        key = self._find(scope)
        shared = self._proxies or (self._table and self._table.shared)
        bulk = context.caller.bulk or key.priority == "bulk"
        budgets = self._budgets_of(key) if key.budget or self._team_budgets else ()
        context.caller = Caller(key.id, self._limits_of(key), key.id if shared else None, bulk, budgets)
        context.key = key
        if page and not key.admin:
            raise _forbidden(f"read {scope['path']}; create one with `--admin`, or set `access.open`")
        if key.models is not None and self.names.isdisjoint(key.models):
            raise _forbidden("use this model")
        if endpoint != BY_MODEL and scope["method"] != "GET":
            check_endpoint(scope, context)

    def _limits_of(self, key: ApiKey) -> Limits:
        requests, tokens = self._default_limits
        requests, tokens = key.requests_per_minute or requests, key.tokens_per_minute or tokens
        return requests and min(requests, _MOST), tokens and min(tokens, _MOST)

    def _budgets_of(self, key: ApiKey) -> tuple[Budget, ...]:
        try:
            own = (parse(key.id, key.budget),) if key.budget else ()
            account = f"team:{key.team}"
            return (*own, parse(account, shared)) if (shared := self._team_budgets.get(account)) else own
        except ValueError as error:  # a time zone that this machine does not have
            log.error("requests of %s are rejected: %s", key.id, error)
            raise ApiError(503, "the budget of this key is not valid on this server", code=UNAVAILABLE) from None

    def check_page(self, scope: Scope) -> None:
        """Raise `ApiError` if a page of the edge is closed for this request."""
        page = _PAGES.get(scope["path"])
        if page and page not in self._open and not self._find(scope).admin:
            raise _forbidden(f"read {scope['path']}; create one with `--admin`, or set `access.open`")

    def _find(self, scope: Scope) -> ApiKey:
        named: list[bytes] = []
        if self._proxies and (client := scope.get("client")) and self._trusts(client[0]):
            named = [value for name, value in scope["headers"] if name == _PROXY_HEADER]
            if len(named) == 1 and len(named[0]) <= _MAX_CALLER:
                with contextlib.suppress(UnicodeDecodeError):
                    if is_caller_id(found := named[0].decode()):
                        return caller(found)
        # Of two names, the proxy may have set only one.
        credential = b"" if len(named) > 1 else _credential(scope["headers"])
        try:
            key = self._table.find(credential, time.time()) if self._table and credential else None
            if key is None and self._batch_secret and len(credential) > len(self._batch_secret):
                key = self._of_batch(credential)
        except UnavailableError as error:
            headers = {"retry-after": "5"}
            raise ApiError(503, str(error), code="access_unavailable", headers=headers) from None
        if key is None:
            # The same text for every reason: it must not say which keys exist.
            message = "the API key is missing or not valid; send it as `Authorization: Bearer KEY`"
            raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        return key

    def _of_batch(self, credential: bytes) -> ApiKey | None:
        """Return the key on whose behalf the worker sends a request, if it is still valid."""
        assert self._batch_secret is not None
        secret, owner = credential[: len(self._batch_secret)], credential[len(self._batch_secret) :]
        if not hmac.compare_digest(secret, self._batch_secret):
            return None
        kind, _, key_id = owner.decode().partition(":")
        if kind == "caller":
            return caller(key_id) if self._proxies else None
        return self._table.find_id(key_id, time.time()) if self._table else None

    def revoke(self, ids: Iterable[str]) -> None:
        """Refuse keys from now on, before the key file says so."""
        if self._table:
            self._table.revoke(ids)

    def _is_proxy(self, address: str) -> bool:
        try:
            found = ipaddress.ip_address(address)
            found = getattr(found, "ipv4_mapped", None) or found
            return any(found in network for network in self._proxies)
        except ValueError:
            return False


def check_endpoint(scope: Scope, context: RequestContext) -> None:
    """Raise `ApiError` 403 if the key of a request may not use its endpoint."""
    key = context.key
    if key is not None and key.endpoints is not None and context.asked.endpoint not in key.endpoints:
        raise _forbidden(f"use {scope['path']}")


def known(access: EdgeAccess | None) -> bool:
    """Return whether clients can be recognized."""
    return access is None or access.ready


def warnings(settings: spec.Access, host: str) -> Iterator[str]:
    """Yield what the operator should know at the start."""
    if settings.required:
        if settings.broker and settings.replicas == 1:
            yield (
                "access.broker is set and access.replicas is 1: until this server hears of others, and without the "
                "broker, it applies the whole limits; set access.replicas to the number of servers"
            )
        return
    if not _is_loopback(host):
        yield (
            f"the server listens on {host} and asks for no key: everyone who reaches it can use it; "
            "create a key with `inferctl keys create NAME`, and set `access.keys`"
        )
    if settings.requests_per_minute or settings.tokens_per_minute:
        yield "limits per key have no effect without `access.keys`"


def ready_line(name: str, url: str, seconds: float, settings: spec.Access) -> str:
    """Return the last line printed when the server is ready: where it and its documentation are."""
    who = " (requires an admin key)" if settings.required and "docs" not in settings.open else ""
    return f"ready      {name} at {url} after {seconds:.1f} s; documentation at {url}/docs{who}"


def limit_headers(quotas: Quotas) -> dict[str, str]:
    """Return the headers of limits: OpenAI's `x-ratelimit-*`, and `RateLimit` and `RateLimit-Policy`."""
    found = [(name, *quota) for name, quota in zip(("requests", "tokens"), quotas, strict=True) if quota]
    headers: dict[str, str] = {}
    for name, limit, left, reset in found:
        headers |= {f"x-ratelimit-limit-{name}": str(limit), f"x-ratelimit-reset-{name}": _duration(reset)}
        headers[f"x-ratelimit-remaining-{name}"] = str(left)
    if found:
        headers["ratelimit-policy"] = ", ".join(f'"{name}";q={limit};w={PERIOD_S}' for name, limit, _, _ in found)
        headers["ratelimit"] = ", ".join(f'"{name}";r={left};t={reset}' for name, _, left, reset in found)
    return headers


def _duration(seconds: int) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def _credential(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the key in the headers of a request; empty if there is none, or if a header appears twice.

    Of two headers, a proxy may check one, and this server the other.
    """
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in _KEY_HEADERS:
            if name in found:
                return b""
            found[name] = value
    bearer, *others = (found.get(name, b"") for name in _KEY_HEADERS)
    if bearer[:7].lower() == b"bearer ":
        return bearer[7:].strip()
    if bearer.startswith(PREFIX.encode()):  # clients of text-embeddings-inference send the bare key
        return bearer.strip()
    return next(filter(None, others), b"").strip()


def _forbidden(what: str) -> ApiError:
    return ApiError(403, f"this API key may not {what}", code="forbidden")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
