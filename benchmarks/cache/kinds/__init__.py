"""Whether the caches' defaults hold on small models of other kinds."""
