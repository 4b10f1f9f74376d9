"""The server of the task `generate`: vLLM, started and watched, with the edge inside of its API process."""
