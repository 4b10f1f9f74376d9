"""Limits, queue, cache and engines behind one interface, which API processes of this machine share."""
