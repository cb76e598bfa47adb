"""The families of models, one a file: data, loader, what differs from the others."""
