"""The service on Ray Serve: one ingress, worker replicas on any number of machines."""
