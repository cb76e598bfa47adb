"""Pictures of the work: sheets that compare settings, plots of what a cache did in one request."""
