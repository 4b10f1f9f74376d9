"""Checks whether the server in this container is ready: `python -m inferctl.serve.health PORT`, for HEALTHCHECK.

INFERCTL_SERVE_PORT overrides the port. A value that is not a number is ignored: for a Service named `inferctl-serve`,
Kubernetes sets the variable to `tcp://10.0.0.1:80`.
"""

from __future__ import annotations

import http.client
import os
import sys

_TIMEOUT_S = 4.0


def ready(port: int) -> bool:
    """Return whether `/readyz` at `port` of this machine responds with 200. Proxy variables are ignored."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    named = os.environ.get("INFERCTL_SERVE_PORT", "")
    sys.exit(0 if ready(int(named if named.isdecimal() else sys.argv[1])) else 1)
