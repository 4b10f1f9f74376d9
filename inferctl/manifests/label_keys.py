"""Labels and annotations of inferctl.

Labels say which model a pod serves, what it does, and on which flavor of hardware. Annotations say what a replica of a
Deployment can do, what its model must serve, and which rules do not apply. `inferctl deploy` writes all but the last
one. `--preview` and `--lint` read them, from any manifests.
"""

from __future__ import annotations

NAME = "app.kubernetes.io/name"
COMPONENT = "app.kubernetes.io/component"
FLAVOR = "inferctl.io/flavor"
# On the pods that serve a model: embed, rerank or generate.
TASK = "inferctl.io/task"
# A pod of our namespace with this label, set to "true", may connect to servers and gateways.
CLIENT = "inferctl.io/client"

# On a Deployment: tokens per second of one replica, the share of it that the autoscaler plans for, and which Deployment
# of a model serves first (1, 2, ...).
RATE = "inferctl.io/tokens-per-second"
UTILIZATION = "inferctl.io/utilization"
PREFERENCE = "inferctl.io/preference"
# Seconds from the start of a pod until it is ready.
LOAD = "inferctl.io/load-seconds"
# On the autoscaler, which differs between clusters, else on the Deployment: the model's peak in this cluster.
PEAK = "inferctl.io/peak-tokens-per-second"
# On any object: ids of rules of the lint that it is exempt from, separated by commas.
LINT_IGNORE = "inferctl.io/lint-ignore"
