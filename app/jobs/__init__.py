"""Jobs that outlive the request that brought them: their records, results and events."""
