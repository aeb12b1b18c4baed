"""Leases: what a router may use of the stage that is served, and all checks of what it sends."""
