"""`inferctl keys`: create, list, revoke and rotate API keys."""

from __future__ import annotations

import re
import sys
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inferctl.cli import completion, console, options
from inferctl.cli.key_place import Place
from inferctl.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from inferctl.access.key_file import ApiKey

_DURATION = re.compile(r"(\d+)([smhdw])")
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
    list[str], typer.Argument(metavar="ID...", help="Id of a key. `-` reads a key from stdin, and uses the id in it.")
]

app = typer.Typer(
    name="keys",
    help="Create, list, revoke and rotate API keys.",
    invoke_without_command=True,
    rich_markup_mode=None,
    add_completion=False,
)


@app.callback()
def root(context: typer.Context) -> None:
    console.help_without_command(context)


_CREATE_EPILOG = """\b
Examples:
  # Create a key, and keep it in a variable; the server accepts it within 0.5 s
  TEAM_A_KEY=$(inferctl keys create team-a)
  # Limit a key to embeddings, 600 requests and 100,000 tokens a minute, and 90 days
  inferctl keys create team-b --endpoint embeddings --requests-per-minute 600 \\
      --tokens-per-minute 100000 --expires 90d
  # Create a key for Prometheus and for `inferctl bench`, which read /metrics and /info
  inferctl keys create monitoring --admin > monitoring.key
"""


@app.command(epilog=_CREATE_EPILOG)
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Who uses the key: a team, a service or a person.")],
    keys_: _KeysOption = None,
    spec_file: options.SpecFile = None,
    expires: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="End the key after this long, such as 12h or 90d. [default: never]"),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Limit the key to this model; repeatable. [default: all]")
    ] = None,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            autocompletion=completion.one_of("embeddings", "rerank", "score", "chat", "completions"),
            help="Limit the key to embeddings, rerank, score, chat or completions; repeatable. [default: all]",
        ),
    ] = None,
    admin: Annotated[bool, typer.Option("--admin", help="Allow /metrics, /info, /docs and /openapi.json too.")] = False,
    priority: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            autocompletion=completion.one_of("interactive", "bulk"),
            help="Set to bulk to run each request of the key as a bulk request.",
        ),
    ] = "interactive",
    requests_per_minute: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Limit the requests per minute. [default: the server's limit]"),
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Limit the tokens per minute. [default: the server's limit]")
    ] = None,
    environment: Annotated[
        str, typer.Option(metavar="NAME", help="Set the second part of the key, such as live or test.")
    ] = "live",
    as_json: options.Json = False,
) -> None:
    """Create a key, and print it once on stdout.

    The file stores only its SHA-256, so the key cannot be shown again.
    """
    from inferctl.access import key_file, keys
    from inferctl.access.key_file import ApiKey, StoredDigest

    if priority not in ("interactive", "bulk"):
        raise UsageError(f"unknown priority {priority!r}", "`--priority` accepts interactive or bulk")
    if not re.fullmatch(keys.ENVIRONMENT, environment):
        raise UsageError(
            f"--environment {environment!r} is not allowed", "use at most 16 lower-case letters and digits"
        )
    if not name.isprintable() or not 0 < len(name) <= 100:
        raise UsageError("the name of a key must have 1 to 100 printable characters", "use a name such as team-a")
    known = ("embeddings", "rerank", "score", "chat", "completions")
    for each in endpoint or ():
        if each not in known:
            raise UsageError(f"unknown endpoint {each!r}", did_you_mean(each, known) or f"known: {', '.join(known)}")
    place, now = Place(options.access(spec_file, keys_)), key_file.now()
    key_id = keys.new_id()
    secret = keys.generate(key_id, environment)
    key = ApiKey(
        id=key_id,
        name=name,
        digests=[StoredDigest(sha256=keys.digest(secret.encode()).hex())],
        created=now,
        expires=now + _duration(expires, "--expires") if expires else None,
        models=model or None,
        endpoints=endpoint or None,
        admin=admin,
        priority="bulk" if priority == "bulk" else "interactive",
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
    )
    with place.edit(create=True) as found:
        found[key_id] = key
    _print_secret(key, secret, f"created {key_id} ({name}) in {place.name}", as_json)
    place.publish([])


@app.command("list")
def list_(keys_: _KeysOption = None, spec_file: options.SpecFile = None, as_json: options.Json = False) -> None:
    """List the keys: id, name, status, scopes and limits.

    Example: inferctl keys list --file keys.json
    """
    from inferctl.access import key_file

    place, now = Place(options.access(spec_file, keys_)), key_file.now()
    found = sorted(place.read(), key=lambda key: key.created)
    if as_json:
        console.document({"file": place.name, "keys": [_described(key, now) for key in found]})
        return
    if not found:
        console.note(f"{place.name} has no keys")
        return
    rows: list[tuple[str, ...]] = [
        ("id", "name", "status", "created", "expires", "scopes", "requests/min", "tokens/min")
    ]
    rows += [_row(key, now) for key in found]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        console.data("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def revoke(
    ids: _Keys, keys_: _KeysOption = None, spec_file: options.SpecFile = None, as_json: options.Json = False
) -> None:
    """Revoke keys. Running servers reject them within a second.

    Without `access.broker`, servers with keys in a database need some seconds.

    Example: inferctl keys revoke 3k9x0a7bq2vd
    """
    from inferctl.access import key_file

    place, now = Place(options.access(spec_file, keys_)), key_file.now()
    changed = []
    with place.edit() as found:
        for each in map(_id_of, ids):
            key = _find(found, each, place.name)
            found[each] = key if key.revoked else key.model_copy(update={"revoked": now, "digests": []})
            changed.append(found[each])
    place.publish([key.id for key in changed])
    if as_json:
        console.document({"file": place.name, "keys": [_described(key, now) for key in changed]})
    for key in changed:
        console.note(f"revoked {key.id} ({console.plain(key.name)}) in {place.name}")


