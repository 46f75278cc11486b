"""What people and machines see of a run: rows, metrics, health, progress line, report."""
