"""Estimates latency, throughput and cost on other hardware.

The server's batcher runs on a virtual clock with a calibrated latency model. docs/estimate.md explains the error bands.
"""

from inferctl.estimate.forecast import Estimate, read_config, rows

__all__ = ["Estimate", "read_config", "rows"]
