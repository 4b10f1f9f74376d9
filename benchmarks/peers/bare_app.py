"""A bare Starlette application that sends the same bytes to every request: the minimum cost of such a server.

python bare_app.py PORT BODY.json [uvicorn|granian]
"""

from __future__ import annotations

import sys
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

body = Path(sys.argv[2]).read_bytes()


async def embed(request: Request) -> Response:
    await request.body()
    return Response(body, media_type="application/json")


async def health(_: Request) -> Response:
    return Response("ok")


app = Starlette(routes=[Route("/v1/embeddings", embed, methods=["POST"]), Route("/health", health)])
if __name__ == "__main__":
    port = int(sys.argv[1])
    if sys.argv[3:] == ["granian"]:
        from granian import Granian
        from granian.constants import Interfaces, Loops

        options = {"interface": Interfaces.ASGI, "loop": Loops.uvloop, "workers": 1, "log_enabled": False}
        Granian("bare_app:app", address="127.0.0.1", port=port, **options).serve()
    else:
        import uvicorn

        uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)
