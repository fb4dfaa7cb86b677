"""Two engines compared on one clip: tensors, detections, tracks, and the first layer that differs."""
