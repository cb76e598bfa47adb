"""A configured model turned into a pipeline on a device."""
