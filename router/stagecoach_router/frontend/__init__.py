"""What callers reach over gRPC: the public service, and what stands before it."""
