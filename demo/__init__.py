"""`make demo`: the main job from end to end, through the public interface alone."""
