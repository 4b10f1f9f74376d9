"""Reads a plan, its load and a recorded trace, and draws the requests and their times."""
