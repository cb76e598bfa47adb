"""Load over HTTP: what a server finishes, how long requests wait, what it holds and refuses; and a fleet from that."""
