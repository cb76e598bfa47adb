"""Every request is a job: submitted, run, ended once, kept for as long as was promised."""
