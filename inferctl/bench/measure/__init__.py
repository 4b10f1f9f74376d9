"""Runs a plan, searches for a rate, finds the concurrency, loads neighbors, and samples the machine."""