_ROTATE_EPILOG = """\b
Examples:
  # Replace a key; clients have a day to change to the new one
  NEW_KEY=$(inferctl keys rotate 3k9x0a7bq2vd)
  # Replace a key that leaked; the old one ends at once
  inferctl keys rotate 3k9x0a7bq2vd --overlap 0s
"""


@app.command(epilog=_ROTATE_EPILOG)
def rotate(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the key. `-` reads a key from stdin instead.")],
    keys_: _KeysOption = None,
    spec_file: options.SpecFile = None,
    overlap: Annotated[
        str, typer.Option(metavar="TIME", help="Accept the old key for this long, such as 0s, 12h or 7d.")
    ] = "24h",
    environment: Annotated[
        str, typer.Option(metavar="NAME", help="Set the second part of the key, such as live or test.")
    ] = "live",
    as_json: options.Json = False,
) -> None:
    """Replace a key by a new one with the same id, and print it once on stdout.

    Name, scopes, limits and expiry stay.
    """
    from inferctl.access import key_file, keys
    from inferctl.access.key_file import StoredDigest

    if not re.fullmatch(keys.ENVIRONMENT, environment):
        raise UsageError(
            f"--environment {environment!r} is not allowed", "use at most 16 lower-case letters and digits"
        )
    place, now, each = Place(options.access(spec_file, keys_)), key_file.now(), _id_of(key_id)
    end = now + _duration(overlap, "--overlap")
    secret = keys.generate(each, environment)
    with place.edit() as found:
        key = _find(found, each, place.name)
        if (status := key.status(now)) != "active":
            raise UsageError(f"the key {each} is {status}", "create another one with `inferctl keys create NAME`")
        old = [
            StoredDigest(sha256=one.sha256, not_after=min(one.not_after or end, end))
            for one in key.digests
            if end > now and (one.not_after is None or one.not_after > now)
        ]
        new = StoredDigest(sha256=keys.digest(secret.encode()).hex())
        found[each] = key = key.model_copy(update={"digests": [new, *old]})
    until = f"the old key is accepted until {end:%Y-%m-%d %H:%M} UTC" if end > now else "the old key is not accepted"
    _print_secret(key, secret, f"rotated {each} ({console.plain(key.name)}) in {place.name}; {until}", as_json)
    place.publish([])


def _id_of(text: str) -> str:
    """Return an id: `text` itself, or that of the key on stdin. A key has no place in an argument, which others see."""
    from inferctl.access import keys

    if text != "-":
        if keys.parse(text):
            raise UsageError(
                "this is a key, not an id", "keep keys out of command lines: pass `-` and the key on stdin"
            )
        return text
    if (found := keys.parse(sys.stdin.readline().strip())) is None:
        raise UsageError("stdin has no API key, or one with a typing error", "a key begins with ik_ and has a checksum")
    return found


def _find(found: dict[str, ApiKey], key_id: str, place: str) -> ApiKey:
    if key_id not in found:
        named = [key.id for key in found.values() if key.name == key_id]
        hint = f"did you mean {' or '.join(named)}?" if named else did_you_mean(key_id, found)
        raise UsageError(f"{place} has no key with the id {key_id!r}", hint or "`inferctl keys list` shows the ids")
    return found[key_id]


def _duration(text: str, option: str) -> timedelta:
    found = _DURATION.fullmatch(text)
    if not found or int(found[1]) > 1_000_000:
        raise UsageError(f"{option} {text!r} is not a time", "write a number and a unit: 30m, 12h, 90d or 4w")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


def _print_secret(key: ApiKey, secret: str, what: str, as_json: bool) -> None:
    from inferctl.access import key_file

    if as_json:
        console.document({**_described(key, key_file.now()), "key": secret})
    else:
        console.data(secret)
    console.note(f"{what}; the key is shown only now")


def _described(key: ApiKey, now: datetime) -> dict[str, Any]:
    """Return a key as JSON data, without its digests."""
    return {**key.model_dump(mode="json", exclude={"digests"}), "status": key.status(now)}


def _row(key: ApiKey, now: datetime) -> tuple[str, ...]:
    scopes = [*(key.endpoints or ()), *(key.models or ()), *(["admin"] if key.admin else ())]
    return (
        key.id,
        console.plain(key.name),
        key.status(now),
        f"{key.created:%Y-%m-%d}",
        f"{key.expires:%Y-%m-%d}" if key.expires else "-",
        console.plain(",".join(scopes)) or "all",
        str(key.requests_per_minute or "-"),
        str(key.tokens_per_minute or "-"),
    )
