"""The service: HTTP, jobs and processes over the models and their caches."""

__version__ = "0.1.0"
