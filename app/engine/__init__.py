"""Where jobs are drawn: the queue, the worker processes and what they say."""
