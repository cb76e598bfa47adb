"""What is found for a model by drawing: where DeepCache's compute calls lie, a first-block threshold."""
