"""What one run needs of its process: one writer per folder, SIGTERM, why it ended, a watchdog, test faults."""
