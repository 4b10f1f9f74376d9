"""The HTTP sink: sends the events of the ledger to a metering product, as batches of CloudEvents."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request

import inferctl
from inferctl.core.addresses import WebAddress
from inferctl.core.errors import NotReadyError
from inferctl.tenancy.metering import cloud_event
from inferctl.tenancy.metering.ledger import Ledger

_EVENTS = 500
_TIMEOUT_S = 10.0


class SinkUnavailableError(NotReadyError):
    """The sink did not accept events. The same call may succeed later."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an error. urllib would follow it with a GET without the events, and send the token along."""

    def redirect_request(self, *_: object) -> None:
        """Return no other request."""


_opener = urllib.request.build_opener(_NoRedirect)


def send(ledger: Ledger, url: WebAddress, prefix: str, token: str | None = None) -> int:
    """Send one batch to `url`, and return how many events it had.

    `prefix`: of the sources to send. `token`: sent as `Authorization: Bearer`. If the process is killed after the sink
    accepted a batch, the batch is sent again: a sink must deduplicate by `source` and `id`, as CloudEvents require.
    Raises `SinkUnavailableError` and `DatabaseUnavailableError`.
    """
    found = ledger.unsent(prefix, _EVENTS)
    if found is None:
        return 0
    source, events = found
    headers = {"Content-Type": cloud_event.BATCH_MEDIA_TYPE, "User-Agent": f"inferctl/{inferctl.__version__}"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(url.secret(), json.dumps(events).encode(), headers, method="POST")
    try:
        with _opener.open(request, timeout=_TIMEOUT_S):
            pass
    except urllib.error.HTTPError as error:
        raise _unavailable(f"status {error.code}") from None
    except OSError as error:
        raise _unavailable(str(error)) from None
    except (ValueError, http.client.HTTPException) as error:  # its text may quote the URL, which may have a password
        raise _unavailable(type(error).__name__) from None
    ledger.sent(source, int(events[-1]["id"]))
    return len(events)


def _unavailable(reason: str) -> SinkUnavailableError:
    return SinkUnavailableError(f"the sink did not accept usage events: {reason}", "check metering.sink")
