"""The HTTP side: what is asked and what is answered."""
