"""Networks as torch modules, for training and export only: the pipeline runs engines."""
