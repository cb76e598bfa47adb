"""Samplers and schedulers."""
