"""How a pod asks for its GPU: the resource, the labels of its nodes and the taint that they have."""

from __future__ import annotations

from inferctl.catalog import Hardware, hardware_profiles
from inferctl.deploy.clusters import Cluster
from inferctl.deploy.plan import GpuResource
from inferctl.deploy_spec import Sharing
from inferctl.errors import UsageError

_PRODUCT = "nvidia.com/gpu.product"
_GKE = ("cloud.google.com/gke-accelerator", "cloud.google.com/gke-gpu-partition-size")


def resource(hardware: Hardware, sharing: Sharing, gpus: int, cluster: Cluster | None = None) -> GpuResource | None:
    """Return the GPU of a pod in `cluster`, or as the NVIDIA device plugin with mixed MIG names it; None for a CPU.

    A node whose MIG slices are not made yet still offers the whole GPU, so a slice also requires
    `nvidia.com/mig.config.state: success`. GKE makes slices before a node joins, and has no such label. With time
    slicing or MPS, `renameByDefault` of the device plugin makes the resource `nvidia.com/gpu.shared` and keeps the
    label.

    Raises `UsageError` for a GPU without node labels in the catalog.
    """
    if hardware.kind == "cpu":
        return None
    gke = cluster is not None and cluster.node_labels == "gke"
    needed = _GKE[:1] if gke else (_PRODUCT,)
    if missing := next((label for label in needed if label not in hardware.labels), None):
        raise UsageError(
            f"{hardware.key} has no label {missing} in the catalog, so no node can be selected",
            "use a YAML file of the hardware with its labels, as in benchmarks/hardware/",
        )
    extra = {label: (value,) for label, value in (cluster.labels if cluster else {}).items()}
    if gke:
        labels = {label: (hardware.labels[label],) for label in _GKE if label in hardware.labels}
        return GpuResource("nvidia.com/gpu", gpus, labels | extra)
    if hardware.mig is None:
        shared = sharing in ("time-slicing", "mps")
        name = "nvidia.com/gpu.shared" if shared else "nvidia.com/gpu"
        return GpuResource(name, gpus, {_PRODUCT: (hardware.labels[_PRODUCT],)} | extra)
    ready = {"nvidia.com/mig.config.state": ("success",)}
    if cluster is not None and cluster.mig_strategy == "single":
        return GpuResource("nvidia.com/gpu", gpus, {_PRODUCT: (hardware.labels[_PRODUCT],)} | ready | extra)
    whole = hardware_profiles()[hardware.mig.parent].labels[_PRODUCT]
    name = f"nvidia.com/mig-{hardware.mig.profile}"
    return GpuResource(name, gpus, {_PRODUCT: (whole,)} | ready | extra)
