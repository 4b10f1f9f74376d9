"""The engines. This package sets environment variables that torch reads on import, so import torch after it."""

import os
import sys

# With Triton 3.6 or later, torch 2.13 compiles kernels of its own for some operations on GPUs, such as the attention of
# a single token. Triton needs a C compiler, which images on CUDA bases do not have, and torch has no fallback.
os.environ.setdefault("TORCH_DISABLE_NATIVE_JIT", "1")


def hide_unused_libraries() -> None:
    """Make Python find neither scikit-learn nor SciPy in this process.

    transformers imports them if they are installed, for methods and losses that no engine uses. That takes 1 s and 0.3 s
    of CPU time. Call it before transformers is imported, which looks for them once.
    """
    for name in ("sklearn", "scipy"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
