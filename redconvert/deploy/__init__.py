"""From a converted network to one that is fast."""

from .engine import Deployed, deploy

__all__ = ["Deployed", "deploy"]
