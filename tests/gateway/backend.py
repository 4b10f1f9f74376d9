"""A server behind the gateway, for tests: `backend.py NAME PORT DELAY_S`.

It answers with its name and the request headers that it got. `/v1/chat/completions` streams five events. `/status/N`
answers with the status N, and `/statuses` with the number of such answers. It handles at most four requests at a time,
as an engine does.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

NAME, PORT, DELAY_S = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
SLOTS, STATUSES = asyncio.Semaphore(4), list[int]()


async def events() -> AsyncIterator[bytes]:
    for number in range(5):
        yield b"data: %d\n\n" % number
        await asyncio.sleep(0.1)


async def answer(request: Request) -> Response:
    size = len(await request.body())
    async with SLOTS:
        await asyncio.sleep(DELAY_S)
    return JSONResponse({"server": NAME, "headers": dict(request.headers), "bytes": size})


async def status(request: Request) -> Response:
    STATUSES.append(request.path_params["status"])
    return Response(status_code=STATUSES[-1])


ROUTES = [
    Route("/readyz", lambda _: Response()),
    Route("/status/{status:int}", status),
    Route("/statuses", lambda _: PlainTextResponse(str(len(STATUSES)))),
    Route(
        "/v1/chat/completions", lambda _: StreamingResponse(events(), media_type="text/event-stream"), methods=["POST"]
    ),
    Route("/{path:path}", answer, methods=["GET", "POST"]),
]
uvicorn.run(Starlette(routes=ROUTES), port=PORT, log_level="warning")
