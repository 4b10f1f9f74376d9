"""Estimates latency, throughput and cost on other hardware.

The server's batcher runs on a virtual clock with a calibrated latency model. docs/method/estimate.md has the error of
its bounds.
"""
