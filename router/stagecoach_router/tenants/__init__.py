"""Who calls, what each may do, and how much of it has been used."""
