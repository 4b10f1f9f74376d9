"""What fields of Kubernetes objects mean, as the scheduler reads them. Lint and preview share it."""
