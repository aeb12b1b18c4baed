"""What the router and its pipelines did, as counters that only rise."""
