"""Requests that outlive a connection, a pipeline or the router: known by their id, kept for a while, journaled."""
