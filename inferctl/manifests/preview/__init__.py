"""Whether the pods of manifests fit on given nodes, what a spike preempts, and what the loss of nodes costs."""
