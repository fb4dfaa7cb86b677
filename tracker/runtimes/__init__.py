"""What runs an engine: named tensors in, named tensors out."""
