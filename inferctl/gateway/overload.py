"""What Envoy does when clients open many connections or its memory is full."""

from __future__ import annotations

from typing import Any

_TYPE = "type.googleapis.com/envoy"
_HEAP, _CONNECTIONS = (
    f"envoy.resource_monitors.{name}" for name in ("fixed_heap", "global_downstream_max_connections")
)
# Shares of the memory. A connection with an incomplete small body, which anyone can send, needs 50 kB: all need 80%.
_SHRINK, _REJECT = 0.9, 0.95
# From this share of the connections on, idle ones are closed earlier, and from the second one on after `_LEAST_S`.
_EARLIER, _EARLIEST, _LEAST_S = 0.5, 0.9, 2


def manager(max_connections: int, max_heap_bytes: int) -> dict[str, Any]:
    """Return the configuration of Envoy's overload manager: bounds of connections and memory."""
    extensions = f"{_TYPE}.extensions.resource_monitors"
    timers = ["HTTP_DOWNSTREAM_CONNECTION_IDLE", "TRANSPORT_SOCKET_CONNECT"]
    return {
        "refresh_interval": "0.25s",
        "resource_monitors": [
            {
                "name": _CONNECTIONS,
                "typed_config": {
                    "@type": f"{extensions}.downstream_connections.v3.DownstreamConnectionsConfig",
                    "max_active_downstream_connections": max_connections,
                },
            },
            {
                "name": _HEAP,
                "typed_config": {
                    "@type": f"{extensions}.fixed_heap.v3.FixedHeapConfig",
                    "max_heap_size_bytes": max_heap_bytes,
                },
            },
        ],
        "actions": [
            _action("shrink_heap", _HEAP, threshold={"value": _SHRINK}),
            _action("stop_accepting_requests", _HEAP, threshold={"value": _REJECT}),
            {
                # Clients without a key would otherwise keep connections by one wrong request in some minutes.
                **_action(
                    "reduce_timeouts",
                    _CONNECTIONS,
                    scaled={"scaling_threshold": _EARLIER, "saturation_threshold": _EARLIEST},
                ),
                "typed_config": {
                    "@type": f"{_TYPE}.config.overload.v3.ScaleTimersOverloadActionConfig",
                    "timer_scale_factors": [{"timer": timer, "min_timeout": f"{_LEAST_S}s"} for timer in timers],
                },
            },
        ],
    }


def _action(name: str, monitor: str, **trigger: dict[str, float]) -> dict[str, Any]:
    return {"name": f"envoy.overload_actions.{name}", "triggers": [{"name": monitor, **trigger}]}
