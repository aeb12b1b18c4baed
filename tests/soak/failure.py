"""What a run under faults ends with when something was wrong."""


class Failed(Exception):
    """Something was lost, wrong or left over."""
