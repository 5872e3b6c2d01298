"""Video files in, clips for a network out."""

from redconvert.data.video import load_clip, read_video, resize_center_crop, sample_clip, to_clip

__all__ = ["load_clip", "read_video", "resize_center_crop", "sample_clip", "to_clip"]
