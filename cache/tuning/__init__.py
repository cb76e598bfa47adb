"""Settings found from uncached runs: where compute calls lie best, and a threshold for a wished speed-up."""
