"""Sends a load: starts Locust's processes, reads their records, and connects to a server or starts one."""
