"""llama.cpp's server, as the package xllamacpp contains it: `llama_server.py GGUF PORT SEQUENCES CONTEXT`."""

from __future__ import annotations

import signal
import sys

import xllamacpp


def main() -> None:
    gguf, port, sequences, context = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.hostnames, params.port = ["127.0.0.1"], int(port)
    params.n_parallel = int(sequences)
    params.n_ctx = int(sequences) * int(context)  # each sequence has its part
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
