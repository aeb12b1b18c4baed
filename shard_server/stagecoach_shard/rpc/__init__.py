"""The shard's gRPC service: who may call it, its simple calls, and its two streams, Session and Forward."""
