"""A server behind the gateway, for tests: `backend.py NAME PORT DELAY_S`.

It answers with its name and the request headers that it got. `/v1/chat/completions` streams five events. `/status/N`
answers with the status N, and `/statuses` with the number of such answers. It handles at most four requests at a time,
as an engine does.
"""

from __future__ import annotations

import asyncio
import json
import sys


async def main() -> None:
    name, port, delay_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    slots, statuses = asyncio.Semaphore(4), 0

    def answer(status: str, body: bytes, *headers: str) -> bytes:
        head = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *headers]
        return "\r\n".join(head).encode() + b"\r\n\r\n" + body

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal statuses
        while line := await reader.readline():
            path = line.split()[1].decode()
            headers: dict[str, str] = {}
            while (field := (await reader.readline()).strip()) != b"":
                key, _, value = field.decode().partition(":")
                headers[key.lower()] = value.strip()
            received = b""
            if headers.get("transfer-encoding") == "chunked":
                while size := int(await reader.readline(), 16):
                    received += (await reader.readexactly(size + 2))[:-2]
                await reader.readline()
            else:
                received = await reader.readexactly(int(headers.get("content-length", "0")))
            if path == "/readyz":
                writer.write(answer("200 OK", b""))
            elif path.startswith("/status/"):
                statuses += 1
                writer.write(answer(f"{path.rpartition('/')[2]} Any", b""))
            elif path == "/statuses":
                writer.write(answer("200 OK", str(statuses).encode()))
            elif path == "/v1/chat/completions":
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
                )
                for number in range(5):
                    event = b"data: %d\n\n" % number
                    writer.write(b"%x\r\n%b\r\n" % (len(event), event))
                    await writer.drain()
                    await asyncio.sleep(0.1)
                writer.write(b"0\r\n\r\n")
            else:
                async with slots:
                    await asyncio.sleep(delay_s)
                body = json.dumps({"server": name, "headers": headers, "bytes": len(received)}).encode()
                writer.write(answer("200 OK", body))
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
