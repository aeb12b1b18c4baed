"""What routers hold of this shard: assigned layers, leases of K/V blocks, and every check of what they send."""
