"""The process next to a server that carries usage events, limit counters and keys."""
