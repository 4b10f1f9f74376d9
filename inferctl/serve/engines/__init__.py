"""The engines. This package sets environment variables that torch reads on import, so import torch after it."""

import os
import sys

# With Triton 3.6 or later, torch 2.13 compiles kernels of its own for some operations on GPUs, such as the attention of
# a single token. Triton needs a C compiler, which images on CUDA bases do not have, and torch has no fallback.
os.environ.setdefault("TORCH_DISABLE_NATIVE_JIT", "1")


def hide_scikit_learn() -> None:
    """Make Python find no scikit-learn in this process.

    transformers imports it if it is installed, for methods that no engine uses. That takes a second.
    """
    sys.modules.setdefault("sklearn", None)  # type: ignore[arg-type]
