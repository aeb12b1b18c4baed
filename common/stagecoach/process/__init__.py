"""How a server process is set up and ends: its settings, its log, its port, its signals."""
