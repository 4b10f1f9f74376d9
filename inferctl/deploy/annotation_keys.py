"""Annotations that say what a replica of a Deployment can do, and what its model must serve.

`inferctl deploy` writes them, and `inferctl deploy --preview` reads them, from any manifests.
"""

from __future__ import annotations

# On a Deployment: tokens per second of one replica, the share of it that the autoscaler plans for, and which Deployment
# of a model serves first (1, 2, ...).
RATE = "inferctl.io/tokens-per-second"
UTILIZATION = "inferctl.io/utilization"
PREFERENCE = "inferctl.io/preference"
# Seconds from the start of a pod until it is ready, and the same with a new node.
LOAD = "inferctl.io/load-seconds"
COLD_START = "inferctl.io/cold-start-seconds"
# On the autoscaler, which differs between clusters, else on the Deployment: the model's peak in this cluster.
PEAK = "inferctl.io/peak-tokens-per-second"
