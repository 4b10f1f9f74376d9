from types import SimpleNamespace as LoadLoRAAdapterRequest
from types import SimpleNamespace as UnloadLoRAAdapterRequest

__all__ = ["LoadLoRAAdapterRequest", "UnloadLoRAAdapterRequest"]
