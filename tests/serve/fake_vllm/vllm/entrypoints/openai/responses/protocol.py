from pydantic import BaseModel


class ResponsesRequest(BaseModel):
    """Accepts each body."""
