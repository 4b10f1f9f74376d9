"""`python -m inferctl.serve`, where vLLM gets the adapter in SWAPPED_ADAPTER instead of the one that was checked."""

from __future__ import annotations

import os
import sys
from typing import Any

from inferctl.serve.generate import command, generation_server
from inferctl.serve.main import exit_with, main


class SwappingServer(generation_server.GenerationServer):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        for each in self._model.adapters:
            (link := command.adapter_link(self._directory, each)).unlink()
            link.symlink_to(os.environ["SWAPPED_ADAPTER"])


if __name__ == "__main__":
    generation_server.GenerationServer = SwappingServer  # type: ignore[misc]
    exit_with(lambda: main(sys.argv[1:]))
