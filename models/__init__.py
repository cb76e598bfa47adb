"""Model families: how one is loaded, what structure it shows to a cache, what a generation is made of."""
