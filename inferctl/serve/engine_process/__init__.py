"""Starts, watches and restarts engine processes, and the frames between both processes."""
