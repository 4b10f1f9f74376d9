"""Spec and receipts to Kubernetes manifests, each number with its formula."""
