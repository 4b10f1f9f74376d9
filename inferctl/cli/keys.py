"""`inferctl keys`: create, list, revoke and rotate API keys."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from inferctl.cli import completion, console, options
from inferctl.cli.key_place import Place
from inferctl.config.budget import EXAMPLE, parse
from inferctl.config.spec import Spec
from inferctl.core import outputs
from inferctl.core.errors import UsageError, did_you_mean, shown
from inferctl.tenancy.access import key_file, keys
from inferctl.tenancy.access.key_file import ApiKey, Priority, StoredDigest
from inferctl.tenancy.metering import prices

_ENDPOINTS = (
    *("embeddings", "rerank", "score", "classify", "predict", "tokenize"),
    *("chat", "completions", "responses", "messages", "batches"),
)
_DURATION = re.compile(r"([0-9]{1,9})([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_KeysOption = Annotated[
    str | None,
    typer.Option(
        "--keys",
        "--file",
        metavar="FILE|URL",
        help="Use this key file or database. [default: access.keys of the spec, else keys.json]",
    ),
]
_Keys = Annotated[
    list[str],
    typer.Argument(
        metavar="ID|NAME...", help="Id or name of a key. `-` reads a key from stdin, and uses the id in it."
    ),
]
_Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="FILE", help="Write the key to this file, with mode 600, and not to stdout."
    ),
]
_Force = Annotated[bool, typer.Option("--force", help="Replace the file of `--output`.")]

app = options.group("keys", "Create, list, revoke and rotate API keys.")


_CREATE_EPILOG = """\b
Examples:
  # Create a key, and keep it in a file; the server accepts it within 0.5 s
  inferctl keys create team-a --output team-a.key
  # Create a second key for bulk requests of the same service, whose usage the same team pays for
  inferctl keys create search --team team-a --priority bulk --output search-bulk.key
  # Limit a key to embeddings, 600 requests and 100,000 tokens a minute, and 90 days
  inferctl keys create team-b --endpoint embeddings --requests-per-minute 600 \\
      --tokens-per-minute 100000 --expires 90d
  # Limit what a key may cost in a calendar month
  inferctl keys create search --budget "50 EUR/month" --output search.key
  # Create a key for Prometheus and for `inferctl bench`, which read /metrics and /info
  inferctl keys create monitoring --admin --output monitoring.key
"""


@app.command(epilog=_CREATE_EPILOG)
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Who uses the key: a service, a team or a person.")],
    keys_: _KeysOption = None,
    spec_file: options.SpecFile = None,
    expires: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="End the key after this long, such as 12h or 90d. [default: never]"),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Limit the key to this model or adapter; repeatable. [default: all]"),
    ] = None,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            autocompletion=completion.one_of(*_ENDPOINTS),
            help=f"Limit the key to {', '.join(_ENDPOINTS[:-1])} or {_ENDPOINTS[-1]}; repeatable. [default: all]",
        ),
    ] = None,
    team: Annotated[
        str | None, typer.Option(metavar="NAME", help="Set who pays for the usage, for `inferctl usage --by team`.")
    ] = None,
    admin: Annotated[bool, typer.Option("--admin", help="Allow /metrics, /info, /docs and /adapters too.")] = False,
    priority: Annotated[
        Priority, typer.Option(help="Set to bulk to run each request of the key as a bulk request.")
    ] = "interactive",
    requests_per_minute: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Limit the requests per minute. [default: the server's limit]"),
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Limit the tokens per minute. [default: the server's limit]")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="BUDGET", help=f'Limit the cost: "{EXAMPLE}". With ` soft`, only warn.')
    ] = None,
    output: _Output = None,
    force: _Force = False,
    as_json: options.Json = False,
) -> None:
    """Create a key, and print it once on stdout, or write it to a file.

    Only its SHA-256 is stored, so the key cannot be shown again. If it cannot be written, it is not created.
    """
    for what, text in (("key", name), *((("team", team),) if team is not None else ())):
        # `-` would mean stdin in other commands, and no team in reports. A key as a name would be in all lists.
        if not text.isprintable() or not 0 < len(text.strip()) == len(text) <= 100 or text == "-" or keys.parse(text):
            message = f"the name of a {what} must have 1 to 100 printable characters, and must not be `-` or a key"
            raise UsageError(message, "use a name such as team-a")
    spec = options.without_model(spec_file, {"access.keys": keys_})
    place, now = Place(options.with_keys(spec.access)), key_file.now()
    served = [each for one in spec.each() for each in one.names] if options.names_model(spec_file, {}) else model or ()
    for each in model or ():
        if each not in served:
            # Keys can be for other servers too.
            console.warn(f"the spec has no model or adapter {shown(each)}, only {', '.join(served)}")
    key_id = keys.new_id()
    secret = keys.generate(key_id)
    key = ApiKey(
        id=key_id,
        name=name,
        team=team,
        digests=[StoredDigest(sha256=keys.digest(secret.encode()).hex())],
        created=now,
        expires=_end(now, expires, "--expires", least=1) if expires is not None else None,
        models=model or None,
        endpoints=[options.known(each, _ENDPOINTS, "--endpoint") for each in endpoint or ()] or None,
        admin=admin,
        priority=priority,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        budget=None if budget is None else _budget(budget, spec),
    )

    def add(found: dict[str, ApiKey]) -> ApiKey:
        named = [each for each in found.values() if each.name == name and each.status(now) == "active"]
        same = [each.id for each in named if each.priority == priority]
        if same or name in found:
            one = (
                f"the {priority} key {', '.join(same)} has the name {name!r}"
                if same
                else f"{name!r} is the id of a key"
            )
            raise UsageError(one, "use another name or `--priority`, or replace that key with `inferctl keys rotate`")
        found[key_id] = key
        return key

    _issue(place, add, secret, output, as_json, force=force, create=True)
    _note(f"created {key_id} ({name}) in {place.name}", output)
    place.publish([])


@app.command("list")
def list_(keys_: _KeysOption = None, spec_file: options.SpecFile = None, as_json: options.Json = False) -> None:
    """List the keys: id, name, team, priority, status, scopes and limits.

    Example: inferctl keys list --file keys.json
    """
    place, now = Place(options.access(spec_file, keys_)), key_file.now()
    found = sorted(place.read(), key=lambda key: key.created)
    if as_json:
        console.document({"file": place.name, "keys": [_described(key, now) for key in found]})
        return
    if not found:
        console.note(f"{place.name} has no keys")
        return
    names = "id name team priority status created expires scopes requests/min tokens/min budget"
    rows = [tuple(names.split()), *(_row(key, now) for key in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        console.data("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def revoke(
    ids: _Keys, keys_: _KeysOption = None, spec_file: options.SpecFile = None, as_json: options.Json = False
) -> None:
    """Revoke keys. Running servers reject them within a second.

    Without `access.broker`, servers with keys in a database need some seconds.

    Example: inferctl keys revoke team-a
    """
    place, now = Place(options.access(spec_file, keys_)), key_file.now()
    changed = []
    with place.edit() as found:
        for key in [_find(found, each, place.name, now) for each in map(_id_of, ids)]:
            found[key.id] = key if key.revoked else key.model_copy(update={"revoked": now, "digests": []})
            changed.append(found[key.id])
    place.publish([key.id for key in changed])
    if as_json:
        console.document({"file": place.name, "keys": [_described(key, now) for key in changed]})
    for key in changed:
        console.note(f"revoked {key.id} ({console.plain(key.name)}) in {place.name}")


_ROTATE_EPILOG = """\b
Examples:
  # Replace a key; clients have a day to change to the new one
  inferctl keys rotate team-a --output team-a.new.key
  # Replace a key that leaked; the old one ends at once
  inferctl keys rotate team-a --overlap 0s --output team-a.key --force
