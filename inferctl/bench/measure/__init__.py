"""Runs a plan, searches for a rate, finds the concurrency, and samples the machine."""
