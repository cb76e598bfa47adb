"""Bad input, clients that leave and killed workers beside good requests, whose pictures must be a quiet server's."""
