"""Models over many devices: parameters cut by a `ParallelLayout`, and collectives between their parts."""
