"""A whole cluster on this machine, in child processes that are kept running."""
