"""The forward over a plan: batches from records, rows on the device, rows on the host; one process or several."""
