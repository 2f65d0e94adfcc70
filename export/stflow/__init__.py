"""The export of STFlow: its graphs, and the proof of their parity."""
