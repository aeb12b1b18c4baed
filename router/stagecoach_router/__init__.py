"""The brain of a cluster: tokenizes, schedules, samples, and answers callers. Each folder is one of its concerns."""
