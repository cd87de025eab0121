"""ESM-2: the table of its sizes, its packed forward, its weights, and the independent reference."""