"""


@app.command(epilog=_ROTATE_EPILOG)
def rotate(
    key_id: Annotated[
        str, typer.Argument(metavar="ID|NAME", help="Id or name of the key. `-` reads a key from stdin instead.")
    ],
    keys_: _KeysOption = None,
    spec_file: options.SpecFile = None,
    overlap: Annotated[
        str, typer.Option(metavar="TIME", help="Accept the old key for this long, such as 0s, 12h or 7d.")
    ] = "24h",
    output: _Output = None,
    force: _Force = False,
    as_json: options.Json = False,
) -> None:
    """Replace a key by a new one with the same id, and print it once on stdout, or write it to a file.

    Name, scopes, limits and expiry stay. If the new key cannot be written, the old one stays too.
    """
    place, now, each = Place(options.access(spec_file, keys_)), key_file.now(), _id_of(key_id)
    end = _end(now, overlap, "--overlap")
    # A key contains its id, and is written before the keys are locked.
    key = _find({one.id: one for one in place.read()}, each, place.name, now)
    secret = keys.generate(key.id)

    def replace(found: dict[str, ApiKey]) -> ApiKey:
        key_now = _find(found, key.id, place.name, now)
        if (status := key_now.status(now)) != "active":
            raise UsageError(f"the key {key.id} is {status}", "create another one with `inferctl keys create NAME`")
        old = [
            StoredDigest(sha256=one.sha256, not_after=min(one.not_after or end, end))
            for one in key_now.digests
            if end > now and (one.not_after is None or one.not_after > now)
        ]
        new = StoredDigest(sha256=keys.digest(secret.encode()).hex())
        found[key.id] = changed = key_now.model_copy(update={"digests": [new, *old]})
        return changed

    _issue(place, replace, secret, output, as_json, force=force)
    last = min(end, key.expires or end)
    until = f"the old key is accepted until {last:%Y-%m-%d %H:%M} UTC" if end > now else "the old key is not accepted"
    _note(f"rotated {key.id} ({console.plain(key.name)}) in {place.name}; {until}", output)
    place.publish([])


@app.command("budget")
def set_budget(
    key_id: Annotated[str, typer.Argument(metavar="ID|NAME", help="Id or name of the key.")],
    budget: Annotated[str, typer.Argument(metavar="BUDGET", help=f'Such as "{EXAMPLE}"; `none` removes it.')],
    keys_: _KeysOption = None,
    spec_file: options.SpecFile = None,
    as_json: options.Json = False,
) -> None:
    """Change the budget of a key, for new requests. What is spent stays.

    Example: inferctl keys budget search "80 EUR/month"
    """
    spec = options.without_model(spec_file, {"access.keys": keys_})
    place, now = Place(options.with_keys(spec.access)), key_file.now()
    new = None if budget == "none" else _budget(budget, spec)
    with place.edit() as found:
        key = _find(found, _id_of(key_id), place.name, now)
        found[key.id] = key = key.model_copy(update={"budget": new})
    place.publish([])
    if as_json:
        console.document({"file": place.name, "keys": [_described(key, now)]})
    console.note(f"the budget of {key.id} ({console.plain(key.name)}) in {place.name} is {new or 'removed'}")


def _budget(text: str, spec: Spec) -> str:
    try:
        currency = parse("", text).currency
    except ValueError as error:
        hint = f'write an amount, a currency and day, week, month or total: "{EXAMPLE}"'
        raise UsageError(str(error), hint) from None
    if (file := spec.metering.prices) and currency not in (books := prices.read_all(Path(file))):
        console.warn(f"{file} has no prices in {currency}, only {', '.join(books)}: servers with it do not start")
    return text


def _id_of(text: str) -> str:
    """Return an id: `text` itself, or that of the key on stdin. A key has no place in an argument, which others see."""
    if text != "-":
        if keys.parse(text):
            raise UsageError(
                "this is a key, not an id", "keep keys out of command lines: pass `-` and the key on stdin"
            )
        return text
    if (found := keys.parse(sys.stdin.readline().strip())) is None:
        raise UsageError("stdin has no API key, or one with a typing error", "a key begins with ik_ and has a checksum")
    return found


def _find(found: dict[str, ApiKey], text: str, place: str, now: datetime) -> ApiKey:
    """Return the key with the id or the name `text`. Keys of different priorities may have one name."""
    if text in found:
        return found[text]
    named = [key for key in found.values() if key.name == text]
    named = [key for key in named if key.status(now) == "active"] or named
    if len(named) == 1:
        return named[0]
    if named:
        ids = " or ".join(f"{key.id} ({key.priority})" for key in named)
        raise UsageError(f"{place} has {len(named)} keys with the name {shown(text)}", f"use the id: {ids}")
    hint = did_you_mean(text, [*found, *{console.plain(key.name) for key in found.values()}])
    message = f"{place} has no key with the id or the name {shown(text)}"
    raise UsageError(message, hint or "`inferctl keys list` shows both")


def _end(now: datetime, text: str, option: str, least: int = 0) -> datetime:
    """Return the time `text` after `now`."""
    found = _DURATION.fullmatch(text)
    if not found or int(found[1]) < least:
        above = " above 0" if least else ""
        raise UsageError(f"{option} {shown(text)} is not a time{above}", "write a number and a unit: 30m, 12h or 90d")
    try:
        return now + timedelta(**{_UNITS[found[2]]: int(found[1])})
    except OverflowError:
        raise UsageError(f"{option} {text} ends after the year 9999", "use a shorter time") from None


def _issue(
    place: Place,
    change: Callable[[dict[str, ApiKey]], ApiKey],
    secret: str,
    output: Path | None,
    as_json: bool,
    *,
    force: bool,
    create: bool = False,
) -> None:
    """Store what `change` returns, but hand the key over first: otherwise nobody would have it.

    A key on stdout can be one that was not stored after all. Then the exit code says so.
    """
    if force and not output:
        raise UsageError("`--force` has no effect without a file", "pass `--output FILE`")
    document: dict[str, Any] = {}

    def deliver() -> None:
        console.result({**document, "key": secret}, secret, as_json=as_json)
        console.check_read()

    with contextlib.ExitStack() as stack:
        if output:
            inputs = [place.file] if place.file else []
            stack.enter_context(outputs.secret(output, f"{secret}\n", "--output", force=force, inputs=inputs))
        with place.edit(create=create, **({} if output else {"deliver": deliver})) as found:
            document = _described(change(found), key_file.now())
    if output and as_json:
        console.document({**document, "output": str(output)})


def _note(what: str, output: Path | None) -> None:
    console.note(f"{what}; the key is {f'in {output}' if output else 'shown only now'}")


def _described(key: ApiKey, now: datetime) -> dict[str, Any]:
    """Return a key as JSON data, without its digests."""
    return {**key.model_dump(mode="json", exclude={"digests"}), "status": key.status(now)}


def _row(key: ApiKey, now: datetime) -> tuple[str, ...]:
    scopes = [*(key.endpoints or ()), *(key.models or ()), *(["admin"] if key.admin else ())]
    return (
        key.id,
        console.plain(key.name),
        console.plain(key.team or "-"),
        key.priority,
        key.status(now),
        f"{key.created:%Y-%m-%d}",
        f"{key.expires:%Y-%m-%d}" if key.expires else "-",
        console.plain(",".join(scopes)) or "all",
        str(key.requests_per_minute or "-"),
        str(key.tokens_per_minute or "-"),
        key.budget or "-",
    )
