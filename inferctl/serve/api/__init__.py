"""The ASGI application of the encoder tasks: endpoints, schemas and the OpenAPI document."""
