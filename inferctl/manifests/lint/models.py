"""What manifests say about the options of a server, and over how many GPUs it spreads its model."""

from __future__ import annotations

from collections.abc import Sequence

from inferctl.manifests.lint.manifests import ManifestContainer, ManifestWorkload

# Options and variables that multiply the number of GPUs.
_PARALLEL = (
    (("--tensor-parallel-size", "-tp", "--tp-size", "--tp", "--num-shard"), ("NUM_SHARD", "SM_NUM_GPUS")),
    (("--pipeline-parallel-size", "-pp", "--pp-size"), ()),
)


def values(container: ManifestContainer, options: Sequence[str], variables: Sequence[str] = ()) -> list[str]:
    """Return the values of options in the command line of a container, then those of environment variables."""
    words, found = container.expanded, []
    for index, word in enumerate(words):
        option, _, value = word.partition("=")
        # vLLM accepts underscores.
        name = option.replace("_", "-") if option.startswith("--") else option
        if name in options:
            found.append(value or (words[index + 1] if index + 1 < len(words) else ""))
    known = container.variables
    return [each for each in (*found, *(known.get(name, "") for name in variables)) if each]


def devices(workload: ManifestWorkload) -> int:
    """Return over how many GPUs a server spreads the weights: tensor times pipeline parallel size."""
    count = 1
    for options, variables in _PARALLEL:
        found = [value for each in workload.containers for value in values(each, options, variables)]
        numbers = [int(value[:4]) for value in found if value.isascii() and value.isdigit()]
        count *= max(1, next(iter(numbers), 1))
    return count
