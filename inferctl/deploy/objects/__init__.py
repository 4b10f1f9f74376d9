"""Builders: the deployment plan to Kubernetes objects, which are plain dicts."""
