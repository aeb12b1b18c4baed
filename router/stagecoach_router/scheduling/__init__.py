"""What is computed next: waiting, blocks, steps and their pace. Pure: nothing here waits, sends or reads a clock."""
