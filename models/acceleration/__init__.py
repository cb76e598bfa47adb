"""How a run's network is made faster without a cache: attention kernels, compiled layers."""
