"""Measurements of this project on the machine they run on: each prints a table and ends in one JSON line."""
