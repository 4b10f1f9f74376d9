"""Two models with everything that a dashboard and alerts can have."""

from __future__ import annotations

from pathlib import Path

import yaml

from inferctl.deploy.observe.watched import Watched, WatchedFlavor
from inferctl.manifests import metric_names

EXPORTERS = {
    name
    for names in yaml.safe_load(Path(__file__).with_name("exporter_metrics.yaml").read_text()).values()
    for name in names
}
KNOWN_METRICS = metric_names.SERVER | EXPORTERS

HALF = WatchedFlavor("embed-a100-half", 240, 45, rate=90_000, measured=True, overflow="embed-a100-half-overflow")
L4 = WatchedFlavor("embed-l4", 300, 200, rate=40_000, measured=True)
EMBED = Watched("embed", "inference", "embed", (HALF, L4), cache=True, metering=True)
CHAT = Watched("chat", "inference", "generate", (WatchedFlavor("chat-a100", 600, 90, rate=3_000),), metering=True)
