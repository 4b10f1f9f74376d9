from types import SimpleNamespace as LoadLoRAAdapterRequest

__all__ = ["LoadLoRAAdapterRequest"]
