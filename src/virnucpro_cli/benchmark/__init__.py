"""The parts of `bench`: workloads, the ways to batch them, the limits of the device, other tools, and the plot."""
