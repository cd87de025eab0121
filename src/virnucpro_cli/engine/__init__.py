"""The packed forward over a plan: batches from records, rows on the device, rows on the host, in one process or more."""
