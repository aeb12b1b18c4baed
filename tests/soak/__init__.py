"""Real processes under faults from outside: kills at chosen moments, and mixed load with random faults for minutes."""
