"""The types that the sections of `inferctl.yaml` share: names, sizes, image references, precisions, tasks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Precision = Literal["auto", "fp32", "fp16", "bf16", "int8", "fp8"]
Task = Literal["embed", "rerank", "classify", "generate"]
TaskSetting = Literal["auto", "embed", "rerank", "classify", "generate"]
# The tasks whose results are cached. Those of pairs of texts are not.
CACHED: tuple[Task, ...] = ("embed", "classify")
Weights = Literal["mount", "bake", "download"]
# One path component of an image name, as Docker accepts it.
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
# The first component is a registry if it has a dot or a port, or is localhost. Other names are on Docker Hub.
_LABELS = r"[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)"
IMAGE_NAME = rf"(?:(?:{_LABELS}+|localhost)/|{_LABELS}*:\d+/)?{_PART}(?:/{_PART})*"
IMAGE_TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
IMAGE_REFERENCE = rf"{IMAGE_NAME}(?::{IMAGE_TAG})?(?:@sha256:[0-9a-f]{{64}})?"
# Before the name of an image whose files are a model.
IMAGE_SCHEME = "oci://"
# Operating system, architecture and variant, such as linux/amd64 or linux/arm/v7.
PLATFORM = r"[a-z0-9]+/[a-z0-9_]+(?:/[a-z0-9_.]+)?"
Slug = Annotated[str, Field(pattern=r"^[a-z0-9]+(?:(?:\.|-+)[a-z0-9]+)*$", max_length=63)]
# A model name in requests: one word, also in a list that commas separate.
ModelAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]*$", max_length=200)]
Size = Annotated[str, Field(pattern=r"^\d+(?:\.\d+)? ?[kKmMgGtT]?i?[bB]?$")]
# A value in a Dockerfile or a label must not contain a line break.
OneLine = Annotated[str, Field(pattern=r"^[^\r\n\x00]+$")]
# What Git accepts as the name of a commit, a branch or a tag.
Revision = Annotated[str, Field(pattern=r"^[^\x00-\x20\x7f~^:?*\[\\]+$", max_length=200)]

_NUMBERS = (int, float, int | None, float | None)


class Section(BaseModel):
    """A section of a file: unknown keys are errors, values cannot be changed."""

    # A traceback with the error of a section would show its values.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_as_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Reject true, which is YAML's `yes` too, where pydantic would read the number 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in _NUMBERS:
            raise PydanticCustomError("number", "must be a number")
        return value
