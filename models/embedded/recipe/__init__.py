"""How the embedded models were made: `python -m models.embedded.recipe --help`."""
