"""Video files in, clips for a network out."""

from redconvert.data.jhmdb import JHMDB
from redconvert.data.motion import motion
from redconvert.data.video import load_clip, read_video, resize_center_crop, sample_clip, to_clip

# The function, not the module that it comes from: both are called motion.
__all__ = ["JHMDB", "load_clip", "motion", "read_video", "resize_center_crop", "sample_clip", "to_clip"]
