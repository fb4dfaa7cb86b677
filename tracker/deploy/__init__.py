"""What tools/ call: scenes, training, export. Never imported by what runs."""
