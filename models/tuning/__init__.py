"""What is found for a model by drawing: its profile, and a first-block threshold."""
