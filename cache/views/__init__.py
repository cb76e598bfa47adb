"""What a UNet and a transformer look like to a cache: where a network can be cut, and how the rest of it runs."""
