"""Labels of nodes and pods that Kubernetes, the NVIDIA GPU Operator and GKE set."""

from __future__ import annotations

HOSTNAME = "kubernetes.io/hostname"
ZONE = "topology.kubernetes.io/zone"
REGION = "topology.kubernetes.io/region"
# On the pods of a Deployment: one value for each version of its template.
POD_TEMPLATE_HASH = "pod-template-hash"
# By GPU feature discovery: the product (`NVIDIA-L4`), and `success` once the MIG slices of a node are made.
GPU_PRODUCT = "nvidia.com/gpu.product"
MIG_STATE = "nvidia.com/mig.config.state"
# By GKE: the product (`nvidia-l4`), and the MIG profile of all its slices.
GKE_ACCELERATOR = "cloud.google.com/gke-accelerator"
GKE_PARTITION = "cloud.google.com/gke-gpu-partition-size"
