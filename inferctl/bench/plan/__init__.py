"""Reads a plan and its load, and draws the requests and their times."""
