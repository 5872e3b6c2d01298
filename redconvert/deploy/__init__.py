"""Fast networks for inference."""

from .frozen import freeze

__all__ = ["freeze"]
