"""Estimates for other hardware: the server's own batcher on a virtual clock with a calibrated latency model.

Everything in here is an estimate and says so; docs/estimate.md says how far to believe it.
"""

from inferctl.estimate.forecast import Estimate, read_config, rows

__all__ = ["Estimate", "read_config", "rows"]
