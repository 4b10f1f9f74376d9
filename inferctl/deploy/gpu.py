"""How a pod asks for its GPU: the resource, the labels of its nodes and the taint that they have."""

from __future__ import annotations

from inferctl.core.errors import UsageError
from inferctl.deploy.clusters import Cluster
from inferctl.deploy.plan import GpuResource
from inferctl.facts.catalog import Hardware, hardware_profiles
from inferctl.manifests.kubernetes.labels import GKE_ACCELERATOR, GKE_PARTITION, GPU_PRODUCT, MIG_STATE

# Labels of GPU feature discovery.
_STRATEGY = "nvidia.com/gpu.sharing-strategy"
_REPLICAS = "nvidia.com/gpu.replicas"
_GKE = (GKE_ACCELERATOR, GKE_PARTITION)
_GKE_SHARING = "cloud.google.com/gke-gpu-sharing-strategy"
_GKE_CLIENTS = "cloud.google.com/gke-max-shared-clients-per-gpu"


def resource(hardware: Hardware, gpus: int, cluster: Cluster | None = None, shared_by: int = 1) -> GpuResource | None:
    """Return the GPU of a pod in `cluster`, or as the NVIDIA device plugin with mixed MIG names it; None for a CPU.

    A node whose MIG slices are not made yet still offers the whole GPU, so a slice also requires
    `nvidia.com/mig.config.state: success`. GKE makes slices before a node joins, and has no such label. With time
    slicing, `renameByDefault` of the device plugin makes the resource `nvidia.com/gpu.shared` and keeps the label. The
    node must share its GPUs among `shared_by` pods, because the memory of a pod is 1/`shared_by`.

    In GKE, whole GPUs, slices and shared GPUs are all `nvidia.com/gpu` on nodes with one label of the accelerator. So
    a pod also requires that the node does, or does not, divide its GPUs.

    Raises `UsageError` for a GPU without node labels in the catalog.
    """
    if hardware.kind == "cpu":
        return None
    shared = shared_by > 1
    gke = cluster is not None and cluster.gpu_labels == "gke"
    needed = _GKE[:1] if gke else (GPU_PRODUCT,)
    if missing := next((label for label in needed if label not in hardware.labels), None):
        raise UsageError(
            f"{hardware.key} has no label {missing} in the catalog, so no node can be selected",
            "use a YAML file of the hardware with its labels, as in benchmarks/hardware/",
        )
    if gke:
        labels = {label: (hardware.labels[label],) if label in hardware.labels else () for label in _GKE}
        labels |= {_GKE_SHARING: ("time-sharing",), _GKE_CLIENTS: (str(shared_by),)} if shared else {_GKE_SHARING: ()}
        return GpuResource("nvidia.com/gpu", gpus, labels)
    if hardware.mig is None:
        name = "nvidia.com/gpu.shared" if shared else "nvidia.com/gpu"
        parts = {_STRATEGY: ("time-slicing",), _REPLICAS: (str(shared_by),)} if shared else {}
        return GpuResource(name, gpus, {GPU_PRODUCT: (hardware.labels[GPU_PRODUCT],)} | parts)
    ready = {MIG_STATE: ("success",)}
    if cluster is not None and cluster.mig_strategy == "single":
        return GpuResource("nvidia.com/gpu", gpus, {GPU_PRODUCT: (hardware.labels[GPU_PRODUCT],)} | ready)
    whole = hardware_profiles()[hardware.mig.parent].labels[GPU_PRODUCT]
    name = f"nvidia.com/mig-{hardware.mig.profile}"
    return GpuResource(name, gpus, {GPU_PRODUCT: (whole,)} | ready)
