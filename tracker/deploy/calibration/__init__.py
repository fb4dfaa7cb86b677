"""Quantisation judged by tracking: frames, ranges, the search for layers to keep, and the report."""
