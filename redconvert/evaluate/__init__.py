"""How well a network answers, and how differently it treats its inputs."""

from redconvert.evaluate.protocols import Accuracy, clip_1, video_1
from redconvert.evaluate.spread import Spread, rank_correlation, spread_of_macs

__all__ = ["Accuracy", "Spread", "clip_1", "rank_correlation", "spread_of_macs", "video_1"]
