"""The load that a configuration received, in words, from its receipt: the plan may be longer, or ask for more."""

from __future__ import annotations

from inferctl.receipts.receipt import JsonObject


def describe(data: JsonObject) -> str:
    """Return loop, level, measured seconds and runs of a receipt."""
    load, found = data["plan"]["load"], data["summary"]
    parts = [_loop(load, found["requested_per_s"], data.get("closed_loop"))]
    if spike := load.get("spike"):
        parts.append(f"{spike['times']:g}x that from {spike['at_s']:g} s for {spike['duration_s']:g} s")
    if stages := load.get("stages"):
        parts.append(f"{len(stages)} stages")
    if (count := load.get("inputs_per_request", 1)) > 1:
        parts.append(f"{count} {'documents' if load.get('task') == 'rerank' else 'texts'} per request")
    if load.get("prompt_name") is not None:
        parts.append(f"with the prompt {load['prompt_name']}")
    if load.get("query_share") is not None:
        parts.append(f"{100 * load['query_share']:g}% queries")
    if names := load.get("names"):
        shares = [f"{name} {100 * share / sum(names.values()):.3g}%" for name, share in names.items()]
        parts.append(f"names {', '.join(shares)}" if len(shares) <= 8 else f"{len(shares)} names")
    runs, seconds = found["runs"], f"{round(found['seconds'], 1):g} s"
    parts.append(f"one run of {seconds}" if runs == 1 else f"{runs} runs, {seconds} in all")
    return _of_search(data.get("search")) + ", ".join(parts)


def _loop(load: JsonObject, offered: float | None, capacity: JsonObject | None) -> str:
    if offered is None:
        return f"closed loop, {load['users']} user{'s' * (load['users'] != 1)}"
    text = f"open loop, {offered:.4g} requests/s offered ({load['arrivals']})"
    if capacity:
        text += f", {load['capacity_percent']:g}% of a capacity of {capacity['reference_rps']:.4g} requests/s"
    return text


def _of_search(search: JsonObject | None) -> str:
    """Return which probe of a search the figures are of."""
    if not search:
        return ""
    return "highest confirmed rate: " if search["max_goodput_rps"] else "no rate confirmed, lowest complete probe: "
