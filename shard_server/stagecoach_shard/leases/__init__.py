"""Which layers are served, what a router may use of them (its lease), and all checks of what it sends."""
