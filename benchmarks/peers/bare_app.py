"""A bare Starlette application on uvicorn that answers every request with the same bytes: what any such server costs at least.

python bare_app.py PORT BODY.json
"""

from __future__ import annotations

import sys
from pathlib import Path

import uvicorn
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
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", access_log=False)
