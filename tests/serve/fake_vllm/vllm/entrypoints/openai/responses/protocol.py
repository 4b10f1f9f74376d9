from pydantic import BaseModel as ResponsesRequest

__all__ = ["ResponsesRequest"]
